# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Turn weights of the authors' JAX classifier into a model folder.

    python scripts/convert_reference_weights.py IN.npz OUT_DIR

The arrays of IN.npz have the names of their modules: `encoder.layers.0.weight`, `cells.0.weight_sigma`,
`mlps.0.layers.0.weight`, `classifier.layers.1.bias` and so on. OUT_DIR is loaded by
`AutoModelForSequenceClassification.from_pretrained`, in the arrays' precision with `dtype="auto"`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from arguments import text
from whole_files import whole_files


MODULES = ("encoder", "cells", "mlps", "classifier")
# The names of a layer's neurons' parameters: ours -> theirs.
SENSORY = {"sensory_scale": "weight_sensory_sigma", "sensory_shift": "weight_sensory_mu"}
STATE = {
    "activation_scale": "weight_sigma",
    "activation_shift": "weight_mu",
    "forget_weight": "weight_w",
    "update_weight": "weight_h",
    "leak_conductance": "weight_gleak",
    "leak_potential": "weight_vleak",
    "elastance_weight": "weight_elastance_kernel",
    "elastance_bias": "weight_elastance_bias",
    "elastance_shift": "weight_elastance_shift",
}


def read(path: str) -> dict[str, Tensor]:
    """The arrays of the file; raises a `ValueError` if they are not those of a classifier."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(array) for name, array in file.items()}
    # numpy raises whatever the parser of the format at hand raises, and gives an array for an .npy file.
    except Exception as error:
        raise ValueError(f"{path!r} cannot be read as an .npz file of arrays of numbers: {error}") from error
    for name, array in arrays.items():
        if not array.is_floating_point() and not array.is_complex():
            raise ValueError(f"{name!r} in {path!r} holds {array.dtype}, not real numbers.")
    if any(array.is_complex() or (name.startswith("cells.") and name.endswith("re")) for name, array in arrays.items()):
        raise ValueError(f"{path!r} has complex states, for which the model has no configuration.")
    return arrays


def convert(arrays: dict[str, Tensor], elastance: str = "asymmetric") -> LrcSSMForSequenceClassification:
    """The model with these weights, in their precision.

    Raises:
        ValueError: an array is missing or has no place in the model, has another shape or precision than the others,
            or holds what is not finite.
    """
    used = set()
    layers = len({name.split(".")[1] for name in arrays if name.startswith("cells.")})

    def array(name: str) -> Tensor:
        if name not in arrays or arrays[name].dim() == 0:
            raise ValueError(f"The weights have no array {name!r}; is this the authors' classifier?")
        used.add(name)
        return arrays[name]

    encoder, mlp = array("encoder.layers.0.weight"), array("mlps.0.layers.0.weight")
    if encoder.dim() != 2:
        raise ValueError(f"'encoder.layers.0.weight' must be a matrix, got shape {tuple(encoder.shape)}.")
    config = LrcSSMConfig(
        block_type="paper",
        num_channels=encoder.shape[1],
        hidden_size=encoder.shape[0],
        state_size=array("cells.0.weight_mu").shape[0],
        intermediate_size=mlp.shape[0],
        num_hidden_layers=layers,
        num_labels=array("classifier.layers.1.bias").shape[0],
        elastance=elastance,
    )
    weights = {}
    mlps = {"encoder": "model.encoder", "classifier": "score"}
    for layer in range(layers):
        mlps[f"mlps.{layer}"] = f"model.layers.{layer}.mlp"
        cell, neurons = f"cells.{layer}.", f"model.layers.{layer}.neurons."
        currents = [array(cell + "weight_sensory_w"), array(cell + "weight_sensory_h")]
        weights[neurons + "currents.weight"] = torch.cat(currents)
        for ours, theirs in (SENSORY | STATE).items():
            # Their cells have a shift whatever the elastance.
            if ours != "elastance_shift" or elastance == "symmetric":
                weights[neurons + ours] = array(cell + theirs)
    for theirs, ours in mlps.items():
        for their_layer, our_layer in ((0, 0), (1, 2)):
            for name in ("weight", "bias"):
                weights[f"{ours}.{our_layer}.{name}"] = array(f"{theirs}.layers.{their_layer}.{name}")
    # Of an asymmetric elastance, the shifts play no part.
    unused = {name for name in arrays if name.split(".")[0] in MODULES and not name.endswith("elastance_shift")} - used
    if unused:
        raise ValueError(f"The model has no place for {min(unused)!r} ({len(unused)} such arrays).")
    for name in sorted(used):
        if arrays[name].dtype != encoder.dtype:
            raise ValueError(
                f"{name!r} is {arrays[name].dtype}, and the encoder {encoder.dtype}; save all in one type."
            )
        if not arrays[name].isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinite values.")
    model = LrcSSMForSequenceClassification(config).to(encoder.dtype).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"The weights do not fit together: {error}") from error
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", metavar="IN.npz", type=text)
    parser.add_argument("output_dir", metavar="OUT_DIR", type=text)
    parser.add_argument(
        "--elastance", default="asymmetric", choices=["asymmetric", "symmetric"], help="That of the cells (asymmetric)."
    )
    args = parser.parse_args(arguments)
    try:
        model = convert(read(args.weights), args.elastance)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder) as partial:
            model.save_pretrained(partial)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
