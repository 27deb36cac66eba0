# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The operators of `mixing.py` on the CPU, in float32, of inputs in float32 or bfloat16.

The convolution has the inputs before a step for its state: the steps are taken one by one, and a document's first finds
zeros. Its text is written out for every number of taps, because LLVM vectorises a loop only over rows whose places in
the scratch buffer it knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cell_compiler import fill
from .cpu_kernels import ARRAYS, define, empty, partition, place, run, with_rows


# Rows of the norm that are one piece of work.
_ROWS = 64
# Numbers of a result from which on it is worth to ask for huge pages.
_SMALL = 1 << 14


# Rows of the scratch buffer: the weights by their distance in steps, the bias, the input and those before it, and the
# output. Operands are (address, batch stride, time stride), or the address of what is contiguous; 0 is that of none.
_CONVOLUTION = """
def convolution(inputs, past, resets, lengths, weight, bias, outputs, last, steps, size, blocks, width, start, stop):
    (x_at, x_b, x_t), (fresh_at, fresh_b, fresh_t) = inputs, resets
    x, y, w = $array(x_at), $array(outputs), _floats(weight)
    s = np.empty($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        end = _longs(lengths)[b] if lengths else steps
        kept = (b * size + first) * ($taps - 1)
        _load_across(s, 0, w, first * $taps, count, $taps, $taps)
        _load(s, $taps * _WIDTH, _floats(bias), first, count)
        if not past:
            s[($input + 1) * _WIDTH : ($input + $taps) * _WIDTH] = 0
        else:
            _load_across(s, $input + 1, $array(past), kept, count, $taps - 1, $taps - 1)
        for t in range(steps + 1):
            if t == end:
                _store_across(s, $input + 1, $array(last), kept, count, $taps - 1)
            if t == steps:
                break
            if fresh_at and _flags(fresh_at)[b * fresh_b + t * fresh_t]:
                s[($input + 1) * _WIDTH : ($input + $taps) * _WIDTH] = 0
            _load_input(s, $input * _WIDTH, x, b * x_b + t * x_t + first, count, _STEPS_AHEAD * x_t, False)
            for j in range(padded):
                $read
                z = $sum
                s[$output * _WIDTH + j] = $activated
                $shift
            _store(s, $output * _WIDTH, y, (b * steps + t) * size + first, count)
"""

# Then the gradient of the output, those of the inputs before the step that come from later ones, that of the input, and
# the sums of those of weights and bias, in float32 for a number of steps and then in float64.
_CONVOLUTION_BACKWARD = """
def convolution_backward(
    grads, grad_last, inputs, past, resets, lengths, weight, bias,
    grad_inputs, grad_past, grad_weight, grad_bias, steps, size, blocks, width, start, stop,
):
    (g_at, g_b, g_t), (x_at, x_b, x_t), (fresh_at, fresh_b, fresh_t) = grads, inputs, resets
    g, x, fresh, w, grad_x = $array(g_at), $array(x_at), _flags(fresh_at), _floats(weight), $array(grad_inputs)
    by_weight, by_bias = _doubles(grad_weight), _doubles(grad_bias)
    s = np.zeros($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        end = _longs(lengths)[b] if lengths else steps
        kept = (b * size + first) * ($taps - 1)
        _load_across(s, 0, w, first * $taps, count, $taps, $taps)
        _load(s, $taps * _WIDTH, _floats(bias), first, count)
        channel = b * size + first
        by_weight[channel * $taps : (channel + count) * $taps] = 0
        by_bias[channel : channel + count] = 0
        s[$before * _WIDTH : $grad_input * _WIDTH] = 0
        for t in range(steps, -1, -1):
            if t == end and grad_last:
                s[($input + 1) * _WIDTH : ($input + $taps) * _WIDTH] = 0
                _load_across(s, $input + 1, $array(grad_last), kept, count, $taps - 1, $taps - 1)
                for j in range(($taps - 1) * _WIDTH):
                    s[$before * _WIDTH + j] += s[($input + 1) * _WIDTH + j]
            if t == 0:
                break
            step = t - 1
            # How many of the inputs before this are of the same document; `reach` past the first are in `past`.
            reach = 0
            while reach < $taps - 1 and step >= reach:
                if fresh_at and fresh[b * fresh_b + (step - reach) * fresh_t]:
                    break
                reach += 1
            goes_on = step < reach and past != 0
            _load_input(s, $input * _WIDTH, x, b * x_b + step * x_t + first, count, -_STEPS_AHEAD * x_t, False)
            s[($input + 1) * _WIDTH : ($input + $taps) * _WIDTH] = 0
            if goes_on:
                _load_across(s, $input + 1 + step, $array(past), kept, count, $taps - 1, $taps - 1 - step)
            for k in range(1, min(reach, step) + 1):
                _load(s, ($input + k) * _WIDTH, x, b * x_b + (step - k) * x_t + first, count)
            _load_input(s, $grad * _WIDTH, g, b * g_b + step * g_t + first, count, -_STEPS_AHEAD * g_t, False)
            for j in range(padded):
                $read
                z = $sum
                $slope
                $carry
            _store(s, $grad_input * _WIDTH, grad_x, (b * steps + step) * size + first, count)
            if fresh_at and fresh[b * fresh_b + step * fresh_t]:
                s[$before * _WIDTH : $grad_input * _WIDTH] = 0
            if step % _FLUSH_STEPS == 0:
                for j in range(count):
                    for k in range($taps):
                        by_weight[(b * size + first + j + 1) * $taps - 1 - k] += s[($sums + k) * _WIDTH + j]
                    by_bias[b * size + first + j] += s[($sums + $taps) * _WIDTH + j]
                s[$sums * _WIDTH :] = 0
        _store_across(s, $before, $array(grad_past), kept, count, $taps - 1)
"""

_SILU_GATE = """
def silu_gate(gates, values, outputs, steps, size, blocks, width, start, stop):
    (g_at, g_b, g_t), (v_at, v_b, v_t) = gates, values
    g, v, y = $array(g_at), $value_array(v_at), $array(outputs)
    s = np.zeros(2 * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for t in range(steps):
            _load_input(s, 0, g, b * g_b + t * g_t + first, count, _STEPS_AHEAD * g_t, False)
            _load_input(s, _WIDTH, v, b * v_b + t * v_t + first, count, _STEPS_AHEAD * v_t, False)
            for j in range(padded):
                s[j] = s[j] * _sigmoid(s[j]) * s[_WIDTH + j]
            _store(s, 0, y, (b * steps + t) * size + first, count)
"""

_SILU_GATE_BACKWARD = """
def silu_gate_backward(grads, gates, values, grad_gates, grad_values, steps, size, blocks, width, start, stop):
    (d_at, d_b, d_t), (g_at, g_b, g_t), (v_at, v_b, v_t) = grads, gates, values
    d, g, v = $array(d_at), $array(g_at), $value_array(v_at)
    by_gate, by_value = $array(grad_gates), $value_array(grad_values)
    s = np.zeros(3 * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for t in range(steps):
            _load_input(s, 0, d, b * d_b + t * d_t + first, count, _STEPS_AHEAD * d_t, False)
            _load_input(s, _WIDTH, g, b * g_b + t * g_t + first, count, _STEPS_AHEAD * g_t, False)
            _load_input(s, 2 * _WIDTH, v, b * v_b + t * v_t + first, count, _STEPS_AHEAD * v_t, False)
            for j in range(padded):
                grad, gate, value = s[j], s[_WIDTH + j], s[2 * _WIDTH + j]
                y = _sigmoid(gate)
                s[_WIDTH + j] = grad * value * (y + gate * y * (_ONE - y))
                s[2 * _WIDTH + j] = grad * gate * y
            _store(s, _WIDTH, by_gate, (b * steps + t) * size + first, count)
            _store(s, 2 * _WIDTH, by_value, (b * steps + t) * size + first, count)
"""


# An item is a number of rows; their scratch is what the hardware caches of them.
_RMS_NORM = """
def rms_norm(inputs, weight, outputs, eps, rows, size, blocks, width, start, stop):
    x, w, y = $array(inputs), _floats(weight)[:size], $array(outputs)
    for row in range(start * $rows, min(stop * $rows, rows)):
        source, target = x[row * size : (row + 1) * size], y[row * size : (row + 1) * size]
        scale = _ONE / np.sqrt(_sum_of_products(source, source) / np.float32(size) + np.float32(eps))
        for j in range(size):
            target[j] = _narrow(_widen(source[j]) * scale * w[j], y)
"""

_RMS_NORM_BACKWARD = """
def rms_norm_backward(grads, inputs, weight, grad_inputs, grad_weight, eps, rows, size, blocks, width, start, stop):
    g, x, w, by_input = $array(grads), $array(inputs), _floats(weight)[:size], $array(grad_inputs)
    for item in range(start, stop):
        sums = _floats(grad_weight)[item * size : (item + 1) * size]
        sums[:] = 0
        weighted = np.empty(size, np.float32)
        for row in range(item * $rows, min((item + 1) * $rows, rows)):
            grad, source = g[row * size : (row + 1) * size], x[row * size : (row + 1) * size]
            target = by_input[row * size : (row + 1) * size]
            scale = _ONE / np.sqrt(_sum_of_products(source, source) / np.float32(size) + np.float32(eps))
            for j in range(size):
                weighted[j] = _widen(grad[j]) * w[j]
            along = _sum_of_products(weighted, source) / np.float32(size) * scale * scale
            for j in range(size):
                target[j] = _narrow((weighted[j] - _widen(source[j]) * along) * scale, by_input)
            for j in range(size):
                sums[j] += _widen(grad[j]) * _widen(source[j]) * scale
"""


def _row(number: int) -> str:
    return f"s[{number} * _WIDTH + j]"


@functools.cache
def _convolution_kernel(taps: int, silu: bool, array: str) -> Callable:
    first = taps + 1
    text = fill(
        _CONVOLUTION,
        taps=str(taps),
        array=array,
        rows=str(2 * taps + 2),
        input=str(first),
        output=str(2 * taps + 1),
        activated="z * _sigmoid(z)" if silu else "z",
        **_sum_of(taps),
        shift=[f"{_row(first + k + 1)} = x{k}" for k in range(taps - 1)],
    )
    return define("convolution", f"{taps}_{'silu' if silu else 'linear'}{array}", text)


@functools.cache
def _convolution_backward_kernel(taps: int, silu: bool, array: str) -> Callable:
    grad = 2 * taps + 1
    before, grad_input, sums = grad + 1, grad + taps, grad + taps + 1
    carry = [f"{_row(grad_input)} = d * w0" + (f" + {_row(before)}" if taps > 1 else "")]
    for k in range(1, taps):
        later = f" + {_row(before + k)}" if k + 1 < taps else ""
        carry.append(f"{_row(before + k - 1)} = d * w{k}{later}")
    carry += [f"{_row(sums + k)} += d * x{k}" for k in range(taps)]
    slope = ["y = _sigmoid(z)", f"d = {_row(grad)} * (y + z * y * (_ONE - y))"] if silu else [f"d = {_row(grad)}"]
    text = fill(
        _CONVOLUTION_BACKWARD,
        taps=str(taps),
        array=array,
        rows=str(sums + taps + 1),
        input=str(taps + 1),
        grad=str(grad),
        before=str(before),
        grad_input=str(grad_input),
        sums=str(sums),
        **_sum_of(taps),
        slope=slope,
        carry=[*carry, f"{_row(sums + taps)} += d"],
    )
    return define("convolution_backward", f"{taps}_{'silu' if silu else 'linear'}{array}", text)


def _sum_of(taps: int) -> dict[str, str | list[str]]:
    read = [f"w{k}, x{k} = {_row(k)}, {_row(taps + 1 + k)}" for k in range(taps)]
    return {"read": read, "sum": " + ".join([_row(taps), *(f"w{k} * x{k}" for k in range(taps))])}


@functools.cache
def _gate_kernel(name: str, array: str, value_array: str) -> Callable:
    text = {"silu_gate": _SILU_GATE, "silu_gate_backward": _SILU_GATE_BACKWARD}[name]
    return define(name, f"{array}{value_array}", fill(text, array=array, value_array=value_array))


@functools.cache
def _norm_kernel(name: str, array: str) -> Callable:
    text = {"rms_norm": _RMS_NORM, "rms_norm_backward": _RMS_NORM_BACKWARD}[name]
    return define(name, array, fill(text, array=array, rows=str(_ROWS)))


def _like(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.numel() > _SMALL:
        return empty(*tensor.shape)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _no_rows(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else place(tensor)


def _convolution_operands(inputs, weight, bias, past, reset, lengths) -> tuple[tuple, tuple]:
    """The tensors that the kernels read, to be kept while they do, and where these lie."""
    inputs, weight, bias = with_rows(inputs), weight.float().contiguous(), bias.float().contiguous()
    past = None if past is None else past.to(inputs.dtype).contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    places = place(inputs), _address(past), _no_rows(reset), _address(lengths), weight.data_ptr(), bias.data_ptr()
    return (inputs, past, reset, lengths, weight, bias), places


def convolution_cpu(inputs, weight, bias, past, reset, lengths, silu: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `mixing.convolution_definition`."""
    (batch, steps, size), taps = inputs.shape, weight.shape[1]
    kept, places = _convolution_operands(inputs, weight, bias, past, reset, lengths)
    outputs, last = _like(kept[0]), inputs.new_empty(batch, size, taps - 1)
    arguments = *places, outputs.data_ptr(), last.data_ptr(), steps, size
    kernel = _convolution_kernel(taps, silu, ARRAYS[inputs.dtype])
    run(kernel, arguments, batch, steps, size, *partition(batch, size))
    return outputs, last


def convolution_backward_cpu(
    grad_outputs, grad_last, inputs, weight, bias, past, reset, lengths, silu: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `convolution_cpu`."""
    (batch, steps, size), taps, dtype = inputs.shape, weight.shape[1], inputs.dtype
    grads = with_rows(torch.zeros_like(inputs) if grad_outputs is None else grad_outputs.to(dtype))
    grad_last = None if grad_last is None else grad_last.to(dtype).contiguous()
    kept, places = _convolution_operands(inputs, weight, bias, past, reset, lengths)
    grad_inputs, grad_past = _like(kept[0]), inputs.new_empty(batch, size, taps - 1)
    grad_weight = weight.new_empty(batch, size, taps, dtype=torch.float64)
    grad_bias = bias.new_empty(batch, size, dtype=torch.float64)
    results = (tensor.data_ptr() for tensor in (grad_inputs, grad_past, grad_weight, grad_bias))
    arguments = place(grads), _address(grad_last), *places, *results, steps, size
    kernel = _convolution_backward_kernel(taps, silu, ARRAYS[dtype])
    run(kernel, arguments, batch, steps, size, *partition(batch, size))
    by_weight, by_bias = grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)
    return grad_inputs, by_weight, by_bias, None if past is None else grad_past, None, None, None


def silu_gate_cpu(gate, values) -> Tensor:
    """Arguments and result as in `mixing.silu_gate_definition`."""
    batch, steps, size = gate.shape
    gate, values = with_rows(gate), with_rows(values)
    outputs = _like(gate)
    arguments = place(gate), place(values), outputs.data_ptr(), steps, size
    kernel = _gate_kernel("silu_gate", ARRAYS[gate.dtype], ARRAYS[values.dtype])
    run(kernel, arguments, batch, steps, size, *partition(batch, size))
    return outputs


def silu_gate_backward_cpu(grad_outputs, gate, values) -> tuple[Tensor, Tensor]:
    """The gradients of the arguments of `silu_gate_cpu`."""
    batch, steps, size = gate.shape
    gate, values, grads = with_rows(gate), with_rows(values), with_rows(grad_outputs.to(gate.dtype))
    grad_gate, grad_values = _like(gate), _like(values)
    arguments = (
        place(grads), place(gate), place(values), grad_gate.data_ptr(), grad_values.data_ptr(), steps, size
    )  # fmt: skip
    kernel = _gate_kernel("silu_gate_backward", ARRAYS[gate.dtype], ARRAYS[values.dtype])
    run(kernel, arguments, batch, steps, size, *partition(batch, size))
    return grad_gate, grad_values


def rms_norm_cpu(inputs, weight, eps: float) -> Tensor:
    """Arguments and result as in `mixing.rms_norm_definition`."""
    inputs, weight, size = inputs.contiguous(), weight.float().contiguous(), inputs.shape[-1]
    outputs, rows = _like(inputs), inputs.numel() // size
    arguments = inputs.data_ptr(), weight.data_ptr(), outputs.data_ptr(), eps, rows, size
    run(_norm_kernel("rms_norm", ARRAYS[inputs.dtype]), arguments, -(-rows // _ROWS), _ROWS, size, 1, size)
    return outputs


def rms_norm_backward_cpu(grad_outputs, inputs, weight, eps: float) -> tuple[Tensor, Tensor, None]:
    """The gradients of the arguments of `rms_norm_cpu`."""
    grads, inputs, size = grad_outputs.to(inputs.dtype).contiguous(), inputs.contiguous(), inputs.shape[-1]
    w, grad_inputs, rows = weight.float().contiguous(), _like(inputs), inputs.numel() // size
    items = -(-rows // _ROWS)
    grad_weight = torch.empty(items, size)
    tensors = grads, inputs, w, grad_inputs, grad_weight
    arguments = *(tensor.data_ptr() for tensor in tensors), eps, rows, size
    run(_norm_kernel("rms_norm_backward", ARRAYS[inputs.dtype]), arguments, items, _ROWS, size, 1, size)
    return grad_inputs, grad_weight.sum(0).to(weight.dtype), None
