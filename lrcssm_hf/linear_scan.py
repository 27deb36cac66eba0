# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The linear scan under all solvers, h_t = A_t h_{t-1} + u_t, in plain PyTorch.

Every channel has n numbers of state and its own n x n blocks A: vectors are (..., n, D), blocks (..., n, n, D), row by
column. For n = 1 all of it is elementwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


# Below this many steps a Python loop costs no more than the bookkeeping of what runs in parallel.
SHORT_SEQUENCE = 32


def apply(block: Tensor, vector: Tensor) -> Tensor:
    """Block times vector, (..., n, D)."""
    if block.shape[-2] == 1:
        return block.squeeze(-2) * vector
    return (block * vector.unsqueeze(-3)).sum(-2)


def multiply(second: Tensor, first: Tensor) -> Tensor:
    """The block that applies `first` and then `second`, (..., n, n, D)."""
    if second.shape[-2] == 1:
        return second * first
    return (second.unsqueeze(-2) * first.unsqueeze(-4)).sum(-3)


def identity(vector: Tensor) -> Tensor:
    """The block that leaves vectors like this one (..., n, D) as they are."""
    eye = torch.eye(vector.shape[-2], dtype=vector.dtype, device=vector.device)
    return eye.unsqueeze(-1).expand(*vector.shape[:-1], *vector.shape[-2:]).contiguous()


def shift(states: Tensor, initial_state: Tensor) -> Tensor:
    """h_0 .. h_{T-1} from h_1 .. h_T and h_0."""
    return torch.cat([initial_state.unsqueeze(1), states[:, :-1]], dim=1)


def scan_loop(blocks: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """All h_t along axis 1, one after the other: the definition."""
    state, states = initial_state, []
    for block, addend in zip(blocks.unbind(1), inputs.unbind(1)):
        state = apply(block, state) + addend
        states.append(state)
    return torch.stack(states, dim=1) if states else torch.empty_like(inputs)


def scan(blocks: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool = False) -> Tensor:
    """The same in O(sqrt(T)) vectorised steps: all chunks at once, then their carries, then all chunks again.

    Args:
        blocks, inputs: (B, T, n, n, D) and (B, T, n, D).
        initial_state: (B, n, D), before the first step, or after the last for `reverse`: h_t = A_t h_{t+1} + u_t.
    """
    if reverse:
        return scan(blocks.flip(1), inputs.flip(1), initial_state).flip(1)
    length = inputs.shape[1]
    if length <= SHORT_SEQUENCE:
        return scan_loop(blocks, inputs, initial_state)
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)
    # Chunks become rows of the batch for `scan_loop`: (B, count, chunk, ...) -> (B * count, chunk, ...), and back.
    chunked_blocks, chunked_inputs = (
        F.pad(x, (*[0, 0] * (x.dim() - 2), 0, count * chunk - length)).unflatten(1, (count, chunk)).flatten(0, 1)
        for x in (blocks, inputs)
    )
    products = _product(chunked_blocks)
    if not products.isfinite().all():
        # The carries of an expanding recurrence can be finite where the products of its factors are not.
        return scan_loop(blocks, inputs, initial_state)
    ends = scan_loop(chunked_blocks, chunked_inputs, torch.zeros_like(chunked_inputs[:, 0]))[:, -1]
    carries = scan_loop(products.unflatten(0, (-1, count)), ends.unflatten(0, (-1, count)), initial_state)
    states = scan_loop(chunked_blocks, chunked_inputs, shift(carries, initial_state).flatten(0, 1))
    return states.unflatten(0, (-1, count)).flatten(1, 2)[:, :length]


def _product(blocks: Tensor) -> Tensor:
    """Of all blocks along axis 1, the last one applied last."""
    if blocks.shape[-2] == 1:
        return blocks.prod(dim=1)
    product, *rest = blocks.unbind(1)
    for block in rest:
        product = multiply(block, product)
    return product
