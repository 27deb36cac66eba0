# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""One sequence over several processes, over gloo: what test_context_parallel.py starts.

A file of its own, because each process imports the file that its function is in.
"""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist

from lrcssm_hf import cell_scan, lrc_scan, prefix_scan
from lrcssm_hf.cells import LSTM
from lrcssm_hf.host import checkpoint_activations
from problems import cast, cell_leaves, leaves, random_cell_problem, random_problem
from processes import join
from tiny_models import make_model, random_ids


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
# Name -> configuration, dtype, whether there are masks and several documents in a row, and the cuts.
MODELS = {
    "model": ({}, torch.float64, False, (7, 14, 21)),
    "masks, documents": ({}, torch.float64, True, (3, 4, 20)),
    "in pieces shorter than the convolution": ({}, torch.float64, True, (1, 2, 4)),
    "float32": ({}, torch.float32, True, (11, 12, 20)),
    "linear": ({"state_dependence": "input"}, torch.float64, True, (7, 9, 21)),
    "no convolution": ({"conv_kernel": 1}, torch.float64, True, (7, 9, 21)),
    "paper": ({"block_type": "paper"}, torch.float64, True, (7, 9, 21)),
    "gradient checkpointing": ({"checkpointed": True}, torch.float64, True, (7, 9, 21)),
    "compiled": ({"compiled": True, "num_hidden_layers": 1}, torch.float64, True, (7, 9, 21)),
}


def run(folder: Path) -> None:
    """Raises what any of the processes raises."""
    torch.multiprocessing.spawn(_run, args=(folder,), nprocs=RANKS)


def _run(rank: int, folder: Path) -> None:
    join(rank, RANKS, folder)
    two = dist.new_group([0, 1])
    for name, (options, dtype, solver, cuts) in CASES.items():
        results = check(name, options, dtype, solver, cuts, dist.group.WORLD)
        if rank < 2:
            check(f"{name}, two ranks", options, dtype, solver, cuts[1:2], two)
        torch.save(results, folder / f"{name}-{rank}")
    for name, (changes, dtype, full, cuts) in MODELS.items():
        check_model(name, dict(changes), dtype, full, cuts, dist.group.WORLD)
        if rank < 2:
            check_model(f"{name}, two ranks", dict(changes), dtype, full, cuts[1:2], two)
    check_two_states(dist.group.WORLD)
    check_linear_scan(dist.group.WORLD)
    check_counted_labels(dist.group.WORLD)
    dist.destroy_process_group()


@contextlib.contextmanager
def counted_gatherings():
    """A list that grows with every gathering."""
    calls, gather = [], dist.all_gather

    def counted(*arguments, **keywords):
        calls.append(1)
        return gather(*arguments, **keywords)

    dist.all_gather = counted
    try:
        yield calls
    finally:
        dist.all_gather = gather


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
    with counted_gatherings() as calls:
        found, found_gradients = gradients(whole, piece, rank == group.size() - 1, solver=solver, group=group)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    if dtype == torch.float64:
        # Without gradients, and in inference mode, as with them.
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                again, _ = gradients(cast(whole, dtype), piece, 0, solver=solver, group=group)
            assert torch.equal(again, found), name
    error = (found - expected[:, piece]).abs() / (1 + expected.abs().max())
    assert (error <= tolerance).all(), name
    for index, (ours, theirs) in enumerate(zip(found_gradients, expected_gradients)):
        ours = torch.zeros_like(theirs) if ours is None else ours.clone()
        # Shares of the parameters; of a step's inputs, each rank has its own and zeros.
        total = ours.double()
        dist.all_reduce(total, group=group)
        error = (total - theirs.double()).abs().max() / (1 + theirs.abs().max())
        assert error <= tolerance * 10, (name, index, error)
    return len(calls)


def check_model(name, changes, dtype, full, cuts, group) -> None:
    """Logits of this rank's piece, and the means of the ranks' losses and gradients, against the whole sequence's."""
    rank, edges = group.rank(), [0, *cuts, STEPS]
    checkpointed, compiled = changes.pop("checkpointed", False), changes.pop("compiled", False)
    model = make_model(**changes).to(dtype).train()
    if checkpointed:
        checkpoint_activations(model)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    inputs = {"input_ids": random_ids(3, STEPS)}
    labels = inputs["input_ids"]
    if full:
        generator = torch.Generator().manual_seed(2)
        inputs["attention_mask"] = (torch.rand(3, STEPS, generator=generator) < 0.7).long()
        inputs["position_ids"] = torch.randint(6, (3, STEPS), generator=generator)
        # A document that starts where the second of the pieces of one step is, and goes on after it.
        inputs["attention_mask"][0, 1:7] = 1
        inputs["position_ids"][0, 1:7] = torch.arange(6)
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)

    def run(part, **options):
        piece = {key: value[:, part] for key, value in inputs.items()}
        outputs = model(**piece, labels=labels[:, part], **options)
        with counted_gatherings() as going_back:
            gradients = torch.autograd.grad(outputs.loss, list(model.parameters()))
        return outputs.logits.detach(), [outputs.loss.detach(), *gradients], len(going_back)

    part = slice(edges[rank], edges[rank + 1])
    expected_logits, expected, _ = run(slice(None))
    with counted_gatherings() as all_gatherings:
        logits, found, going_back = run(part, context_parallel_group=group)
    # Every layer once, and what a checkpointed layer did going forward once more.
    going_forward = len(all_gatherings) - 1 - going_back if checkpointed else 0
    assert going_back <= model.config.num_hidden_layers + going_forward, name
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5}[dtype]
    error = (logits - expected_logits[:, part]).abs() / (1 + expected_logits.abs().max())
    assert (error <= tolerance).all(), (name, rank)
    for index, (ours, theirs) in enumerate(zip(found, expected)):
        mean = ours.clone()
        dist.all_reduce(mean, group=group)
        error = (mean / group.size() - theirs).abs().max() / (1 + theirs.abs().max())
        # transformers computes losses in float32.
        assert error <= 2e-6, (name, index, error)


def check_two_states(group) -> None:
    """A cell of two states a neuron: its states, and the sums of the ranks' gradients."""
    inputs, parameters, options = problem = random_cell_problem(LSTM, 2, STEPS, 5, full=True)
    cuts = (3, 4, 20)
    part, is_last = slice([0, *cuts][group.rank()], [*cuts, STEPS][group.rank()]), group.rank() == group.size() - 1

    def run(part, last, **others):
        at = {name: tensor[:, part] for name, tensor in (options | inputs).items() if name != "initial_state"}
        steps = {name: at.pop(name) for name in ("time_step", "reset")}
        start = options["initial_state"]
        states, final_state = cell_scan(LSTM, at, parameters, initial_state=start, **steps, **others)
        loss = states.square().sum() + last * final_state.sum()
        return states, torch.autograd.grad(loss, cell_leaves(problem))

    expected, expected_gradients = run(slice(None), 1)
    found, gradients = run(part, is_last, group=group)
    torch.testing.assert_close(found, expected[:, part])
    for ours, theirs in zip(gradients, expected_gradients):
        total = ours.clone()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total, theirs)


def check_linear_scan(group) -> None:
    """`prefix_scan` of this rank's steps, of which the second rank has none."""
    generator = torch.Generator().manual_seed(3)
    decay, inputs, start = (torch.randn(2, n, 5, generator=generator, dtype=torch.float64) for n in (STEPS, STEPS, 1))
    cuts = (9, 9, 20)
    part = slice([0, *cuts][group.rank()], [*cuts, STEPS][group.rank()])
    found = prefix_scan(decay[:, part], inputs[:, part], start[:, 0], group=group)
    torch.testing.assert_close(found, prefix_scan(decay, inputs, start[:, 0])[:, part])


def check_counted_labels(group) -> None:
    """With a number of labels, as Trainer gives it, a loss is a share of the sum over the ranks."""
    model, ids = make_model(), random_ids(2, STEPS)
    expected = model(input_ids=ids, labels=ids, num_items_in_batch=100).loss
    part = slice(group.rank() * STEPS // group.size(), (group.rank() + 1) * STEPS // group.size())
    options = {"num_items_in_batch": 100, "context_parallel_group": group}
    loss = model(input_ids=ids[:, part], labels=ids[:, part], **options).loss.detach()
    dist.all_reduce(loss, group=group)
    torch.testing.assert_close(loss, expected)
