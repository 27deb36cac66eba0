# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The training loop of the time series scripts: epochs with early stopping on a validation score."""

from __future__ import annotations

import copy
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from free_memory import keep_freed_memory
from pretrain import make_optimizer, use_all_cores


Result = TypeVar("Result")
# Of transformers' schedules, those that need to know the number of epochs only.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip
# Higher is better; the further numbers of a tuple decide between equal first ones.
Score = float | tuple[float, ...]


class FitResult(NamedTuple):
    """Epochs count from 1; `history` has for each its `epoch`, `train_loss` and `score`; `seconds_per_epoch` is the
    median of the training passes, without validation."""

    best_epoch: int
    best_score: Score
    history: list[dict]
    seconds_per_epoch: float


def make_runs(
    script: str, arguments: list[str] | None, work: Callable[[Accelerator, str], Result]
) -> tuple[Accelerator, Result]:
    """What `work(accelerator, command)` returns, by the script with these arguments, or those of this process; exits
    with one message where it refuses its input."""
    command = shlex.join(["accelerate", "launch", script, *(sys.argv[1:] if arguments is None else arguments)])
    keep_freed_memory()
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores()
    try:
        return accelerator, work(accelerator, command)
    except (ValueError, OSError, StrictDataclassError) as refused:
        accelerator.print(f"error: {refused}", file=sys.stderr)
        accelerator.end_training()
        raise SystemExit(2) from None


def fit(
    model: torch.nn.Module,
    loaders: dict[str, DataLoader],
    accelerator: Accelerator,
    *,
    learning_rate: float,
    epochs: int,
    patience: int,
    score: Callable[[torch.nn.Module, DataLoader], Score],
    seed: int,
    weight_decay: float = 0.01,
    adam_beta2: float = 0.95,
    max_grad_norm: float = 1.0,
    lr_scheduler_type: str = "cosine",
    description: str = "Training",
) -> FitResult:
    """Trains with AdamW on `loaders["train"]`, whose batches are the arguments of a model that returns a `loss`; the
    learning rate follows transformers' schedule of that name, of SCHEDULES, over the epochs.

    After every epoch `score(model, loaders["validation"])` is taken, without gradients; when it has not improved for
    `patience` epochs, or the loss is no longer finite, training ends. The model then has the weights of the best epoch
    and is in evaluation mode. Model and loaders need not be prepared; `score` receives them prepared.

    Raises:
        ValueError: the loss is not finite in the first epoch; says whether the learning rate or the data are to blame.
    """
    set_seed(seed)
    start_weights = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, learning_rate, weight_decay, adam_beta2)
    trained, optimizer, train, validation = accelerator.prepare(
        model, optimizer, loaders["train"], loaders["validation"]
    )
    schedule = get_scheduler(lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=epochs)
    best_epoch, best_score, best_weights, history, seconds = 0, None, None, [], []
    bar = tqdm(range(1, epochs + 1), desc=description, disable=not accelerator.is_main_process, leave=False)
    for epoch in bar:
        start = time.perf_counter()
        loss = _train_epoch(trained, optimizer, train, accelerator, max_grad_norm)
        seconds.append(time.perf_counter() - start)
        schedule.step()
        if not math.isfinite(loss):
            break
        trained.eval()
        with torch.no_grad():
            value = score(trained, validation)
        history.append({"epoch": epoch, "train_loss": loss, "score": value})
        if best_score is None or value > best_score:
            best_epoch, best_score, best_weights = epoch, value, copy.deepcopy(model.state_dict())
        shown = value[0] if isinstance(value, tuple) else value
        bar.set_postfix(loss=f"{loss:.4f}", score=f"{shown:.4f}", best_epoch=best_epoch)
        if epoch - best_epoch >= patience:
            break
    bar.close()
    if best_weights is None:
        model.load_state_dict(start_weights)
        _refuse_data_without_a_loss(trained, train, accelerator)
        raise ValueError(f"The loss is {loss} in the first epoch; lower --learning_rate ({learning_rate}).")
    accelerator.free_memory()
    model.load_state_dict(best_weights)
    model.eval()
    return FitResult(best_epoch, best_score, history, statistics.median(seconds))


def _train_epoch(model, optimizer, loader: DataLoader, accelerator: Accelerator, max_grad_norm: float) -> float:
    """One pass over the training data; returns the mean loss of its batches."""
    model.train()
    sums = torch.zeros(2, device=accelerator.device)  # of the losses, and their number
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        sums += torch.stack([loss.detach().float(), torch.ones_like(sums[0])])
    total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return total / count


@torch.no_grad()
def _refuse_data_without_a_loss(untrained, loader: DataLoader, accelerator: Accelerator) -> None:
    """Raises a `ValueError` where the loss of a batch is not finite before anything is learned."""
    untrained.eval()
    ranges = []
    for batch in loader:
        if not untrained(**batch).loss.isfinite():
            numbers = {name: values for name, values in batch.items() if values.is_floating_point()}
            ranges.append({name: [values.min().item(), values.max().item()] for name, values in numbers.items()})
    ranges = gather_object(ranges)
    if ranges:
        # Of numpy, whose minimum of a NaN and a number is NaN.
        ends = {name: [pick([r[name] for r in ranges]) for pick in (np.min, np.max)] for name in ranges[0]}
        seen = ", ".join(f"`{name}` from {low:g} to {high:g}" for name, (low, high) in ends.items())
        raise ValueError(
            f"The loss of {len(ranges)} batches is not finite before anything is learned, so that no --learning_rate "
            f"helps. Look at the data there: {seen}."
        )
