# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What the compiled float32 kernels for the CPU are made of and run by: `define` compiles the text of one, whose names
are those of this file.

A kernel makes one sweep over time with the rows of a block of channels in cache, so that each operand moves through
memory once; LLVM turns the loops over channels into vector instructions, for which the exponential is written out
below. Work is split over batch and channel blocks. Threads come from Python's own pool (the kernels release the GIL),
as many as torch may use, so nothing spins beside torch's threads between calls. Machine code is cached on disk after
the first call.

A kernel writes everything it returns from the start, so that one that has failed can simply be run again: compiled in
memory where the cache is broken, or in the calling thread where there are no others to be had. Importing this module
needs numba; `backends.py` does without it, and without kernels that do not compile.
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


try:  # Guarded, because transformers refuses a Hub model's code when an unguarded import is missing.
    from llvmlite import ir
    from numba import carray, config, njit, types, version_info
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


def compiled(function):
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
def _narrow(typingctx, value, array):
    """A float32 as it is stored in the array: itself, or the bits of the nearest bfloat16 in an int16."""
    if array.dtype not in (types.float32, types.int16):
        raise TypingError(f"A result is of {array.dtype}.")

    def codegen(context, builder, signature, args):
        if signature.return_type == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], ir.IntType(32))
        upper, half = bits.type(16), bits.type(0x7FFF)
        odd = builder.and_(builder.lshr(bits, upper), bits.type(1))
        nearest = builder.lshr(builder.add(builder.add(bits, half), odd), upper)
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, bits.type(0x7FC0), nearest), ir.IntType(16))

    return array.dtype(value, array), codegen


def _pointer_to(number: types.Type):
    """A pointer from an address, which numba takes as an argument in less time than an array."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(number)(types.intp), codegen

    return pointer


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
_FAR = 1 << 40


def _array_at(number: types.Type, dtype: type):
    """What begins at an address, as an array whose end nobody looks for."""
    pointer = _pointer_to(number)

    @_inline()
    def array(address):
        return carray(pointer(address), (_FAR,), dtype)

    return array


_floats, _doubles = _array_at(types.float32, np.float32), _array_at(types.float64, np.float64)
_bfloat16s, _longs = _array_at(types.int16, np.int16), _array_at(types.int64, np.int64)
_flags = _array_at(types.boolean, np.bool_)


@_inline()
def _load(s, row, array, offset, count):
    source, target = array[offset : offset + count], s[row : row + count]
    for j in range(count):
        target[j] = _widen(source[j])


@_inline()
def _load_input(s, row, array, offset, count, ahead, finite):
    """`finite` takes inputs that are not for 0, for steps whose inputs must not matter."""
    for j in range(0, count, _VECTOR):
        _prefetch(array, offset + ahead + j)
    _load(s, row, array, offset, count)
    if finite:
        target = s[row : row + count]
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
        target[j] = _narrow(source[j], array)


@_inline()
def _load_across(s, row, array, offset, count, each, rows):
    """Into `rows` rows from this one on, of (channels, each) numbers of which a channel's last is for the first row."""
    for k in range(rows):
        for j in range(count):
            s[(row + k) * _WIDTH + j] = _widen(array[offset + (j + 1) * each - 1 - k])


@_inline()
def _store_across(s, row, array, offset, count, rows):
    for k in range(rows):
        for j in range(count):
            array[offset + (j + 1) * rows - 1 - k] = _narrow(s[(row + k) * _WIDTH + j], array)


# What is summed is summed in any order.
_summing = njit(fastmath=_FAST | {"reassoc"}, error_model="numpy", nogil=True)


@_summing
def _sum(values):
    total = np.float32(0)
    for value in values:
        total += value
    return total


@_summing
def _sum_of_products(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += _widen(a[i]) * _widen(b[i])
    return total


@_inline()
def _block(item, blocks, width, size):
    """Batch row, first channel and number of channels of a work item, and that number in whole vectors."""
    first = (item % blocks) * width
    count = min(width, size - first)
    return item // blocks, first, count, (count + _VECTOR - 1) // _VECTOR * _VECTOR


# --- From a text to a kernel ------------------------------------------------------------------------------------------


def define(name: str, key: str, text: str) -> Callable:
    """The function of that name in the text, compiled at its first call; `key` tells apart those of one name.

    Numba keeps machine code beside a file of source, which is written to the user's cache; without one, it compiles in
    memory.
    """
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
    return compiled(namespace[name])


@functools.cache
def _this_source() -> str:
    """What the functions that kernels call are made of, which numba does not look at for its cache."""
    return inspect.getsource(sys.modules[__name__])


# --- Running one ------------------------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> tuple[np.ndarray, int, int]:
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


def with_rows(tensor: Tensor) -> Tensor:
    """A (B, T, D) tensor in float32 or bfloat16 whose channels are contiguous; copied only if it is not."""
    tensor = tensor if tensor.dtype in ARRAYS else tensor.float()
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


def place(tensor: Tensor) -> tuple[int, int, int]:
    """Its address and its two leading strides."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


# The word, in the text of a kernel, for the array at an address.
ARRAYS = {torch.float32: "_floats", torch.bfloat16: "_bfloat16s"}


def optional_rows(tensor: Tensor | None, default: float | bool, batch: int, steps: int) -> tuple[np.ndarray, int, int]:
    """The rows of an optional operand; absent, those of one repeated default."""
    if tensor is None:
        dtype = torch.bool if isinstance(default, bool) else torch.float32
        tensor = torch.full((1, 1), default, dtype=dtype, device="cpu").expand(batch, steps)
    return rows_of(tensor)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lrcssm")


if hasattr(os, "register_at_fork"):
    # A forked process has the pool but not its threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run(kernel, arguments: tuple, batch: int, steps: int, size: int, blocks: int, width: int) -> None:
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


def partition(batch: int, size: int) -> tuple[int, int]:
    """Channel blocks per batch row and their width, such that the threads share the work evenly."""
    threads = torch.get_num_threads()
    blocks = max(1, min(threads // math.gcd(batch, threads), -(-size // _VECTOR)))
    width = min(max(1, -(-size // (blocks * _VECTOR))) * _VECTOR, _WIDTH)
    return -(-size // width), width


def empty(*shape: int) -> Tensor:
    """A new tensor aligned to cache lines. From numpy, which asks for huge pages, so that the kernel that fills it does
    not wait for a page fault every 4 KiB."""
    count, line = math.prod(shape), 64
    buffer = np.empty(count + line // 4, np.float32)
    first = -buffer.ctypes.data % line // 4
    return torch.from_numpy(buffer[first : first + count]).view(shape)
