# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The operators of `mixing.py` on GPUs, in float32 or float64, on inputs of any floating dtype.

A program of the convolution walks through a chunk of steps of a block of channels, with the inputs before a step in
registers; its text is written out for every number of taps. Going back, a chunk begins as many steps after its end as
reach into it. Importing this module needs triton; `backends.py` does without it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from .cell_compiler import fill
from .recurrence_triton import define, on_device, options_for, program_of, sigmoid, with_rows


try:  # Guarded, because transformers refuses a Hub model's code when an unguarded import is missing.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The GPU kernels need triton (`pip install triton`): {error}", name="triton") from error


# Steps of a program.
_CHUNK = 64
# Rows of a program of the gate.
_ROWS = 8


# --- The convolution ------------------------------------------------------------------------------------------------
# x0 is the input of a step, x1 that of the step before it, and so on; w0, w1, ... are their weights.

_CONVOLUTION_TEMPLATE = '''
@triton.jit
def find_before(x, past, reset, b, at, x_b, x_t, r_b, r_t, size, channel, DTYPE: tl.constexpr):
    """The inputs before the step `at`, zero where they are of another document."""
    same = at >= 0
    $find_before
    return $before,


@triton.jit
def convolution(
    x, weight, bias, past, reset, lengths, outputs, last,
    x_b, x_t, r_b, r_t, steps, size, chunks, blocks,
    CHUNK: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):
    b, index, _, channel = program_of(chunks, blocks, BLOCK)
    inside = channel < size
    $load_weights
    bias0 = tl.load(bias + channel, mask=inside, other=0.0).to(DTYPE)
    first = index * CHUNK
    $before_first
    for t in range(first, tl.minimum(first + CHUNK, steps)):
        x0 = tl.load(x + b * x_b + t * x_t + channel, mask=inside, other=0.0).to(DTYPE)
        if reset is not None:
            fresh = tl.load(reset + b * r_b + t * r_t) != 0
            $forget
        z = bias0 + $sum
        if SILU:
            z = z * sigmoid(z)
        tl.store(outputs + (b * steps + t) * size + channel, z, mask=inside)
        $shift
    if index == 0:
        end = steps + tl.zeros([], tl.int64)
        if lengths is not None:
            end = tl.load(lengths + b)
        $before_end
        $store_last


@triton.jit
def convolution_backward(
    grads, grad_last, x, weight, bias, past, reset, lengths, grad_inputs, grad_past, grad_weights,
    g_b, g_t, x_b, x_t, r_b, r_t, steps, size, chunks, blocks,
    CHUNK: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):
    """grad_weights (B, chunks, K + 1, D), for the weights from w0 on and then the bias."""
    b, index, _, channel = program_of(chunks, blocks, BLOCK)
    inside = channel < size
    $load_weights
    bias0 = tl.load(bias + channel, mask=inside, other=0.0).to(DTYPE)
    $zero_sums
    sum_bias = tl.zeros([BLOCK], DTYPE)
    $zero_later
    first = index * CHUNK
    stop = tl.minimum(first + CHUNK, steps)
    end = steps + tl.zeros([], tl.int64)
    if lengths is not None:
        end = tl.load(lengths + b)
    begin = tl.minimum(stop + $taps - 1, steps)
    for back in range(begin - first):
        t = begin - 1 - back
        if grad_last is not None:
            if t + 1 == end:
                $add_last
        $before_step
        x0 = tl.load(x + b * x_b + t * x_t + channel, mask=inside, other=0.0).to(DTYPE)
        grad = tl.load(grads + b * g_b + t * g_t + channel, mask=inside, other=0.0).to(DTYPE)
        if reset is not None:
            fresh = tl.load(reset + b * r_b + t * r_t) != 0
            $forget
        if SILU:
            z = bias0 + $sum
            y = sigmoid(z)
            grad = grad * (y + z * y * (1.0 - y))
        $by_input
        tl.store(grad_inputs + (b * steps + t) * size + channel, by_input, mask=channel < tl.where(t < stop, size, 0))
        $carry
        if reset is not None:
            $forget_later
        counted = tl.where(t < stop, grad, 0.0)
        $add_sums
        sum_bias += counted
    entry = (b * chunks + index) * ($taps + 1) * size + channel
    $store_sums
    tl.store(grad_weights + entry + $taps * size, sum_bias, mask=inside)
    if index == 0:
        if grad_last is not None:
            if end == 0:
                $add_last
        $store_past
'''


def _convolution_parts(taps: int) -> dict[str, str | list[str]]:
    kept = f"(b * size + channel) * {taps - 1}"
    before = [f"x{k}" for k in range(1, taps)]
    later = [f"later{k}" for k in range(1, taps)]
    find = []
    for k in range(1, taps):
        find += [
            f"source = x + b * x_b + (at - {k}) * x_t + channel",
            f"x{k} = tl.load(source, mask=channel < tl.where(same & (at >= {k}), size, 0), other=0.0).to(DTYPE)",
            "if past is not None:",
            f"    source = past + {kept} + {taps - 1 - k} + at",
            f"    x{k} += tl.load(source, mask=channel < tl.where(same & (at < {k}), size, 0), other=0.0).to(DTYPE)",
            "if reset is not None:",
            f"    flag = tl.load(reset + b * r_b + (at - {k}) * r_t, mask=at >= {k}, other=0)",
            "    same = same & (flag == 0)",
        ]
    call = "find_before(x, past, reset, b, {}, x_b, x_t, r_b, r_t, size, channel, DTYPE)"
    finding = {
        f"before_{name}": [f"{', '.join(before)}, = {call.format(at)}"] if before else ["pass"]
        for name, at in (("first", "first"), ("end", "end"), ("step", "t"))
    }
    return finding | {
        "taps": str(taps),
        "before": before or ["same"],
        "find_before": find,
        "load_weights": [
            f"w{k} = tl.load(weight + channel * {taps} + {taps - 1 - k}, mask=inside, other=0.0).to(DTYPE)"
            for k in range(taps)
        ],
        "forget": [f"{name} = tl.where(fresh, 0.0, {name})" for name in before] or ["pass"],
        "sum": " + ".join(f"w{k} * x{k}" for k in range(taps)),
        "shift": [f"x{k} = x{k - 1}" for k in range(taps - 1, 0, -1)],
        "store_last": [f"tl.store(last + {kept} + {taps - 1 - k}, x{k}, mask=inside)" for k in range(1, taps)]
        or ["pass"],
        "zero_sums": [f"sum{k} = tl.zeros([BLOCK], DTYPE)" for k in range(taps)],
        "zero_later": [f"{name} = tl.zeros([BLOCK], DTYPE)" for name in later],
        "add_last": [
            f"later{k} += tl.load(grad_last + {kept} + {taps - 1 - k}, mask=inside, other=0.0).to(DTYPE)"
            for k in range(1, taps)
        ]
        or ["pass"],
        "by_input": ["by_input = w0 * grad" + (" + later1" if taps > 1 else "")],
        "carry": [f"later{k} = w{k} * grad" + (f" + later{k + 1}" if k + 1 < taps else "") for k in range(1, taps)],
        "forget_later": [f"{name} = tl.where(fresh, 0.0, {name})" for name in later] or ["pass"],
        "add_sums": [f"sum{k} += counted * x{k}" for k in range(taps)],
        "store_sums": [f"tl.store(grad_weights + entry + {k} * size, sum{k}, mask=inside)" for k in range(taps)],
        "store_past": [f"tl.store(grad_past + {kept} + {taps - 1 - k}, later{k}, mask=inside)" for k in range(1, taps)],
    }


@functools.cache
def _convolution_kernels(taps: int) -> SimpleNamespace:
    text = fill(_CONVOLUTION_TEMPLATE, **_convolution_parts(taps))
    return define(f"convolution{taps}", text, program_of=program_of, sigmoid=sigmoid)


def _flags(reset: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if reset is None else (reset.view(torch.uint8), reset.stride(0), reset.stride(1))


def convolution_triton(inputs, weight, bias, past, reset, lengths, silu: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `mixing.convolution_definition`."""
    (batch, steps, size), taps = inputs.shape, weight.shape[1]
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    last = inputs.new_empty(batch, size, taps - 1)
    if batch * size == 0:
        return outputs, last
    (x, *strides), (flags, *r_strides) = with_rows(inputs), _flags(reset)
    past = None if past is None else past.contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    options = options_for(inputs, size, CHUNK=_CHUNK, SILU=silu, num_warps=1)
    chunks, blocks = max(1, triton.cdiv(steps, _CHUNK)), triton.cdiv(size, options["BLOCK"])
    with on_device(inputs.device):
        _convolution_kernels(taps).convolution[(batch * chunks * blocks,)](
            x, weight.contiguous(), bias.contiguous(), past, flags, lengths, outputs, last,
            *strides, *r_strides, steps, size, chunks, blocks, **options,
        )  # fmt: skip
    return outputs, last


def convolution_backward_triton(
    grad_outputs, grad_last, inputs, weight, bias, past, reset, lengths, silu: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `convolution_triton`."""
    (batch, steps, size), taps = inputs.shape, weight.shape[1]
    grad_outputs = torch.zeros_like(inputs) if grad_outputs is None else grad_outputs
    grad_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    grad_past = None if past is None else past.new_empty(past.shape)
    (g, *g_strides), (x, *strides), (flags, *r_strides) = with_rows(grad_outputs), with_rows(inputs), _flags(reset)
    past = None if past is None else past.contiguous()
    grad_last = None if grad_last is None else grad_last.contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    options = options_for(inputs, max(1, size), CHUNK=_CHUNK, SILU=silu, num_warps=1)
    chunks, blocks = max(1, triton.cdiv(steps, _CHUNK)), triton.cdiv(size, options["BLOCK"])
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    grad_weights = weight.new_empty(batch, chunks, taps + 1, size, dtype=dtype)
    if batch * size > 0:
        with on_device(inputs.device):
            _convolution_kernels(taps).convolution_backward[(batch * chunks * blocks,)](
                g, grad_last, x, weight.contiguous(), bias.contiguous(), past, flags, lengths,
                grad_inputs, inputs.new_empty(batch, size, taps - 1) if grad_past is None else grad_past, grad_weights,
                *g_strides, *strides, *r_strides, steps, size, chunks, blocks, **options,
            )  # fmt: skip
    sums = grad_weights.sum((0, 1))
    by_weight, by_bias = sums[:taps].flip(0).t().to(weight.dtype), sums[taps].to(bias.dtype)
    return grad_inputs, by_weight, by_bias, grad_past, None, None, None


# --- The gate -------------------------------------------------------------------------------------------------------


@triton.jit
def _place(rows, steps, size, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Batch rows, steps and channels of a program, and which of them there are."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    channel = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row // steps, row % steps, row, channel, (row < rows) & (channel < size)


@triton.jit
def _silu_gate_kernel(
    gates, values, outputs, g_b, g_t, v_b, v_t, rows, steps, size, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b, t, row, channel, inside = _place(rows, steps, size, blocks, ROWS, BLOCK)
    gate = tl.load(gates + b * g_b + t * g_t + channel, mask=inside, other=0.0).to(DTYPE)
    value = tl.load(values + b * v_b + t * v_t + channel, mask=inside, other=0.0).to(DTYPE)
    tl.store(outputs + row * size + channel, gate * sigmoid(gate) * value, mask=inside)


@triton.jit
def _silu_gate_backward_kernel(
    grads, gates, values, grad_gates, grad_values, d_b, d_t, g_b, g_t, v_b, v_t, rows, steps, size, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    b, t, row, channel, inside = _place(rows, steps, size, blocks, ROWS, BLOCK)
    grad = tl.load(grads + b * d_b + t * d_t + channel, mask=inside, other=0.0).to(DTYPE)
    gate = tl.load(gates + b * g_b + t * g_t + channel, mask=inside, other=0.0).to(DTYPE)
    value = tl.load(values + b * v_b + t * v_t + channel, mask=inside, other=0.0).to(DTYPE)
    y = sigmoid(gate)
    tl.store(grad_gates + row * size + channel, grad * value * (y + gate * y * (1.0 - y)), mask=inside)
    tl.store(grad_values + row * size + channel, grad * gate * y, mask=inside)


def _launch_gate(kernel, operands: list[Tensor], results: list[Tensor]) -> None:
    batch, steps, size = operands[0].shape
    if operands[0].numel() == 0:
        return
    pointers, *strides = zip(*map(with_rows, operands))
    options = options_for(operands[0], size, ROWS=_ROWS, num_warps=4)
    blocks = triton.cdiv(size, options["BLOCK"])
    with on_device(operands[0].device):
        kernel[(triton.cdiv(batch * steps, _ROWS) * blocks,)](
            *pointers, *results, *(stride for pair in zip(*strides) for stride in pair), batch * steps, steps, size,
            blocks, **options,
        )  # fmt: skip


def silu_gate_triton(gate, values) -> Tensor:
    """Arguments and result as in `mixing.silu_gate_definition`."""
    outputs = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch_gate(_silu_gate_kernel, [gate, values], [outputs])
    return outputs


def silu_gate_backward_triton(grad_outputs, gate, values) -> tuple[Tensor, Tensor]:
    """The gradients of the arguments of `silu_gate_triton`."""
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, values)]
    _launch_gate(_silu_gate_backward_kernel, [grad_outputs, gate, values], results)
    return tuple(results)
