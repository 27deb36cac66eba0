# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What the gated block does between its matrix products, each in one pass over memory: `convolution` with its bias and
SiLU, `silu_gate`, `rms_norm`, and for decoding `gated_step`, a step of the neurons and the gate at once.

The functions whose names end in `_definition` say in PyTorch what is computed, in float32 at least; so do compilers,
which fuse it themselves, and transforms. Kernels of `mixing_cpu.py` and `mixing_triton.py` do the same in eager mode.
Shapes: B batch, T steps, D channels, K taps of the convolution, n states of a neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import by_kernels, kernels_for
from .cell_compiler import PROGRAMS, Program
from .cells import Cell
from .operators import in_forward_mode, is_transformed, working_dtype
from .solvers import Problem


class _Fused(torch.autograd.Function):
    """An operator by its kernels, going back too; by its definition where they fail."""

    @staticmethod
    def forward(ctx, operator: str, definition: Callable, *arguments):
        ctx.operator, ctx.definition = operator, definition
        ctx.others = [None if isinstance(argument, Tensor) else argument for argument in arguments]
        ctx.save_for_backward(*(argument if isinstance(argument, Tensor) else None for argument in arguments))
        ctx.set_materialize_grads(False)
        return _forward(operator, definition, arguments)

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = [other if tensor is None else tensor for tensor, other in pairs]
        gradients = None
        # With `create_graph` and in forward mode, what is computed has to be differentiable itself.
        if not (torch.is_grad_enabled() or in_forward_mode()):
            gradients = by_kernels(f"{ctx.operator}_backward", "auto", arguments[0], *grads, *arguments)
        if gradients is None:
            gradients = _through_definition(ctx.definition, arguments, ctx.needs_input_grad[2:], grads)
        return None, None, *gradients


def _forward(operator: str, definition: Callable, arguments: Sequence):
    results = by_kernels(operator, "auto", arguments[0], *arguments)
    return definition(*arguments) if results is None else results


def _through_definition(definition: Callable, arguments: Sequence, needed: Sequence[bool], grads: Sequence):
    again = torch.is_grad_enabled() or in_forward_mode()
    with torch.enable_grad():
        if not again:
            arguments = [x.detach().requires_grad_() if is_needed else x for x, is_needed in zip(arguments, needed)]
        results = definition(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        results, grads = zip(*((result, grad) for result, grad in zip(results, grads) if grad is not None))
        wanted = [x for x, is_needed in zip(arguments, needed) if is_needed]
        gradients = iter(torch.autograd.grad(results, wanted, grads, create_graph=again, allow_unused=True))
    return [next(gradients) if is_needed else None for is_needed in needed]


def _is_watched() -> bool:
    """Whether a compiler or a transform has to see what is computed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def _are_plain(tensors: Sequence) -> bool:
    """Whether kernels may read them, which do not ask what an address leads to: all on one device, and of no type that
    keeps its numbers elsewhere."""
    device = tensors[0].device
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == device
        for tensor in tensors
        if isinstance(tensor, Tensor)
    )


def _fused(operator: str, definition: Callable, *arguments):
    if _is_watched() or not _are_plain(arguments):
        return definition(*arguments)
    if torch.is_grad_enabled() and kernels_for(operator, arguments[0]) is not None:
        return _Fused.apply(operator, definition, *arguments)
    return _forward(operator, definition, arguments)


# --- The convolution ------------------------------------------------------------------------------------------------


def convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over the last K steps of the same document, with bias and, for `silu`, a SiLU.

    Args:
        inputs: (B, T, D).
        weight: (D, K), the last of which is for the step itself.
        bias: (D,).
        past: (B, D, K - 1), the inputs before the first; zero by default.
        reset: (B, T) bool; where it is set a document begins, and the steps before it count as zero.
        lengths: (B,), the number of steps that count; all by default.

    Returns:
        The outputs (B, T, D), and the past of what continues the last document, (B, D, K - 1), both in the dtype of the
        inputs.
    """
    return _fused("convolution", convolution_definition, inputs, weight, bias, past, reset, lengths, silu)


def convolution_definition(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    past: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """See [`convolution`]: a sum over the taps."""
    length, before = inputs.shape[1], weight.shape[1] - 1
    window, document = _window(inputs, past, reset, before)
    dtype = working_dtype(inputs, weight)
    outputs = inputs.to(dtype) * weight[:, -1] + bias
    for tap in range(before):
        tapped = window[:, tap : tap + length].to(dtype) * weight[:, tap]
        if document is not None:
            is_other = document[:, tap : tap + length] != document[:, before:]
            tapped = tapped.masked_fill(is_other.unsqueeze(-1), 0)
        outputs = outputs + tapped
    outputs = F.silu(outputs) if silu else outputs
    return outputs.to(inputs.dtype), _last_steps(window, lengths, document, before).transpose(1, 2)


def last_steps(inputs: Tensor, past: Tensor | None, reset: Tensor | None, lengths: Tensor | None, count: int) -> Tensor:
    """What `convolution` would return as the past after these inputs, (B, D, count)."""
    window, document = _window(inputs, past, reset, count)
    return _last_steps(window, lengths, document, count).transpose(1, 2)


def _window(inputs: Tensor, past: Tensor | None, reset: Tensor | None, before: int) -> tuple[Tensor, Tensor | None]:
    """The inputs after those before them, (B, before + T, D), and the document of each, or None for one."""
    batch, _, size = inputs.shape
    past = inputs.new_zeros(batch, before, size) if past is None else past.transpose(1, 2).to(inputs.dtype)
    document = None if reset is None else F.pad(reset.cumsum(1), (before, 0))
    return torch.cat([past, inputs], dim=1), document


def _last_steps(window: Tensor, lengths: Tensor | None, document: Tensor | None, count: int) -> Tensor:
    """The last `count` steps of those that count and of their last document, (B, count + T, D) -> (B, count, D)."""
    batch, length, size = window.shape
    if lengths is None and document is None:
        # A copy, so that the whole window is not kept for its end.
        return window[:, length - count :].clone()
    if lengths is None:
        last = torch.arange(length - count, length, device=window.device).expand(batch, -1)
    else:
        last = lengths[:, None] + torch.arange(count, device=window.device)
    taken = window.gather(1, last.unsqueeze(-1).expand(-1, -1, size))
    if document is None:
        return taken
    return taken.masked_fill((document.gather(1, last) != document[:, -1:]).unsqueeze(-1), 0)


# --- The gate -------------------------------------------------------------------------------------------------------


# Fewer numbers than this PyTorch has done before a kernel is found.
_FEW = 1 << 12


def silu_gate(values: Tensor, gate: Tensor) -> Tensor:
    """values * SiLU(gate), both (B, T, D), in the dtype of the gate."""
    if _is_watched() or gate.numel() < _FEW:
        return silu_gate_definition(gate, values)
    if values.dtype not in (torch.float32, gate.dtype):
        values = values.to(gate.dtype)
    return _fused("silu_gate", silu_gate_definition, gate, values)


def silu_gate_definition(gate: Tensor, values: Tensor) -> Tensor:
    """See [`silu_gate`]."""
    dtype = working_dtype(values, gate)
    if gate.dtype is dtype is values.dtype:
        return values * F.silu(gate)
    return (values.to(dtype) * F.silu(gate.to(dtype))).to(gate.dtype)


# --- The norm -------------------------------------------------------------------------------------------------------


def rms_norm(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """inputs / sqrt(mean(inputs ** 2) + eps) * weight, the mean over the last dimension, in the dtype of the inputs."""
    return _fused("rms_norm", rms_norm_definition, inputs, weight, eps)


def rms_norm_definition(inputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See [`rms_norm`]."""
    return F.rms_norm(inputs, weight.shape, weight, eps)


# --- Decoding -------------------------------------------------------------------------------------------------------


def decodes_by_kernels(gate: Tensor) -> bool:
    """Whether `gated_step` is for this gate: for one step, without gradients, where there are kernels."""
    # Compilers first, for which a length that is looked at is no longer open.
    is_alone = not _is_watched() and gate.shape[1] == 1 and not torch.is_grad_enabled()
    return is_alone and kernels_for("gated_step", gate) is not None


def gated_step(
    cell: Cell, inputs: Mapping[str, Tensor], parameters: Sequence[Tensor], state: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of a cell's neurons, and the gate on the last state of each, without gradients.

    Args:
        inputs: by name, (B, 1, D).
        parameters: (D,), in the cell's order.
        state: before the step, (B, D), or (B, n, D) for n > 1; zero by default.
        gate: (B, 1, D).

    Returns:
        last state * SiLU(gate), (B, 1, D), in the dtype of the gate, and the next state, float32 at least.
    """
    program, inputs = PROGRAMS[cell.key(tuple(inputs), False)], list(inputs.values())
    (batch, _, size), count = gate.shape, len(cell.states)
    dtype = working_dtype(gate, *parameters, *([] if state is None else [state]))
    if state is None:
        state = gate.new_zeros(batch, count, size, dtype=dtype)
    arguments = program, inputs, parameters, state.reshape(batch, count, size), gate
    is_served = dtype == torch.float32 and _are_plain((gate, state, *inputs, *parameters))
    results = by_kernels("gated_step", "auto", gate, *arguments) if is_served else None
    output, state = gated_step_definition(*arguments) if results is None else results
    return output, state.squeeze(1) if count == 1 else state


def gated_step_definition(
    program: Program, inputs: Sequence[Tensor], parameters: Sequence[Tensor], state: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """See [`gated_step`]; states are (B, n, D)."""
    problem = Problem.of(program, inputs, None, None, [p.to(state.dtype) for p in parameters], state.dtype)
    states = problem.advance(state.unsqueeze(1))
    return silu_gate_definition(gate, states[:, :, -1]), states.squeeze(1)
