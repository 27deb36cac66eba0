# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Jacobians keep to their bound, and gradients do not grow over 65,536 steps."""

import json

import pytest
import torch

import stability_report
from lrcssm_hf import LrcParameters, LrcSSMConfig, LrcSSMForCausalLM, LrcSSMModel, lrc_step
from lrcssm_hf.modeling_lrcssm import LrcSSMSteps
from lrcssm_hf.stability import confine, jacobian_bound
from tiny_models import make_config, make_model


def random_problem(seed, symmetric=False):
    """Parameters, states and inputs of all sizes, for 20,000 neurons."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale):
        sizes = 10 ** torch.empty(20_000, dtype=torch.float64).uniform_(-1, 1.5, generator=generator)
        return scale * sizes * torch.randn(20_000, dtype=torch.float64, generator=generator)

    parameters = LrcParameters(*(draw(scale) for scale in (1, 1, 1, 1, 1, 1, 0.3, 1)))
    if symmetric:
        parameters = parameters._replace(elastance_shift=draw(1))
    return parameters, [draw(1) for _ in range(4)], draw(1)


def jacobians(parameters, inputs, state, time_step=None):
    state = state.clone().requires_grad_()
    forget, update, elastance, _ = inputs
    following = lrc_step(state, forget, update, parameters, elastance_input=elastance, time_step=time_step)
    return torch.autograd.grad(following.sum(), state)[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_jacobian_is_beyond_its_bound(seed, symmetric):
    parameters, inputs, state = random_problem(seed, symmetric)
    bound = jacobian_bound(parameters, state.abs())
    for time_step in (None, torch.rand(20_000, dtype=torch.float64)):
        found = jacobians(parameters, inputs, state, time_step)
        assert (found.abs() <= bound * (1 + 1e-12)).all() and (found >= 1 - bound - 1e-9 * bound).all()


def test_the_bound_is_nearly_reached():
    """By the update's weight, and by the forget gate's: the proof gives nothing away."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    update = LrcParameters(one, zero, zero, 3 * one, -1.5 * one, one, zero, 30 * one)
    found = jacobians(update, [-60 * one, zero, zero, None], zero)
    assert found.item() == pytest.approx(1.75, rel=1e-6) and jacobian_bound(update, 0.0).item() == pytest.approx(1.75)
    # k = 0.22388 |w_f| = 4 at |a x| = 1.5434, and F = (k - 1) / (2 k) there.
    weight = -4 / 0.22388 * one
    forget = LrcParameters(one, zero, weight, zero, zero, zero, zero, 30 * one)
    state = 1.5434 * one
    gate = torch.logit(torch.tensor(3 / 8, dtype=torch.float64)) - weight * torch.sigmoid(state)
    found = jacobians(forget, [gate, zero, zero, None], state)
    assert found.item() == pytest.approx(jacobian_bound(forget, 0.0).item(), rel=1e-4)


@pytest.mark.parametrize("bound", [1, 1.25])
def test_confined_weights_keep_to_the_bound(bound):
    parameters, inputs, state = random_problem(7)
    confined = confine(parameters, bound)
    assert (jacobian_bound(confined, torch.inf) <= bound * (1 + 1e-12)).all()
    found = jacobians(confined, inputs, state)
    assert (found.abs() <= bound * (1 + 1e-12)).all()
    # In half precision too, of what the half-precision weights are.
    rounded = LrcParameters(*(p.bfloat16() for p in parameters[:8]))
    halves = LrcParameters(*(p.double() for p in confine(rounded, bound)[:8]))
    assert (jacobian_bound(halves, torch.inf) <= bound * (1 + 1e-6)).all()
    # What is far within the bound stays as it is.
    small = LrcParameters(*(1e-3 * p.sign() for p in parameters[:8]))
    for name in ("forget_weight", "update_weight"):
        assert torch.allclose(getattr(confine(small, 1.25), name), getattr(small, name), rtol=1e-4)


def test_bounds_that_nothing_keeps_to_are_refused():
    parameters, _, _ = random_problem(0)
    for largest_state in (-1.0, float("nan"), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="largest_state"):
            jacobian_bound(parameters, largest_state)
    for bound in (0.5, float("nan")):
        with pytest.raises(ValueError, match="bound.*at least 1"):
            confine(parameters, bound)


@pytest.mark.parametrize(
    "changes", [{"jacobian_bound": 1}, {"state_dependence": "input", "block_type": "gated"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_do_not_grow_over_65536_steps(changes, dtype):
    """Of neurons with large weights: the gradient of the last state by the first is a product of Jacobians."""
    torch.manual_seed(0)
    model = make_model(LrcSSMModel, num_hidden_layers=1, state_size=16, hidden_size=16, **changes)
    neurons = model.layers[0].mixer.neurons
    with torch.no_grad():
        for parameter in neurons.parameters():
            parameter.mul_(4)
        # Slow, so that gradients come back at all.
        neurons.elastance_bias.fill_(-12.0)
        neurons.currents.weight[-16:] = 0
    neurons = neurons.to(dtype)
    inputs, state = torch.randn(1, 65536, 16).to(dtype), torch.randn(1, 16, requires_grad=True)
    inputs.requires_grad_()
    _, final = neurons(inputs, state, LrcSSMSteps(None))
    by_state, by_inputs = torch.autograd.grad(final.sum(), [state, inputs])
    assert (by_state.abs() <= 1 + 1e-4).all() and by_state.abs().max() > 0.1 and by_inputs.isfinite().all()
    # No step has more influence than its own currents give it: a sum over neurons of bounded slopes.
    norms = by_inputs[0].float().norm(dim=-1)
    assert norms[:-1].max() < 100 * norms[-100:].max()
    for steps in (1, 64, 4096):
        _, near = neurons(inputs[:, :steps].detach(), state, LrcSSMSteps(None))
        (gradient,) = torch.autograd.grad(near.sum(), state)
        assert (by_state.abs() <= gradient.abs() * (1 + 1e-3) + 1e-6).all()


def test_a_bounded_model_trains_and_says_what_it_needs():
    config = make_config(jacobian_bound=1.0)
    model = LrcSSMForCausalLM(config)
    assert not any("elastance_weight" in name for name, _ in model.named_parameters())
    ids = torch.randint(2, 61, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="jacobian_bound"):
        LrcSSMConfig(jacobian_bound=0.9)
    for field, value in {
        "elastance": "symmetric",
        "state_dependence": "input",
        "initialization": "state_tracking",
    }.items():
        with pytest.raises(ValueError, match=f"jacobian_bound.*{field}"):
            LrcSSMConfig(jacobian_bound=1, **{field: value})


def test_the_report(tmp_path, capsys):
    model = make_model(LrcSSMModel, num_channels=3, jacobian_bound=1)
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--length", "300", "--output_dir", str(tmp_path / "report")]
    stability_report.main(arguments)
    results = json.loads((tmp_path / "report" / "stability.json").read_text())
    assert len(results["layers"]) == 3 and all(layer["largest"] <= 1.00001 for layer in results["layers"])
    assert all(layer["bound"] == pytest.approx(1, abs=1e-5) for layer in results["layers"])
    assert list(results["gradients"]) == ["float32", "bfloat16"] and "256" in results["gradients"]["float32"]
    assert (tmp_path / "report" / "stability.png").exists() and "| 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        stability_report.main([str(tmp_path / "missing")])
    assert "could not be loaded" in capsys.readouterr().err
