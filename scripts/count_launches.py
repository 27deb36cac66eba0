# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How many kernels a scan launches on a GPU, without one: Triton's, and torch's beside them: results/launches.md.

    python scripts/count_launches.py

A launch costs the host some microseconds, which is what short sequences wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock


# Triton reads it when it is imported. On a GPU the same is launched.
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from count_traffic import returns_views
from lrcssm_hf import LrcParameters, lrc_scan, recurrence, recurrence_triton


RESULTS = Path(__file__).resolve().parent / "results"
# Rows, steps and channels of which all kernels that can cut time into chunks do.
SHAPE = (1, 4096, 256)
# What `measure` counts with commit 09aee96, version 0.1, in the place of this package.
OF_VERSION_0_1 = {
    "sequential": ((1, 7), (3, 2)),
    "sequential, time steps and resets": ((1, 7), (3, 3)),
    "chunked": ((13, 9), (3, 2)),
    "chunked, time steps and resets": ((14, 14), (3, 3)),
    "newton": ((2, 9), (3, 2)),
    "newton, time steps and resets": ((3, 14), (3, 3)),
}
OPERATORS = {op._qualname: op for op in vars(recurrence).values() if isinstance(op, CustomOpDef)}


class TorchLaunches(TorchDispatchMode):
    """Counts what calculates or copies, inside our own operators too; neither views nor new memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in OPERATORS:
            with self:
                return OPERATORS[name]._init_fn(*args, **(kwargs or {}))
        if not returns_views(function) and not name.split("::")[1].startswith(("empty", "new_empty", "promote_types")):
            self.count += 1
        return function(*args, **(kwargs or {}))


def launches(call: Callable) -> tuple[tuple[int, int], tuple]:
    """How many are Triton's and how many torch's, and what is returned."""
    with mock.patch.object(GridExecutor, "__call__", mock.Mock()) as launch, TorchLaunches() as by_torch:
        results = call()
    return (launch.call_count, by_torch.count), results


def measure() -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Launches of the scan of an LRC and of its gradient, by Triton and by torch, for every solver, without and with
    time steps and resets."""
    batch, steps, _ = SHAPE
    time = {"time_step": torch.ones(batch, steps), "reset": torch.zeros(batch, steps, dtype=torch.bool)}
    counts = {}
    # As if the GPU were so large that all kernels that cut time into chunks do.
    with mock.patch.object(recurrence_triton, "_lanes", lambda device: 1 << 20):
        for solver in ("sequential", "chunked", "newton"):
            for suffix, options in (("", {}), (", time steps and resets", time)):
                counts[solver + suffix] = _measure(solver, options)
    return counts


def _measure(solver: str, options: dict[str, torch.Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    inputs = [torch.zeros(SHAPE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    parameters = LrcParameters(*[torch.zeros(SHAPE[2], requires_grad=True) for _ in range(8)])
    cotangent = torch.ones(SHAPE)
    forward, (states, _) = launches(
        lambda: lrc_scan(*inputs, parameters, solver=solver, backend="triton", **options)
    )  # fmt: skip
    backward, _ = launches(lambda: torch.autograd.grad(states, [*inputs, *parameters[:8]], cotangent))
    return forward, backward


def main() -> None:
    text = (
        f"Kernels that the scan of an LRC launches, Triton's + torch's, at {SHAPE}, by scripts/count_launches.py.\n\n"
        "| solver | forward | backward | all | forward, version 0.1 | backward, version 0.1 | all, version 0.1 |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for title, passes in measure().items():
        cells = []
        for pair in (passes, OF_VERSION_0_1[title]):
            cells += [*(f"{triton} + {torch}" for triton, torch in pair), str(sum(map(sum, pair)))]
        text += f"| {title} | {' | '.join(cells)} |\n"
    (RESULTS / "launches.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
