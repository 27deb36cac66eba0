# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Numbers made by the authors' JAX code in float64 (tests/data), under this project's names."""

from pathlib import Path

import numpy as np
import torch

from convert_reference_weights import STATE
from lrcssm_hf import LrcParameters


DATA = Path(__file__).parent / "data"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"{name}.npz") as data:
        return {key: torch.from_numpy(value) for key, value in data.items()}


def cell_parameters(data: dict, symmetric: bool) -> LrcParameters:
    values = {}
    for name, key in STATE.items():
        values[name] = data[key] if key in data else torch.complex(data[key + "re"], data[key + "im"])
    return LrcParameters(**values if symmetric else values | {"elastance_shift": None})
