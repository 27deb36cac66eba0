# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Which kernels an operator runs on: those of the backend that was asked for, or of the tensors' device, or none, where
PyTorch does it.

A backend's kernels are imported at their first use. One whose package is missing or broken, or that fails, is given up
for the process, with a warning.
"""

from __future__ import annotations

import importlib.util
import logging
import threading

import torch
from torch import Tensor

from .operators import Kernels


logger = logging.getLogger(__name__)

_BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}
# What was imported, by backend, or why it cannot be used. Not functools.cache: torch.compile would warn of it.
loaded: dict[str, Kernels | str] = {}
_giving_up = threading.Lock()


def kernels_of(backend: str) -> Kernels | str:
    """The kernels of `cpu` or `triton`, or why there are none."""
    if backend not in loaded:
        try:
            loaded[backend] = _cpu_kernels() if backend == "cpu" else _triton_kernels()
        except Exception as error:  # A package that does not fit its surroundings can raise anything.
            give_up(backend, error)
    return loaded[backend]


def _cpu_kernels() -> Kernels:
    from .mixing_cpu import (
        convolution_backward_cpu,
        convolution_cpu,
        rms_norm_backward_cpu,
        rms_norm_cpu,
        silu_gate_backward_cpu,
        silu_gate_cpu,
    )
    from .recurrence_cpu import (
        cell_scan_backward_cpu,
        cell_scan_cpu,
        gated_step_cpu,
        prefix_scan_backward_cpu,
        prefix_scan_cpu,
        serves_cpu,
    )

    return Kernels(
        cell_scan_cpu,
        cell_scan_backward_cpu,
        prefix_scan_cpu,
        prefix_scan_backward_cpu,
        gated_step_cpu,
        convolution_cpu,
        convolution_backward_cpu,
        silu_gate_cpu,
        silu_gate_backward_cpu,
        serves_cpu,
        rms_norm_cpu,
        rms_norm_backward_cpu,
    )


def _triton_kernels() -> Kernels:
    from .mixing_triton import (
        convolution_backward_triton,
        convolution_triton,
        silu_gate_backward_triton,
        silu_gate_triton,
    )
    from .recurrence_triton import (
        cell_scan_backward_triton,
        cell_scan_triton,
        gated_step_triton,
        prefix_scan_backward_triton,
        prefix_scan_triton,
        serves_triton,
    )

    return Kernels(
        cell_scan_triton,
        cell_scan_backward_triton,
        prefix_scan_triton,
        prefix_scan_backward_triton,
        gated_step_triton,
        convolution_triton,
        convolution_backward_triton,
        silu_gate_triton,
        silu_gate_backward_triton,
        serves_triton,
    )


def give_up(backend: str, error: Exception) -> None:
    """Does without the backend's kernels from now on, and says so once."""
    with _giving_up:
        if isinstance(loaded.get(backend), str):
            return
        loaded[backend] = f"{type(error).__name__}: {error}"
    device = "CPU" if backend == "cpu" else "GPU"
    logger.warning(f"The recurrence runs in plain PyTorch on the {device}, which is slower. {loaded[backend]}")


def kernels_for(operator: str, tensor: Tensor) -> Kernels | None:
    """The kernels of the tensor's device, where they serve it."""
    backend = _BACKEND_OF_DEVICE.get(tensor.device.type)
    kernels = None if backend is None else kernels_of(backend)
    return None if kernels is None or isinstance(kernels, str) or not kernels.serves(operator, tensor) else kernels


def load_cpu_kernels() -> None:
    """Imports them where their package is there."""
    try:
        is_there = importlib.util.find_spec("numba") is not None
    except Exception:  # An importer may say so itself, and a package half imported has no spec.
        is_there = False
    if is_there:
        kernels_of("cpu")


def require_kernels(operator: str, backend: str, tensor: Tensor) -> Kernels:
    """The kernels of a backend, or a ValueError where there are none for such tensors."""
    kernels = kernels_of(backend)
    if isinstance(kernels, str):
        raise ValueError(f"backend {backend!r} cannot be used, try 'auto': {kernels}")
    if not kernels.serves(operator, tensor):
        needs = {
            "cpu": "float32 tensors on the CPU",
            "triton": "float32 or float64 tensors on a GPU (or TRITON_INTERPRET=1)",
        }[backend]
        raise ValueError(
            f"backend {backend!r} needs {needs}, got {tensor.dtype} on {tensor.device}; use backend 'auto'."
        )
    return kernels


def by_kernels(operator: str, backend: str, tensor: Tensor, *arguments):
    """What the operator's kernel returns for the arguments, tensors like `tensor`; None where PyTorch has to do it.

    Kernels write nothing but what they return, so that PyTorch can begin anew after any of their failures.
    """
    if backend == "torch":
        return None
    is_choice = backend == "auto"
    kernels = kernels_for(operator, tensor) if is_choice else require_kernels(operator, backend, tensor)
    if kernels is None:
        return None
    try:
        return getattr(kernels, operator)(*arguments)
    except (MemoryError, torch.OutOfMemoryError):  # PyTorch needs more still.
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # PyTorch's word for it on CPUs.
            raise
        if not is_choice:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"backend {backend!r} has failed, try 'auto': {reason}") from error
        give_up(_BACKEND_OF_DEVICE[tensor.device.type], error)
        return None
