# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Counts the machine instructions of LRC's Triton kernels, without a GPU: results/instructions_<target>.md.

    python scripts/count_instructions.py [target]

The kernels are compiled as compile_kernels.py does and disassembled. Counted is the loop over time, which is where they
spend it: the instructions that a thread issues for one element of one step. How long they take is not known from that.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from compile_kernels import TARGETS, Compiled, call_operators, compiling
from lrcssm_hf import cells


RESULTS = Path(__file__).parent / "results"
INPUTS = {"": cells.LRC.inputs[:2], " + q": cells.LRC.inputs}
# Title, name, and what the arguments of the launch are.
KERNELS = [
    ("sweep, sequential", "sweep", lambda arguments: arguments["products"] is None),
    ("sweep, with Jacobian", "sweep", lambda arguments: arguments["products"] is not None),
    ("adjoint, reducing", "adjoint", lambda arguments: arguments["REDUCE"]),
    ("adjoint, writing", "adjoint", lambda arguments: not arguments["REDUCE"]),
    ("linear scan, reducing", "_linear_kernel", lambda arguments: arguments["products"] is not None),
    (
        "linear scan, writing",
        "_linear_kernel",
        lambda arguments: arguments["products"] is arguments["trajectory"] is None,
    ),
]


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop, between a label and a branch back to it, that are in no loop inside it."""
    lines = sass.splitlines()
    labels = {line.rstrip(":"): index for index, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    branches = [(index, re.search(r"\bBRA (\w+)", line)) for index, line in enumerate(lines)]
    spans = [(labels[branch[1]], index) for index, branch in branches if branch and labels[branch[1]] < index]
    bodies = []
    for first, last in spans:
        inner = [span for span in spans if first <= span[0] and span[1] <= last and span != (first, last)]
        own = [i for i in range(first, last + 1) if not any(start <= i <= end for start, end in inner)]
        bodies.append([lines[i] for i in own if ";" in lines[i]])
    return bodies


def bytes_loaded(instructions: list[str]) -> int:
    """By a thread, from global memory."""
    loads = [re.search(r"\bLDG(?:STS)?\b([^\s]*)", line) for line in instructions]
    widths = [re.search(r"\.(U8|U16|64|128)\b", load[1]) for load in loads if load]
    return sum({"U8": 1, "U16": 2, "64": 8, "128": 16}[width[1]] if width else 4 for width in widths)


def bytes_of_element(kernel: Compiled) -> int:
    """What is loaded for one channel of one step."""
    tensors = [a for name, a in kernel.arguments.items() if re.fullmatch(r"input\d+_pointer|decay|inputs", name)]
    states = 2 * torch.float32.itemsize if kernel.name == "adjoint" else 0
    return sum(tensor.dtype.itemsize for tensor in tensors) + states


def rows(target: str) -> list[tuple[str, int, float, float]]:
    """Kernel, registers, instructions per element, and how many of them are special functions."""
    table = []
    with compiling(target) as kernels:
        for suffix, names in INPUTS.items():
            kernels.clear()
            call_operators(cells.LRC, names, torch.bfloat16, torch.float32)
            for title, name, is_wanted in KERNELS:
                # The linear scan is the same for all inputs.
                for kernel in [k for k in kernels if k.name == name and is_wanted(k.arguments)][:1]:
                    loop = max(loops(kernel.text.asm["sass"]), key=bytes_loaded)
                    elements = bytes_loaded(loop) / bytes_of_element(kernel)
                    special = sum("MUFU" in instruction for instruction in loop)
                    table.append((title + suffix, kernel.registers, len(loop) / elements, special / elements))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = [name for name, target in TARGETS.items() if target.backend == "cuda"]
    parser.add_argument("target", nargs="?", default="sm_90", choices=choices)
    target = parser.parse_args().target
    text = (
        f"Instructions that a thread issues per element (channel and step) in the loops over time, for {target}, by "
        "scripts/count_instructions.py.\nLRC, inputs in bfloat16, states in float32; `+ q` with elastance input.\n\n"
        "| kernel | registers | instructions | of them special functions |\n|---|---|---|---|\n"
    )
    for title, registers, instructions, special in rows(target):
        text += f"| {title} | {registers} | {instructions:.1f} | {special:.1f} |\n"
    (RESULTS / f"instructions_{target}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
