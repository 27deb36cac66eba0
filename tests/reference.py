# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Numbers made by the authors' JAX code in float64 (tests/data), under this project's names."""

from pathlib import Path

import numpy as np
import torch

from lrcssm_hf import LrcParameters, LrcSSMConfig, LrcSSMForSequenceClassification


DATA = Path(__file__).parent / "data"
AUTHORS_NAMES = {
    "activation_scale": "sigma",
    "activation_shift": "mu",
    "forget_weight": "w",
    "update_weight": "h",
    "leak_conductance": "gleak",
    "leak_potential": "vleak",
    "elastance_weight": "elastance_kernel",
    "elastance_bias": "elastance_bias",
    "elastance_shift": "elastance_shift",
}


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as data:
        return {key: torch.from_numpy(value) for key, value in data.items()}


def cell_parameters(data: dict, symmetric: bool) -> LrcParameters:
    values = {}
    for name, authors_name in AUTHORS_NAMES.items():
        key = f"weight_{authors_name}"
        values[name] = data[key] if key in data else torch.complex(data[key + "re"], data[key + "im"])
    return LrcParameters(**values if symmetric else values | {"elastance_shift": None})


def classifier(data: dict) -> LrcSSMForSequenceClassification:
    """Their whole model, built from its weights."""
    layers = len({key.split(".")[1] for key in data if key.startswith("cells.")})
    config = LrcSSMConfig(
        block_type="paper",
        num_channels=data["u"].shape[-1],
        hidden_size=data["encoder.layers.0.weight"].shape[0],
        state_size=data["cells.0.weight_mu"].shape[0],
        num_hidden_layers=layers,
        num_labels=data["logits"].shape[-1],
    )
    weights = {}

    def copy_mlp(source, target):
        for theirs, ours in ((0, 0), (1, 2)):
            for name in ("weight", "bias"):
                weights[f"{target}.{ours}.{name}"] = data[f"{source}.layers.{theirs}.{name}"]

    copy_mlp("encoder", "model.encoder")
    copy_mlp("classifier", "score")
    for layer in range(layers):
        copy_mlp(f"mlps.{layer}", f"model.layers.{layer}.mlp")
        cell, neurons = f"cells.{layer}.weight_", f"model.layers.{layer}.neurons."
        weights[neurons + "currents.weight"] = torch.cat([data[cell + "sensory_w"], data[cell + "sensory_h"]])
        weights[neurons + "sensory_scale"] = data[cell + "sensory_sigma"]
        weights[neurons + "sensory_shift"] = data[cell + "sensory_mu"]
        for name, authors_name in AUTHORS_NAMES.items():
            if name != "elastance_shift":
                weights[neurons + name] = data[cell + authors_name]
    model = LrcSSMForSequenceClassification(config).double().eval()
    model.load_state_dict(weights)
    return model
