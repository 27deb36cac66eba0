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
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
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
