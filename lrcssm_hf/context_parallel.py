# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The recurrence over a sequence whose pieces lie on several ranks.

Rank r knows its own steps but not the state s_r before the first of them. From a guess of all s_r, every rank solves
its piece and finds the state e_r after it and its derivative p_r = de_r/ds_r, D numbers each, because the Jacobian is
diagonal. All ranks gather them, and Newton's method gives the next guess from the first rank to the last:

    s_{r+1} <- e_r + p_r (s_r - the guess of s_r).

The first rank's state is known, so that after k sweeps those of the first k ranks are exact, and after as many sweeps
as there are ranks all are; where Newton converges earlier, as it mostly does after two or three, so does the scan.

Going back is linear, and takes one gathering: with l_r the gradient by s_r of what is asked of rank r's own steps, that
by s_r of everything is l_r + p_r (that by s_{r+1}).

Beside the state, a rank needs from those before it what its convolutions read across the border (`steps_before`), and
from the one after it a label (`spread_labels`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        scan: `scan(inputs, parameters, initial_state)` -> states (B, T, D) and final state (B, D) of a piece.
        inputs, parameters: of this rank's steps, and of all.
        initial_state: (B, D), before the first rank's first step, in the dtype of the states.
        tolerance: relative change of a state between pieces below which it has converged.
    """
    return _ScanOverRanks.apply(
        scan, group, tolerance, tuple(inputs), len(inputs), initial_state, *inputs.values(), *parameters
    )


class _ScanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan, group, tolerance, names, count, initial_state, *tensors):
        rank, size = group.rank(), group.size()
        # The slopes are gradients, which are to be had where nobody asks for any too.
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [None if x is None else _leaf(x) for x in tensors]
            starts = _leaf(initial_state).detach().expand(size, *initial_state.shape)
        for _ in range(size):
            with torch.inference_mode(False), torch.enable_grad():
                start = starts[rank].clone().requires_grad_()
                states, final_state = scan(dict(zip(names, leaves[:count])), leaves[count:], start)
                (slope,) = torch.autograd.grad(final_state.sum(), start, retain_graph=True)
            ends, slopes = _gather(torch.stack([final_state.detach(), slope]), group).unbind(1)
            matched = _match(starts, ends, slopes)
            scale = torch.maximum(matched.abs(), starts.abs())
            # Every rank compares the same numbers, and so all end together. What is not a number does not match.
            if ((matched - starts).abs() <= tolerance * scale).all():
                break
            starts = matched
        ctx.group, ctx.slopes = group, slopes
        # A piece without steps has no states to go back through.
        ctx.has_steps = states.shape[1] > 0
        ctx.start, ctx.leaves, ctx.outputs = start, leaves, (final_state, states)[: 1 + ctx.has_steps]
        return states.detach(), final_state.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states, grad_final_state):
        rank, size = ctx.group.rank(), ctx.group.size()
        by_states = (grad_states,) if ctx.has_steps else ()
        asked = (grad_final_state, *by_states)
        (own,) = torch.autograd.grad(ctx.outputs, ctx.start, asked, retain_graph=True)
        gathered = _gather(own, ctx.group)
        later = torch.zeros_like(own)
        for other in reversed(range(rank + 1, size)):
            later = gathered[other] + ctx.slopes[other] * later
        wanted = [ctx.start, *(leaf for leaf in ctx.leaves if leaf is not None and leaf.requires_grad)]
        asked = (grad_final_state + later, *by_states)
        # Kept for a second time, as that of a plain scan is; it goes with `ctx`.
        by_start, *found = torch.autograd.grad(ctx.outputs, wanted, asked, retain_graph=True, allow_unused=True)
        found = iter(found)
        gradients = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in ctx.leaves]
        return None, None, None, None, None, by_start if rank == 0 else torch.zeros_like(by_start), *gradients


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
    for last, count in zip(lasts[: group.rank()], counts):
        index = places + count.unsqueeze(1)
        moved = before.gather(1, index.clamp(max=len(places) - 1).unsqueeze(-1).expand_as(before))
        before = last + moved.masked_fill((index >= len(places)).unsqueeze(-1), 0)
    return before


def spread_labels(labels: Tensor, group: dist.ProcessGroup, ignore_index: int = -100) -> dict:
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
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def _leaf(tensor: Tensor) -> Tensor:
    """The same numbers, for a graph of their own."""
    leaf = tensor.clone() if tensor.is_inference() else tensor.detach()
    return leaf.requires_grad_(tensor.requires_grad and tensor.is_floating_point())


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of all ranks, in a new first dimension."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def _match(starts: Tensor, ends: Tensor, slopes: Tensor) -> Tensor:
    """Newton's next guess of the states before the pieces, each (ranks, B, D)."""
    matched = [starts[0]]
    for start, end, slope in zip(starts[:-1], ends, slopes):
        change = matched[-1] - start
        guess = end + slope * change
        # A piece whose start was right has the right end, whatever its slope; and a guess must be a number.
        matched.append(torch.where((change == 0) | ~guess.isfinite(), end, guess))
    return torch.stack(matched)
