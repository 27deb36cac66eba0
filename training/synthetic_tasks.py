# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Generated tasks that ask for a state, learned on short sequences and tested on ones up to 64 times as long.

    accelerate launch training/synthetic_tasks.py --task parity

Every seed is a run: `--output_dir` receives a JSON file for each, `results.md` and a plot of accuracy against length. A
finished run is not run again.

Why a nonlinear recurrence tracks states that a linear one does not: reading a symbol, a neuron goes from x to x + eps
(leak_potential tanh(z) - sigmoid(f) x), where eps, z and f are monotone in x and each is shifted by the symbol. A
linear recurrence with decay in (0, 1) can only contract, so that whatever it counts fades, and a sum that does not
fade is read with an error that grows with it. This map can have an attracting cycle. With forget_weight =
update_weight > 0 and leak_potential = -1 a neuron integrates and fires: below its threshold it climbs by a step and
forgets nothing; above it the leak takes all of the state away and the potential puts it back to the bottom, -1,
whatever the error was. From levels -1, 0, ..., p - 2 it thus counts modulo p, as long as one likes; a period of 2 is
parity; and a symbol that drives eps to 0 (the elastance input) is not counted.

The thresholds of eps, z and f move with the symbol. So one neuron with falling eps can also exchange its two lowest
levels and leave the others alone, which with the cycle generates all permutations of its levels: with five, a problem
that is complete for NC1 (Barrington), and that no constant number of layers of a diagonal linear recurrence solves
for all lengths unless TC0 = NC1 (arXiv 2404.08819). What it cannot do is
exchange arbitrary pairs: with monotone eps, either all levels below a threshold hold, or all above it. Groups whose
every element is a symbol are instead composed by layers, one for each step of a composition series with abelian
factors: for S3 the first counts the sign modulo 2, the second modulo 3 in the direction that the sign gives.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_scheduler

from arguments import Distinct, integer, number, text
from arguments import seed as any_seed
from cpu_processes import start_missing_processes
from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceModeling
from pretrain import describe_environment, make_folder, make_optimizer, parse_overrides
from series_rivals import MIXERS, build
from series_training import make_runs
from whole_files import write_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# --- Tasks: (batch, length, generator) -> inputs and labels, both (B, T); continuous ones (B, T, channels) ----------

IGNORED = -100
NUM_COPIED, NUM_SYMBOLS = 4, 4  # of selective copying
OPERATIONS = (min, max, statistics.median_low, lambda values: sum(values) % 10)


def modular_counting(batch: int, length: int, generator: torch.Generator, modulus: int) -> tuple[Tensor, Tensor]:
    """How many of the bits so far are 1, modulo `modulus`, after every bit."""
    bits = torch.randint(2, (batch, length), generator=generator)
    return bits, bits.cumsum(1) % modulus


@functools.cache
def composition_table(degree: int) -> Tensor:
    """(N, N) for the N permutations of `degree` points: which one is "first the column's, then the row's"."""
    permutations = list(itertools.permutations(range(degree)))
    index = {permutation: i for i, permutation in enumerate(permutations)}
    return torch.tensor([[index[tuple(then[i] for i in first)] for first in permutations] for then in permutations])


def permutation_composition(batch: int, length: int, generator: torch.Generator, degree: int) -> tuple[Tensor, Tensor]:
    """Which permutation of `degree` points the permutations so far compose to."""
    table = composition_table(degree)
    symbols = torch.randint(len(table), (batch, length), generator=generator)
    # Symbol 0 is the identity.
    composed = itertools.accumulate(symbols.unbind(1), lambda state, symbol: table[symbol, state])
    return symbols, torch.stack(list(composed), 1)


def flip_flop(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The last written bit, where it is read (arXiv 2306.00946): 0 and 1 write, 2 and 3 are to be ignored, 4 reads."""
    kinds = torch.tensor([0, 2, 4])[
        torch.multinomial(torch.tensor([0.1, 0.8, 0.1]), batch * length, True, generator=generator)
    ]
    kinds = kinds.view(batch, length)
    kinds[:, 0], kinds[:, -1] = 0, 4
    bits = torch.randint(2, (batch, length), generator=generator)
    written = torch.where(kinds == 0, torch.arange(length), 0).cummax(1).values
    labels = torch.where(kinds == 4, bits.gather(1, written), IGNORED)
    return torch.where(kinds == 4, kinds, kinds + bits), labels


def selective_copying(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four symbols 1 to 4, somewhere among zeros, to be repeated in their order at the end (arXiv 2312.00752)."""
    symbols = torch.randint(1, NUM_SYMBOLS + 1, (batch, NUM_COPIED), generator=generator)
    places = torch.rand(batch, length - NUM_COPIED, generator=generator).topk(NUM_COPIED).indices.sort().values
    inputs = torch.zeros(batch, length, dtype=torch.long).scatter(1, places, symbols)
    inputs[:, -NUM_COPIED:] = NUM_SYMBOLS + 1
    labels = torch.full((batch, length), IGNORED)
    labels[:, -NUM_COPIED:] = symbols - 1
    return inputs, labels


def adding(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Channels are a number in (0, 1) and a mark, set once in each half (Hochreiter and Schmidhuber, 1997).

    What is asked, after every step, is the sum of the marked numbers so far.
    """
    numbers = torch.rand(batch, length, generator=generator)
    marks = torch.zeros(batch, length)
    half = length // 2
    for low, high in ((0, half), (half, length)):
        marks.scatter_(1, torch.randint(low, high, (batch, 1), generator=generator), 1)
    return torch.stack([numbers, marks], -1), (numbers * marks).cumsum(1).unsqueeze(-1)


def listops(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The value of a nested expression of digits, minimum, maximum, median and sum modulo 10 (arXiv 1804.06028).

    Symbols 0 to 9 are digits, 10 to 13 open an operation, 14 closes it, 15 fills up before the expression. The value is
    asked at the last step.
    """
    inputs = torch.full((batch, length), 15)
    labels = torch.full((batch, length), IGNORED)
    for row in range(batch):
        draw = random.Random(torch.randint(1 << 31, (), generator=generator).item())
        symbols, value = _expression(length, draw)
        inputs[row, -len(symbols) :] = torch.tensor(symbols)
        labels[row, -1] = value
    return inputs, labels


def _expression(room: int, draw: random.Random) -> tuple[list[int], int]:
    """Symbols, at most `room` of them, and value; an operation takes at least two symbols beside its arguments."""
    if room < 4:
        digit = draw.randrange(10)
        return [digit], digit
    operation = draw.randrange(len(OPERATIONS))
    arguments = min(draw.randint(2, 5), room - 2)
    cuts = [0, *sorted(draw.sample(range(1, room - 2), arguments - 1)), room - 2]
    parts = [_expression(end - start, draw) for start, end in zip(cuts, cuts[1:])]
    symbols = [10 + operation, *(symbol for part, _ in parts for symbol in part), 14]
    return symbols, OPERATIONS[operation]([value for _, value in parts])


class Task(NamedTuple):
    """How to generate it, and what a model's configuration says of its inputs and outputs."""

    generate: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    sizes: dict

    def batch(self, rows: int, length: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the model."""
        inputs, labels = self.generate(rows, length, generator)
        name = "input_values" if inputs.is_floating_point() else "input_ids"
        return {name: inputs.to(device), "labels": labels.to(device)}


def _classes(generate: Callable, vocab_size: int, num_labels: int, **arguments) -> Task:
    return Task(functools.partial(generate, **arguments), {"vocab_size": vocab_size, "num_labels": num_labels})


TASKS = {
    "parity": _classes(modular_counting, 2, 2, modulus=2),
    "mod3": _classes(modular_counting, 2, 3, modulus=3),
    "mod5": _classes(modular_counting, 2, 5, modulus=5),
    "s3": _classes(permutation_composition, 6, 6, degree=3),
    "s5": _classes(permutation_composition, 120, 120, degree=5),
    "flip-flop": _classes(flip_flop, 5, 2),
    "selective-copying": _classes(selective_copying, NUM_SYMBOLS + 2, NUM_SYMBOLS),
    "adding": Task(adding, {"num_channels": 2, "num_labels": 1}),
    "listops": _classes(listops, 16, 10),
}
SHORTEST = 2 * NUM_COPIED  # Length that every task has room in.
ADDING_TOLERANCE = 0.04  # A sum that is this near is right.


# --- Model ----------------------------------------------------------------------------------------------------------


def make_config(task: Task, overrides: str | None) -> LrcSSMConfig:
    """Small, and one symbol a step: with a convolution, a neuron would count what it sees several times."""
    defaults = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "conv_kernel": 1}
    defaults |= {"initializer_range": 0.125, "initialization": "state_tracking"}
    own = {**task.sizes, "use_cache": False}
    values = parse_overrides("lrcssm", overrides)
    if fixed := sorted(own.keys() & values.keys()):
        raise ValueError(f"--config_overrides: the task sets {fixed[0]!r}; leave it out.")
    return LrcSSMConfig(**{**defaults, **values, **own})


# --- Training and testing -------------------------------------------------------------------------------------------


class Curriculum:
    """Lengths of the training batches: short at first, and longer by `GROWTH` whenever `MASTERED` of the predicted
    steps of the recent batches are right. A part of the batches, and towards the end all, have any length, so that
    a model that does not get on has been trained at all of them too.
    """

    GROWTH, MASTERED, SHARE_OF_ANY, ALL_FROM = 1.4, 0.9, 0.2, 0.8

    def __init__(self, longest: int, generator: torch.Generator):
        self.longest, self.generator = longest, generator
        self.top, self.accuracy, self.counts = float(SHORTEST), 0.0, True

    def draw(self, progress: float) -> int:
        """A length, at this fraction of the training."""
        share, place = torch.rand(2, generator=self.generator).tolist()
        self.counts = share >= self.SHARE_OF_ANY and progress < self.ALL_FROM
        low, high = (self.top / 2, self.top) if self.counts else (SHORTEST, self.longest)
        return max(SHORTEST, round(low * (high / low) ** place))

    def record(self, accuracy: float) -> None:
        """Of the batch of the last drawn length."""
        if self.counts:
            self.accuracy += 0.1 * (accuracy - self.accuracy)
            if self.accuracy > self.MASTERED and self.top < self.longest:
                self.top, self.accuracy = min(self.longest, self.GROWTH * self.top), 0.0


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many predicted steps of the sequence's second half are right, and how many there are."""
    half = labels.shape[1] // 2
    logits, labels = logits[:, half:], labels[:, half:]
    if labels.is_floating_point():
        right, predicted = (logits - labels).abs() < ADDING_TOLERANCE, torch.ones_like(labels, dtype=torch.bool)
    else:
        right, predicted = logits.argmax(-1) == labels, labels != IGNORED
    return torch.stack([(right & predicted).sum(), predicted.sum()])


@torch.no_grad()
def measure(model, task: Task, length: int, tokens: int, device: torch.device) -> float:
    """Accuracy at this length, on at least 4 sequences of `tokens` altogether that are the same for all models."""
    model.eval()
    generator = torch.Generator().manual_seed(length)
    rows, most = max(4, tokens // length), max(1, 16384 // length)
    counts = torch.zeros(2, dtype=torch.long, device=device)
    while rows > 0:
        batch = task.batch(min(rows, most), length, generator, device)
        labels = batch.pop("labels")
        counts += count_correct(model(**batch).logits, labels)
        rows -= most
    model.train()
    right, predicted = counts.tolist()
    return right / predicted


def train(args: argparse.Namespace, config: LrcSSMConfig, seed: int, accelerator: Accelerator) -> dict:
    """A run: trains a model and returns what is measured."""
    task, steps = TASKS[args.task], args.max_train_steps
    set_seed(seed)
    model = build(LrcSSMForSequenceModeling, config, args.model)
    parameters = model.num_parameters()
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=steps // 20,
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.05},
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    # All processes draw the same lengths, and each its own sequences.
    curriculum = Curriculum(args.max_train_length, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed((seed + 1) * 1000 + accelerator.process_index)
    history, losses, start = [], [], time.perf_counter()
    bar = tqdm(range(1, steps + 1), desc=f"Seed {seed}", disable=not accelerator.is_main_process, leave=False)
    for step in bar:
        length = curriculum.draw(step / steps)
        batch = task.batch(args.per_device_train_batch_size, length, generator, accelerator.device)
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        right, predicted = accelerator.reduce(count_correct(outputs.logits.detach(), batch["labels"])).tolist()
        if predicted:
            curriculum.record(right / predicted)
        losses.append(outputs.loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"The loss is {losses[-1]} at step {step}; lower --learning_rate ({args.learning_rate}).")
        if step % args.eval_steps == 0 or step == steps:
            accuracy = measure(model, task, args.max_train_length, args.eval_tokens // 4, accelerator.device)
            loss, losses = statistics.mean(losses), []
            history.append({"step": step, "loss": loss, "longest": round(curriculum.top), "accuracy": accuracy})
            bar.set_postfix(loss=f"{loss:.4f}", longest=round(curriculum.top), accuracy=f"{accuracy:.3f}")
    seconds, accuracies = time.perf_counter() - start, {}
    length = args.max_train_length
    while length <= args.max_eval_length:
        accuracies[length] = measure(model, task, length, args.eval_tokens, accelerator.device)
        length *= 2
    accelerator.free_memory()
    return {"parameters": parameters, "accuracy": accuracies, "history": history, "seconds": seconds}


def run_seeds(args: argparse.Namespace, accelerator: Accelerator, command: str) -> list[dict]:
    """Trains the seeds that are not there yet, and returns the records of all of them.

    Raises:
        ValueError: before training, for anything that cannot be used; in training, if the loss is not finite.
    """
    folder = make_folder(args.output_dir)
    config = make_config(TASKS[args.task], args.config_overrides)
    build(LrcSSMForSequenceModeling, config, args.model)  # Refuses what it cannot match.
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "output_dir")}
    runs = []
    for seed in args.seeds:
        path = folder / f"seed-{seed}.json"
        if path.is_file():
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            if runs[-1]["settings"] != settings:
                raise ValueError(f"{path} is a run with other settings; give another --output_dir.")
    finished = {run["seed"]: run for run in runs}
    accelerator.wait_for_everyone()
    for seed in (seed for seed in args.seeds if seed not in finished):
        measured = train(args, config, seed, accelerator)
        record = {"task": args.task, "model": args.model, "seed": seed, **measured}
        record |= {**describe_environment(accelerator), "command": command, "settings": settings}
        # As it is read back, with names for lengths.
        text = json.dumps(record, indent=1) + "\n"
        finished[seed] = json.loads(text)
        if accelerator.is_main_process:
            write_whole(folder / f"seed-{seed}.json", text)
    return [finished[seed] for seed in args.seeds]


# --- Report ---------------------------------------------------------------------------------------------------------


def plot_accuracy(axes, label: str, runs: list[dict], **style) -> None:
    """A line through the mean over runs at each length, in a band from the worst to the best."""
    lengths = [int(length) for length in runs[0]["accuracy"]]
    values = [[100 * accuracy for accuracy in run["accuracy"].values()] for run in runs]
    means = [statistics.mean(column) for column in zip(*values)]
    (line,) = axes.plot(lengths, means, "o-", markersize=3, label=label, **style)
    low, high = ([f(column) for column in zip(*values)] for f in (min, max))
    axes.fill_between(lengths, low, high, alpha=0.15, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.3)


def report(runs: list[dict], folder: Path) -> str:
    """Writes `results.md` and `accuracy.png`, from the runs' records; returns the table."""
    first = runs[0]
    title = f"{first['model']} on {first['task']}"
    figure, axes = plt.subplots(figsize=(6, 4))
    plot_accuracy(axes, first["model"], runs)
    axes.set(xlabel="length", ylabel="accuracy in the second half (%)", title=title)
    figure.savefig(folder / "accuracy.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    lengths = list(first["accuracy"])
    lines = [
        f"{title}, {first['parameters']:,} parameters, trained at lengths up to {lengths[0]}. Accuracy in percent of "
        "the predicted steps in the second half of sequences of the length",
        "",
        f"| seed | {' | '.join(f'{int(length):,}' for length in lengths)} | seconds |",
        "|---|" + "---|" * (len(lengths) + 1),
    ]
    for run in runs:
        cells = [f"{100 * run['accuracy'][length]:.1f}" for length in lengths]
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {run['seconds']:.0f} |")
    table = "\n".join(lines) + "\n"
    write_whole(folder / "results.md", f"# {title}\n\n{table}\n    {first['command']}\n\n![Accuracy](accuracy.png)\n")
    return table


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="parity")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MIXERS, default="lrcssm", help="lrcssm, or a rival of its size.")
    model.add_argument("--config_overrides", help='"num_hidden_layers=1,initialization=default".')
    train = parser.add_argument_group("training")
    train.add_argument("--max_train_length", type=integer(at_least=SHORTEST), default=128)
    train.add_argument("--max_train_steps", type=integer(at_least=1), default=1500)
    train.add_argument("--per_device_train_batch_size", type=integer(at_least=1), default=32)
    train.add_argument("--learning_rate", type=number(above=0), default=2e-3)
    train.add_argument(
        "--weight_decay", type=number(at_least=0), default=0.1, help="Of matrices; vectors do not decay."
    )
    train.add_argument("--max_grad_norm", type=number(above=0), default=1.0)
    train.add_argument(
        "--eval_steps", type=integer(at_least=1), default=250, help="Steps between points of the record's history."
    )
    train.add_argument(
        "--seeds", type=any_seed, nargs="+", action=Distinct, default=[0], help="Each is a run (default 0)."
    )
    test = parser.add_argument_group("test")
    test.add_argument("--max_eval_length", type=integer(at_least=SHORTEST), default=8192)
    test.add_argument("--eval_tokens", type=integer(at_least=1), default=32768, help="Of the sequences at each length.")
    parser.add_argument("--output_dir", type=text, help="Default runs/TASK-MODEL.")
    args = parser.parse_args(arguments)
    if args.output_dir is None:
        args.output_dir = f"runs/{args.task}-{args.model}"
    if args.max_eval_length < args.max_train_length:
        parser.error(f"--max_eval_length must be at least --max_train_length, got {args.max_eval_length}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    accelerator, runs = make_runs("training/synthetic_tasks.py", arguments, functools.partial(run_seeds, args))
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        print(f"\n{report(runs, folder)}\n{folder / 'results.md'} shows this with the plot.")
    accelerator.end_training()


if __name__ == "__main__":
    start_missing_processes()
    main()
