# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""One sequence over several processes, over gloo: what test_context_parallel.py starts.

A file of its own, because each process imports the file that its function is in.
"""

import datetime
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from lrcssm_hf import lrc_scan
from problems import cast, leaves, random_problem


RANKS = 4
# Name -> options of the problem, dtype, solver, and where the sequence of 29 steps is cut.
CASES = {
    "even": ({}, torch.float64, "auto", (7, 14, 21)),
    "odd, masks, resets": ({"full": True}, torch.float64, "auto", (3, 4, 20)),
    "symmetric": ({"full": True, "symmetric": True}, torch.float64, "newton", (10, 11, 25)),
    "an empty piece": ({"full": True}, torch.float64, "auto", (9, 9, 20)),
    "large weights": ({"scale": 8.0}, torch.float64, "sequential", (8, 15, 22)),
    "float32": ({"full": True}, torch.float32, "auto", (7, 14, 21)),
    "bfloat16": ({}, torch.bfloat16, "auto", (7, 14, 21)),
}
STEPS = 29


def run(folder: Path) -> None:
    """Raises what any of the processes raises."""
    torch.multiprocessing.spawn(_run, args=(folder,), nprocs=RANKS)


def _run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, world_size=RANKS, rank=rank)
    two = dist.new_group([0, 1])
    for name, (options, dtype, solver, cuts) in CASES.items():
        results = check(name, options, dtype, solver, cuts, dist.group.WORLD)
        if rank < 2:
            check(f"{name}, two ranks", options, dtype, solver, cuts[1:2], two)
        torch.save(results, folder / f"{name}-{rank}")
    dist.destroy_process_group()


def check(name, options, dtype, solver, cuts, group) -> int:
    """States and gradients of this rank's piece against those of the whole sequence in one process."""
    rank, edges = group.rank(), [0, *cuts, STEPS]
    piece = slice(edges[rank], edges[rank + 1])
    cotangent = torch.randn(2, STEPS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(problem, part, last, **scan_options):
        forget, update, parameters, others = problem
        per_step = {k: v[:, part] for k, v in others.items() if k != "initial_state"}
        start = {k: v for k, v in others.items() if k == "initial_state"}
        states, final = lrc_scan(forget[:, part], update[:, part], parameters, **per_step, **start, **scan_options)
        if not torch.is_grad_enabled():
            return states, None
        loss = (states * cotangent[:, part].to(states.dtype)).sum() + last * final.square().sum()
        return states, torch.autograd.grad(loss, leaves(*problem), allow_unused=True)

    whole = cast(random_problem(2, STEPS, 5, **options), dtype)
    expected, expected_gradients = gradients(whole, slice(None), 1)
    calls = []
    torch_gather = dist.all_gather

    def counted(*arguments, **keywords):
        calls.append(1)
        return torch_gather(*arguments, **keywords)

    dist.all_gather = counted
    try:
        found, found_gradients = gradients(whole, piece, rank == group.size() - 1, solver=solver, group=group)
    finally:
        dist.all_gather = torch_gather
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    if dtype == torch.float64:
        # Without gradients, and in inference mode, as with them.
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                again, _ = gradients(whole, piece, 0, solver=solver, group=group)
            assert torch.equal(again, found), name
    error = (found - expected[:, piece]).abs() / (1 + expected.abs().max())
    assert not (error > tolerance).any(), name
    for index, (ours, theirs) in enumerate(zip(found_gradients, expected_gradients)):
        ours = torch.zeros_like(theirs) if ours is None else ours.clone()
        # Shares of the parameters; of a step's inputs, each rank has its own and zeros.
        total = ours.double()
        dist.all_reduce(total, group=group)
        error = (total - theirs.double()).abs().max() / (1 + theirs.abs().max())
        assert error <= tolerance * 10, (name, index, error)
    return len(calls)
