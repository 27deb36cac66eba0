# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for GPUs: the operators of `recurrence.py`, in float32 or float64, on inputs of any floating dtype.

A thread owns a few channels and walks through a chunk of time with their states in registers, while the next rows are
on their way from memory. Where batch and channels alone do not fill the chip, time is cut into chunks that run at once:

    sequential   one chunk.
    chunked      multiple shooting (`recurrence._solve_chunked`): `_sweep_kernel` runs all chunks from guessed starts,
                 `_stitch_kernel` checks their boundaries and corrects the starts by a scan over the chunks.
    newton       DEER (`recurrence._solve_newton`): `_newton_kernel`, a scan over all steps in every iteration.

Whether an answer has converged is decided on the device, for every block of channels on its own: a fixed number of
sweeps is launched, of which those that are not needed return at once, and last the sequential solver for the blocks
that are still unsolved. The host never waits, so a call can be captured in a CUDA graph.

The adjoint and `prefix_scan` are linear: one pass reduces every chunk to (product, end), a scan over the chunks gives
their starts, and a second pass writes the result. Gradients that the batch shares are summed per chunk and then by
torch: no atomics, the same result every time.

Importing this module needs triton; `recurrence.py` falls back to PyTorch without it.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from .recurrence import SOLVERS, Kernels, LrcParameters, last_changes


try:  # Guarded, because transformers refuses a Hub model's code when an unguarded import is missing.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The GPU kernels need triton (`pip install triton`): {error}", name="triton") from error


# Channels of a program: two for every thread of a warp, so that a row of bfloat16 is read in words of four bytes; half
# as many in float64, for which there would not be the registers.
_BLOCK = 64
# Rows that are on their way from memory while a step is computed.
_STAGES = tl.constexpr(5)
# Steps, or chunks, that a program scans at a time; fewer where more is computed for each of them.
_LINEAR_TILE, _CHUNKS_TILE, _NEWTON_TILE = 64, 32, 16
# Threads that fill a processor of the GPU.
_LANES = 1024
# Chunks are not cut shorter than this: their boundaries have to be worth less than their steps.
_SHORTEST_CHUNK = 64
# Sweeps launched before the sequential solver takes over. Contracting recurrences need two or three.
_MAX_SWEEPS = 6
_MAX_NEWTON_ITERATIONS = tl.constexpr(30)
# The smallest number a residual is measured against, as in `recurrence._residual`.
_TINY = tl.constexpr(1.1754943508222875e-38)


# --- The cell -------------------------------------------------------------------------------------------------------


@triton.jit
def _sigmoids(a, b):
    """Two sigmoids for the price of one division. Above 40 they are 1 in every precision; NaN stays NaN."""
    a = tl.exp(tl.minimum(a, 40.0, propagate_nan=tl.PropagateNan.ALL))
    b = tl.exp(tl.minimum(b, 40.0, propagate_nan=tl.PropagateNan.ALL))
    reciprocal = 1.0 / ((1.0 + a) * (1.0 + b))
    return a * (1.0 + b) * reciprocal, b * (1.0 + a) * reciprocal


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _carried(factor, state):
    """factor * state, but 0 where the state is 0: products of many factors overflow before states do."""
    return tl.where(state == 0, 0.0, factor * state)


@triton.jit
def _compose(factor_1, addend_1, factor_2, addend_2):
    """h -> factor_1 h + addend_1, then h -> factor_2 h + addend_2."""
    return factor_1 * factor_2, _carried(factor_2, addend_1) + addend_2


@triton.jit
def _load_weights(weights, size, channel, inside, SYMMETRIC: tl.constexpr):
    """The fields of `LrcParameters` in their order; an absent elastance shift is 0."""
    scale = tl.load(weights + channel, mask=inside, other=0.0)
    shift = tl.load(weights + size + channel, mask=inside, other=0.0)
    forget_weight = tl.load(weights + 2 * size + channel, mask=inside, other=0.0)
    update_weight = tl.load(weights + 3 * size + channel, mask=inside, other=0.0)
    conductance = tl.load(weights + 4 * size + channel, mask=inside, other=0.0)
    potential = tl.load(weights + 5 * size + channel, mask=inside, other=0.0)
    elastance_weight = tl.load(weights + 6 * size + channel, mask=inside, other=0.0)
    bias = tl.load(weights + 7 * size + channel, mask=inside, other=0.0)
    elastance_shift = tl.zeros_like(scale)
    if SYMMETRIC:
        elastance_shift = tl.load(weights + 8 * size + channel, mask=inside, other=0.0)
    return scale, shift, forget_weight, update_weight, conductance, potential, elastance_weight, bias, elastance_shift


@triton.jit
def _load_step(
    c, d, q, dt, reset, row_c, row_d, row_q, row, channel, inside, rows_inside, DTYPE: tl.constexpr
):  # fmt: skip
    """Inputs, time step and reset flag of one step (`row` a number) or many (`row` a column).

    `row_*` are the rows' offsets in the respective tensor. What a step of no time would have read does not matter.
    """
    forget_input = tl.load(c + row_c + channel, mask=inside, other=0.0).to(DTYPE)
    update_input = tl.load(d + row_d + channel, mask=inside, other=0.0).to(DTYPE)
    elastance_input = tl.zeros_like(forget_input)
    if q is not None:
        elastance_input = tl.load(q + row_q + channel, mask=inside, other=0.0).to(DTYPE)
    step = tl.full([], 1.0, DTYPE)
    if dt is not None:
        step = tl.load(dt + row, mask=rows_inside, other=1.0)
        forget_input = tl.where(_finite(forget_input), forget_input, tl.where(step == 0, 0.0, forget_input))
        update_input = tl.where(_finite(update_input), update_input, tl.where(step == 0, 0.0, update_input))
        elastance_input = tl.where(_finite(elastance_input), elastance_input, tl.where(step == 0, 0.0, elastance_input))
    fresh = tl.full([], 0, tl.int1)
    if reset is not None:
        fresh = tl.load(reset + row, mask=rows_inside, other=0) != 0
    return forget_input, update_input, elastance_input, step, fresh


@triton.jit
def _cell(x, forget_input, update_input, elastance_input, w, SYMMETRIC: tl.constexpr):
    """`recurrence._cell`: n, forget gate, tanh(z), eps, its derivatives by drive and by shift, v."""
    synapse = w[0] * (x - w[1])
    drive = w[6] * x + w[7] + elastance_input
    if SYMMETRIC:
        n, _ = _sigmoids(synapse, synapse)
        upper, lower = _sigmoids(drive + w[8], drive - w[8])
        upper_slope, lower_slope = upper * (1.0 - upper), lower * (1.0 - lower)
        eps, slope, shift_slope = upper - lower, upper_slope - lower_slope, upper_slope + lower_slope
    else:
        n, eps = _sigmoids(synapse, drive)
        slope = eps * (1.0 - eps)
        shift_slope = slope
    gate, update = _sigmoids(w[4] + forget_input + w[2] * n, 2.0 * (w[4] + update_input + w[3] * n))
    update = 2.0 * update - 1.0
    return n, gate, update, eps, slope, shift_slope, w[5] * update - gate * x


@triton.jit
def _advance(x, eps, velocity, step):
    return tl.where(step == 0, x, x + step * eps * velocity)


@triton.jit
def _slope(x, n, gate, update, eps, slope, velocity, w):
    """(dx_t/dx_{t-1} - 1) / dt."""
    through_n = w[5] * (1.0 - update * update) * w[3] - x * gate * (1.0 - gate) * w[2]
    return eps * (through_n * w[0] * n * (1.0 - n) - gate) + slope * w[6] * velocity


@triton.jit
def _linearise(previous, forget_input, update_input, elastance_input, step, fresh, w, SYMMETRIC: tl.constexpr):
    """F(x_{t-1}) and dF/dx_{t-1}."""
    x = tl.where(fresh, 0.0, previous)
    n, gate, update, eps, slope, _, velocity = _cell(x, forget_input, update_input, elastance_input, w, SYMMETRIC)
    jacobian = 1.0 + step * _slope(x, n, gate, update, eps, slope, velocity, w)
    return _advance(x, eps, velocity, step), tl.where(fresh, 0.0, jacobian)


@triton.jit
def _residual(state, previous, target):
    """`recurrence._residual`, elementwise."""
    scale = tl.maximum(tl.maximum(tl.abs(state), tl.abs(previous)), _TINY)
    error = tl.abs(state - target) / scale
    # Anything that is not a number is no solution: it must not compare as small.
    return tl.where(_finite(error), error, float("inf"))


# --- The recurrence -------------------------------------------------------------------------------------------------
# Programs are numbered channel block first, then chunk, then batch row. `log` is (4, batch, blocks) float32, the rows
# iterations, residual, unsolved (1 until a solver has converged there) and the solver's number.


@triton.jit
def _program(chunks, blocks, BLOCK: tl.constexpr):
    """Batch row, chunk, channel block and its channels."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    return program // (blocks * chunks), program // blocks % chunks, block, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _sweep_kernel(
    c, d, q, dt, reset, weights, starts, states, products, log,
    c_b, c_t, d_b, d_t, q_b, q_t, steps, size, chunk, chunks, blocks, batch,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The exact recurrence through every chunk from its start; where `products` is given, also the chunk's Jacobian.

    starts, products (B, chunks, D); states (B, T, D). With a log, only blocks that are unsolved.
    """
    b, index, block, channel = _program(chunks, blocks, BLOCK)
    inside = channel < size
    w = _load_weights(weights, size, channel, inside, SYMMETRIC)
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    if log is not None:
        unsolved = tl.load(log + (2 * batch + b) * blocks + block) != 0
        last = tl.where(unsolved, last, first)
    x = tl.load(starts + (b * chunks + index) * size + channel, mask=inside, other=0.0)
    product = tl.full([BLOCK], 1.0, DTYPE)
    for t in tl.range(first, last, num_stages=_STAGES):
        forget_input, update_input, elastance_input, step, fresh = _load_step(
            c, d, q, dt, reset, b * c_b + t * c_t, b * d_b + t * d_t, b * q_b + t * q_t, b * steps + t,
            channel, inside, True, DTYPE,
        )  # fmt: skip
        x, jacobian = _linearise(x, forget_input, update_input, elastance_input, step, fresh, w, SYMMETRIC)
        if products is not None:
            product *= jacobian
        tl.store(states + (b * steps + t) * size + channel, x, mask=inside)
    if products is not None:
        ran = channel < tl.where(last > first, size, 0)
        tl.store(products + (b * chunks + index) * size + channel, product, mask=ran)


@triton.jit
def _stitch_kernel(
    c, d, q, dt, reset, weights, starts, states, products, log,
    c_b, c_t, d_b, d_t, q_b, q_t, steps, size, chunk, chunks, blocks, batch, tolerance,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Checks the step into every chunk, and corrects the starts by Newton's method on the boundaries."""
    b, _, block, channel = _program(1, blocks, BLOCK)
    w = _load_weights(weights, size, channel, channel < size, SYMMETRIC)
    entry = log + b * blocks + block
    plane = batch * blocks
    if tl.load(entry + 2 * plane) != 0:
        worst = tl.zeros([TILE, BLOCK], DTYPE)
        carry = tl.zeros([BLOCK], DTYPE)
        last_row = tl.arange(0, TILE)[:, None] == TILE - 1
        for tile in range(1, chunks, TILE):
            index = tile + tl.arange(0, TILE).to(tl.int64)[:, None]
            inside = (index < chunks) & (channel < size)[None, :]
            t = index * chunk
            at = (b * steps + t) * size + channel[None, :]
            boundary = (b * chunks + index) * size + channel[None, :]
            state = tl.load(states + at, mask=inside, other=0.0)
            end = tl.load(states + at - size, mask=inside, other=0.0)
            start = tl.load(starts + boundary, mask=inside, other=0.0)
            product = tl.load(products + boundary - size, mask=inside, other=1.0)
            forget_input, update_input, elastance_input, step, fresh = _load_step(
                c, d, q, dt, reset, b * c_b + t * c_t, b * d_b + t * d_t, b * q_b + t * q_t, b * steps + t,
                channel[None, :], inside, index < chunks, DTYPE,
            )  # fmt: skip
            target = _linearise(end, forget_input, update_input, elastance_input, step, fresh, w, SYMMETRIC)[0]
            worst = tl.maximum(worst, tl.where(inside, _residual(state, end, target), 0.0))

            mismatch = tl.where(inside & _finite(end), end - start, 0.0)
            product = tl.where(_finite(product), product, 0.0)
            factor, correction = tl.associative_scan((product, mismatch), 0, _compose)
            correction += _carried(factor, carry[None, :])
            # The end, not the start, plus what is left: exact as soon as the chunk before has been exact.
            corrected = end + (correction - mismatch)
            tl.store(starts + boundary, tl.where(_finite(corrected), corrected, 0.0), mask=inside)
            carry = tl.sum(tl.where(last_row, correction, 0.0), 0)
            carry = tl.where(_finite(carry), carry, 0.0)
        residual = tl.max(tl.max(worst, 1), 0)
        tl.store(entry, tl.load(entry) + 1.0)
        tl.store(entry + plane, residual.to(tl.float32))
        tl.store(entry + 2 * plane, tl.where(residual <= tolerance, 0.0, 1.0))


@triton.jit
def _hold_kernel(
    states, initial, last_change, steps, size, chunk, chunks, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """Steps of no time at the head of a chunk are given, bit for bit, the state before them: `recurrence._hold`.

    last_change (B, T): the last step, counted from 1, at which the state may have changed; 0 is the initial state.
    """
    b, index, _, channel = _program(chunks, blocks, BLOCK)
    inside = channel < size
    first = index * chunk
    source = tl.load(last_change + b * steps + first)
    if source <= first:
        from_initial = channel < tl.where(source == 0, size, 0)
        from_states = channel < tl.where(source == 0, 0, size)
        held = tl.load(states + (b * steps + source - 1) * size + channel, mask=from_states, other=0.0)
        held += tl.load(initial + b * size + channel, mask=from_initial, other=0.0)
        t = first
        last = tl.minimum(first + chunk, steps)
        while t < last:
            tl.store(states + (b * steps + t) * size + channel, held, mask=inside)
            t += 1
            same = tl.load(last_change + b * steps + t, mask=t < last, other=-1) == source
            t = tl.where(same, t, last)


@triton.jit
def _newton_kernel(
    c, d, q, dt, reset, weights, initial, states, log,
    c_b, c_t, d_b, d_t, q_b, q_t, steps, size, blocks, batch, tolerance,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """All of Newton's iterations for a block of channels; states (2, B, T, D), of which the first half is zero at first
    and the solution at last."""
    b, _, block, channel = _program(1, blocks, BLOCK)
    w = _load_weights(weights, size, channel, channel < size, SYMMETRIC)
    x_0 = tl.load(initial + b * size + channel, mask=channel < size, other=0.0)[None, :]
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    half = tl.full([], 1, tl.int64) * batch * steps * size
    iterations = 0
    residual = tl.full([], float("inf"), DTYPE)
    going = residual > tolerance
    while going:
        # Even iterations read the first half and write the second, odd ones the other way.
        source = states + iterations % 2 * half
        target = states + (iterations + 1) % 2 * half
        worst = tl.zeros([TILE, BLOCK], DTYPE)
        carry = tl.zeros([BLOCK], DTYPE)
        for first in range(0, steps, TILE):
            t = first + row
            inside = (t < steps) & (channel < size)[None, :]
            at = (b * steps + t) * size + channel[None, :]
            state = tl.load(source + at, mask=inside, other=0.0)
            previous = tl.load(source + at - size, mask=inside & (t > 0), other=0.0)
            previous = tl.where(t == 0, x_0, previous)
            forget_input, update_input, elastance_input, step, fresh = _load_step(
                c, d, q, dt, reset, b * c_b + t * c_t, b * d_b + t * d_t, b * q_b + t * q_t, b * steps + t,
                channel[None, :], inside, t < steps, DTYPE,
            )  # fmt: skip
            value, jacobian = _linearise(
                previous, forget_input, update_input, elastance_input, step, fresh, w, SYMMETRIC
            )
            worst = tl.maximum(worst, tl.where(inside, _residual(state, previous, value), 0.0))
            factor, correction = tl.associative_scan((jacobian, value - state), 0, _compose)
            correction += _carried(factor, carry[None, :])
            tl.store(target + at, state + correction, mask=inside)
            carry = tl.sum(tl.where(row == TILE - 1, correction, 0.0), 0)
        residual = tl.max(tl.max(worst, 1), 0)
        going = (residual > tolerance) & (residual < float("inf")) & (iterations < _MAX_NEWTON_ITERATIONS)
        iterations += going.to(tl.int32)
        # The next iteration's threads read what others have written in this one.
        tl.debug_barrier()
    if iterations % 2 == 1:
        for first in range(0, steps, TILE):
            t = first + row
            inside = (t < steps) & (channel < size)[None, :]
            at = (b * steps + t) * size + channel[None, :]
            tl.store(states + at, tl.load(states + half + at, mask=inside, other=0.0), mask=inside)
    entry = log + b * blocks + block
    plane = batch * blocks
    tl.store(entry, iterations.to(tl.float32))
    tl.store(entry + plane, residual.to(tl.float32))
    tl.store(entry + 2 * plane, tl.where(residual <= tolerance, 0.0, 1.0))


@triton.jit
def _adjoint_kernel(
    c, d, q, dt, reset, weights, initial, states, grad_states, incoming, products,
    grad_c, grad_d, grad_q, grad_dt, grad_initial, grad_weights,
    c_b, c_t, d_b, d_t, q_b, q_t, g_b, g_t, steps, size, chunk, chunks, blocks, batch,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """lam_t = g_t + J_{t+1} lam_{t+1} through every chunk from its last step to its first.

    REDUCE: from J lam = 0 after every chunk, leaving in `incoming` (B, chunks, D) what it passes on to the chunk before
    it, and in `products` its Jacobian. Otherwise from `incoming`, writing the gradients: those of the inputs (B, T, D),
    grad_dt (blocks, B, T) and grad_weights (B, chunks, 8 or 9, D) yet to be summed.
    """
    b, index, block, channel = _program(chunks, blocks, BLOCK)
    inside = channel < size
    w = _load_weights(weights, size, channel, inside, SYMMETRIC)
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    chunk_entry = (b * chunks + index) * size + channel
    x_0 = tl.load(initial + b * size + channel, mask=inside, other=0.0)
    carry = tl.zeros([BLOCK], DTYPE)
    product = tl.full([BLOCK], 1.0, DTYPE)
    if not REDUCE:
        carry = tl.load(incoming + chunk_entry, mask=inside, other=0.0)
    sum_synapse = tl.zeros([BLOCK], DTYPE)
    sum_synapse_x = tl.zeros([BLOCK], DTYPE)
    sum_f_n = tl.zeros([BLOCK], DTYPE)
    sum_z_n = tl.zeros([BLOCK], DTYPE)
    sum_f_z = tl.zeros([BLOCK], DTYPE)
    sum_potential = tl.zeros([BLOCK], DTYPE)
    sum_drive_x = tl.zeros([BLOCK], DTYPE)
    sum_drive = tl.zeros([BLOCK], DTYPE)
    sum_shift = tl.zeros([BLOCK], DTYPE)
    for back in tl.range(0, last - first, num_stages=_STAGES):
        t = last - 1 - back
        row = b * steps + t
        forget_input, update_input, elastance_input, step, fresh = _load_step(
            c, d, q, dt, reset, b * c_b + t * c_t, b * d_b + t * d_t, b * q_b + t * q_t, row,
            channel, inside, True, DTYPE,
        )  # fmt: skip
        x = tl.load(states + (row - 1) * size + channel, mask=channel < tl.where(t > 0, size, 0), other=0.0)
        x = tl.where(fresh, 0.0, tl.where(t == 0, x_0, x))
        lam = carry + tl.load(grad_states + b * g_b + t * g_t + channel, mask=inside, other=0.0)
        n, gate, update, eps, slope, shift_slope, velocity = _cell(
            x, forget_input, update_input, elastance_input, w, SYMMETRIC
        )
        jacobian = 1.0 + step * _slope(x, n, gate, update, eps, slope, velocity, w)
        carry = tl.where(fresh, 0.0, jacobian * lam)
        if REDUCE:
            product = tl.where(fresh, 0.0, product * jacobian)
        else:
            grad_increment = lam * step
            grad_eps = grad_increment * velocity
            grad_velocity = grad_increment * eps
            grad_drive = grad_eps * slope
            grad_f = -grad_velocity * x * gate * (1.0 - gate)
            grad_z = grad_velocity * w[5] * (1.0 - update * update)
            grad_synapse = (grad_f * w[2] + grad_z * w[3]) * n * (1.0 - n)
            tl.store(grad_c + row * size + channel, grad_f, mask=inside)
            tl.store(grad_d + row * size + channel, grad_z, mask=inside)
            if grad_q is not None:
                tl.store(grad_q + row * size + channel, grad_drive, mask=inside)
            if grad_dt is not None:
                of_step = tl.sum(tl.where(inside, lam * eps * velocity, 0.0), 0)
                tl.store(grad_dt + (block * batch + b) * steps + t, of_step)
            sum_synapse += grad_synapse
            sum_synapse_x += grad_synapse * x
            sum_f_n += grad_f * n
            sum_z_n += grad_z * n
            sum_f_z += grad_f + grad_z
            sum_potential += grad_velocity * update
            sum_drive_x += grad_drive * x
            sum_drive += grad_drive
            if SYMMETRIC:
                sum_shift += grad_eps * shift_slope
    if REDUCE:
        tl.store(incoming + chunk_entry, carry, mask=inside)
        tl.store(products + chunk_entry, product, mask=inside)
    else:
        tl.store(grad_initial + b * size + channel, carry, mask=channel < tl.where(index == 0, size, 0))
        out = grad_weights + (b * chunks + index) * (9 if SYMMETRIC else 8) * size + channel
        tl.store(out, sum_synapse_x - w[1] * sum_synapse, mask=inside)
        tl.store(out + size, -w[0] * sum_synapse, mask=inside)
        tl.store(out + 2 * size, sum_f_n, mask=inside)
        tl.store(out + 3 * size, sum_z_n, mask=inside)
        tl.store(out + 4 * size, sum_f_z, mask=inside)
        tl.store(out + 5 * size, sum_potential, mask=inside)
        tl.store(out + 6 * size, sum_drive_x, mask=inside)
        tl.store(out + 7 * size, sum_drive, mask=inside)
        if SYMMETRIC:
            tl.store(out + 8 * size, sum_shift, mask=inside)


# --- The linear scan ------------------------------------------------------------------------------------------------


@triton.jit
def _starts_kernel(
    products, ends, initial, starts, unsolved, size, chunks, blocks,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The state before every chunk, (B, chunks, D), from the chunks' products and their ends from a start of zero.

    `unsolved` (B, blocks) is set where a product has overflowed, which the state need not have done.
    """
    b, _, block, channel = _program(1, blocks, BLOCK)
    carry = tl.zeros([BLOCK], DTYPE)
    if initial is not None:
        carry = tl.load(initial + b * size + channel, mask=channel < size, other=0.0)
    zeroth = (b * chunks + (chunks - 1 if REVERSE else 0)) * size + channel
    tl.store(starts + zeroth, carry, mask=channel < size)
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    overflow = tl.zeros([TILE, BLOCK], tl.int32)
    for tile in range(0, chunks, TILE):
        order = tile + row
        inside = (order < chunks) & (channel < size)[None, :]
        index = chunks - 1 - order if REVERSE else order
        at = (b * chunks + index) * size + channel[None, :]
        product = tl.load(products + at, mask=inside, other=1.0)
        factor, state = tl.associative_scan((product, tl.load(ends + at, mask=inside, other=0.0)), 0, _compose)
        state += _carried(factor, carry[None, :])
        overflow = tl.maximum(overflow, tl.where(_finite(factor), 0, 1))
        following = at - size if REVERSE else at + size
        tl.store(starts + following, state, mask=inside & (order < chunks - 1))
        carry = tl.sum(tl.where(row == TILE - 1, state, 0.0), 0)
    if unsolved is not None:
        tl.store(unsolved + b * blocks + block, tl.max(tl.max(overflow, 1), 0))


@triton.jit
def _linear_kernel(
    decay, inputs, starts, states, products, ends, unsolved,
    a_b, a_t, u_b, u_t, steps, size, chunk, chunks, blocks,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h_t = decay_t h_{t-1} + inputs_t through every chunk, tile by tile.

    With `products`, from zero, leaving each chunk's product and end; otherwise from `starts`, writing the states. With
    `unsolved`, only the blocks for which it is set.
    """
    b, index, block, channel = _program(chunks, blocks, BLOCK)
    entry = (b * chunks + index) * size + channel
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    if unsolved is not None:
        last = tl.where(tl.load(unsolved + b * blocks + block) != 0, last, first)
    carry = tl.zeros([BLOCK], DTYPE)
    total = tl.full([BLOCK], 1.0, DTYPE)
    if products is None:
        carry = tl.load(starts + entry, mask=channel < size, other=0.0)
    for tile in range(first, last, TILE):
        order = tile + row
        t = steps - 1 - order if REVERSE else order
        inside = (order < last) & (channel < size)[None, :]
        a = tl.load(decay + b * a_b + t * a_t + channel[None, :], mask=inside, other=1.0).to(DTYPE)
        u = tl.load(inputs + b * u_b + t * u_t + channel[None, :], mask=inside, other=0.0).to(DTYPE)
        factor, state = tl.associative_scan((a, u), 0, _compose)
        state += _carried(factor, carry[None, :])
        if products is not None:
            total *= tl.sum(tl.where(row == TILE - 1, factor, 0.0), 0)
        else:
            tl.store(states + (b * steps + t) * size + channel[None, :], state, mask=inside)
        last_state = tl.sum(tl.where(row == TILE - 1, state, 0.0), 0)
        if tl.max(tl.max(tl.where(_finite(factor), 0, 1), 1), 0) != 0:
            # A product has overflowed, which the states need not have done: step by step, then.
            tl.debug_barrier()
            last_state = carry
            for step in range(tile, tl.minimum(tile + TILE, last)):
                t_1 = steps - 1 - step if REVERSE else step
                a_1 = tl.load(decay + b * a_b + t_1 * a_t + channel, mask=channel < size, other=1.0).to(DTYPE)
                u_1 = tl.load(inputs + b * u_b + t_1 * u_t + channel, mask=channel < size, other=0.0).to(DTYPE)
                last_state = a_1 * last_state + u_1
                if products is None:
                    tl.store(states + (b * steps + t_1) * size + channel, last_state, mask=channel < size)
        carry = last_state
    if products is not None:
        tl.store(products + entry, total, mask=channel < size)
        tl.store(ends + entry, carry, mask=channel < size)


# --- Tensors in, tensors out ----------------------------------------------------------------------------------------


@functools.cache
def _lanes(device: torch.device) -> int:
    """Threads that fill the device; in Triton's interpreter, which runs on the CPU, those of one processor."""
    if device.type == "cpu":
        return _LANES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"] * _LANES


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _chunk_length(batch: int, steps: int, size: int, device: torch.device, fewest: int) -> int:
    """Steps per chunk, such that all chunks together fill the device; all steps if that takes less than `fewest`."""
    chunks = min(-(-_lanes(device) // (batch * size)), steps // _SHORTEST_CHUNK)
    return steps if chunks < fewest else -(-steps // chunks)


def _rows(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A (B, T, D) tensor with contiguous channels, and its other strides."""
    if tensor is None:
        return None, 0, 0
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0), tensor.stride(1)


def _operands(forget_input, update_input, elastance_input, time_step, reset, weights) -> tuple[tuple, tuple]:
    """The pointers and strides that the recurrence's kernels begin with."""
    c, *c_strides = _rows(forget_input)
    d, *d_strides = _rows(update_input)
    q, *q_strides = _rows(elastance_input)
    dt = None if time_step is None else time_step.to(weights.dtype).contiguous()
    fresh = None if reset is None else reset.contiguous().view(torch.uint8)
    return (c, d, q, dt, fresh, weights.contiguous()), (*c_strides, *d_strides, *q_strides)


def _options(tensor: Tensor, size: int, **options) -> dict:
    double = tensor.dtype == torch.float64
    block = max(16, min(_BLOCK // 2 if double else _BLOCK, triton.next_power_of_2(size)))
    # Said explicitly, because Triton is about to change its default.
    return {"BLOCK": block, "DTYPE": tl.float64 if double else tl.float32, "enable_fp_fusion": True, **options}


def serves_triton(operator: str, tensor: Tensor) -> bool:
    on_gpu = tensor.device.type in ("cuda", "xpu") or triton.knobs.runtime.interpret
    return on_gpu and tensor.dtype in (torch.float32, torch.float64)


def lrc_scan_triton(
    forget_input, update_input, elastance_input, time_step, reset, initial_state, weights, solver, tolerance
) -> tuple[Tensor, Tensor]:
    """The states (B, T, D) and the operator's numbers; arguments as in `recurrence._lrc_scan_op`."""
    batch, steps, size = forget_input.shape
    states = weights.new_empty(batch, steps, size)
    if states.numel() == 0:
        return states, weights.new_zeros(4, dtype=torch.float32)
    chunk = _chunk_length(batch, steps, size, weights.device, fewest=2 if solver == "chunked" else 4)
    if solver == "auto":
        solver = "sequential" if chunk == steps else "chunked"
    operands, strides = _operands(forget_input, update_input, elastance_input, time_step, reset, weights)
    initial = initial_state.contiguous()
    options = _options(weights, size, SYMMETRIC=weights.shape[0] == len(LrcParameters._fields))
    if solver == "newton":
        options["BLOCK"] = max(16, options["BLOCK"] // 2)
    blocks = triton.cdiv(size, options["BLOCK"])
    log = weights.new_zeros(4, batch, blocks, dtype=torch.float32)
    log[3] = SOLVERS.index(solver)

    def sweep(starts, products, chunk, log):
        chunks = triton.cdiv(steps, chunk)
        _sweep_kernel[(batch * chunks * blocks,)](
            *operands, starts, states, products, log, *strides, steps, size, chunk, chunks, blocks, batch,
            **options, num_warps=1,
        )  # fmt: skip

    with _on(weights.device):
        if solver == "sequential":
            log[0] = 1
            sweep(initial, None, steps, None)
            return states, log.amax((1, 2))
        log[2] = 1
        if solver == "newton":
            both = weights.new_zeros(2, batch, steps, size)
            _newton_kernel[(batch * blocks,)](
                *operands, initial, both, log, *strides, steps, size, blocks, batch, tolerance,
                **options, TILE=_NEWTON_TILE, num_warps=4,
            )  # fmt: skip
            states = both[0].clone()
            chunk = 1
        else:
            chunks = triton.cdiv(steps, chunk)
            starts = weights.new_zeros(batch, chunks, size)
            starts[:, 0] = initial
            products = torch.empty_like(starts)
            for _ in range(min(_MAX_SWEEPS, chunks)):
                sweep(starts, products, chunk, log)
                _stitch_kernel[(batch * blocks,)](
                    *operands, starts, states, products, log, *strides, steps, size, chunk, chunks, blocks, batch,
                    tolerance, **options, TILE=_CHUNKS_TILE, num_warps=8,
                )  # fmt: skip
        if time_step is not None:
            chunks = triton.cdiv(steps, chunk)
            _hold_kernel[(batch * chunks * blocks,)](
                states, initial, last_changes(time_step, reset), steps, size, chunk, chunks, blocks,
                BLOCK=options["BLOCK"], num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        sweep(initial, None, steps, log)
    return states, log.amax((1, 2))


def lrc_scan_backward_triton(
    grad_states, states, forget_input, update_input, elastance_input, time_step, reset, initial_state, weights
) -> tuple[Tensor, ...]:
    """The gradients; arguments and results as in `recurrence._lrc_scan_backward_op`."""
    batch, steps, size = forget_input.shape
    operands, strides = _operands(forget_input, update_input, elastance_input, time_step, reset, weights)
    grad_states, *g_strides = _rows(grad_states)
    initial = initial_state.contiguous()
    options = _options(weights, size, SYMMETRIC=weights.shape[0] == len(LrcParameters._fields), num_warps=1)
    blocks = triton.cdiv(size, options["BLOCK"])
    chunk = _chunk_length(max(1, batch), steps, max(1, size), weights.device, fewest=2)
    chunks = triton.cdiv(steps, chunk)

    grad_forget = torch.empty_like(forget_input, memory_format=torch.contiguous_format)
    grad_update = torch.empty_like(update_input, memory_format=torch.contiguous_format)
    grad_elastance = grad_time = None
    if elastance_input is not None:
        grad_elastance = torch.empty_like(elastance_input, memory_format=torch.contiguous_format)
    if time_step is not None:
        grad_time = weights.new_empty(blocks, batch, steps)
    grad_initial = torch.empty_like(initial)
    grad_weights = weights.new_empty(batch, chunks, *weights.shape)
    incoming = weights.new_zeros(batch, chunks, size)

    def adjoint(incoming, products, reduce):
        _adjoint_kernel[(batch * chunks * blocks,)](
            *operands, initial, states, grad_states, incoming, products,
            grad_forget, grad_update, grad_elastance, grad_time, grad_initial, grad_weights,
            *strides, *g_strides, steps, size, chunk, chunks, blocks, batch, **options, REDUCE=reduce,
        )  # fmt: skip

    if batch * size > 0:
        with _on(weights.device):
            if chunks > 1:
                products, ends = torch.empty_like(incoming), torch.empty_like(incoming)
                adjoint(ends, products, True)
                _starts(products, ends, None, incoming, None, reverse=True)
            adjoint(incoming, None, False)
    return (
        grad_forget,
        grad_update,
        weights.new_empty(0) if grad_elastance is None else grad_elastance,
        weights.new_empty(0) if grad_time is None else grad_time.sum(0).to(time_step.dtype),
        grad_initial,
        grad_weights.sum((0, 1)),
    )


def _starts(products, ends, initial, starts, unsolved, reverse: bool) -> None:
    batch, chunks, size = starts.shape
    options = _options(starts, size, REVERSE=reverse, TILE=_CHUNKS_TILE, num_warps=4)
    blocks = triton.cdiv(size, options["BLOCK"])
    _starts_kernel[(batch * blocks,)](products, ends, initial, starts, unsolved, size, chunks, blocks, **options)


def prefix_scan_triton(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """The states (B, T, D) of the linear recurrence; arguments as in `recurrence._prefix_scan_op`."""
    batch, steps, size = inputs.shape
    states = initial_state.new_empty(batch, steps, size)
    if states.numel() == 0:
        return states
    (decay, *a_strides), (inputs, *u_strides) = _rows(decay), _rows(inputs)
    initial = initial_state.contiguous()
    options = _options(states, size, REVERSE=reverse, TILE=_LINEAR_TILE, num_warps=4)
    blocks = triton.cdiv(size, options["BLOCK"])
    chunk = _chunk_length(batch, steps, size, states.device, fewest=4)

    def scan(starts, products, ends, unsolved, chunk):
        chunks = triton.cdiv(steps, chunk)
        _linear_kernel[(batch * chunks * blocks,)](
            decay, inputs, starts, states, products, ends, unsolved, *a_strides, *u_strides, steps, size,
            chunk, chunks, blocks, **options,
        )  # fmt: skip

    with _on(states.device):
        if chunk == steps:
            scan(initial, None, None, None, steps)
        else:
            products, ends, starts = states.new_empty(3, batch, triton.cdiv(steps, chunk), size)
            unsolved = states.new_empty(batch, blocks, dtype=torch.int32)
            scan(None, products, ends, None, chunk)
            # Chunks are numbered in the order of the scan, whichever way that goes through time.
            _starts(products, ends, initial, starts, unsolved, reverse=False)
            scan(starts, None, None, None, chunk)
            scan(initial, None, None, unsolved, steps)
    return states


KERNELS = Kernels(lrc_scan_triton, lrc_scan_backward_triton, prefix_scan_triton, serves_triton)
