# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How many bytes the gated block moves beside its matrix products, under autocast to bfloat16.

    python scripts/count_traffic.py

Counted is what every operation reads and writes, as torch's dispatcher sees it: all its tensors but those that share
their memory with its arguments. The table gives the bytes for each of the B * T * D numbers of the layer's states,
forward, and forward and backward. It is the same on every device, because the operations are.
"""

from __future__ import annotations

import collections
import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrcssm_hf import LrcSSMConfig, backends, mixing
from lrcssm_hf.blocks import LrcSSMGatedBlock
from lrcssm_hf.steps import LrcSSMSteps


# Matrix products, and what moves nothing.
NOT_COUNTED = {"mm", "addmm", "bmm", "_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided"}


def bytes_of(values: object) -> int:
    """Of all tensors in there; what is expanded is read once."""
    total = 0
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            sizes = (size for size, stride in zip(tensor.shape, tensor.stride()) if stride != 0)
            total += torch.Size(sizes).numel() * tensor.element_size()
    return total


RESULTS = Path(__file__).resolve().parent / "results"
# Rows and steps: enough of them for the weights not to count.
SHAPE = (8, 1024)


def returns_views(function: torch._ops.OpOverload) -> bool:
    """Whether what it returns has its arguments' memory, and nothing is calculated or copied."""
    return any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns)


class Traffic(TorchDispatchMode):
    """Counts bytes by the name of the operation."""

    def __init__(self):
        self.moved = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not returns_views(function) and name not in NOT_COUNTED:
            # What is allocated by the example of a tensor does not read that.
            read = () if name.startswith(("new_", "zeros_", "ones_", "full_")) else (args, kwargs)
            self.moved[name] += bytes_of(read) + bytes_of(results)
        return results

    def kernel(self, operator: str, backend: str, tensor: Tensor, *arguments):
        """In the place of `by_kernels`: what a kernel moves, and nothing of what its wrapper does."""
        with unittest.mock.patch.object(self, "moved", collections.Counter()):
            results = backends.by_kernels(operator, backend, tensor, *arguments)
        self.moved[operator] += bytes_of(arguments) + bytes_of(results)
        return results


@contextlib.contextmanager
def counting() -> Iterator[collections.Counter]:
    """Inside, what is moved is added to the counter."""
    traffic = Traffic()
    with traffic, unittest.mock.patch.object(mixing, "by_kernels", traffic.kernel):
        yield traffic.moved


def bytes_per_element(call: Callable[[Tensor], Tensor], inputs: Tensor, elements: int) -> tuple[dict, dict]:
    """By operation: forward, and backward."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        with counting() as forward:
            outputs = call(inputs)
        with counting() as backward:
            outputs.backward(torch.ones_like(outputs))
    return ({name: count / elements for name, count in moved.items()} for moved in (forward, backward))


def measure() -> list[tuple[str, dict, dict]]:
    """Of mixer and block, without and with documents told apart: bytes per element by operation, forward and back."""
    torch.manual_seed(0)
    config = LrcSSMConfig(hidden_size=256, num_hidden_layers=1)
    block = LrcSSMGatedBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    inputs = torch.randn(*SHAPE, config.hidden_size)
    measured = []
    # The block reads the residual stream in float32, and the mixer what the norm makes of it.
    for name, part, dtype in (("mixer", block.mixer, torch.bfloat16), ("block", block, torch.float32)):
        for documents in (False, True):
            steps = LrcSSMSteps(None, torch.zeros(SHAPE, dtype=torch.bool) if documents else None)
            hidden = inputs.to(dtype).requires_grad_()
            passes = bytes_per_element(lambda x: part(x, steps)[0], hidden, inputs.numel())  # noqa: B023
            measured.append((name + (", documents" if documents else ""), *passes))
    return measured


def main() -> None:
    text = (
        "Bytes that the gated block moves beside its matrix products for each number of its states, under autocast to "
        "bfloat16, by scripts/count_traffic.py.\n\n"
        "| | forward | backward | forward, by operation |\n|---|---|---|---|\n"
    )
    for name, forward, backward in measure():
        largest = sorted((item for item in forward.items() if item[1] >= 0.05), key=lambda item: -item[1])
        detail = ", ".join(f"{operation} {count:.1f}" for operation, count in largest)
        text += f"| {name} | {sum(forward.values()):.1f} | {sum(backward.values()):.1f} | {detail} |\n"
    (RESULTS / "block_traffic.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
