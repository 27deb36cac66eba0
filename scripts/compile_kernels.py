# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Compiles the Triton kernels for GPUs that need not be there, and shows the registers they take.

    python scripts/compile_kernels.py [target ...]

calls the operators as a model would, with a driver in the place of Triton's own that names a GPU but has none: whatever
would have been launched is compiled instead. Exits with 1 if a compiler had to spill registers to memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lrcssm_hf import cells, mixing_triton, recurrence_triton
from lrcssm_hf.cell_compiler import PROGRAMS


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The cell, dtype of the inputs, dtype of the states, and what there is of all that is optional: inputs, or time steps
# and resets; few neurons ("narrow") are compiled otherwise than many.
VARIANTS = [
    (cells.LRC, torch.bfloat16, torch.float32, ()),
    (cells.LRC, torch.bfloat16, torch.float32, ("inputs",)),
    (cells.LRC, torch.bfloat16, torch.float32, ("inputs", "steps")),
    (cells.LRC, torch.float32, torch.float32, ("inputs", "steps", "narrow")),
    (cells.LRC_SYMMETRIC, torch.float64, torch.float64, ("inputs", "steps")),
    (cells.GRU, torch.bfloat16, torch.float32, ()),
    (cells.MGU, torch.bfloat16, torch.float32, ()),
    (cells.LSTM, torch.bfloat16, torch.float32, ("steps",)),
    (cells.OSCILLATING_LRC, torch.bfloat16, torch.float32, ("inputs", "steps")),
]


def call_operators(
    cell: cells.Cell,
    names: Sequence[str],
    inputs_dtype: torch.dtype,
    dtype: torch.dtype,
    with_steps: bool = False,
    size: int = 128,
) -> None:
    """Every kernel once, for the inputs of these names; the tensors are never read."""
    batch, steps = 2, 512
    program = PROGRAMS[cell.key(names, with_steps)]
    inputs = [torch.empty(batch, steps, size, dtype=inputs_dtype) for _ in names]
    states = torch.empty(batch, steps, program.states, size, dtype=dtype)
    initial = torch.empty(batch, program.states, size, dtype=dtype)
    weights = [torch.empty(size, dtype=dtype) for _ in range(program.weights)]
    time_step = torch.ones(batch, steps) if with_steps else None
    reset = torch.zeros(batch, steps, dtype=torch.bool) if with_steps else None
    operands = (program, inputs, time_step, reset, initial, weights)
    for solver in ("sequential", "chunked", "newton"):
        recurrence_triton.cell_scan_triton(*operands, solver, 1e-6, False)
    recurrence_triton.cell_scan_backward_triton(states, None, states, *operands)
    if cell is cells.LRC or cell is cells.LRC_SYMMETRIC:
        for reverse in (False, True):
            recurrence_triton.prefix_scan_triton(inputs[0], inputs[0], initial[:, 0], reverse)
            of_scan = inputs[0], states[:, :, 0], initial[:, 0], reverse
            recurrence_triton.prefix_scan_backward_triton(states[:, :, 0], *of_scan)
        call_mixing(inputs, reset, states[:, :, -1])
    step, (gate, *_) = PROGRAMS[cell.key(names, False)], (first := [x[:, :1] for x in inputs])
    recurrence_triton.gated_step_triton(step, first, weights, initial, gate)


def call_mixing(inputs: list[torch.Tensor], reset: torch.Tensor | None, states: torch.Tensor) -> None:
    """What the gated block does beside the recurrence; everything optional where there is a `reset`."""
    x, (batch, _, size), taps = inputs[0], inputs[0].shape, 4
    past = lengths = None
    if reset is not None:
        past, lengths = torch.empty(batch, size, taps - 1, dtype=x.dtype), torch.ones(batch, dtype=torch.long)
    operands = x, torch.empty(size, taps, dtype=states.dtype), torch.empty(size, dtype=states.dtype)
    operands = (*operands, past, reset, lengths, True)
    mixing_triton.convolution_triton(*operands)
    mixing_triton.convolution_backward_triton(x, past, *operands)
    mixing_triton.silu_gate_triton(x, states)
    mixing_triton.silu_gate_backward_triton(x, x, states)


class Compiled(NamedTuple):
    """A kernel as it is compiled for a launch; `arguments` are those of the launch, by name."""

    name: str
    arguments: dict[str, Any]
    text: CompiledKernel
    registers: int
    bytes_spilled: int


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for the target where they would have been launched for the first time.

    Gives the list to which they are added.
    """
    no_gpu = SimpleNamespace(
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: list(TARGETS).index(target),
        get_current_stream=lambda device: 0,
    )
    run, kernels, hashes = JITFunction.run, [], set()

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash in hashes:
            return
        hashes.add(compiled.hash)
        if "amdgcn" in compiled.asm:
            text = compiled.asm["amdgcn"]
            # What is spilled to memory lies in the scratch of a thread.
            registers, spilled = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"
        else:
            text, registers, spilled = log.getvalue(), r"Used (\d+) registers", r"(\d+) bytes spill stores"
        counts = [int(re.search(pattern, text).group(1)) for pattern in (registers, spilled)]
        arguments = dict(zip(kernel.arg_names, args)) | kwargs
        kernels.append(Compiled(kernel.__name__, arguments, compiled, *counts))

    driver.set_active(no_gpu)
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    # As if the GPU were so large that all kernels that cut time into chunks do.
    lanes = mock.patch.object(recurrence_triton, "_lanes", lambda device: 1 << 20)
    with lanes, mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def compile_kernels(target: str) -> list[tuple[str, str, str, int, int]]:
    """(target, variant, kernel, registers, bytes spilled) of every kernel launched for a target."""
    rows = []
    with compiling(target) as kernels:
        for cell, inputs_dtype, dtype, options in VARIANTS:
            variant = ", ".join([cell.name, f"{inputs_dtype}".removeprefix("torch."), *options])
            names = [name for name in cell.inputs if "inputs" in options or name not in cell.defaults]
            kernels.clear()
            size = 3 if "narrow" in options else 128
            call_operators(cell, names, inputs_dtype, dtype, "steps" in options, size)
            rows += [(target, variant, kernel.name, kernel.registers, kernel.bytes_spilled) for kernel in kernels]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; all by default")
    targets = parser.parse_args().targets or list(TARGETS)
    for target in targets:
        if target not in TARGETS:
            parser.error(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    with ProcessPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        rows = [row for rows in pool.map(compile_kernels, targets) for row in rows]
    print("| target | inputs | kernel | registers | bytes spilled |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    spilling = [row for row in rows if row[-1] > 0]
    sys.exit(f"{len(spilling)} of {len(rows)} kernels spill registers: {spilling}" if spilling else 0)


if __name__ == "__main__":
    main()
