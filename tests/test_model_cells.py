# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Models whose neurons are another cell: those that are registered, and one of one's own."""

import subprocess
import sys

import pytest
import torch

from lrcssm_hf import (
    Cell,
    LrcSSMConfig,
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMModel,
    cells,
    register_cell,
)
from lrcssm_hf.host import CACHE
from lrcssm_hf.steps import LrcSSMSteps
from problems import cell_definition
from tiny_models import make_config, make_model, make_writer, random_ids, without_memory


def _leaky(x, drive, *, leak, gain):
    return gain * torch.tanh(drive) - torch.sigmoid(leak) * x


def _turning(x, y, drive, *, angle):
    return angle.cos() * x - angle.sin() * y + drive - x, angle.sin() * x + angle.cos() * y - y


LEAKY, TURNING = Cell(_leaky), Cell(_turning, states=2)


@pytest.fixture(autouse=True)
def cells_of_our_own():
    before = dict(cells.REGISTERED)
    register_cell("mine", LEAKY)
    register_cell("turning", TURNING)
    yield
    cells.REGISTERED.clear()
    cells.REGISTERED.update(before)


every_name = pytest.mark.parametrize("name", ["gru", "mgu", "lstm", "mine", "turning"])


@every_name
@pytest.mark.parametrize("block_type", ["gated", "paper"])
def test_neurons_are_their_cell(name, block_type):
    """The projection's parts are the cell's inputs, in its order, and the last state is the output."""
    model = make_model(LrcSSMModel, cell=name, block_type=block_type, state_size=20, num_hidden_layers=1).double()
    block, cell = model.layers[0], cells.REGISTERED[name]
    neurons = block.mixer.neurons if block_type == "gated" else block.neurons
    inputs = torch.randn(2, 40, neurons.currents.in_features, dtype=torch.float64)
    time_step = torch.rand(2, 40, dtype=torch.float64)
    outputs, final_state = neurons(inputs, None, LrcSSMSteps(time_step))
    currents = torch.nn.functional.linear(inputs, neurons.currents.weight, neurons.currents.bias)
    parts = dict(zip(cell.inputs, currents.chunk(len(cell.inputs), -1)))
    parameters = {key: dict(neurons.named_parameters())[f"cell_{key}"] for key in cell.parameters}
    expected = cell_definition(cell, parts, parameters, time_step=time_step)
    assert torch.allclose(final_state, expected[:, -1])
    assert torch.allclose(outputs, expected if len(cell.states) == 1 else expected[:, :, -1])


@every_name
@torch.no_grad()
def test_generation_reads_the_state(name):
    writer, ids = make_writer(cell=name), random_ids(3, 12)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    written = writer.generate(ids, **options)
    assert torch.equal(written, writer.generate(ids, use_cache=False, **options))
    with without_memory():
        assert not torch.equal(written, writer.generate(ids, **options))
    beams = writer.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, writer.generate(ids, num_beams=3, use_cache=False, **options))


@every_name
def test_every_weight_starts_somewhere_and_learns(name):
    """transformers leaves a module that it takes to be initialised as memory happened to be."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        model = LrcSSMForCausalLM(make_config(cell=name))
    finally:
        torch.use_deterministic_algorithms(False)
    neurons, bound = model.model.layers[0].mixer.neurons, 32**-0.5
    for key in neurons.cell.parameters:
        weight = getattr(neurons, f"cell_{key}")
        assert 0.5 * bound < weight.abs().max() < bound
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(getattr(neurons, f"cell_{key}").grad.abs().max() > 0 for key in neurons.cell.parameters)


@every_name
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model, ids = make_model(cell=name), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = LrcSSMForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.cell == name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.save_state(model(ids[:, :5], use_cache=True)[CACHE], tmp_path / "state.safetensors")
    state = {CACHE: loaded.load_state(tmp_path / "state.safetensors")}
    assert torch.allclose(loaded(ids[:, 5:], **state).logits, model(ids).logits[:, 5:], atol=1e-5)


@torch.no_grad()
def test_a_state_of_another_cell_is_refused(tmp_path):
    ids = random_ids(2, 9)
    for name, other in (("gru", "lstm"), ("lstm", "gru")):
        cache = make_model(cell=name)(ids, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="shapes"):
            make_model(cell=other)(ids, **{CACHE: cache})


def test_the_papers_classifier_of_another_cell():
    config = LrcSSMConfig(block_type="paper", cell="gru", num_channels=3, hidden_size=16, num_hidden_layers=2)
    assert config.sensory_activation == "none" and not config.elastance_input
    model = LrcSSMForSequenceClassification(config)
    values = torch.randn(4, 30, 3)
    labels = torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(input_values=values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_a_configuration_from_before_there_were_cells():
    older = {key: value for key, value in make_config().to_dict().items() if key != "cell"}
    assert LrcSSMConfig.from_dict(older).cell == "lrc"


def test_one_name_is_one_cell():
    register_cell("mine", LEAKY)
    with pytest.raises(ValueError, match="'mine' is that of another cell: .*_leaky"):
        register_cell("mine", TURNING)
    with pytest.raises(ValueError, match="must be a word, got 'a b'"):
        register_cell("a b", LEAKY)
    with pytest.raises(ValueError, match="must be a `Cell`, got function"):
        register_cell("other", _leaky)


def test_a_model_of_a_cell_that_is_not_registered(tmp_path):
    make_model(cell="mine").save_pretrained(tmp_path)
    code = f"from lrcssm_hf import LrcSSMForCausalLM; LrcSSMForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "`cell` must be one of lrc, gru, mgu, lstm, got 'mine'" in result.stderr
    assert "register_cell" in result.stderr
