# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What all solvers and backends of the recurrence share: their names, and the checks of their arguments."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


SOLVERS = ("auto", "sequential", "newton", "chunked")
BACKENDS = ("auto", "torch", "cpu", "triton")


class Kernels(NamedTuple):
    """A backend's implementation of the operators of `recurrence.py` and `mixing.py`, for the tensors it serves.

    On GPUs, torch has a kernel for the norm.
    """

    cell_scan: Callable
    cell_scan_backward: Callable
    prefix_scan: Callable
    prefix_scan_backward: Callable
    gated_step: Callable
    convolution: Callable
    convolution_backward: Callable
    silu_gate: Callable
    silu_gate_backward: Callable
    serves: Callable[[str, Tensor], bool]
    rms_norm: Callable | None = None
    rms_norm_backward: Callable | None = None


def require_tensor(name: str, tensor: Tensor, like: Tensor | None = None, shape: tuple[int, ...] | None = None):
    """Refuses what is no tensor of numbers, of this shape, where the first argument is."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        raise ValueError(f"`{name}` is {tensor.dtype}, with which torch does not calculate; pass `{name}.float()`.")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"`{name}` is on {tensor.device}, but the others are on {like.device}: move it there.")


def require_sequence(name: str, tensor: Tensor) -> None:
    require_tensor(name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"`{name}` must be (batch, steps, state), got shape {tuple(tensor.shape)}.")


def require_broadcastable(name: str, tensor: Tensor, state: Tensor) -> None:
    """Refuses what would make the state another shape."""
    require_tensor(name, tensor, state)
    sizes = zip(reversed(tensor.shape), reversed(state.shape))
    if tensor.dim() > state.dim() or not all(size in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"`{name}` must be broadcastable to the state's shape {tuple(state.shape)}, got {tuple(tensor.shape)}."
        )


def require_steps(time_step: Tensor | None, reset: Tensor | None, like: Tensor, shape: tuple[int, int]) -> None:
    """Refuses time steps and resets that are not one real number and one flag for every step."""
    if time_step is not None:
        require_tensor("time_step", time_step, like, shape)
        if time_step.is_complex():
            raise ValueError(f"`time_step` must be real, got {time_step.dtype}; pass `time_step.real`.")
    if reset is not None:
        require_tensor("reset", reset, like, shape)
        if reset.dtype != torch.bool:
            raise ValueError(f"`reset` must be bool, got {reset.dtype}; pass `reset.bool()`.")


def require_options(solver: str, backend: str, tolerance: float | None) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if tolerance is not None and not (isinstance(tolerance, numbers.Real) and 0 < tolerance < math.inf):
        raise ValueError(f"`tolerance` must be a positive finite number, got {tolerance!r}; None is a good one.")


def require_spreadable(name: str, is_asked: bool, dtype: torch.dtype) -> None:
    """Refuses what does not go with a `group`."""
    if is_asked:
        raise ValueError(f"`{name}` does not go with a `group`; leave it out.")
    if dtype.is_complex:
        raise ValueError(f"A `group` is for real numbers, got {dtype}.")
    if is_transformed():
        raise ValueError("Forward mode and the transforms of `torch.func` do not go with a `group`; leave it out.")


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for other in dict.fromkeys(tensor.dtype for tensor in tensors if tensor is not None):
        dtype = torch.promote_types(dtype, other)
    return dtype


def as_operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autograd can keep and kernels can read: floating-point numbers, or complex ones if all have to be."""
    if tensor is None:
        return None
    if dtype.is_complex or not tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # Compilers cannot ask, and say themselves what is wrong.
    is_refused = torch.is_grad_enabled() and not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if is_refused else tensor


def rounding(dtype: torch.dtype) -> float:
    """The relative error that is accepted by default."""
    return 16 * torch.finfo(dtype).eps


def unpack(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """`count` tensors (B, T, D), of which there is each, or one that has them side by side, (B, T, count * D)."""
    return list(tensors) if len(tensors) == count else list(tensors[0].chunk(count, dim=-1))


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether this is forward mode or inside a transform of `torch.func`, which have no derivatives of operators."""
    return in_forward_mode() or torch._C._are_functorch_transforms_active()
