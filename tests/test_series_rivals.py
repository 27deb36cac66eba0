# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The rivals: each recurrence against its paper's equations in a loop, and all of them in our model."""

import math

import pytest
import torch

from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling
from lrcssm_hf.steps import LrcSSMSteps
from series_rivals import LRU, MIXERS, S4D, S5, Attention, CfC, LinOSS, build, elapsed_time, hippo_normal


RIVALS = MIXERS[1:]
REGULAR = LrcSSMSteps(None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config(**changes):
    sizes = {"num_channels": 3, "num_labels": 2, "hidden_size": 16, "num_hidden_layers": 1}
    return LrcSSMConfig(**{**sizes, **changes})


def complex_weight(weight):
    """The complex (rows, N) matrix whose parts alternate in the columns of a real (rows, 2 N) one."""
    return torch.complex(weight[:, ::2], weight[:, 1::2])


def loop(decay, inputs):
    """h_t = decay_t h_{t-1} + inputs_t, one step after the other; decay (N,) or (B, T, N)."""
    state, states = torch.zeros_like(inputs[:, 0]), []
    for t, decay_t in enumerate(decay.expand_as(inputs).unbind(1)):
        state = decay_t * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, 1)


def irregular(batch, steps):
    return 0.25 + 1.5 * torch.rand(batch, steps, dtype=torch.float64)


# --- Recurrences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regular", [True, False])
def test_lru_is_the_papers_recurrence(regular):
    mixer, inputs = LRU(5, 7).double(), torch.randn(2, 37, 5, dtype=torch.float64)
    elapsed = None if regular else irregular(2, 37)
    eigenvalues = torch.exp(torch.complex(-mixer.log_decay.exp(), mixer.log_phase.exp()))
    drive = complex_weight(mixer.drive.weight.T).T
    readout = complex_weight(mixer.readout.weight).conj()
    gain = torch.sqrt(1 - eigenvalues.abs() ** 2)
    decay = eigenvalues if elapsed is None else eigenvalues ** elapsed[..., None]
    states = loop(decay, gain * (inputs.to(drive.dtype) @ drive.T))
    expected = (states @ readout.T).real
    assert torch.allclose(mixer.respond(inputs, elapsed), expected, rtol=1e-5, atol=1e-5)


def test_lru_starts_in_its_ring():
    radius = torch.exp(-LRU(4, 1000).log_decay.exp())
    assert 0.9 <= radius.min() < 0.91 and 0.99 < radius.max() <= 0.9991


@pytest.mark.parametrize("regular", [True, False])
def test_s5_is_the_papers_recurrence(regular):
    """All conjugate pairs, discretised with a zero-order hold; C is half of what the kept states are read with."""
    mixer, inputs = S5(5, 4).double(), torch.randn(2, 37, 5, dtype=torch.float64)
    elapsed = None if regular else irregular(2, 37)
    rate = torch.complex(-mixer.log_decay.exp(), mixer.frequency)
    drive, readout = complex_weight(mixer.drive.weight.T).T, complex_weight(mixer.readout.weight).conj() / 2
    rate, step = torch.cat([rate, rate.conj()]), mixer.log_step.exp().repeat(2)
    drive, readout = torch.cat([drive, drive.conj()]), torch.cat([readout, readout.conj()], 1)
    step = step if elapsed is None else step * elapsed[..., None]
    decay = torch.exp(rate * step)
    states = loop(decay, (decay - 1) / rate * (inputs.to(drive.dtype) @ drive.T))
    expected = states @ readout.T
    assert expected.imag.abs().max() < 1e-12
    assert torch.allclose(mixer.respond(inputs, elapsed), expected.real, atol=1e-10)


def test_s5_starts_as_the_normal_part_of_hippo():
    eigenvalues, vectors = hippo_normal(3)
    order = torch.arange(6, dtype=torch.float64)
    root = torch.sqrt(2 * order + 1)
    hippo = -torch.tril(torch.outer(root, root), -1) - torch.diag(order + 1)
    normal = (hippo + torch.outer(root, root) / 2).to(vectors.dtype)
    assert torch.allclose(normal @ vectors, vectors * eigenvalues)
    assert torch.allclose(vectors.mH @ vectors, torch.eye(3, dtype=vectors.dtype))
    assert (eigenvalues.imag > 0).all()


@pytest.mark.parametrize("regular", [True, False])
def test_s4d_is_the_papers_recurrence(regular):
    mixer, inputs = S4D(5, 4).double(), torch.randn(2, 37, 5, dtype=torch.float64)
    elapsed = None if regular else irregular(2, 37)
    rate = torch.complex(-mixer.log_decay.exp(), mixer.frequency).view(5, 4)
    assert torch.allclose(rate[2], torch.complex(*torch.tensor([[-0.5] * 4, [math.pi * n for n in range(4)]])).to(rate))
    step = mixer.log_step.exp()[:, None].expand(5, 4)
    step = step if elapsed is None else step * elapsed[..., None, None]
    decay = torch.exp(rate * step)
    readout = complex_weight(mixer.readout).conj() / 2
    states = loop(decay, (decay - 1) / rate * inputs[..., None])
    expected = 2 * (states * readout).sum(-1).real
    assert torch.allclose(mixer.respond(inputs, elapsed), expected, atol=1e-10)


@pytest.mark.parametrize("kind", [S5, S4D])
def test_a_held_input_over_two_steps_is_one_step_of_twice_the_time(kind):
    mixer, inputs = kind(5, 4), torch.randn(2, 20, 5)
    twice = mixer.respond(inputs.repeat_interleave(2, 1), None)[:, 1::2]
    assert torch.allclose(mixer.respond(inputs, torch.full((2, 20), 2.0)), twice, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regular", [True, False])
def test_linoss_is_the_papers_implicit_scheme(regular):
    """The 2 x 2 blocks of equation (3) on (z, y), before they are diagonalised."""
    mixer, inputs = LinOSS(5, 7).double(), torch.randn(2, 37, 5, dtype=torch.float64)
    elapsed = None if regular else irregular(2, 37)
    stiffness, step = mixer.log_frequency.exp() ** 2, mixer.step.sigmoid()
    driven = inputs @ mixer.drive.weight.T
    z = y = torch.zeros(2, 7, dtype=torch.float64)
    outputs = []
    for t in range(37):
        dt = step if elapsed is None else step * elapsed[:, t, None]
        schur = 1 / (1 + dt**2 * stiffness)
        z, y = (
            schur * z - dt * stiffness * schur * y + dt * schur * driven[:, t],
            dt * schur * z + schur * y + dt**2 * schur * driven[:, t],
        )
        outputs.append(y @ mixer.readout.weight.T)
    assert torch.allclose(mixer.respond(inputs, elapsed), torch.stack(outputs, 1), atol=1e-10)


# --- Time and padding -----------------------------------------------------------------------------------------------


def test_elapsed_time_sees_real_steps_only():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    assert elapsed_time(LrcSSMSteps.of(None)) is None
    assert elapsed_time(LrcSSMSteps.of(mask)) is None
    deltas = torch.tensor([[1.0, 1, 1, 1], [5, 1, 2, 5]])
    assert elapsed_time(LrcSSMSteps.of(mask, deltas)).tolist() == [[1, 1, 1, 1], [1, 2, 1, 1]]


def test_positions_of_attention_are_elapsed_times():
    mixer, inputs = Attention(8, 2, causal=False), torch.randn(1, 6, 8)
    later = LrcSSMSteps(torch.tensor([[9.0, 1, 2, 1, 1, 3]]))
    sooner = LrcSSMSteps(torch.tensor([[1.0, 1, 2, 1, 1, 3]]))
    assert torch.allclose(mixer.mix(inputs, later), mixer.mix(inputs, sooner), atol=1e-5)
    assert not torch.allclose(mixer.mix(inputs, sooner), mixer.mix(inputs, REGULAR), atol=1e-3)


def test_cfc_gives_every_row_its_own_time():
    """With as many rows as units, ncps by itself would take one for the other."""
    pytest.importorskip("ncps")
    mixer, inputs = CfC(4, 3), torch.randn(3, 10, 4)
    time = irregular(3, 10).float()
    together = mixer.mix(inputs, LrcSSMSteps(time))
    for row in range(3):
        alone = mixer.mix(inputs[row : row + 1], LrcSSMSteps(time[row : row + 1]))
        assert torch.allclose(together[row : row + 1], alone, atol=1e-6)


def skip_without_ncps(mixer):
    if mixer == "cfc":
        pytest.importorskip("ncps")


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_step_depends_on_no_later_one(mixer):
    skip_without_ncps(mixer)
    model = build(LrcSSMForSequenceModeling, config(), mixer).eval()
    series = torch.randn(2, 40, 3)
    changed = series.clone()
    changed[:, 25:] += 1
    for deltas in (None, irregular(2, 40).float()):
        outputs = model(input_values=series, time_deltas=deltas).logits
        others = model(input_values=changed, time_deltas=deltas).logits
        assert torch.allclose(outputs[:, :25], others[:, :25], atol=1e-5)
        assert not torch.allclose(outputs[:, 25:], others[:, 25:], atol=1e-3)


def test_attention_of_a_classifier_reads_what_comes_later():
    series = torch.randn(2, 40, 3)
    changed = series.clone()
    changed[:, 39] += 1
    for head, sees in ((LrcSSMForSequenceClassification, True), (LrcSSMForSequenceModeling, False)):
        model = build(head, config(), "transformer").eval()
        first, other = (model.model(input_values=values).last_hidden_state[:, 0] for values in (series, changed))
        assert torch.allclose(first, other, atol=1e-6) is not sees


@pytest.mark.parametrize("changes", [{}, {"bidirectional": True, "num_hidden_layers": 2}], ids=["forward", "both ways"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_leaves_no_trace(mixer, changes):
    skip_without_ncps(mixer)
    model = build(LrcSSMForSequenceClassification, config(**changes), mixer).eval()
    series, deltas = torch.randn(1, 30, 3), irregular(1, 30).float()
    padded = torch.full((3, 50, 3), float("nan"))
    padded_deltas, mask = torch.full((3, 50), 7.0), torch.zeros(3, 50, dtype=torch.bool)
    for row, start in enumerate((0, 20, 11)):
        mask[row, start : start + 30] = True
        padded[row, start : start + 30] = series
        padded_deltas[row, start : start + 30] = deltas
    for times, padded_times in ((None, None), (deltas, padded_deltas)):
        expected = model(input_values=series, time_deltas=times).logits
        logits = model(input_values=padded, attention_mask=mask, time_deltas=padded_times).logits
        assert torch.allclose(logits, expected.expand_as(logits), atol=1e-5)


@pytest.mark.parametrize("mixer", RIVALS)
def test_an_empty_row_spoils_no_gradient(mixer):
    skip_without_ncps(mixer)
    model = build(LrcSSMForSequenceClassification, config(), mixer)
    mask = torch.ones(2, 20)
    mask[1] = 0
    model(input_values=torch.randn(2, 20, 3), attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if "mixer" in name)


# --- Models ---------------------------------------------------------------------------------------------------------


SIZES = [{"hidden_size": 64, "num_hidden_layers": 4}, {"hidden_size": 32, "num_hidden_layers": 2}]


@pytest.mark.parametrize("changes", [*SIZES, {"num_hidden_layers": 2, "num_hidden_groups": 1}], ids=str)
@pytest.mark.parametrize("mixer", RIVALS)
def test_parameters_are_those_of_lrcssm(mixer, changes):
    skip_without_ncps(mixer)
    wanted = LrcSSMForSequenceClassification(config(**changes)).num_parameters()
    assert abs(build(LrcSSMForSequenceClassification, config(**changes), mixer).num_parameters() / wanted - 1) < 0.1


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_learns(mixer):
    """Which half of the series has the larger values: no single step tells."""
    skip_without_ncps(mixer)
    torch.manual_seed(0)
    model = build(LrcSSMForSequenceClassification, config(), mixer)
    labels = torch.randint(2, (64,))
    series = torch.randn(64, 16, 3)
    series += (2 * labels - 1)[:, None, None] * torch.where(torch.arange(16) < 8, -1, 1)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):  # CfC takes its time: of six seeds the slowest is at 0.4 after 40.
        loss = model(input_values=series, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_forecasts_without_a_cache():
    model = build(LrcSSMForSequenceModeling, config(prediction_length=5, scaling="std"), "s5").eval()
    assert model.forecast(torch.randn(2, 20, 3), horizon=5).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="keeps no state"):
        model.forecast(torch.randn(2, 20, 3), horizon=6)


@pytest.mark.parametrize(
    ("changes", "mixer", "message"),
    [
        ({}, "s6", "mixer.*lrcssm, lru"),
        ({"block_type": "paper"}, "lru", "block_type.*paper"),
        ({"hidden_size": 64, "state_size": 4, "intermediate_size": 8}, "s4d", "s4d.*parameters.*state_size"),
    ],
)
def test_what_cannot_be_built_says_so(changes, mixer, message):
    with pytest.raises(ValueError, match=message):
        build(LrcSSMForSequenceClassification, config(**changes), mixer)


def test_documents_in_one_row_are_refused():
    model = build(LrcSSMForSequenceModeling, config(), "lru")
    with pytest.raises(ValueError, match="position_ids"):
        model(input_values=torch.randn(1, 6, 3), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
