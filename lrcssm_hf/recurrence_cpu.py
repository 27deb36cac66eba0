# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Compiled float32 kernels for the CPU: the operators of `recurrence.py`, step by step and channel-vectorised.

One sweep over time with the states of a block of channels in cache moves each operand through memory once; LLVM turns
the loop over channels into vector instructions, for which the exponential is written out below. Work is split over
batch and channel blocks. Threads come from Python's own pool (the kernels release the GIL), as many as torch may use,
so nothing spins beside torch's threads between calls. Machine code is cached on disk after the first call.

Importing this module needs numba; `recurrence.py` falls back to PyTorch without it.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from .recurrence import LrcParameters


# Contraction to FMA and exact-enough reciprocals; never reassociation, which would undo exp's two-part reduction, and
# never the assumption that nothing is NaN: a NaN input has to be seen in the output.
_FAST = {"contract", "arcp", "nsz"}
_kernel = functools.partial(njit, nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
_inline = functools.partial(njit, inline="always", fastmath=_FAST, error_model="numpy")

# Channels per vector: blocks are cut at multiples of it.
_VECTOR = 16
# A call with fewer elements than this is done before a second thread has woken up.
_PARALLEL_ELEMENTS = 1 << 15
# Float32 partial sums of parameter gradients are moved to float64 after this many steps.
_FLUSH_STEPS = 64


@intrinsic
def _float_from_bits(typingctx, bits):
    """The float32 with these bits (numba has no reinterpreting cast)."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
# exp(x) = 2^n exp(r), |r| <= log(2)/2, with log(2) in two parts so that r is exact; the polynomial is the degree-7 one of
# the Cephes library (S. Moshier), good to 1 ulp. Beyond +-87 a sigmoid is 0 or 1 in float32 to within 1e-38.
_EXP_LIMIT = np.float32(87)
_LOG2_E = np.float32(1.44269504088896341)
_LOG_2_HIGH, _LOG_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_5, _EXP_4, _EXP_3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_EXP_2, _EXP_1, _EXP_0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_EXPONENT_BIAS, _EXPONENT_SHIFT = np.int32(127), np.int32(23)


@_inline()
def _exp(x):
    # Comparisons in this direction keep NaN a NaN.
    x = -_EXP_LIMIT if x < -_EXP_LIMIT else x
    x = _EXP_LIMIT if x > _EXP_LIMIT else x
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LOG_2_HIGH - n * _LOG_2_LOW
    polynomial = ((((_EXP_5 * r + _EXP_4) * r + _EXP_3) * r + _EXP_2) * r + _EXP_1) * r + _EXP_0
    return (polynomial * r * r + r + _ONE) * _float_from_bits((np.int32(n) + _EXPONENT_BIAS) << _EXPONENT_SHIFT)


@_inline()
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@_inline()
def _tanh(x):
    return _TWO * _sigmoid(_TWO * x) - _ONE


@_inline()
def _cell(state, forget_input, update_input, elastance_input, w, j):
    """`recurrence._cell` for one channel; rows of `w` are the fields of `LrcParameters`."""
    activation = _sigmoid(w[0, j] * (state - w[1, j]))
    forget_gate = _sigmoid(w[4, j] + forget_input + w[2, j] * activation)
    update = _tanh(w[4, j] + update_input + w[3, j] * activation)
    velocity = w[5, j] * update - forget_gate * state
    return activation, forget_gate, update, velocity, w[6, j] * state + w[7, j] + elastance_input


@_inline()
def _elastance(drive, shift, j):
    """eps and its derivatives by drive and shift; `shift` None is the asymmetric elastance, a separate compilation."""
    if shift is None:
        elastance = _sigmoid(drive)
        slope = elastance * (_ONE - elastance)
        return elastance, slope, slope
    else:
        upper, lower = _sigmoid(drive + shift[j]), _sigmoid(drive - shift[j])
        upper_slope, lower_slope = upper * (_ONE - upper), lower * (_ONE - lower)
        return upper - lower, upper_slope - lower_slope, upper_slope + lower_slope


@_inline()
def _block(item, blocks, width, size):
    """Batch row and channel range of a work item."""
    first = (item % blocks) * width
    return item // blocks, first, max(min(width, size - first), 0)


@njit(fastmath=True, nogil=True)
def _sum(values):
    total = np.float32(0)
    for value in values:
        total += value
    return total


@_kernel()
def _lrc_forward(forget, update, elastance, time_step, reset, initial, w, shift, states, blocks, width, start, stop):
    """Operands are (flat array, batch stride, time stride); work items `start` to `stop` of batch * blocks."""
    (c, c_b, c_t), (d, d_b, d_t), (q, q_b, q_t) = forget, update, elastance
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t) = time_step, reset
    steps, size = states.shape[1], states.shape[2]
    state = np.empty(width, np.float32)
    for item in range(start, stop):
        b, first, count = _block(item, blocks, width, size)
        w_block = w[:, first : first + count].copy()
        for j in range(count):
            state[j] = initial[b, first + j]
        for t in range(steps):
            if fresh[b * fresh_b + t * fresh_t]:
                for j in range(count):
                    state[j] = 0
            row = states[b, t, first : first + count]
            step = dt[b * dt_b + t * dt_t]
            if step != 0:
                c_row = c[b * c_b + t * c_t + first :][:count]
                d_row = d[b * d_b + t * d_t + first :][:count]
                q_row = q[b * q_b + t * q_t + first :][:count]
                for j in range(count):
                    x = state[j]
                    _, _, _, velocity, drive = _cell(x, c_row[j], d_row[j], q_row[j], w_block, j)
                    eps, _, _ = _elastance(drive, shift, first + j)
                    x += step * eps * velocity
                    state[j] = x
                    row[j] = x
            else:
                for j in range(count):
                    row[j] = state[j]


@_kernel()
def _lrc_backward(
    grads, states, forget, update, elastance, time_step, reset, initial, w, shift,
    grad_forget, grad_update, grad_elastance, grad_time_step, grad_initial, grad_w, blocks, width, start, stop,
):  # fmt: skip
    """The adjoint sweep, from the last step to the first; partial sums of the shared gradients per work item."""
    (c, c_b, c_t), (d, d_b, d_t), (q, q_b, q_t) = forget, update, elastance
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t), (g, g_b, g_t) = time_step, reset, grads
    (gq, gq_b, gq_t) = grad_elastance
    steps, size = states.shape[1], states.shape[2]
    adjoint, previous = np.empty(width, np.float32), np.empty(width, np.float32)
    increments = np.empty(width, np.float32)
    sums = np.empty((grad_w.shape[1], width), np.float32)
    for item in range(start, stop):
        b, first, count = _block(item, blocks, width, size)
        w_block = w[:, first : first + count].copy()
        adjoint[:] = 0
        sums[:] = 0
        for t in range(steps - 1, -1, -1):
            if fresh[b * fresh_b + t * fresh_t]:
                previous[:] = 0
            elif t == 0:
                for j in range(count):
                    previous[j] = initial[b, first + j]
            else:
                row = states[b, t - 1, first : first + count]
                for j in range(count):
                    previous[j] = row[j]
            step = dt[b * dt_b + t * dt_t]
            c_row = c[b * c_b + t * c_t + first :][:count]
            d_row = d[b * d_b + t * d_t + first :][:count]
            q_row = q[b * q_b + t * q_t + first :][:count]
            g_row = g[b * g_b + t * g_t + first :][:count]
            gq_row = gq[b * gq_b + t * gq_t + first :][:count]
            gc_row = grad_forget[b, t, first : first + count]
            gd_row = grad_update[b, t, first : first + count]
            for j in range(count):
                x = previous[j]
                n, gate, tanh_z, velocity, drive = _cell(x, c_row[j], d_row[j], q_row[j], w_block, j)
                eps, eps_slope, shift_slope = _elastance(drive, shift, first + j)
                lam = adjoint[j] + g_row[j]
                grad_eps = lam * step * velocity
                grad_velocity = lam * step * eps
                grad_drive = grad_eps * eps_slope
                grad_f = -grad_velocity * x * gate * (_ONE - gate)
                grad_z = grad_velocity * w_block[5, j] * (_ONE - tanh_z * tanh_z)
                grad_synapse = (grad_f * w_block[2, j] + grad_z * w_block[3, j]) * n * (_ONE - n)
                gc_row[j] = grad_f
                gd_row[j] = grad_z
                gq_row[j] = grad_drive
                increments[j] = lam * eps * velocity
                sums[0, j] += grad_synapse * (x - w_block[1, j])
                sums[1, j] -= grad_synapse * w_block[0, j]
                sums[2, j] += grad_f * n
                sums[3, j] += grad_z * n
                sums[4, j] += grad_f + grad_z
                sums[5, j] += grad_velocity * tanh_z
                sums[6, j] += grad_drive * x
                sums[7, j] += grad_drive
                if shift is not None:
                    sums[8, j] += grad_eps * shift_slope
                adjoint[j] = lam - grad_velocity * gate + grad_synapse * w_block[0, j] + grad_drive * w_block[6, j]
            if grad_time_step is not None:
                grad_time_step[item % blocks, b, t] = _sum(increments[:count])
            if fresh[b * fresh_b + t * fresh_t]:
                adjoint[:] = 0
            if t % _FLUSH_STEPS == 0:
                for k in range(grad_w.shape[1]):
                    for j in range(count):
                        grad_w[b, k, first + j] += sums[k, j]
                sums[:] = 0
        for j in range(count):
            grad_initial[b, first + j] = adjoint[j]


@_kernel()
def _linear_scan(decay, inputs, initial, states, reverse, blocks, width, start, stop):
    """h_t = decay_t * h_{t-1} + inputs_t, or from the end for `reverse`."""
    (a, a_b, a_t), (u, u_b, u_t) = decay, inputs
    steps, size = states.shape[1], states.shape[2]
    state = np.empty(width, np.float32)
    for item in range(start, stop):
        b, first, count = _block(item, blocks, width, size)
        for j in range(count):
            state[j] = initial[b, first + j]
        for k in range(steps):
            t = steps - 1 - k if reverse else k
            a_row = a[b * a_b + t * a_t + first :][:count]
            u_row = u[b * u_b + t * u_t + first :][:count]
            row = states[b, t, first : first + count]
            for j in range(count):
                state[j] = a_row[j] * state[j] + u_row[j]
                row[j] = state[j]


# --- Tensors in, tensors out ----------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> tuple[np.ndarray, int, int]:
    """A (B, T, ...) tensor as a flat array and its two leading strides, without a copy where channels are contiguous."""
    if tensor.dim() == 3 and tensor.stride(2) != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    flat = tensor.detach().as_strided((extent,), (1,)) if tensor.numel() else tensor.new_empty(0)
    return flat.numpy(), tensor.stride(0), tensor.stride(1)


def _optional(tensor: Tensor | None, default: float | bool, batch: int, steps: int, *size: int):
    """The rows of an optional operand; absent, those of one repeated default."""
    if tensor is None:
        tensor = torch.full((1, 1, *size), default).expand(batch, steps, *size)
    return _rows(tensor)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lrcssm")


def _run(kernel, arguments: tuple, batch: int, steps: int, size: int, blocks: int, width: int) -> None:
    items = batch * blocks
    threads = min(torch.get_num_threads(), items) if batch * steps * size >= _PARALLEL_ELEMENTS else 1
    if threads == 1:
        return kernel(*arguments, blocks, width, 0, items)
    bounds = [items * i // threads for i in range(threads + 1)]
    futures = [_pool(threads).submit(kernel, *arguments, blocks, width, *pair) for pair in zip(bounds, bounds[1:])]
    for future in futures:
        future.result()


def _partition(batch: int, size: int) -> tuple[int, int]:
    """Channel blocks per batch row and their width, such that the threads share the work evenly."""
    threads = torch.get_num_threads()
    blocks = min(threads // math.gcd(batch, threads), -(-size // _VECTOR))
    width = -(-size // (blocks * _VECTOR)) * _VECTOR
    return -(-size // width), width


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _operands(forget_input, update_input, elastance_input, time_step, reset, initial_state, weights) -> tuple:
    batch, steps, size = forget_input.shape
    symmetric = weights.shape[0] == len(LrcParameters._fields)
    w = weights.detach().contiguous().numpy()
    return (
        _rows(_float(forget_input)),
        _rows(_float(update_input)),
        _optional(_float(elastance_input), 0.0, batch, steps, size),
        _optional(_float(time_step), 1.0, batch, steps),
        _optional(reset, False, batch, steps),
        initial_state.detach().contiguous().numpy(),
        w,
        w[-1] if symmetric else None,
    )


def lrc_scan(forget_input, update_input, elastance_input, time_step, reset, initial_state, weights) -> Tensor:
    """The states (B, T, D); arguments as in `recurrence._lrc_scan_op`."""
    batch, steps, size = forget_input.shape
    states = torch.empty(batch, steps, size)
    operands = _operands(forget_input, update_input, elastance_input, time_step, reset, initial_state, weights)
    blocks, width = _partition(batch, size)
    _run(_lrc_forward, (*operands, states.numpy()), batch, steps, size, blocks, width)
    return states


def lrc_scan_backward(
    grad_states, states, forget_input, update_input, elastance_input, time_step, reset, initial_state, weights
) -> tuple[Tensor, ...]:
    """The gradients; arguments and results as in `recurrence._lrc_scan_backward_op`."""
    batch, steps, size = forget_input.shape
    operands = _operands(forget_input, update_input, elastance_input, time_step, reset, initial_state, weights)
    blocks, width = _partition(batch, size)
    grad_forget, grad_update = torch.empty_like(states), torch.empty_like(states)
    # Without an elastance input its gradient is written over and over into one row that stays in cache; one row for
    # each batch row, so that threads do not share it.
    grad_elastance = torch.empty(batch, 1 if elastance_input is None else steps, size)
    grad_time_step = None if time_step is None else torch.empty(blocks, batch, steps)
    grad_initial = torch.empty_like(initial_state)
    grad_weights = torch.zeros(batch, *weights.shape, dtype=torch.float64)
    results = (
        grad_forget.numpy(),
        grad_update.numpy(),
        _rows(grad_elastance if elastance_input is not None else grad_elastance.expand(batch, steps, size)),
        None if grad_time_step is None else grad_time_step.numpy(),
        grad_initial.numpy(),
        grad_weights.numpy(),
    )
    arguments = (_rows(grad_states), states.numpy(), *operands, *results)
    _run(_lrc_backward, arguments, batch, steps, size, blocks, width)
    return (
        grad_forget.to(forget_input.dtype),
        grad_update.to(update_input.dtype),
        torch.empty(0) if elastance_input is None else grad_elastance.to(elastance_input.dtype),
        torch.empty(0) if grad_time_step is None else grad_time_step.sum(0),
        grad_initial,
        grad_weights.sum(0).to(weights.dtype),
    )


def prefix_scan(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """The states (B, T, D) of the linear recurrence; arguments as in `recurrence.prefix_scan`."""
    batch, steps, size = inputs.shape
    states = torch.empty(batch, steps, size)
    blocks, width = _partition(batch, size)
    initial = initial_state.detach().contiguous().numpy()
    arguments = (_rows(decay), _rows(inputs), initial, states.numpy(), reverse)
    _run(_linear_scan, arguments, batch, steps, size, blocks, width)
    return states
