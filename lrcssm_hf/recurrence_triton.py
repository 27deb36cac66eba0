# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels for GPUs: the operators of `recurrence.py`, in float32 or float64, on inputs of any floating dtype.

A thread owns a few channels and walks through a chunk of time with their states in registers, while the next rows are
on their way from memory. Where batch and channels alone do not fill the chip, time is cut into chunks that run at once:

    sequential   one chunk.
    chunked      multiple shooting (`solvers._solve_chunked`): `sweep` runs all chunks from guessed starts, `stitch`
                 checks their boundaries and corrects the starts by a scan over the chunks.
    newton       DEER (`solvers._solve_newton`): the kernel of that name, a scan over all steps in every iteration.

Whether an answer has converged is decided on the device, for every block of channels on its own: a fixed number of
sweeps is launched, of which those that are not needed return at once, and last the sequential solver for the blocks
that are still unsolved. The host never waits, so a call can be captured in a CUDA graph.

The adjoint and `prefix_scan` are linear: one pass reduces every chunk to (product, end), a scan over the chunks gives
their starts, and a second pass, of which the adjoint's does that scan itself, writes the result. Gradients that the
batch shares are summed per chunk and then by torch: no atomics, the same result every time.

A cell's kernels are templates with its program put in; n states of a neuron have n x n Jacobian blocks.

Importing this module needs triton; `recurrence.py` falls back to PyTorch without it.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import math
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor

from .cell_compiler import ARITHMETIC, PROGRAMS, Code, Line, Program, Spelling, Tape, Value, fill, operands
from .operators import SOLVERS, unpack, working_dtype
from .solvers import gathered_rounding


try:  # Guarded, because transformers refuses a Hub model's code when an unguarded import is missing.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The GPU kernels need triton (`pip install triton`): {error}", name="triton") from error


# Channels of a program: four for every thread of a warp, so that a row of bfloat16 is read in words of eight bytes;
# half as many in float64, for which there would not be the registers.
_BLOCK = 128
# Rows that a loop over time takes at once, and groups of them of which one is computed while the others are on their
# way from memory.
_ROWS = 4
_STAGES = tl.constexpr(3)
# Steps, or chunks, that a program scans at a time; fewer where more is computed for each of them.
_CHUNKS_TILE, _NEWTON_TILE = 32, 8
# Threads that fill a processor of the GPU.
_LANES = 1024
# Chunks are not cut shorter than this: their boundaries have to be worth less than their steps.
_SHORTEST_CHUNK = 64
# Sweeps launched before the sequential solver takes over: contracting recurrences need two or three, those with time
# constants of thousands of steps four.
_MAX_SWEEPS = 4
# Flags of steps that are looked through at a time.
_FLAGS = 1024
_MAX_NEWTON_ITERATIONS = tl.constexpr(30)
# Triton's interpreter knows no instructions of a processor.
_COMPILES = tl.constexpr(not triton.knobs.runtime.interpret)
# Of a kernel that is launched: sizes that vary from call to call, each kind of which would be compiled on its own.
_kernel = functools.partial(triton.jit, do_not_specialize=["steps", "chunk", "batch"])
# The smallest number a residual is measured against, as in `solvers._largest`.
_TINY = tl.constexpr(1.1754943508222875e-38)


# --- Functions of numbers -------------------------------------------------------------------------------------------


@triton.jit
def _exp2(x):
    """2**x, without what Triton spends on results so small that they are not normal numbers."""
    if _COMPILES and tl.target_info.is_cuda() and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], x.dtype, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x):
    """1 / x of a normal number, to 1 ulp."""
    if _COMPILES and tl.target_info.is_cuda() and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], x.dtype, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _sigmoids(a, b):
    """Two sigmoids, of a / log2(e) and b / log2(e), for the price of one division.

    From 40 on, which is 58 here, they are 1 in every precision; NaN stays NaN.
    """
    a = _exp2(tl.minimum(a, 58.0, propagate_nan=tl.PropagateNan.ALL))
    b = _exp2(tl.minimum(b, 58.0, propagate_nan=tl.PropagateNan.ALL))
    reciprocal = _reciprocal((1.0 + a) * (1.0 + b))
    return a * ((1.0 + b) * reciprocal), b * ((1.0 + a) * reciprocal)


@triton.jit
def sigmoid(x):
    a = _exp2(tl.minimum(x * 1.4426950408889634, 58.0, propagate_nan=tl.PropagateNan.ALL))
    return a * _reciprocal(1.0 + a)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _carried(factor, state):
    """factor * state, but 0 where the state is 0: products of many factors overflow before states do."""
    return tl.where(state == 0, 0.0, factor * state)


@triton.jit
def _relative(error, scale):
    """`solvers._largest`, elementwise. What is not a number is no solution, and must not compare as small."""
    error = tl.abs(error) / tl.maximum(scale, _TINY)
    return tl.where(_finite(error) & _finite(scale), error, float("inf"))


# --- What all cells share -------------------------------------------------------------------------------------------
# Programs of a launch are numbered channel block first, then chunk, then batch row. `log` is (3, batch, blocks)
# float32, the rows iterations, residual and unsolved (1 until a solver has converged there). What holds for a whole row
# is put into masks as a bound, `channel < tl.where(condition, size, 0)`: Triton 3.9's interpreter takes no other.


@triton.jit
def program_of(chunks, blocks, BLOCK: tl.constexpr):
    """Batch row, chunk, channel block and its channels."""
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    return program // (blocks * chunks), program // blocks % chunks, block, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _find_change(dt, reset, b, steps, before, TILE: tl.constexpr):
    """The last step before this one at which the state may have changed, counted from 1; 0 is the initial state."""
    found = before * 0
    # Triton 3.6 cannot compile addresses that a `while` carries; once found, nothing more is read.
    for passed in range(0, before, TILE):
        t = before - passed - 1 - tl.arange(0, TILE)
        looking = t >= tl.where(found == 0, 0, before)
        changes = tl.load(dt + b * steps + t, mask=looking, other=0.0) != 0
        if reset is not None:
            changes = changes | (tl.load(reset + b * steps + t, mask=looking, other=0) != 0)
        found = tl.maximum(found, tl.max(tl.where(changes, t + 1, 0), 0))
    return found


@_kernel
def _hold_kernel(
    dt, reset, states, initial, final, steps, size, chunk, chunks, blocks,
    STATES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Steps of no time at the head of a chunk are given, bit for bit, the state before them: `solvers._hold`."""
    b, index, _, channel = program_of(chunks, blocks, BLOCK)
    inside = channel < size
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    t = first
    same = True
    while same:
        # The first step that changes the state ends it.
        same = t < last
        same = same & (tl.load(dt + b * steps + t, mask=same, other=1.0) == 0)
        if reset is not None:
            same = same & (tl.load(reset + b * steps + t, mask=same, other=1) == 0)
        t += same.to(tl.int64)
    if t > first:
        source = _find_change(dt, reset, b, steps, first, TILE)
        from_states = channel < tl.where(source == 0, 0, size)
        for i in tl.static_range(STATES):
            held_at = ((b * steps + source - 1) * STATES + i) * size + channel
            held = tl.load(states + held_at, mask=from_states, other=0.0)
            if initial is not None:
                from_initial = channel < tl.where(source == 0, size, 0)
                held += tl.load(initial + (b * STATES + i) * size + channel, mask=from_initial, other=0.0)
            for k in range(first, t):
                tl.store(states + ((b * steps + k) * STATES + i) * size + channel, held, mask=inside)
            at_end = channel < tl.where(t == steps, size, 0)
            tl.store(final + (b * STATES + i) * size + channel, held, mask=at_end)


@_kernel
def _linear_kernel(
    decay, inputs, starts, states, products, ends, unsolved, trajectory, initial, grad_decay, grad_initial,
    a_b, a_t, u_b, u_t, steps, size, chunk, chunks, blocks,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """h_t = decay_t h_{t-1} + inputs_t through every chunk.

    With `products`, from zero, leaving each chunk's product and end; otherwise from `starts`, writing the states. With
    `unsolved`, only the blocks for which it is set.

    With a `trajectory`, of a scan the other way from `initial`, its adjoint: the inputs are gradients of its states,
    h_t = decay_t (h_{t-1} + inputs_t) is carried, and what is in the brackets is written as `states`.
    """
    b, index, block, channel = program_of(chunks, blocks, BLOCK)
    inside = (channel < size) | EVEN
    entry = (b * chunks + index) * size + channel
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    if unsolved is not None:
        last = tl.where(tl.load(unsolved + b * blocks + block) != 0, last, first)
    state = tl.zeros([BLOCK], DTYPE)
    product = tl.full([BLOCK], 1.0, DTYPE)
    if products is None and starts is not None:
        state = tl.load(starts + entry, mask=inside, other=0.0)
    # Groups of rows, and then what is left one by one.
    for rows in tl.static_range(ROWS, 0, 1 - ROWS if ROWS > 1 else -1):
        whole = last - (last - first) % rows
        for group in tl.range(first, whole, rows, num_stages=_STAGES):
            for k in tl.static_range(rows):
                t = steps - 1 - group - k if REVERSE else group + k
                a = tl.load(decay + b * a_b + t * a_t + channel, mask=inside, other=1.0).to(DTYPE)
                u = tl.load(inputs + b * u_b + t * u_t + channel, mask=inside, other=0.0).to(DTYPE)
                if products is not None:
                    product *= a
                row = (b * steps + t) * size + channel
                if trajectory is None:
                    state = a * state + u
                    if products is None:
                        tl.store(states + row, state, mask=inside)
                else:
                    adjoint = state + u
                    state = a * adjoint
                    if products is None:
                        # The state before the step, which is the first of the other scan in the last step of this.
                        is_first = group + k == steps - 1
                        at = row - size if REVERSE else row + size
                        before = tl.load(trajectory + at, mask=inside & (not is_first), other=0.0)
                        from_initial = channel < tl.where(is_first, size, 0)
                        before += tl.load(initial + b * size + channel, mask=from_initial, other=0.0)
                        tl.store(states + row, adjoint, mask=inside)
                        tl.store(grad_decay + row, adjoint * before, mask=inside)
        first = whole
    if products is not None:
        tl.store(products + entry, product, mask=inside)
        tl.store(ends + entry, state, mask=inside)
    elif trajectory is not None:
        at_end = channel < tl.where(last == steps, size, 0)
        tl.store(grad_initial + b * size + channel, state, mask=at_end)


# --- A cell's kernels -----------------------------------------------------------------------------------------------
# In the templates a state of a neuron, an input or a weight has the name that it has in the program, and `$` names are
# put in for the program: lists of names, or of lines. States are (B, T, n, D), Jacobians of chunks
# (B, chunks, n, n, D).

_SPELLING = Spelling(ARITHMETIC | {"exp": "tl.exp({})", "sin": "tl.sin({})", "cos": "tl.cos({})"})

_SCAN_TEMPLATE = '''
@triton.jit
def compose($first_blocks, $first_addends, $second_blocks, $second_addends):
    """h -> block h + addend, the second after the first."""
    return $composed_blocks, $composed_addends


@_kernel
def find_starts(
    products, ends, initial, starts, unsolved, size, chunks, blocks,
    BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):
    """The state before every chunk, (B, chunks, n, D), from the chunks' products and their ends from a start of zero.

    `unsolved` (B, blocks) is set where a product has overflowed, which the state need not have done.
    """
    b, _, block, channel = program_of(1, blocks, BLOCK)
    is_channel = channel < size
    $zero_carries
    if initial is not None:
        $carries_from_initial
    zeroth = b * chunks
    $store_zeroth_start
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    channel = channel[None, :]
    overflow = tl.zeros([TILE, BLOCK], tl.int32)
    for tile in range(0, chunks, TILE):
        order = tile + row
        inside = (order < chunks) & (channel < size)
        entry = b * chunks + order
        $load_products
        $load_ends
        $factors, $corrections = tl.associative_scan(($products, $ends), 0, compose)
        $add_carries
        $note_overflow
        entry += 1
        inside = inside & (order < chunks - 1)
        $store_starts
        $keep_corrections
    if unsolved is not None:
        tl.store(unsolved + b * blocks + block, tl.max(tl.max(overflow, 1), 0))
'''

_CELL_TEMPLATE = '''
@triton.jit
def load_step($in_pointers, dt, reset, $rows, row, channel, inside, rows_inside, DTYPE: tl.constexpr):
    """Inputs, time step and reset flag of one step (`row` a number) or many (`row` a column).

    `row0`, ... are the rows' offsets in the inputs. What a step of no time would have read does not matter.
    """
    $load_inputs
    time_step = tl.full([], 1.0, DTYPE)
    $load_time_step
    fresh = tl.full([], 0, tl.int1)
    if reset is not None:
        fresh = tl.load(reset + row, mask=rows_inside, other=0) != 0
    return $inputs, time_step, fresh


@triton.jit
def linearise($states, $inputs, time_step, fresh$weights):
    """F(x_{t-1}) and dF/dx_{t-1}, row by row."""
    $forget_at_reset
    $linearise
    return $following, $jacobian_or_zero


@_kernel
def sweep(
    $in_pointers, dt, reset, $weight_pointers, initial, starts, trajectory, final, products, amplitudes, log,
    $in_strides, steps, size, chunk, chunks, blocks, batch,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
):
    """The exact recurrence through every chunk from its start; where `products` is given, also the chunk's Jacobian,
    and the size of its states in `amplitudes`.

    starts, amplitudes (B, chunks, n, D); trajectory (B, T, n, D); final (B, n, D). The FIRST of several makes the
    starts, of which all but the initial state are zero; without starts there is one chunk. Otherwise, with a log, only
    blocks that are unsolved.
    """
    b, index, block, channel = program_of(chunks, blocks, BLOCK)
    is_channel = (channel < size) | EVEN
    inside = is_channel
    $load_weights
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    if log is not None and not FIRST:
        unsolved = tl.load(log + (2 * batch + b) * blocks + block) != 0
        last = tl.where(unsolved, last, first)
    entry = b * chunks + index
    if FIRST or starts is None:
        $zero_states
        if initial is not None:
            is_first = channel < tl.where(index == 0, size, 0)
            $first_states
    else:
        $load_starts
    if FIRST:
        $store_first_starts
    $identity
    $zero_amplitudes
    next_row = first
    # Groups of rows, and then what is left one by one.
    for rows in tl.static_range(ROWS, 0, 1 - ROWS if ROWS > 1 else -1):
        whole = last - (last - next_row) % rows
        for group in tl.range(next_row, whole, rows, num_stages=_STAGES):
            for k in tl.static_range(rows):
                t = group + k
                $inputs, time_step, fresh = load_step(
                    $in_pointers, dt, reset, $rows_at_t, b * steps + t, channel, inside, True, DTYPE
                )
                $states, $jacobian = linearise($states, $inputs, time_step, fresh$weights)
                if products is not None:
                    $products = $jacobian_times_products
                    $amplitudes = $larger_amplitudes
                $store_states
        next_row = whole
    at_end = channel < tl.where(last == steps, size, 0)
    $store_final
    if products is not None:
        ran = channel < tl.where(last > first, size, 0)
        $store_products
        $store_amplitudes


@triton.jit
def step(
    $in_pointers, $weight_pointers, initial, gates, outputs, following, $in_batch_strides, g_b, size, blocks,
    BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):
    """One step of all neurons, and the gate on the last state of each; `mixing.gated_step_definition`."""
    b, _, _, channel = program_of(1, blocks, BLOCK)
    inside = channel < size
    $load_step_inputs
    $load_step_weights
    $load_step_states
    $states, $jacobian = linearise($states, $inputs, tl.full([], 1.0, DTYPE), tl.full([], 0, tl.int1)$weights)
    gate = tl.load(gates + b * g_b + channel, mask=inside, other=0.0).to(DTYPE)
    tl.store(outputs + b * size + channel, gate * sigmoid(gate) * $last_state, mask=inside)
    $store_step_states


@_kernel
def stitch(
    starts, trajectory, products, amplitudes, log, steps, size, chunk, chunks, blocks, batch, tolerance, gathered,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):
    """Finds how far the starts of the chunks are off, and corrects them by Newton's method on the boundaries.

    `gathered` is what the rounding of a chunk may be, `solvers.gathered_rounding`.
    """
    b, _, block, channel = program_of(1, blocks, BLOCK)
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    channel = channel[None, :]
    log_entry = log + b * blocks + block
    plane = batch * blocks
    sweeps, unsolved = 0.0, 1.0
    if not FIRST:
        sweeps, unsolved = tl.load(log_entry), tl.load(log_entry + 2 * plane)
    if unsolved != 0:
        $zero_largest
        for tile in range(0, chunks, TILE):
            index = tile + row
            inside = (index < chunks) & (channel < size)
            entry = b * chunks + index
            $load_amplitudes
            $find_largest
        worst = tl.zeros([TILE, BLOCK], DTYPE)
        $zero_carries
        for tile in range(1, chunks, TILE):
            index = tile + row
            inside = (index < chunks) & (channel < size)
            t = index * chunk
            entry = b * chunks + index
            $load_boundaries
            $products = $finite_products
            $mismatches = $finite_mismatches
            $factors, $corrections = tl.associative_scan(($products, $mismatches), 0, compose)
            $add_carries
            $worst_of_boundaries
            # The end, not the start, plus what is left: exact as soon as the chunk before has been exact.
            $store_corrected
            $keep_corrections
            $finite_carries
        residual = tl.max(tl.max(worst, 1), 0) / gathered
        tl.store(log_entry, sweeps + 1.0)
        tl.store(log_entry + plane, residual.to(tl.float32))
        tl.store(log_entry + 2 * plane, tl.where(residual <= tolerance, 0.0, 1.0))


@_kernel
def newton(
    $in_pointers, dt, reset, $weight_pointers, initial, solution, spare, final, log,
    $in_strides, steps, size, blocks, batch, tolerance, BLOCK: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):
    """All of Newton's iterations for a block of channels, from states of zero; `spare` is a place like the solution's
    for every other iteration."""
    b, _, block, channel = program_of(1, blocks, BLOCK)
    is_channel = channel < size
    $load_weights
    $zero_initial
    if initial is not None:
        $load_initial
    row = tl.arange(0, TILE).to(tl.int64)[:, None]
    channel = channel[None, :]
    iterations = 0
    residual = tl.full([], float("inf"), DTYPE)
    going = residual > tolerance
    while going:
        # Even iterations improve the solution into the spare, odd ones the other way; the first of all reads nothing.
        trajectory, improved = solution, spare
        if iterations % 2 == 1:
            trajectory, improved = spare, solution
        worst = tl.zeros([TILE, BLOCK], DTYPE)
        $zero_carries
        for first in range(0, steps, TILE):
            t = first + row
            inside = (t < steps) & (channel < size)
            guessed = inside & (channel < tl.where(iterations > 0, size, 0))
            $load_guesses
            $inputs, time_step, fresh = load_step(
                $in_pointers, dt, reset, $rows_at_t, b * steps + t, channel, inside, t < steps, DTYPE
            )
            $targets, $jacobian = linearise($ends, $inputs, time_step, fresh$weights)
            $worst_of_steps
            $factors, $corrections = tl.associative_scan(($jacobian, $shortfalls), 0, compose)
            $add_carries
            $store_improved
            $keep_corrections
        residual = tl.max(tl.max(worst, 1), 0)
        going = (residual > tolerance) & (residual < float("inf")) & (iterations < _MAX_NEWTON_ITERATIONS)
        iterations += going.to(tl.int32)
        # The next iteration's threads read what others have written in this one.
        tl.debug_barrier()
    if (iterations % 2 == 1) | (iterations == 0):
        for first in range(0, steps, TILE):
            t = first + row
            inside = (t < steps) & (channel < size)
            guessed = inside & (channel < tl.where(iterations > 0, size, 0))
            $copy_to_solution
        tl.debug_barrier()
    channel = block * BLOCK + tl.arange(0, BLOCK)
    $copy_to_final
    log_entry = log + b * blocks + block
    plane = batch * blocks
    tl.store(log_entry, iterations.to(tl.float32))
    tl.store(log_entry + plane, residual.to(tl.float32))
    tl.store(log_entry + 2 * plane, tl.where(residual <= tolerance, 0.0, 1.0))


@_kernel
def adjoint(
    $in_pointers, dt, reset, $weight_pointers, initial, trajectory, grad_trajectory, grad_final, products, ends,
    $grad_pointers, grad_dt, grad_initial, grad_weights,
    $in_strides, g_b, g_t, g_n, o_b, o_t, steps, size, chunk, chunks, blocks, batch,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, REDUCE: tl.constexpr,
):
    """lam_t = g_t + J_{t+1}^T lam_{t+1} through every chunk from its last step to its first.

    REDUCE: from J^T lam = 0 after every chunk, leaving in `ends` (B, chunks, n, D) what it passes on to the chunk
    before it, and in `products` its transposed Jacobian. Otherwise from what the chunks after it pass on, which every
    program finds for itself, writing the gradients: those of the inputs, whose rows lie alike, grad_dt (blocks, B, T)
    and grad_weights (B, chunks, P, D) yet to be summed.
    """
    b, index, block, channel = program_of(chunks, blocks, BLOCK)
    is_channel = (channel < size) | EVEN
    $load_weights
    $zero_carries
    if not REDUCE:
        if grad_final is not None:
            $carries_from_final
        if products is not None:
            later = chunks - 1 - index
            for group in tl.range(0, later, ROWS, num_stages=_STAGES):
                for k in tl.static_range(ROWS):
                    inside = channel < tl.where(group + k < later, size, 0)
                    entry = b * chunks + chunks - 1 - group - k
                    $load_products
                    $load_ends
                    $carries = $ends_and_products_times_carries
    inside = is_channel
    entry = b * chunks + index
    first = index * chunk
    last = tl.minimum(first + chunk, steps)
    $zero_initial
    if initial is not None:
        $load_initial
    $identity
    $zero_sums
    next_row = last - 1
    for rows in tl.static_range(ROWS, 0, 1 - ROWS if ROWS > 1 else -1):
        # Groups of rows do not ask whether theirs is the first row of all.
        count = (next_row + 1 - (first if rows == 1 else tl.maximum(first, 1))) // rows * rows
        for back in tl.range(0, count, rows, num_stages=_STAGES):
            for k in tl.static_range(rows):
                t = next_row - back - k
                row = b * steps + t
                $inputs, time_step, fresh = load_step(
                    $in_pointers, dt, reset, $rows_at_t, row, channel, inside, True, DTYPE
                )
                before = inside
                if rows == 1:
                    before = channel < tl.where(t > 0, size, 0)
                $load_before
                $load_adjoints
                if REDUCE:
                    $targets, $jacobian = linearise($states, $inputs, time_step, fresh$weights)
                    $carries = $transposed_times_adjoints
                    $products = $transposed_times_products
                else:
                    $adjoint
                    $carries = $gradients_of_states
                    $store_gradients
                    $add_sums
        next_row -= count
    if REDUCE:
        $store_ends
        ran = inside
        $store_products
    else:
        if grad_initial is not None:
            is_first = channel < tl.where(index == 0, size, 0)
            $store_grad_initial
        grad_weights += entry * $weight_count * size + channel
        $store_sums
'''


def _state_parts(n: int) -> dict[str, str | list[str]]:
    """What the templates need for n states a neuron."""
    pairs = [(i, k) for i in range(n) for k in range(n)]

    def each(form: str) -> list[str]:
        return [form.format(i=i) for i in range(n)]

    def each_pair(form: str) -> list[str]:
        return [form.format(i=i, k=k, unit=float(i == k)) for i, k in pairs]

    def sums(*terms: str) -> list[str]:
        """For every state, or row and column, the sum over the states j."""
        indices = pairs if any("{k}" in term for term in terms) else [(i, 0) for i in range(n)]
        return [" + ".join(t.format(i=i, k=k, j=j) for t in terms for j in range(n)) for i, k in indices]

    def at(row: str) -> str:
        """The offset of a state's row."""
        return f"(({row}) * {n} + {{i}}) * size + channel"

    def block_at(row: str) -> str:
        return f"((({row}) * {n} + {{i}}) * {n} + {{k}}) * size + channel"

    def last_row_of(name: str, mask: str) -> str:
        return f"tl.sum(tl.where({mask}, {name}, 0.0), 0)"

    trajectory = "trajectory + " + at("b * steps + t")
    return {
        "states": each("state{i}"),
        "ends": each("end{i}"),
        "targets": each("target{i}"),
        "carries": each("carry{i}"),
        "mismatches": each("mismatch{i}"),
        "corrections": each("correction{i}"),
        "jacobian": each_pair("jacobian{i}_{k}"),
        "products": each_pair("product{i}_{k}"),
        "factors": each_pair("factor{i}_{k}"),
        # Affine maps and their composition.
        "first_blocks": each_pair("first{i}_{k}"),
        "first_addends": each("first{i}"),
        "second_blocks": each_pair("second{i}_{k}"),
        "second_addends": each("second{i}"),
        "composed_blocks": sums("second{i}_{j} * first{j}_{k}"),
        "composed_addends": [f"{x} + second{i}" for i, x in enumerate(sums("_carried(second{i}_{j}, first{j})"))],
        "identity": each_pair("product{i}_{k} = tl.full([BLOCK], {unit}, DTYPE)"),
        "jacobian_times_products": sums("jacobian{i}_{j} * product{j}_{k}"),
        "transposed_times_products": sums("jacobian{j}_{i} * product{j}_{k}"),
        "transposed_times_adjoints": sums("jacobian{j}_{i} * adjoint{j}"),
        "zero_carries": each("carry{i} = tl.zeros([BLOCK], DTYPE)"),
        "add_carries": [
            f"correction{i} += {x}" for i, x in enumerate(sums("_carried(factor{i}_{j}, carry{j}[None, :])"))
        ],
        "keep_corrections": each("carry{i} = " + last_row_of("correction{i}", "row == TILE - 1")),
        # sweep
        "load_starts": each(_load("state{i}", "starts + " + at("entry"))),
        "zero_states": each("state{i} = tl.zeros([BLOCK], DTYPE)"),
        "first_states": each(_load("state{i}", "initial + " + at("b"), "is_first")),
        "store_first_starts": each(_store("starts + " + at("entry"), "state{i}", "is_channel")),
        "store_final": each(_store("final + " + at("b"), "state{i}", "at_end")),
        "store_states": each(_store(trajectory, "state{i}")),
        "amplitudes": each("amplitude{i}"),
        "zero_amplitudes": each("amplitude{i} = tl.zeros([BLOCK], DTYPE)"),
        "larger_amplitudes": each("tl.maximum(amplitude{i}, tl.abs(state{i}))"),
        "store_amplitudes": each(_store("amplitudes + " + at("entry"), "amplitude{i}", "ran")),
        "store_products": each_pair(_store("products + " + block_at("entry"), "product{i}_{k}", "ran")),
        # stitch
        "zero_largest": each("largest{i} = tl.zeros([BLOCK], DTYPE)"),
        "load_amplitudes": each(_load("amplitude{i}", "amplitudes + " + at("entry"))),
        "find_largest": each("largest{i} = tl.maximum(largest{i}, tl.max(amplitude{i}, 0))"),
        "load_boundaries": [
            *each(_load("end{i}", "trajectory + " + at("b * steps + t - 1"))),
            *each(_load("start{i}", "starts + " + at("entry"))),
            *each_pair(_load("product{i}_{k}", "products + " + block_at("entry - 1"))),
            *each(_load("amplitude{i}", "amplitudes + " + at("entry"))),
            *each(_load("before{i}", "amplitudes + " + at("entry - 1"))),
        ],
        "worst_of_boundaries": [
            *each("missed{i} = _relative(mismatch{i}, tl.minimum(amplitude{i}, before{i}))"),
            *each("off{i} = tl.maximum(missed{i}, _relative(correction{i}, largest{i}[None, :]))"),
            *each("off{i} = tl.where(_finite(end{i}), off{i}, float('inf'))"),
            *each("worst = tl.maximum(worst, tl.where(inside, off{i}, 0.0))"),
        ],
        "finite_products": each_pair("tl.where(_finite(product{i}_{k}), product{i}_{k}, 0.0)"),
        "finite_mismatches": each("tl.where(inside & _finite(end{i}), end{i} - start{i}, 0.0)"),
        "store_corrected": [
            *each("corrected{i} = end{i} + (correction{i} - mismatch{i})"),
            *each(_store("starts + " + at("entry"), "tl.where(_finite(corrected{i}), corrected{i}, 0.0)")),
        ],
        "finite_carries": each("carry{i} = tl.where(_finite(carry{i}), carry{i}, 0.0)"),
        # newton
        "zero_initial": each("initial{i} = tl.zeros([BLOCK], DTYPE)"),
        "load_initial": each(_load("initial{i}", "initial + " + at("b"), "is_channel")),
        "load_guesses": [
            *each(_load("state{i}", trajectory, "guessed")),
            *each(_load("end{i}", "trajectory + " + at("b * steps + t - 1"), "guessed & (t > 0)")),
            *each("end{i} = tl.where(t == 0, initial{i}[None, :], end{i})"),
        ],
        "shortfalls": each("target{i} - state{i}"),
        "worst_of_steps": [
            *each("off{i} = _relative(state{i} - target{i}, tl.maximum(tl.abs(state{i}), tl.abs(end{i})))"),
            *each("worst = tl.maximum(worst, tl.where(inside, off{i}, 0.0))"),
        ],
        "store_improved": each(_store("improved + " + at("b * steps + t"), "state{i} + correction{i}")),
        "copy_to_solution": [
            *each(_load("state{i}", "spare + " + at("b * steps + t"), "guessed")),
            *each(_store("solution + " + at("b * steps + t"), "state{i}")),
        ],
        "copy_to_final": [
            *each(_load("end{i}", "solution + " + at("b * steps + steps - 1"), "is_channel")),
            *each(_store("final + " + at("b"), "end{i}", "is_channel")),
        ],
        # adjoint
        "carries_from_final": each(_load("carry{i}", "grad_final + " + at("b"), "is_channel")),
        "ends_and_products_times_carries": [
            f"end{i} + {x}" for i, x in enumerate(sums("_carried(product{i}_{j}, carry{j})"))
        ],
        "load_before": [
            *each(_load("state{i}", "trajectory + " + at("row - 1"), "before")),
            *each("state{i} = tl.where(fresh, 0.0, tl.where((t == 0) & (rows == 1), initial{i}, state{i}))"),
        ],
        "load_adjoints": [
            *each(_load("adjoint{i}", "grad_trajectory + b * g_b + t * g_t + {i} * g_n + channel")),
            *each("adjoint{i} += carry{i}"),
        ],
        "store_ends": each(_store("ends + " + at("entry"), "carry{i}")),
        "store_grad_initial": each(_store("grad_initial + " + at("b"), "carry{i}", "is_first")),
        # find_starts
        "carries_from_initial": each(_load("carry{i}", "initial + " + at("b"), "is_channel")),
        "store_zeroth_start": each(_store("starts + " + at("zeroth"), "carry{i}", "is_channel")),
        "load_products": each_pair(
            "product{i}_{k} = tl.load(products + " + block_at("entry") + ", mask=inside, other={unit})"
        ),
        "load_ends": each(_load("end{i}", "ends + " + at("entry"))),
        "note_overflow": each_pair("overflow = tl.maximum(overflow, tl.where(_finite(factor{i}_{k}), 0, 1))"),
        "store_starts": each(_store("starts + " + at("entry"), "correction{i}")),
    }


def _cell_parts(program: Program) -> dict[str, str | list[str]]:
    """What the templates need of a program."""
    states, inputs, weights = (
        [f"{kind}{i}" for i in range(count)]
        for kind, count in (("state", program.states), ("input", program.inputs), ("weight", program.weights))
    )
    following, jacobian = _spelled_results(program)
    gradients = dict(zip(operands(program), map(_SPELLING.argument, program.adjoint.results), strict=True))
    grad_inputs = [_store(f"grad_{name} + b * o_b + t * o_t + channel", gradients[name]) for name in inputs]
    load_time_step = []
    if program.has_time_step:
        following = [f"tl.where(time_step == 0, {name}, {value})" for name, value in zip(states, following)]
        at_no_time = "{0} = tl.where(_finite({0}), {0}, tl.where(time_step == 0, 0.0, {0}))"
        load_time_step = [_load("time_step", "dt + row", "rows_inside", "1.0"), *map(at_no_time.format, inputs)]
        grad_inputs += [
            f"of_step = tl.sum(tl.where(inside, {gradients['time_step']}, 0.0), 0)",
            "tl.store(grad_dt + (block * batch + b) * steps + t, of_step)",
        ]
    return {
        "inputs": inputs,
        "weights": "".join(f", {name}" for name in weights),
        "in_pointers": [f"{name}_pointer" for name in inputs],
        "in_strides": [f"{name}_{axis}" for name in inputs for axis in "bt"],
        "in_batch_strides": [f"{name}_b" for name in inputs],
        "weight_pointers": [f"{name}_pointer" for name in weights],
        "load_step_inputs": [_load(name, f"{name}_pointer + b * {name}_b + channel") + ".to(DTYPE)" for name in inputs],
        "load_step_weights": [_load(name, f"{name}_pointer + channel") + ".to(DTYPE)" for name in weights],
        "load_step_states": [
            _load(name, f"initial + (b * {program.states} + {i}) * size + channel") for i, name in enumerate(states)
        ],
        "last_state": states[-1],
        "store_step_states": [
            _store(f"following + (b * {program.states} + {i}) * size + channel", name) for i, name in enumerate(states)
        ],
        "rows": [f"{name}_row" for name in inputs],
        "rows_at_t": [f"b * {name}_b + t * {name}_t" for name in inputs],
        "grad_pointers": [f"grad_{name}" for name in inputs],
        "weight_count": str(program.weights),
        "load_inputs": [_load(name, f"{name}_pointer + {name}_row + channel") + ".to(DTYPE)" for name in inputs],
        "load_time_step": load_time_step,
        "load_weights": [_load(name, f"{name}_pointer + channel", "is_channel") for name in weights],
        "forget_at_reset": [f"{name} = tl.where(fresh, 0.0, {name})" for name in states],
        "linearise": _lines(program.linearise),
        "following": following,
        "jacobian_or_zero": [f"tl.where(fresh, 0.0, {value})" for value in jacobian],
        "adjoint": _lines(program.adjoint),
        "gradients_of_states": [f"tl.where(fresh, 0.0, {gradients[name]})" for name in states],
        "store_gradients": grad_inputs,
        "zero_sums": [f"sum{k} = tl.zeros([BLOCK], DTYPE)" for k in range(program.weights)],
        "add_sums": [f"sum{k} += {gradients[name]}" for k, name in enumerate(weights)],
        "store_sums": [_store(f"grad_weights + {k} * size", f"sum{k}") for k in range(program.weights)],
    }


def _load(target: str, source: str, mask: str = "inside", other: str = "0.0") -> str:
    return f"{target} = tl.load({source}, mask={mask}, other={other})"


def _store(target: str, value: str, mask: str = "inside") -> str:
    return f"tl.store({target}, {value}, mask={mask})"


def _spelled_results(program: Program) -> tuple[list[str], list[str]]:
    """Next states and Jacobian of `linearise`, each of the shape of a state."""
    full = {name for name in operands(program) if name.startswith(("state", "input"))}
    for line in program.linearise.lines:
        if full.intersection(line.arguments):
            full.add(line.name)
    spelled = []
    for result in program.linearise.results:
        if not isinstance(result, str):
            spelled.append(f"tl.full(state0.shape, {result!r}, state0.dtype)")
        else:
            spelled.append(result if result in full else f"tl.broadcast_to({result}, state0.shape)")
    return spelled[: program.states], spelled[program.states :]


def _lines(code: Code) -> list[str]:
    """The code in Triton, with sigmoids and tanhs two at a time: a line waits for a partner that does not need it."""
    spelled, rest = [], list(code.lines)
    while rest:
        first, names, waiting = None, set(), []
        for index, line in enumerate(rest):
            if names.intersection(line.arguments):
                waiting.append(line)
                names.add(line.name)
            elif line.operation not in ("sigmoid", "tanh"):
                spelled.append(_SPELLING.line(line))
            elif first is None:
                first = line
                names.add(line.name)
            else:
                spelled += _sigmoid_lines(first, line)
                rest = waiting + rest[index + 1 :]
                break
        else:
            spelled += [] if first is None else _sigmoid_lines(first, first)
            rest = waiting
    return spelled


def _sigmoid_lines(*pair: Line) -> list[str]:
    """tanh(z) is 2 sigmoid(2 z) - 1."""
    names = [pair[0].name, pair[1].name if pair[1] is not pair[0] else "_"]
    tanhs = [f"{line.name} = 2.0 * {line.name} - 1.0" for line in dict.fromkeys(pair) if line.operation == "tanh"]
    return [f"{', '.join(names)} = _sigmoids({', '.join(line.arguments[0] for line in pair)})", *tanhs]


def _for_powers_of_two(program: Program) -> Program:
    """The program with arguments of sigmoid in units of 1 / log2(e), and of tanh in half of that, as `_sigmoids` takes
    them, and with fewer instructions in a step: what can be done to the weights is the same in every step."""
    scales = {"sigmoid": math.log2(math.e), "tanh": 2 * math.log2(math.e)}

    def rewritten(code: Code, names: list[str]) -> Code:
        tape = Tape(program.key)
        values = {name: Value(tape, name) for name in names}
        lines = {line.name: line for line in code.lines}
        uses = Counter([*code.results, *(x for line in code.lines for x in line.arguments)])

        def is_slope(line: Line) -> bool:
            """y * (1 - y), of a sigmoid."""
            return lines.get(line.arguments[-1], line)[1:] == ("sub", (1.0, line.arguments[0]))

        def factors(argument: str | float) -> list[str | float]:
            line = lines.get(argument)
            if line is None or line.operation != "mul" or is_slope(line) or uses[argument] > 1:
                return [argument]
            return [factor for x in line.arguments for factor in factors(x)]

        def scaled(argument: str | float, scale: float) -> Value | float:
            operation, arguments = lines[argument][1:] if argument in lines else (None, ())
            if operation in ("add", "sub"):
                return tape.add(operation, *(scaled(x, scale) for x in arguments))
            if operation == "mul" and any(str(x).startswith("weight") for x in arguments):
                weight, factor = sorted(arguments, key=lambda x: not str(x).startswith("weight"))
                return scaled(weight, scale) * values.get(factor, factor)
            return scale * values.get(argument, argument)

        for line in code.lines:
            arguments = [values.get(x, x) for x in line.arguments]
            if line.operation in scales:
                arguments = [scaled(line.arguments[0], scales[line.operation])]
            if line.operation == "mul" and is_slope(line):
                # One fused operation as y - y * y, and as exact.
                values[line.name] = arguments[0] - arguments[0] * arguments[0]
            elif line.operation == "mul":
                # Weights first.
                product = sorted((x for a in line.arguments for x in factors(a)), key=lambda x: "weight" not in str(x))
                values[line.name] = math.prod(values.get(x, x) for x in product)
            else:
                values[line.name] = tape.add(line.operation, *arguments)
        return tape.code(values.get(x, x) for x in code.results)

    return program._replace(
        linearise=rewritten(program.linearise, operands(program)),
        adjoint=rewritten(program.adjoint, operands(program, adjoint=True)),
    )


@functools.cache
def _scan_kernels(states: int) -> SimpleNamespace:
    """`compose` and `find_starts` for so many states a neuron."""
    return define(f"scan{states}", fill(_SCAN_TEMPLATE, **_state_parts(states)))


@functools.cache
def _cell_kernels(key: str) -> SimpleNamespace:
    """A program's kernels, by the names that they have in the template."""
    program = PROGRAMS[key]
    text = fill(_CELL_TEMPLATE, **_state_parts(program.states), **_cell_parts(_for_powers_of_two(program)))
    return define(key, text, compose=_scan_kernels(program.states).compose)


def define(name: str, text: str, **names) -> SimpleNamespace:
    """What the text defines, in this module and with more names."""
    source = f"<{__name__}.{name}>"
    # Where Triton looks for what it compiles.
    linecache.cache[source] = (len(text), None, text.splitlines(keepends=True), source)
    known = globals() | names
    namespace = dict(known)
    exec(compile(text, source, "exec"), namespace)
    return SimpleNamespace(**{name: value for name, value in namespace.items() if name not in known})


# --- Tensors in, tensors out ----------------------------------------------------------------------------------------


@functools.cache
def _lanes(device: torch.device) -> int:
    """Threads that fill the device; in Triton's interpreter, which runs on the CPU, those of one processor."""
    if device.type == "cpu":
        return _LANES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"] * _LANES


def on_device(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _chunk_length(batch: int, steps: int, size: int, device: torch.device, fewest: int) -> int:
    """Steps per chunk, such that all chunks together fill the device; all steps if that takes less than `fewest`."""
    chunks = min(-(-_lanes(device) // (batch * size)), steps // _SHORTEST_CHUNK)
    return steps if chunks < fewest else -(-steps // chunks)


def with_rows(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A (B, T, D) tensor with contiguous channels, and its other strides."""
    if tensor is None:
        return None, 0, 0
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0), tensor.stride(1)


def _operands(inputs, time_step, reset, weights, dtype: torch.dtype) -> tuple[tuple, list[int]]:
    """The pointers and strides that a cell's kernels begin with."""
    rows, *strides = zip(*map(with_rows, inputs))
    dt = None if time_step is None else time_step.to(dtype).contiguous()
    fresh = None if reset is None else reset.contiguous().view(torch.uint8)
    weights = [weight.contiguous() for weight in weights]
    return (*rows, dt, fresh, *weights), [stride for pair in zip(*strides) for stride in pair]


def options_for(tensor: Tensor, size: int, **options) -> dict:
    double = tensor.dtype == torch.float64
    block = max(16, min(_BLOCK // 2 if double else _BLOCK, triton.next_power_of_2(size)))
    # Said explicitly, because Triton is about to change its default.
    return {"BLOCK": block, "DTYPE": tl.float64 if double else tl.float32, "enable_fp_fusion": True, **options}


def _walk(tensor: Tensor, size: int, block: int, program: Program | None = None, *, adjoint: bool = False) -> dict:
    """What the kernels that walk through time want to know beside their options; fewer rows at once where each takes
    more registers."""
    rows = 1 if tensor.dtype == torch.float64 else _ROWS
    if program is not None:
        rows //= program.states
        if program.has_time_step:
            rows //= 4 if adjoint else 2
    return {"EVEN": size % block == 0, "ROWS": max(1, rows)}


def serves_triton(operator: str, tensor: Tensor) -> bool:
    on_gpu = tensor.device.type in ("cuda", "xpu") or triton.knobs.runtime.interpret
    if operator == "rms_norm":
        return False
    is_scan = operator in ("cell_scan", "cell_scan_backward", "prefix_scan")
    return on_gpu and (tensor.dtype in (torch.float32, torch.float64) if is_scan else tensor.is_floating_point())


def _channels(tensor: Tensor, program: Program, size: int) -> int:
    """Channels of a program of a launch: fewer where a neuron has more states to keep in registers."""
    return max(16, options_for(tensor, size)["BLOCK"] // program.states)


def _tile(most: int, tensor: Tensor, states: int) -> int:
    """Steps or chunks that a program scans at a time: fewer where the numbers of each take more registers."""
    return max(2, most // (states * tensor.element_size() // 4))


def cell_scan_triton(
    program: Program, inputs, time_step, reset, initial_state, weights, solver, tolerance, with_info
) -> tuple[Tensor, Tensor, Tensor]:
    """The states (B, T, n, D), the last of them, and the operator's numbers; arguments as in
    `recurrence._cell_scan_op`."""
    batch, steps, size = inputs[0].shape
    dtype = working_dtype(*inputs, initial_state, *weights)
    states = inputs[0].new_empty(batch, steps, program.states, size, dtype=dtype)
    final, numbers = states.new_empty(batch, program.states, size), states.new_empty(4, dtype=torch.float32)
    if states.numel() == 0:
        return states, final, numbers
    chunk = _chunk_length(batch, steps, size, states.device, fewest=2 if solver == "chunked" else 4)
    if solver == "auto":
        solver = "sequential" if chunk == steps else "chunked"
    pointers, strides = _operands(inputs, time_step, reset, weights, states.dtype)
    initial = None if initial_state is None else initial_state.contiguous()
    options = options_for(states, size, BLOCK=_channels(states, program, size))
    if solver == "newton":
        options["BLOCK"] = min(options["BLOCK"], _BLOCK // 2)
    blocks = triton.cdiv(size, options["BLOCK"])
    log = None if solver == "sequential" else states.new_empty(3, batch, blocks, dtype=torch.float32)
    kernels = _cell_kernels(program.key)

    def sweep(starts, products, amplitudes, chunk, log, is_first=False):
        chunks = triton.cdiv(steps, chunk)
        kernels.sweep[(batch * chunks * blocks,)](
            *pointers, initial, starts, states, final, products, amplitudes, log,
            *strides, steps, size, chunk, chunks, blocks, batch,
            **options, **_walk(states, size, options["BLOCK"], program), FIRST=is_first,
            num_warps=states.element_size() // 4,
        )  # fmt: skip

    with on_device(states.device):
        if solver == "newton":
            kernels.newton[(batch * blocks,)](
                *pointers, initial, states, torch.empty_like(states), final, log, *strides, steps, size, blocks, batch,
                tolerance, **options, TILE=_tile(_NEWTON_TILE, states, program.states), num_warps=8,
            )  # fmt: skip
            chunk = 1
        elif solver == "chunked":
            chunks = triton.cdiv(steps, chunk)
            starts, amplitudes = states.new_empty(2, batch, chunks, program.states, size)
            products = states.new_empty(batch, chunks, program.states, program.states, size)
            for number in range(min(_MAX_SWEEPS, chunks)):
                sweep(starts, products, amplitudes, chunk, log, is_first=number == 0)
                kernels.stitch[(batch * blocks,)](
                    starts, states, products, amplitudes, log, steps, size, chunk, chunks, blocks, batch,
                    tolerance, gathered_rounding(chunk), **options, FIRST=number == 0,
                    TILE=_tile(_CHUNKS_TILE, states, program.states), num_warps=32 // states.element_size(),
                )  # fmt: skip
        if time_step is not None and solver != "sequential":
            chunks = triton.cdiv(steps, chunk)
            dt, fresh = pointers[len(inputs) : len(inputs) + 2]
            _hold_kernel[(batch * chunks * blocks,)](
                dt, fresh, states, initial, final, steps, size, chunk, chunks, blocks,
                STATES=program.states, BLOCK=options["BLOCK"], TILE=_FLAGS, num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
        sweep(None, None, None, steps, log)
    if with_info:
        numbers[:3] = 0 if log is None else log.amax((1, 2))
        numbers[0] = 1 if log is None else numbers[0]
        numbers[3] = SOLVERS.index(solver)
    return states, final, numbers


def cell_scan_backward_triton(
    grad_states, grad_final_state, states, program: Program, inputs, time_step, reset, initial_state, weights
) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor]:
    """The gradients; arguments and results as in `recurrence._cell_scan_backward_op`."""
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    inputs, grad_inputs = (unpack(tensors, program.inputs) for tensors in (inputs, gradients))
    batch, steps, size = inputs[0].shape
    pointers, strides = _operands(inputs, time_step, reset, weights, states.dtype)
    grad_states = grad_states if grad_states.stride(3) == 1 else grad_states.contiguous()
    initial = None if initial_state is None else initial_state.contiguous()
    options = options_for(states, size, BLOCK=_channels(states, program, size), num_warps=1)
    options |= _walk(states, size, options["BLOCK"], program, adjoint=True)
    blocks = triton.cdiv(size, options["BLOCK"])
    chunk = _chunk_length(max(1, batch), steps, max(1, size), states.device, fewest=2)
    chunks = triton.cdiv(steps, chunk)
    kernels = _cell_kernels(program.key)

    grad_time = None if time_step is None else states.new_empty(blocks, batch, steps)
    grad_initial = None if initial is None else torch.empty_like(initial)
    grad_weights = states.new_empty(batch, chunks, len(weights), size)
    grad_final = None if grad_final_state is None else grad_final_state.contiguous()
    products = ends = None
    if chunks > 1:
        products = states.new_empty(batch, chunks, program.states, program.states, size)
        ends = states.new_empty(batch, chunks, program.states, size)

    def adjoint(reduce):
        kernels.adjoint[(batch * chunks * blocks,)](
            *pointers, initial, states, grad_states, grad_final, products, ends,
            *grad_inputs, grad_time, grad_initial, grad_weights,
            *strides, *grad_states.stride()[:3], *grad_inputs[0].stride()[:2],
            steps, size, chunk, chunks, blocks, batch, **options, REDUCE=reduce,
        )  # fmt: skip

    if batch * size > 0:
        with on_device(states.device):
            if chunks > 1:
                adjoint(reduce=True)
            adjoint(reduce=False)
    return gradients, None if grad_time is None else grad_time.sum(0), grad_initial, grad_weights.sum((0, 1))


def gated_step_triton(program: Program, inputs, parameters, state, gate) -> tuple[Tensor, Tensor]:
    """The output and the next state; arguments as in `mixing.gated_step_definition`."""
    batch, _, size = gate.shape
    outputs, following = torch.empty_like(gate, memory_format=torch.contiguous_format), torch.empty_like(state)
    rows, strides, _ = zip(*map(with_rows, inputs))
    gates, g_b, _ = with_rows(gate)
    options = options_for(state, size, BLOCK=_channels(state, program, size), num_warps=1)
    blocks = triton.cdiv(size, options["BLOCK"])
    with on_device(gate.device):
        _cell_kernels(program.key).step[(batch * blocks,)](
            *rows, *(parameter.contiguous() for parameter in parameters), state.contiguous(), gates, outputs,
            following, *strides, g_b, size, blocks, **options,
        )  # fmt: skip
    return outputs, following


def _find_starts(products, ends, initial, starts, unsolved) -> None:
    batch, chunks, states, size = starts.shape
    options = options_for(starts, size, TILE=_tile(_CHUNKS_TILE, starts, states), num_warps=8)
    options["BLOCK"] = max(16, options["BLOCK"] // states)
    blocks = triton.cdiv(size, options["BLOCK"])
    find_starts = _scan_kernels(states).find_starts
    find_starts[(batch * blocks,)](products, ends, initial, starts, unsolved, size, chunks, blocks, **options)


def prefix_scan_triton(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """The states (B, T, D) of the linear recurrence; arguments as in `recurrence._prefix_scan_op`."""
    states = initial_state.new_empty(inputs.shape)
    _linear_scan(decay, inputs, initial_state.contiguous(), states, (None,) * 4, reverse)
    return states


def prefix_scan_backward_triton(
    grad_states: Tensor, decay: Tensor, states: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of decay, inputs and initial state; arguments as in `recurrence._prefix_scan_backward_op`."""
    by_decay, by_inputs = torch.empty_like(states), torch.empty_like(states)
    by_initial_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    forward = states, initial_state.contiguous(), by_decay, by_initial_state
    _linear_scan(decay, grad_states, None, by_inputs, forward, not reverse)
    return by_decay, by_inputs, by_initial_state


def _linear_scan(
    decay: Tensor, inputs: Tensor, initial: Tensor | None, states: Tensor, forward: tuple, reverse: bool
) -> None:
    """Fills the states; with `forward` (its states, initial state, and what is to be filled by their gradients), those
    of the adjoint, which starts from zero."""
    if states.numel() == 0:
        return
    batch, steps, size = states.shape
    (decay, *a_strides), (inputs, *u_strides) = with_rows(decay), with_rows(inputs)
    options = options_for(states, size, REVERSE=reverse, num_warps=1)
    options |= _walk(states, size, options["BLOCK"])
    blocks = triton.cdiv(size, options["BLOCK"])
    chunk = _chunk_length(batch, steps, size, states.device, fewest=4)

    def scan(starts, products, ends, unsolved, chunk):
        chunks = triton.cdiv(steps, chunk)
        _linear_kernel[(batch * chunks * blocks,)](
            decay, inputs, starts, states, products, ends, unsolved, *forward, *a_strides, *u_strides, steps, size,
            chunk, chunks, blocks, **options,
        )  # fmt: skip

    with on_device(states.device):
        if chunk == steps:
            scan(initial, None, None, None, steps)
        else:
            products, ends, starts = states.new_empty(3, batch, triton.cdiv(steps, chunk), 1, size)
            unsolved = states.new_empty(batch, blocks, dtype=torch.int32)
            scan(None, products, ends, None, chunk)
            # Chunks are numbered in the order of the scan, whichever way that goes through time.
            _find_starts(products.unsqueeze(3), ends, initial, starts, unsolved)
            scan(starts, None, None, None, chunk)
            scan(initial, None, None, unsolved, steps)
