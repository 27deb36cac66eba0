# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Compiled float32 kernels for the CPU: the operators of `recurrence.py`, step by step and channel-vectorised.

One sweep over time with the states of a block of channels in cache moves each operand through memory once; LLVM turns
the loop over channels into vector instructions, for which the exponential is written out below. Work is split over
batch and channel blocks. Threads come from Python's own pool (the kernels release the GIL), as many as torch may use,
so nothing spins beside torch's threads between calls. Machine code is cached on disk after the first call.
`prefix_scan` is compiled for complex64 too. A cell's kernels are two templates with its program put in.

A kernel writes everything it returns from the start, so that one that has failed can simply be run again: compiled in
memory where the cache is broken, or in the calling thread where there are no others to be had. Importing this module
needs numba; `recurrence.py` does without it, and without kernels that do not compile.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import logging
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from torch import Tensor

from .cell_compiler import ARITHMETIC, PROGRAMS, Code, Program, Spelling, fill, operands
from .operators import SOLVERS, Kernels


try:  # Guarded, because transformers refuses a Hub model's code when an unguarded import is missing.
    from llvmlite import ir
    from numba import config, njit, types, version_info
    from numba.core import cgutils
    from numba.core.errors import TypingError
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError(f"The CPU kernels need numba (`pip install numba`): {error}", name="numba") from error


if version_info.short < (0, 62):
    # LLVM before version 20 does not know how to compile `llvm.minimum`, and ends the process.
    raise ImportError(f"The CPU kernels need numba 0.62 or newer, got {'.'.join(map(str, version_info.short))}.")
if config.DISABLE_JIT:
    raise RuntimeError("NUMBA_DISABLE_JIT is set, so that numba compiles nothing.")

logger = logging.getLogger(__name__)

# Contraction to FMA and exact-enough reciprocals; never reassociation, which would undo the rounding in `_exp`, and
# never the assumption that nothing is NaN: a NaN input has to be seen in the output.
_FAST = {"contract", "arcp", "nsz"}
_inline = functools.partial(njit, inline="always", fastmath=_FAST, error_model="numpy")

_NOT_CACHED = "The compiled recurrence cannot be kept on disk, and is compiled anew in every process."
_warned: set[str] = set()
_warning = threading.Lock()


def _warn_once(consequence: str, cause: Exception) -> None:
    with _warning:
        is_new = consequence not in _warned
        _warned.add(consequence)
    if is_new:
        logger.warning(f"{consequence} {type(cause).__name__}: {cause}")


def _kernel(function):
    """The function compiled at its first call, from the cache on disk or into it; where that fails, in memory."""
    compile_options = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    in_memory = njit(**compile_options)(function)
    try:
        compiled = njit(cache=True, **compile_options)(function)
    except Exception as error:  # There is no folder that a cache could be written to.
        _warn_once(_NOT_CACHED, error)
        return in_memory

    def kernel(*arguments):
        nonlocal compiled
        called = compiled
        try:
            return called(*arguments)
        except Exception as error:  # Reading a cache unpickles it, which can raise anything.
            if called is in_memory:
                raise
            results = in_memory(*arguments)  # What fails without the cache too is not the cache's fault.
            _warn_once(f"{_NOT_CACHED} Deleting {called.stats.cache_path} may help.", error)
            compiled = in_memory
            return results

    return kernel


# Channels per vector: blocks are cut at multiples of it.
_VECTOR = 16
# A call with fewer elements than this is done before a second thread has woken up.
_PARALLEL_ELEMENTS = 1 << 15
# Inputs are asked for this many steps ahead: the hardware does not foresee rows that a thread reads only a part of.
_STEPS_AHEAD = 5
# Float32 partial sums of parameter gradients are moved to float64 after this many steps.
_FLUSH_STEPS = 64


# --- What numba has no word for -------------------------------------------------------------------------------------


@intrinsic
def _float_from_bits(typingctx, bits):
    """The float32 with these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@intrinsic
def _widen(typingctx, value):
    """A float32, or the bits of a bfloat16 in an int16, as a float32."""
    if value not in (types.float32, types.int16):
        raise TypingError(f"An operand is of {value}.")

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        bits = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, bits.type(16)), ir.FloatType())

    return types.float32(value), codegen


@intrinsic
def _bits(typingctx, value):
    """The bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


def _bound(operation: str):
    """The smaller or larger of two float32, or NaN if either is; comparisons that keep a NaN cost more instructions."""

    @intrinsic
    def bound(typingctx, value, limit):
        def codegen(context, builder, signature, args):
            float32 = args[0].type
            function_type = ir.FunctionType(float32, [float32, float32])
            function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{operation}.f32")
            return builder.call(function, args)

        return types.float32(types.float32, types.float32), codegen

    return bound


_minimum, _maximum = _bound("minimum"), _bound("maximum")


@intrinsic
def _prefetch(typingctx, array, index):
    """Asks for the cache line that array[index] is in, or would be in if there were one."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [address, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        pointer = builder.bitcast(builder.gep(data, [args[1]]), address)
        builder.call(function, [pointer, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


# --- Functions of one number ----------------------------------------------------------------------------------------

_ONE, _TWO, _LOG2_E = np.float32(1), np.float32(2), np.float32(math.log2(math.e))
# e^x = 2^n 2^r with n an integer and |r| <= 1/2. Adding a number so large that its unit of rounding is 1 leaves n, with
# the exponent's bias, in the sum's lowest bits, from where it is shifted into place; 2^r is a minimax polynomial, good
# to 2e-9. The sigmoid of more than 25 log(2) is 1 in float32, and that of less than -125 log(2) is 0 to within 1e-37.
_ROUNDING, _EXPONENT_SHIFT = np.float32(1.5 * 2**23 + 127), np.int32(23)
_LOWEST, _HIGHEST = np.float32(-125), np.float32(25)
_EXP_1, _EXP_2, _EXP_3 = np.float32(0.69314718246), np.float32(0.24022647738), np.float32(0.05550332367)
_EXP_4, _EXP_5, _EXP_6 = np.float32(0.00961843691766), np.float32(0.00133988750167), np.float32(0.00015353361960)


@_inline()
def _exp(x):
    """e^x for -86 < x < 17, and beyond that e^-86 and e^17."""
    x = _minimum(_maximum(x * _LOG2_E, _LOWEST), _HIGHEST)
    shifted = x + _ROUNDING
    r = x - (shifted - _ROUNDING)
    power = (((((_EXP_6 * r + _EXP_5) * r + _EXP_4) * r + _EXP_3) * r + _EXP_2) * r + _EXP_1) * r + _ONE
    return power * _float_from_bits(_bits(shifted) << _EXPONENT_SHIFT)


@_inline()
def _sigmoid(x):
    odds = _exp(x)
    return odds / (odds + _ONE)


@_inline()
def _tanh(x):
    odds = _exp(_TWO * x)
    return (odds - _ONE) / (odds + _ONE)


# Every operand of the loop over channels lies in one scratch buffer of rows this far apart. LLVM then knows at compile
# time that the rows do not overlap; with twenty arrays it would give up on vector instructions. Not a power of two, or
# all rows would compete for the same few lines of the cache.
_WIDTH = 1024 + _VECTOR


@_inline()
def _load(s, row, array, offset, count):
    source, target = array[offset : offset + count], s[row : row + count]
    for j in range(count):
        target[j] = source[j]


@_inline()
def _load_input(s, row, array, offset, count, ahead, finite):
    """`finite` takes inputs that are not for 0, for steps whose inputs must not matter."""
    for j in range(0, count, _VECTOR):
        _prefetch(array, offset + ahead + j)
    source, target = array[offset : offset + count], s[row : row + count]
    for j in range(count):
        target[j] = _widen(source[j])
    if finite:
        for j in range(count):
            if not math.isfinite(target[j]):
                target[j] = 0


@_inline()
def _load_sum(s, row, array, offset, count, ahead):
    """Adds the array to the row."""
    for j in range(0, count, _VECTOR):
        _prefetch(array, offset + ahead + j)
    source, target = array[offset : offset + count], s[row : row + count]
    for j in range(count):
        target[j] += _widen(source[j])


@_inline()
def _store(s, row, array, offset, count):
    source, target = s[row : row + count], array[offset : offset + count]
    for j in range(count):
        target[j] = source[j]


@njit(fastmath=True, nogil=True)
def _sum(values):
    total = np.float32(0)
    for value in values:
        total += value
    return total


@_inline()
def _block(item, blocks, width, size):
    """Batch row, first channel and number of channels of a work item, and that number in whole vectors."""
    first = (item % blocks) * width
    count = min(width, size - first)
    return item // blocks, first, count, (count + _VECTOR - 1) // _VECTOR * _VECTOR


@_kernel
def _linear_scan(decay, inputs, initial, states, pairs, reverse, blocks, width, start, stop):
    """h_t = decay_t * h_{t-1} + inputs_t, or from the end for `reverse`; operands are (flat array, batch stride,
    time stride), and work items batch * blocks.

    `pairs` None (or True) makes two compilations: real channels, or complex ones, of which a row holds the real and the
    imaginary parts in turn. The states in hand have them in two rows of one scratch buffer.
    """
    (a, a_b, a_t), (u, u_b, u_t) = decay, inputs
    parts = 1 if pairs is None else 2
    steps, size = states.shape[1], states.shape[2] // parts
    s = np.empty(parts * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, _ = _block(item, blocks, width, size)
        first, floats = parts * first, parts * count
        for j in range(floats):
            s[j % parts * _WIDTH + j // parts] = initial[b, first + j]
        for k in range(steps):
            t = steps - 1 - k if reverse else k
            a_row = a[b * a_b + t * a_t + first :][:floats]
            u_row = u[b * u_b + t * u_t + first :][:floats]
            row = states[b, t, first : first + floats]
            if pairs is None:
                for j in range(count):
                    s[j] = _widen(a_row[j]) * s[j] + _widen(u_row[j])
                    row[j] = s[j]
            else:
                for j in range(count):
                    re, im, a_re, a_im = s[j], s[_WIDTH + j], a_row[2 * j], a_row[2 * j + 1]
                    s[j] = a_re * re - a_im * im + u_row[2 * j]
                    s[_WIDTH + j] = a_re * im + a_im * re + u_row[2 * j + 1]
                    row[2 * j] = s[j]
                    row[2 * j + 1] = s[_WIDTH + j]


# --- A cell's kernels -----------------------------------------------------------------------------------------------
# In the templates an operand of the program has its row of the scratch buffer: first the weights, then the states, then
# the inputs; for the adjoint, then what it carries, the gradients that are stored at every step, and the sums of those
# of the weights. Operands of a kernel are (flat array, batch stride, time stride).

_SPELLING = Spelling(
    ARITHMETIC
    | {"sigmoid": "_sigmoid({})", "tanh": "_tanh({})", "exp": "_exp({})", "sin": "math.sin({})", "cos": "math.cos({})"},
    number="np.float32({!r})",
)

_FORWARD = """
def forward(inputs, time_steps, resets, initial, weights, states, blocks, width, start, stop):
    $unpack_inputs
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t) = time_steps, resets
    steps, size = states.shape[1], states.shape[3]
    s = np.zeros($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for k in range(weights.shape[0]):
            _load(s, k * _WIDTH, weights[k], first, count)
        s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
        for i in range($states):
            _load(s, ($first_state + i) * _WIDTH, initial[b, i], first, count)
        for t in range(steps):
            if fresh[b * fresh_b + t * fresh_t]:
                s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
            time_step = _widen(dt[b * dt_b + t * dt_t])
            if time_step != 0:
                $load_inputs
                for j in range(padded):
                    $read
                    $advance
                    $write
            for i in range($states):
                _store(s, ($first_state + i) * _WIDTH, states[b, t, i], first, count)
"""

# The adjoint sweep, from the last step to the first; gradients shared by the batch are summed per batch row, in float32
# for a number of steps and then in float64.
_BACKWARD = """
def backward(
    grads, grad_final, trajectory, inputs, time_steps, resets, initial, weights,
    grad_inputs, grad_time_steps, grad_initial, grad_weights, blocks, width, start, stop,
):
    $unpack_inputs
    $unpack_gradients
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t) = time_steps, resets
    steps, size = trajectory.shape[1], trajectory.shape[3]
    s = np.zeros($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for k in range(weights.shape[0]):
            _load(s, k * _WIDTH, weights[k], first, count)
            grad_weights[b, k, first : first + count] = 0
        s[$first_adjoint * _WIDTH : $first_gradient * _WIDTH] = 0
        for i in range($states):
            _load(s, ($first_adjoint + i) * _WIDTH, grad_final[b, i], first, count)
        for t in range(steps - 1, -1, -1):
            is_reset = fresh[b * fresh_b + t * fresh_t]
            if is_reset:
                s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
            else:
                for i in range($states):
                    before = initial[b, i] if t == 0 else trajectory[b, t - 1, i]
                    _load(s, ($first_state + i) * _WIDTH, before, first, count)
            time_step = _widen(dt[b * dt_b + t * dt_t])
            $load_inputs
            for i in range($states):
                g = grads[i]
                _load_sum(
                    s, ($first_adjoint + i) * _WIDTH, g[0], b * g[1] + t * g[2] + first, count, -_STEPS_AHEAD * g[2]
                )
            for j in range(padded):
                $read
                $adjoint
                $write
            $store_gradients
            if is_reset:
                s[$first_adjoint * _WIDTH : $first_gradient * _WIDTH] = 0
            if t % _FLUSH_STEPS == 0:
                for k in range(weights.shape[0]):
                    for j in range(count):
                        grad_weights[b, k, first + j] += s[($first_sum + k) * _WIDTH + j]
                s[$first_sum * _WIDTH :] = 0
        for i in range($states):
            _store(s, ($first_adjoint + i) * _WIDTH, grad_initial[b, i], first, count)
"""


def _forward_source(program: Program) -> str:
    rows = _rows_of(program)
    results = map(_SPELLING.argument, program.advance.results)
    return fill(
        _FORWARD,
        **_common_parts(program, rows),
        load_inputs=_load_inputs(program, rows, "_STEPS_AHEAD", "False"),
        read=_read(program.advance, rows),
        advance=_SPELLING.lines(program.advance),
        write=[f"{_entry(rows[f'state{i}'])} = {result}" for i, result in enumerate(results)],
    )


def _backward_source(program: Program) -> str:
    rows, names = _rows_of(program), operands(program)
    # The adjoint of every state, the gradients that are stored at every step, and the sums.
    adjoints = [f"adjoint{i}" for i in range(program.states)]
    stored = [f"grad_{name}" for name in names if name.startswith("input") or name == "time_step"]
    sums = [f"grad_weight{k}" for k in range(program.weights)]
    rows |= {name: len(rows) + i for i, name in enumerate([*adjoints, *stored, *sums])}
    write = []
    for name, result in zip(names, map(_SPELLING.argument, program.adjoint.results), strict=True):
        target = name.replace("state", "adjoint") if name.startswith("state") else f"grad_{name}"
        write.append(f"{_entry(rows[target])} {'+=' if name.startswith('weight') else '='} {result}")
    of_inputs = [name for name in stored if name != "grad_time_step"]
    store = [f"_store(s, {rows[name]} * _WIDTH, {name}[b, t], first, count)" for name in of_inputs]
    if program.has_time_step:
        row = rows["grad_time_step"]
        store.append(f"grad_time_steps[item % blocks, b, t] = _sum(s[{row} * _WIDTH : {row} * _WIDTH + count])")
    return fill(
        _BACKWARD,
        **_common_parts(program, rows),
        first_adjoint=str(rows[adjoints[0]]),
        first_gradient=str(rows[stored[0]]),
        first_sum=str(len(rows) - len(sums)),
        unpack_gradients=[f"({', '.join(of_inputs)},) = grad_inputs"],
        load_inputs=_load_inputs(program, rows, "-_STEPS_AHEAD", "time_step == 0"),
        read=_read(program.adjoint, rows),
        adjoint=_SPELLING.lines(program.adjoint),
        write=write,
        store_gradients=store,
    )


def _rows_of(program: Program) -> dict[str, int]:
    kinds = {"weight": program.weights, "state": program.states, "input": program.inputs}
    return {name: row for row, name in enumerate(f"{kind}{i}" for kind, count in kinds.items() for i in range(count))}


def _common_parts(program: Program, rows: dict[str, int]) -> dict[str, str | list[str]]:
    operands = [f"(in{i}, in{i}_b, in{i}_t)" for i in range(program.inputs)]
    return {
        "rows": str(len(rows)),
        "states": str(program.states),
        "first_state": str(rows["state0"]),
        "first_input": str(rows["input0"]),
        "unpack_inputs": [f"({', '.join(operands)},) = inputs"],
    }


def _entry(row: int) -> str:
    return f"s[{row} * _WIDTH + j]"


def _load_inputs(program: Program, rows: dict[str, int], ahead: str, finite: str) -> list[str]:
    return [
        f"_load_input(s, {rows[f'input{i}']} * _WIDTH, in{i}, b * in{i}_b + t * in{i}_t + first, count, "
        f"{ahead} * in{i}_t, {finite})"
        for i in range(program.inputs)
    ]


def _read(code: Code, rows: dict[str, int]) -> list[str]:
    used = {argument for line in code.lines for argument in line.arguments} | set(code.results)
    return [f"{name} = {_entry(row)}" for name, row in rows.items() if name in used]


class _CellKernels:
    """The two passes of a program, to be compiled at their first call."""

    def __init__(self, program: Program):
        self.forward = _kernel(_defined("forward", program.key, _forward_source(program)))
        self.backward = _kernel(_defined("backward", program.key, _backward_source(program)))


@functools.cache
def _kernels_of(key: str) -> _CellKernels:
    return _CellKernels(PROGRAMS[key])


def _defined(name: str, key: str, text: str) -> Callable:
    """The function that the text defines, in this module. Numba keeps machine code beside a file of source, which is
    written to the user's cache; without one, it compiles in memory."""
    digest = hashlib.sha256(f"{_this_source()}{text}".encode()).hexdigest()[:16]
    file_name = f"{name}_{key}_{digest}.py"
    try:
        path = Path(cached_assets_path("lrcssm_hf", "recurrence", "cpu")) / file_name
        if not (path.is_file() and path.read_text(encoding="utf-8") == text):
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, path)
        source = str(path)
    except (OSError, ValueError):  # The latter is the hub's word for a file in the place of a folder.
        source = f"<{file_name}>"
    # Where messages and debuggers look for a source that is in no file.
    linecache.cache[source] = (len(text), None, text.splitlines(keepends=True), source)
    namespace = dict(globals())
    exec(compile(text, source, "exec"), namespace)
    return namespace[name]


@functools.cache
def _this_source() -> str:
    """What the functions that kernels call are made of, which numba does not look at for its cache."""
    return inspect.getsource(sys.modules[__name__])


# --- Tensors in, tensors out ----------------------------------------------------------------------------------------


def _rows(tensor: Tensor) -> tuple[np.ndarray, int, int]:
    """A (B, T, ...) tensor as a flat array of float32, bool or the bits of bfloat16, and its two leading strides.

    Copied only if its channels are not contiguous or its type is another.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    elif tensor.dtype != torch.bool:
        tensor = tensor.float()
    if tensor.dim() == 3 and tensor.stride(2) != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
    extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    flat = tensor.as_strided((extent,), (1,)) if tensor.numel() else tensor.new_empty(0)
    return flat.numpy(), tensor.stride(0), tensor.stride(1)


def _optional(tensor: Tensor | None, default: float | bool, batch: int, steps: int) -> tuple[np.ndarray, int, int]:
    """The rows of an optional operand; absent, those of one repeated default."""
    if tensor is None:
        dtype = torch.bool if isinstance(default, bool) else torch.float32
        tensor = torch.full((1, 1), default, dtype=dtype, device="cpu").expand(batch, steps)
    return _rows(tensor)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lrcssm")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but not its threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run(kernel, arguments: tuple, batch: int, steps: int, size: int, blocks: int, width: int) -> None:
    """Calls the kernel on all work items, each one batch row of `width` channels, shared among torch's threads."""
    items, threads = batch * blocks, torch.get_num_threads()
    if min(threads, items) == 1 or batch * steps * size < _PARALLEL_ELEMENTS:
        return kernel(*arguments, blocks, width, 0, items)
    bounds = sorted({items * i // threads for i in range(threads + 1)})
    pool = _pool(threads)
    try:
        for part in [pool.submit(kernel, *arguments, blocks, width, *pair) for pair in zip(bounds, bounds[1:])]:
            part.result()
    except (RuntimeError, CancelledError) as error:
        # No more threads can be started, or none at all because the interpreter is ending. What was begun has to end
        # before it is done again.
        pool.shutdown(cancel_futures=True)
        _pool.cache_clear()
        kernel(*arguments, blocks, width, 0, items)
        _warn_once("The compiled recurrence runs in the calling thread alone.", error)


def _partition(batch: int, size: int) -> tuple[int, int]:
    """Channel blocks per batch row and their width, such that the threads share the work evenly."""
    threads = torch.get_num_threads()
    blocks = max(1, min(threads // math.gcd(batch, threads), -(-size // _VECTOR)))
    width = min(max(1, -(-size // (blocks * _VECTOR))) * _VECTOR, _WIDTH)
    return -(-size // width), width


def _empty(*shape: int) -> Tensor:
    """A new tensor aligned to cache lines. From numpy, which asks for huge pages, so that the kernel that fills it does
    not wait for a page fault every 4 KiB."""
    count, line = math.prod(shape), 64
    buffer = np.empty(count + line // 4, np.float32)
    first = -buffer.ctypes.data % line // 4
    return torch.from_numpy(buffer[first : first + count]).view(shape)


def _operands(inputs, time_step, reset, initial_state, weights) -> tuple:
    batch, steps, _ = inputs[0].shape
    return (
        tuple(map(_rows, inputs)),
        _optional(time_step, 1.0, batch, steps),
        _optional(reset, False, batch, steps),
        initial_state.detach().contiguous().numpy(),
        weights.detach().contiguous().numpy(),
    )


def serves_cpu(operator: str, tensor: Tensor) -> bool:
    dtypes = (torch.float32, torch.complex64) if operator == "prefix_scan" else (torch.float32,)
    return tensor.device.type == "cpu" and tensor.dtype in dtypes


def cell_scan_cpu(
    program: Program, inputs, time_step, reset, initial_state, weights, solver, tolerance
) -> tuple[Tensor, Tensor]:
    """The states (B, T, n, D), solved sequentially, and the operator's numbers; arguments as in
    `recurrence._cell_scan_op`."""
    batch, steps, size = inputs[0].shape
    states = _empty(batch, steps, program.states, size)
    arguments = (*_operands(inputs, time_step, reset, initial_state, weights), states.numpy())
    blocks, width = _partition(batch, size)
    _run(_kernels_of(program.key).forward, arguments, batch, steps, size, blocks, width)
    return states, torch.tensor([1, 0, 0, SOLVERS.index("sequential")], dtype=torch.float32)


def cell_scan_backward_cpu(
    grad_states, grad_final_state, states, program: Program, inputs, time_step, reset, initial_state, weights
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """The gradients; arguments and results as in `recurrence._cell_scan_backward_op`."""
    batch, steps, size = inputs[0].shape
    blocks, width = _partition(batch, size)
    grad_inputs = [_empty(batch, steps, size) for _ in inputs]
    grad_time_step = None if time_step is None else states.new_empty(blocks, batch, steps)
    grad_initial = initial_state.new_empty(initial_state.shape)
    grad_weights = weights.new_empty(batch, *weights.shape, dtype=torch.float64)
    arguments = (
        tuple(_rows(grad) for grad in grad_states.unbind(2)),
        torch.zeros_like(initial_state).numpy() if grad_final_state is None else grad_final_state.contiguous().numpy(),
        states.numpy(),
        *_operands(inputs, time_step, reset, initial_state, weights),
        tuple(gradient.numpy() for gradient in grad_inputs),
        None if grad_time_step is None else grad_time_step.numpy(),
        grad_initial.numpy(),
        grad_weights.numpy(),
    )
    _run(_kernels_of(program.key).backward, arguments, batch, steps, size, blocks, width)
    return grad_inputs, None if grad_time_step is None else grad_time_step.sum(0), grad_initial, grad_weights.sum(0)


def _pairs(tensor: Tensor) -> Tensor:
    """A complex (..., D) tensor as a real one (..., 2 D), real and imaginary parts in turn; a view where it can be."""
    return torch.view_as_real(tensor.detach().resolve_conj()).flatten(-2)


def prefix_scan_cpu(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """The states (B, T, D) of the linear recurrence, real or complex; arguments as in `recurrence.prefix_scan`."""
    batch, steps, size = inputs.shape
    pairs = True if initial_state.is_complex() else None
    if pairs:
        decay, inputs, initial_state = _pairs(decay), _pairs(inputs), _pairs(initial_state)
    states = _empty(batch, steps, inputs.shape[2])
    blocks, width = _partition(batch, size)
    initial = initial_state.detach().contiguous().numpy()
    arguments = (_rows(decay), _rows(inputs), initial, states.numpy(), pairs, reverse)
    _run(_linear_scan, arguments, batch, steps, size, blocks, width)
    return torch.view_as_complex(states.unflatten(2, (size, 2))) if pairs else states


KERNELS = Kernels(cell_scan_cpu, cell_scan_backward_cpu, prefix_scan_cpu, serves_cpu)
