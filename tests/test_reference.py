# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Against the authors' own numbers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from convert_reference_weights import convert, main
from lrcssm_hf import lrc_scan
from reference import DATA, cell_parameters, load


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
    model = convert(data)
    with torch.no_grad():
        per_step = model.score(model.model(input_values=data["u"]).last_hidden_state)
        logits = model(input_values=data["u"]).logits
    assert (per_step - data["per_step_logits"]).abs().max() < 1e-9
    assert (logits - data["logits"]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["model_equal_widths", "model_different_widths"])
@torch.no_grad()
def test_converted_folder(name, tmp_path):
    main([str(DATA / f"{name}.npz"), str(tmp_path / "model")])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float64)
    data = load(name)
    assert (model(input_values=data["u"]).logits - data["logits"]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("cells.1.weight_mu"), "no array 'cells.1.weight_mu'"),
        (lambda data: data.update({"encoder.layers.0.weight": torch.zeros(3)}), "must be a matrix"),
        (lambda data: data.update({"encoder.layers.0.weight": torch.tensor(3.0)}), "no array"),
        (lambda data: data.update({"encoder.layers.0.bias": torch.arange(3)}), "int64, not real"),
        (lambda data: data.update({"mlps.0.layers.1.bias": torch.zeros(3).double()}), "do not fit together"),
        (lambda data: data.update({"mlps.0.layers.2.bias": torch.zeros(3)}), "no place for 'mlps.0.layers.2.bias'"),
        (lambda data: data.update({"encoder.layers.0.bias": torch.zeros(32)}), "is torch.float32, and the encoder"),
        (lambda data: data["cells.0.weight_mu"].fill_(float("nan")), "'cells.0.weight_mu' holds NaN"),
    ],
)
def test_other_weights_are_refused_by_name(change, message, tmp_path, capsys):
    data = load("model_equal_widths")
    change(data)
    np.savez(tmp_path / "weights.npz", **data)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "weights.npz"), str(tmp_path / "model")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "weights.npz").write_text("not an archive")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "words.npz", word=np.array("word"))
    for name in ("weights.npz", "missing.npz", "array.npy", "words.npz"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), str(tmp_path / "model")])
        assert "cannot be read" in capsys.readouterr().err
