# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Against the authors' own numbers."""

import pytest
import torch

from lrcssm_hf import LrcParameters, lrc_scan
from reference import AUTHORS_NAMES, cell_parameters, classifier, load


CELLS = ["asymmetric", "asymmetric_unit_weights", "symmetric", "symmetric_unit_weights"]


def sensory_currents(data, u):
    activation = torch.sigmoid(data["weight_sensory_sigma"] * (u - data["weight_sensory_mu"]))
    return activation @ data["weight_sensory_w"].T, activation @ data["weight_sensory_h"].T


@pytest.mark.parametrize("solver", ["sequential", "newton", "chunked"])
@pytest.mark.parametrize("name", CELLS)
def test_cell_and_its_gradients(name, solver):
    data = load(f"cell_{name}")
    differentiated = {key.removeprefix("grad_"): value for key, value in data.items() if key.startswith("grad_")}
    for key in differentiated:
        data[key] = data[key].clone().requires_grad_()
    parameters = cell_parameters(data, symmetric=name.startswith("symmetric"))
    states, _ = lrc_scan(*sensory_currents(data, data["u"]), parameters, initial_state=data["h0"], solver=solver)
    assert (states - data["states"]).abs().max() < 1e-10
    (states * data["cotangent"]).sum().backward()
    for key, expected in differentiated.items():
        if key == "weight_elastance_shift" and parameters.elastance_shift is None:
            assert (expected == 0).all()
        else:
            assert (data[key].grad - expected).abs().max() < 1e-10 * max(1, expected.abs().max()), key


@pytest.mark.parametrize("solver", ["sequential", "newton", "chunked"])
def test_complex_cell(solver):
    data = load("cell_complex_state")
    states, _ = lrc_scan(
        *sensory_currents(data, data["u"]),
        cell_parameters(data, symmetric=False),
        initial_state=data["h0"],
        solver=solver,
    )
    assert states.is_complex()
    assert (states - data["states"]).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["model_equal_widths", "model_different_widths"])
def test_whole_model(name):
    data = load(name)
    model = classifier(data)
    with torch.no_grad():
        per_step = model.score(model.model(input_values=data["u"]).last_hidden_state)
        logits = model(input_values=data["u"]).logits
    assert (per_step - data["per_step_logits"]).abs().max() < 1e-9
    assert (logits - data["logits"]).abs().max() < 1e-9


def test_every_parameter_has_its_name():
    assert tuple(AUTHORS_NAMES) == LrcParameters._fields
