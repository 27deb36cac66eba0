# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Values of series: which are there, on what scale, and whether they can be read.

Shapes: B batch, T steps, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .steps import as_mask, may_look


# As in transformers' PatchTST: keeps a constant channel from being blown up.
_MINIMUM_VARIANCE = 1e-5


def in_full(values: Tensor) -> Tensor:
    """The values in a floating type that holds them: float32 at least, float64 for integers beyond 16 bits."""
    if values.is_complex():
        raise ValueError(
            f"Values of series must be real, got {values.dtype}; pass real and imaginary parts as channels."
        )
    is_integer = not values.is_floating_point() and values.dtype != torch.bool
    # Apple's GPUs have no float64.
    is_long = is_integer and values.element_size() > 2 and values.device.type != "mps"
    lowest = torch.float64 if is_long else torch.float32
    return values.to(torch.promote_types(values.dtype, lowest))


def observed_values(
    values: Tensor, mask: Tensor | None, observed_mask: Tensor | None, name: str = "observed_mask"
) -> tuple[Tensor, Tensor]:
    """The values (B, T, C), as of `in_full` and 0 where there is none, and which there are, bool, by the mask of the
    steps (B, T) and that of the values (B, T, C), an argument of this name."""
    if observed_mask is None:
        observed = torch.ones_like(values, dtype=torch.bool)
    elif observed_mask.shape == values.shape:
        observed = as_mask(name, observed_mask)
    else:
        raise ValueError(f"`{name}` must have shape {tuple(values.shape)}, got {tuple(observed_mask.shape)}.")
    if mask is not None:
        observed = observed & mask.unsqueeze(-1)
    return in_full(values).masked_fill(~observed, 0), observed


def series_statistics(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of every series over its observed values, each (B, 1, C), in the
    precision of the values, float32 at least.

    Args:
        values, observed: (B, T, C), real and bool; what is not observed may be anything.
    """
    values = in_full(values).masked_fill(~observed, 0)
    count = observed.sum(1, keepdim=True).clamp(min=1)
    mean = values.sum(1, keepdim=True) / count
    # What rounding took from the sum of large values.
    mean = mean + (values - mean).masked_fill(~observed, 0).sum(1, keepdim=True) / count
    spread = (values - mean).masked_fill(~observed, 0)
    # In this unit no square overflows.
    unit = spread.detach().abs().amax(1, keepdim=True).clamp(min=1)
    variance = (spread / unit).square().sum(1, keepdim=True) / count
    return mean, (variance + _MINIMUM_VARIANCE / unit.square()).sqrt() * unit


def last_observed(values: Tensor, observed: Tensor) -> Tensor:
    """(B, T, C): at every step the latest observed value, 0 before the first."""
    steps = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    latest = torch.where(observed, steps, 0).cummax(dim=1).values
    return F.pad(values, (0, 0, 1, 0)).gather(1, latest)


def require_features(name: str, features: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The features, or None for a model that reads none; raises where what is passed is not what it reads."""
    wanted = shape if shape[-1] else None
    given = None if features is None else tuple(features.shape)
    if given != wanted:
        expected = f"must have shape {wanted}" if wanted else f"must be left out, as `num_{name}` is 0"
        raise ValueError(f"`{name}` {expected}; got {given}.")
    return features


def require_finite(name: str, values: Tensor) -> None:
    """On the CPU only: elsewhere the check would stall the device's queue."""
    if may_look(values) and not values.isfinite().all():
        raise ValueError(f"`{name}` holds NaN or infinite values at unmasked steps; fill or mask them.")
