# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The recurrence over a sequence whose pieces lie on several ranks.

Rank r knows its own steps but not the state s_r before the first of them. From a guess of all s_r, every rank solves
its piece and finds the state e_r after it and its derivative p_r = de_r/ds_r, because the Jacobian is diagonal a number
for each of the D neurons, or n x n where a neuron has n states. All ranks gather them, and Newton's method gives the
next guess from the first rank to the last:

    s_{r+1} <- e_r + p_r (s_r - the guess of s_r).

The first rank's state is known, so that after k sweeps those of the first k ranks are exact, and after as many sweeps
as there are ranks all are; where Newton converges earlier, as it mostly does after two or three, so does the scan.

Going back is linear, and takes one gathering: with g_r the gradient of the whole loss by s_r, and l_r that of rank r's
own outputs, g_r = l_r + p_r^T g_{r+1}.

Beside the state, a rank needs from those before it what its convolutions read across the border (`steps_before`), and
from the one after it a label (`spread_labels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .linear_scan import apply, identity


# What talks to other ranks is left out of compiled graphs.
@torch.compiler.disable
def scan_over_ranks(
    scan: Callable,
    group: dist.ProcessGroup,
    inputs: dict[str, Tensor | None],
    parameters: tuple[Tensor | None, ...],
    initial_state: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """States and final state of this rank's piece.

    Args:
        scan: `scan(inputs, parameters, initial_state)` -> states (B, T, n, D) and final state (B, n, D) of a piece.
        inputs, parameters: of this rank's steps, and of all.
        initial_state: (B, n, D), before the first rank's first step, in the dtype of the states.
        tolerance: relative change of a state between pieces below which it has converged.
    """
    return _ScanOverRanks.apply(scan, group, tolerance, tuple(inputs), initial_state, *inputs.values(), *parameters)


class _ScanOverRanks(torch.autograd.Function):
    """Keeps its arguments and the state before the piece for the way back, where the piece is solved once more."""

    @staticmethod
    def forward(ctx, scan, group, tolerance, names, initial_state, *tensors):
        rank, size = group.rank(), group.size()
        starts = initial_state.detach().expand(size, *initial_state.shape)
        for _ in range(size):
            piece = _Piece.solve(scan, names, tensors, starts[rank])
            states, final_state, slope = piece.states.detach(), piece.final_state.detach(), piece.slope()
            del piece  # A graph as large as the next sweep's.
            gathered = _gather(torch.cat([final_state.unsqueeze(2), slope], dim=2), group)
            ends, slopes = gathered[..., 0, :], gathered[..., 1:, :]
            matched = _match(starts, ends, slopes)
            scale = torch.maximum(matched.abs(), starts.abs())
            # Every rank compares the same numbers, and so all end together. What is not a number does not match.
            if ((matched - starts).abs() <= tolerance * scale).all():
                break
            starts = matched
        ctx.scan, ctx.group, ctx.names = scan, group, names
        ctx.save_for_backward(slopes, starts[rank].clone(), *tensors)
        return states, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_final_state):
        rank, size = ctx.group.rank(), ctx.group.size()
        slopes, start, *tensors = ctx.saved_tensors
        piece = _Piece.solve(ctx.scan, ctx.names, tensors, start)
        # A piece without steps has no states to go back through.
        has_steps = piece.states.shape[1] > 0
        outputs = (piece.final_state, piece.states)[: 1 + has_steps]
        by_states = (grad_states,)[:has_steps]
        (own,) = torch.autograd.grad(outputs, piece.start, (grad_final_state, *by_states), retain_graph=True)
        gathered = _gather(own, ctx.group)
        later = torch.zeros_like(own)
        for other in reversed(range(rank + 1, size)):
            later = gathered[other] + apply(slopes[other].transpose(-3, -2), later)
        wanted = [piece.start, *(leaf for leaf in piece.leaves if leaf is not None and leaf.requires_grad)]
        by_all = (grad_final_state + later, *by_states)
        by_start, *found = torch.autograd.grad(outputs, wanted, by_all, allow_unused=True)
        found = iter(found)
        gradients = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in piece.leaves]
        return None, None, None, None, by_start if rank == 0 else torch.zeros_like(by_start), *gradients


class _Piece(NamedTuple):
    """A rank's piece as solved from a state, with a graph of its own."""

    start: Tensor
    states: Tensor
    final_state: Tensor
    leaves: list[Tensor | None]

    @classmethod
    def solve(cls, scan: Callable, names: tuple[str, ...], tensors: tuple[Tensor | None, ...], start: Tensor) -> _Piece:
        # The slopes need a graph where the caller has none; nor is it one that gradient checkpointing drops.
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            leaves = [None if x is None else _leaf(x) for x in tensors]
            start = start.clone().requires_grad_()
            states, final_state = scan(dict(zip(names, leaves)), leaves[len(names) :], start)
        return cls(start, states, final_state, leaves)

    def slope(self) -> Tensor:
        """The derivative of the final state by the state before the piece, (B, n, n, D), row by column."""
        seeds = identity(self.final_state).unbind(1)
        rows = [torch.autograd.grad(self.final_state, self.start, seed, retain_graph=True)[0] for seed in seeds]
        return torch.stack(rows, dim=1)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _leaf(tensor: Tensor) -> Tensor:
    """The same numbers, for a graph of their own."""
    leaf = tensor.clone() if tensor.is_inference() else tensor.detach()
    return leaf.requires_grad_(tensor.requires_grad)


@torch.compiler.disable
def steps_before(last: Tensor, count: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the last K steps before this rank's piece hold, (B, K, D), zero where there are none; differentiable.

    Args:
        last: (B, K, D), what the last steps of this piece hold, at its end; zero where it has fewer.
        count: (B,), how many steps stand instead of what was before: as many as there are, or K where a document
            starts in the piece.
    """
    lasts, counts = _Gather.apply(last, group), _gather(count, group)
    places = torch.arange(last.shape[1], device=last.device)
    # Zeros that know the others': the first rank, which reads none, has to go back through the gathering too.
    before = lasts[0].masked_fill(torch.ones_like(lasts[0], dtype=torch.bool), 0)
    for rank in range(group.rank()):
        index = places + counts[rank].unsqueeze(1)
        moved = before.gather(1, index.clamp(max=len(places) - 1).unsqueeze(-1).expand_as(before))
        before = lasts[rank] + moved.masked_fill((index >= len(places)).unsqueeze(-1), 0)
    return before


@torch.compiler.disable
def spread_labels(labels: Tensor, group: dist.ProcessGroup, ignore_index: int = -100) -> dict[str, Tensor]:
    """Arguments of transformers' loss of language models for this rank's labels (B, T): those of each next step, which
    after the last is the next rank's first, and a count by which the mean of the ranks' losses is that of the whole."""
    firsts = F.pad(_gather(labels[:, 0], group), (0, 0, 0, 1), value=ignore_index)
    shifted = torch.cat([labels[:, 1:], firsts[group.rank() + 1].unsqueeze(1)], dim=1)
    count = (shifted != ignore_index).sum()
    dist.all_reduce(count, group=group)
    return {"shift_labels": shifted, "num_items_in_batch": count / group.size()}


class _Gather(torch.autograd.Function):
    """`_gather` and its gradient, the sum over all ranks of what they ask of this one."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of all ranks, in a new first dimension."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _match(starts: Tensor, ends: Tensor, slopes: Tensor) -> Tensor:
    """Newton's next guess of the states before the pieces, (ranks, B, n, D), as are the ends."""
    matched = [starts[0]]
    for start, end, slope in zip(starts[:-1], ends, slopes):
        change = matched[-1] - start
        guess = end + apply(slope, change)
        # A piece whose start was right has the right end, whatever its slope; and a guess must be a number.
        is_right = (change == 0).all(dim=-2, keepdim=True)
        matched.append(torch.where(is_right | ~guess.isfinite(), end, guess))
    return torch.stack(matched)
