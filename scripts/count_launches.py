# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How many kernels a scan launches on a GPU, without one: Triton's, and torch's beside them.

    python scripts/count_launches.py

A launch costs the host some microseconds, which is what short sequences wait for.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lrcssm_hf import cells, recurrence_triton
from lrcssm_hf.cell_compiler import PROGRAMS


RESULTS = Path(__file__).resolve().parent / "results"
# Rows, steps and channels of which all kernels that can cut time into chunks do.
SHAPE = (1, 4096, 256)


class TorchLaunches(TorchDispatchMode):
    """Counts what calculates or copies; neither views nor new memory."""

    def __init__(self, count: collections.Counter):
        self.count = count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        shares = any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns)
        if not shares and not name.startswith(("empty", "new_empty", "promote_types")):
            self.count["torch"] += 1
        return function(*args, **(kwargs or {}))


def launches(call: Callable) -> tuple[collections.Counter, tuple]:
    """How many of `triton` and of `torch`, and what is returned."""
    count = collections.Counter()

    def run(kernel, *arguments, **options):
        count["triton"] += 1

    with mock.patch.object(JITFunction, "run", run), TorchLaunches(count):
        results = call()
    return count, results


def measure() -> list[tuple[str, collections.Counter, collections.Counter]]:
    """Of every solver, without and with time steps and resets, forward and backward."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    # As if the GPU were so large that all kernels that cut time into chunks do.
    with mock.patch.object(recurrence_triton, "_lanes", lambda device: 1 << 20):
        return [row for solver in ("sequential", "chunked", "newton") for row in _measure(solver)]


def _measure(solver: str) -> list[tuple[str, collections.Counter, collections.Counter]]:
    batch, steps, size = SHAPE
    inputs, weights = [torch.zeros(SHAPE, dtype=torch.bfloat16)] * 2, [torch.zeros(size)] * len(cells.LRC.parameters)
    measured = []
    for full in (False, True):
        program = PROGRAMS[cells.LRC.key(cells.LRC.inputs[:2], full)]
        time = (torch.ones(batch, steps), torch.zeros(batch, steps, dtype=torch.bool)) if full else (None, None)
        operands = (program, inputs, *time, None, weights)
        forward, (states, *_) = launches(
            lambda: recurrence_triton.cell_scan_triton(*operands, solver, 1e-6, False)  # noqa: B023
        )
        backward, _ = launches(
            lambda: recurrence_triton.cell_scan_backward_triton(states, None, states, *operands)  # noqa: B023
        )
        measured.append((solver + (", time steps and resets" if full else ""), forward, backward))
    return measured


def main() -> None:
    text = (
        f"Kernels that the scan of an LRC launches, Triton's and torch's, at {SHAPE}, by scripts/count_launches.py.\n\n"
        "| solver | forward | backward |\n|---|---|---|\n"
    )
    for title, *passes in measure():
        counts = [f"{count['triton']} + {count['torch']}" for count in passes]
        text += f"| {title} | {' | '.join(counts)} |\n"
    (RESULTS / "launches.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
