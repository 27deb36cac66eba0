# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Train and evaluate a classifier of time series, LrcSSM or a rival, on a set of the archives or on your own.

    accelerate launch training/classify_series.py --dataset_name BasicMotions

Every seed is a run: its own split (70% training, 15% validation, 15% test), normalised by the training series; each
learning rate is tried, and the epoch and rate with the best validation accuracy (of equal ones, the least validation
loss) are tested, once. `--output_dir` receives a JSON file per run, `results.md`, the plots, and the model folder of
the best run (for the LrcSSM models), whose configuration names the classes and has the channels' mean and deviation. A
finished run is not run again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import statistics
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import ModelOutput

from arguments import Distinct, integer, number, text
from arguments import seed as any_seed
from cpu_processes import start_missing_processes
from lrcssm_hf import (
    LrcSSMConfig,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    series_statistics,
)
from lrcssm_hf.series import observed_values
from pretrain import describe_environment, make_folder, parse_overrides
from run_records import read_record
from series_data import (
    SeriesData,
    add_series_arguments,
    channel_statistics,
    check_time_unit,
    collate,
    load_series,
    make_rows,
    split,
)
from series_rivals import MIXERS, build
from series_training import SCHEDULES, fit, make_runs
from whole_files import whole_files, write_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PAPER_SEEDS = (2345, 3456, 4567, 5678, 6789)
# Those whose folder AutoModelForSequenceClassification loads: a rival's mixer is no part of the package.
SAVED_MODELS = ("lrcssm", "lrcssm-paper")
MODELS = (*SAVED_MODELS, *(mixer for mixer in MIXERS if mixer != "lrcssm"), "minirocket")

# What flags are where they are not given, and the configuration that --config_overrides changes. Several steps are
# read as one token where the longest series would have more than `tokens_per_series`.
PRESETS = {
    "default": {
        "model": "lrcssm",
        "learning_rate": [3e-3],
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 100,
        "patience": 30,
        "per_device_train_batch_size": 16,
        "tokens_per_series": 100,
        "config": {"hidden_size": 64, "num_hidden_layers": 2, "hidden_dropout": 0.1, "initializer_range": 0.1},
    },
    # arXiv 2505.21717, section 4 and the authors' code. It declares a dropout of 0.2 but does not apply it.
    "paper": {
        "model": "lrcssm-paper",
        "learning_rate": [1e-4, 1e-3],
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 3000,
        "patience": 1000,
        "per_device_train_batch_size": 4,
        "tokens_per_series": None,
        "config": {"hidden_size": 64, "state_size": 64, "num_hidden_layers": 6},
    },
}
EVALUATION_BATCH_SIZE = 64
# What the record of every run has.
RECORD = {
    "model": str, "seed": int, "data": dict, "settings": dict, "validation_accuracy": float, "test_accuracy": float,
    "confusion": list, "seconds": float, "hardware": dict, "versions": dict, "command": str,
}  # fmt: skip
MINIROCKET_STEPS = 9  # The shortest series that aeon's takes.


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_series_arguments(parser.add_argument_group("data"))
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, help="lrcssm, the authors' block or a rival of the size of lrcssm.")
    model.add_argument("--config_overrides", help='"hidden_size=128,num_hidden_layers=4,bidirectional=True".')
    model.add_argument(
        "--preset", choices=PRESETS, default="default", help="Defaults of all these flags, or the paper's."
    )
    train = parser.add_argument_group("training")
    rates = {"type": number(above=0), "nargs": "+", "action": Distinct}
    train.add_argument("--learning_rate", **rates, help="Each is tried; validation chooses.")
    train.add_argument("--weight_decay", type=number(at_least=0), help="Of matrices; vectors do not decay.")
    train.add_argument("--adam_beta2", type=number(at_least=0, below=1))
    train.add_argument("--lr_scheduler_type", choices=SCHEDULES, help="Over the epochs.")
    count = integer(at_least=1)
    train.add_argument("--num_train_epochs", type=count, help="At most.")
    train.add_argument("--patience", type=count, help="Epochs without improvement after which training ends.")
    train.add_argument("--per_device_train_batch_size", type=count)
    seeds = {"type": any_seed, "nargs": "+", "action": Distinct, "default": PAPER_SEEDS[:1]}
    train.add_argument("--seeds", **seeds, help="Each is a run (default 2345).")
    train.add_argument(
        "--self_pretrain", action="store_true", help="First learn to fill in hidden spans of the series."
    )
    train.add_argument("--num_pretrain_epochs", type=count, default=30, help="Of that, at most (default 30).")
    parser.add_argument("--output_dir", type=text, help="Default runs/DATA SET-MODEL.")
    # The preset is known before the flags whose defaults it has.
    parser.set_defaults(**PRESETS[parser.parse_known_args(arguments)[0].preset])
    args = parser.parse_args(arguments)
    if args.output_dir is None:
        args.output_dir = f"runs/{args.dataset_name or Path(args.data_file).stem}-{args.model}"
    if args.model == "minirocket" and (args.config_overrides or args.self_pretrain):
        parser.error("--config_overrides and --self_pretrain are not for minirocket, which is no network.")
    return args


def make_config(args: argparse.Namespace, data: SeriesData) -> LrcSSMConfig:
    """The classifier's configuration; for a rival, of the LrcSSM whose size it takes."""
    values = {**args.config, **parse_overrides("lrcssm", args.config_overrides)}
    if args.model == "lrcssm-paper":
        values["block_type"] = "paper"
    if args.tokens_per_series is not None:
        values.setdefault("patch_length", math.ceil(data.lengths[1] / args.tokens_per_series))
    if values.setdefault("num_channels", data.channels) != data.channels:
        raise ValueError(f"{data.name} has {data.channels} channels, not num_channels={values['num_channels']}.")
    return LrcSSMConfig(
        **values,
        id2label=dict(enumerate(data.classes)),
        label2id={label: i for i, label in enumerate(data.classes)},
        problem_type="single_label_classification",
    )


def new_model(name: str, config: LrcSSMConfig) -> nn.Module:
    """An untrained network of `MODELS`."""
    mixer = "lrcssm" if name in SAVED_MODELS else name
    return build(LrcSSMForSequenceClassification, copy.deepcopy(config), mixer)


def make_settings(args: argparse.Namespace, data: SeriesData) -> dict:
    """What a run's result follows from, beside its seed."""
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "output_dir", "data_file")}
    digest = hashlib.sha256(data.labels.astype(np.int64).tobytes())
    for values in (*data.series, *(data.time_deltas or ())):
        digest.update(values.tobytes())
    return {**settings, "dataset_name": data.name, "data_sha256": digest.hexdigest()}


def read_runs(folder: Path, settings: dict) -> dict[int, dict]:
    """The finished runs of a folder by their seed. Raises a `ValueError` if one is broken or had other settings."""
    runs = {}
    for path in sorted(folder.glob("seed-*.json")):
        run = read_record(path, RECORD)
        if path.stem != f"seed-{run['seed']}":
            raise ValueError(f"{path} is the run with seed {run['seed']}; give it its name again, or remove it.")
        # As they are after a way through JSON.
        for name, value in json.loads(json.dumps(settings)).items():
            if run["settings"].get(name) != value:
                raise ValueError(
                    f"{path} is a run with {name}={run['settings'].get(name)}, not {value}; give another --output_dir."
                )
        runs[run["seed"]] = run
    return runs


class MaskedSpans(nn.Module):
    """Self-pretraining ("Never Train from Scratch", arXiv 2310.02980): to say the values of hidden spans of a series.

    A quarter of the spans, each a twentieth of the longest series, are hidden from the model, all channels at once; its
    loss is the mean squared error there. In evaluation the same spans are hidden every time.
    """

    share = 0.25
    spans = 20

    def __init__(self, classifier: LrcSSMForSequenceClassification):
        super().__init__()
        config = copy.deepcopy(classifier.config)
        config.num_labels, config.problem_type = config.num_channels, "regression"
        self.model = LrcSSMForSequenceModeling(config)
        self.model.model = classifier.model

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        observed_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
    ) -> ModelOutput:
        """The arguments of the classifier, whose labels are not looked at."""
        mask = None if attention_mask is None else attention_mask.bool()
        values, observed = observed_values(input_values, mask, observed_mask)
        hidden = self.hide(*input_values.shape[:2], input_values.device).unsqueeze(-1)
        visible, target = observed & ~hidden, observed & hidden
        predicted = self.model(
            input_values=input_values,
            attention_mask=attention_mask,
            observed_mask=visible,
            time_deltas=time_deltas,
        ).logits
        if self.model.config.scaling is not None:
            mean, deviation = series_statistics(values, visible)
            values = (values - mean) / deviation
        error = F.mse_loss(predicted.float(), values, reduction="none").masked_fill(~target, 0)
        return ModelOutput(loss=error.sum() / target.sum().clamp(min=1))

    def hide(self, batch: int, steps: int, device: torch.device) -> Tensor:
        """(B, T), whether a step is hidden."""
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        length = -(-steps // self.spans)
        start = torch.randint(length, (batch, 1), device=device, generator=generator)
        hidden = torch.rand(batch, self.spans + 1, device=device, generator=generator) < self.share
        return hidden.gather(1, (torch.arange(steps, device=device) + start) // length)


def fit_options(args: argparse.Namespace, seed: int) -> dict:
    """What pretraining and training have in common, for `fit`."""
    return {"seed": seed, **{name: getattr(args, name) for name in ("weight_decay", "adam_beta2", "lr_scheduler_type")}}


def pretrain_trunk(classifier: nn.Module, loaders: dict, accelerator: Accelerator, args, seed: int) -> list[dict]:
    """Trains the classifier's trunk, in place, on the series alone; returns the losses of the epochs."""

    def score(model: nn.Module, loader: DataLoader) -> float:
        losses = torch.stack([model(**batch).loss for batch in loader])
        return -accelerator.reduce(losses.mean(), reduction="mean").item()

    result = fit(
        MaskedSpans(classifier),
        loaders,
        accelerator,
        learning_rate=args.learning_rate[0],
        epochs=args.num_pretrain_epochs,
        patience=args.num_pretrain_epochs,
        score=score,
        description="Pretraining",
        **fit_options(args, seed),
    )
    return [
        {"epoch": epoch["epoch"], "train_loss": epoch["train_loss"], "validation_loss": -epoch["score"]}
        for epoch in result.history
    ]


def predict(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of all series of a prepared loader."""
    batches = [accelerator.gather_for_metrics((model(**batch).logits.float(), batch["labels"])) for batch in loader]
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches))
    return logits, labels


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> list[list[int]]:
    """Number of test series by their class (rows) and the predicted one (columns)."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix(labels, predictions, labels=range(classes)).tolist()


def train_network(
    args: argparse.Namespace, config: LrcSSMConfig, rows: dict[str, list[dict]], seed: int, accelerator: Accelerator
) -> tuple[dict, nn.Module]:
    """A run: for every learning rate the same start and budget; what is measured, and the chosen model."""

    def score(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
        logits, labels = predict(model, loader, accelerator)
        return accuracy(logits, labels), -F.cross_entropy(logits, labels).item()

    set_seed(seed)
    model = new_model(args.model, config)
    loaders = {
        name: DataLoader(
            rows[name],
            batch_size=args.per_device_train_batch_size if name == "train" else EVALUATION_BATCH_SIZE,
            shuffle=name == "train",
            collate_fn=collate,
        )
        for name in rows
    }
    pretraining = pretrain_trunk(model, loaders, accelerator, args, seed) if args.self_pretrain else None
    start = copy.deepcopy(model.state_dict())
    best = None
    by_rate = {}
    for rate in args.learning_rate:
        model.load_state_dict(start)
        result = fit(
            model,
            loaders,
            accelerator,
            learning_rate=rate,
            epochs=args.num_train_epochs,
            patience=args.patience,
            score=score,
            description=f"Seed {seed}, learning rate {rate:g}",
            **fit_options(args, seed),
        )
        by_rate[f"{rate:g}"] = result.best_score[0]
        if best is None or result.best_score > best[1].best_score:
            best = rate, result, copy.deepcopy(model.state_dict())
    rate, result, weights = best
    model.load_state_dict(weights)
    with torch.no_grad():
        logits, labels = predict(*accelerator.prepare(model, loaders["test"]), accelerator)
    accelerator.free_memory()
    return {
        "config": config.to_diff_dict(),
        "parameters": model.num_parameters(),
        "learning_rate": rate,
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "seconds_per_epoch": result.seconds_per_epoch,
        "validation_accuracy": result.best_score[0],
        "validation_accuracy_by_learning_rate": by_rate,
        "validation_loss": -result.best_score[1],
        "test_accuracy": accuracy(logits, labels),
        "confusion": confusion(logits.argmax(-1).numpy(), labels.numpy(), config.num_labels),
        "history": [
            {
                "epoch": epoch["epoch"],
                "train_loss": epoch["train_loss"],
                "validation_accuracy": epoch["score"][0],
                "validation_loss": -epoch["score"][1],
            }
            for epoch in result.history
        ],
        "pretraining": pretraining,
    }, model


def train_minirocket(rows: dict[str, list[dict]], classes: int, seed: int) -> dict:
    """MiniRocket (arXiv 2012.08791) with a ridge classifier, as aeon has it; shorter series end in zeros."""
    from aeon.classification.convolution_based import MiniRocketClassifier

    batch = collate([row for part in rows.values() for row in part])
    # aeon has channels before steps.
    series, labels = batch["input_values"].transpose(1, 2).double().numpy(), batch["labels"].numpy()
    ends = np.cumsum([len(part) for part in rows.values()])[:-1]
    series, labels = (dict(zip(rows, np.split(values, ends))) for values in (series, labels))
    model = MiniRocketClassifier(random_state=seed)
    model.fit(series["train"], labels["train"])
    predictions = {name: model.predict(series[name]) for name in ("validation", "test")}
    correct = {name: float((predictions[name] == labels[name]).mean()) for name in predictions}
    return {
        "validation_accuracy": correct["validation"],
        "test_accuracy": correct["test"],
        "confusion": confusion(predictions["test"], labels["test"], classes),
    }


def check_minirocket(data: SeriesData) -> None:
    if any(np.isnan(values).any() for values in data.series):
        raise ValueError("--model minirocket cannot do with missing values; fill them in, or take another model.")
    if data.lengths[1] < MINIROCKET_STEPS:
        raise ValueError(f"--model minirocket needs series of {MINIROCKET_STEPS} steps, got {data.lengths[1]}.")


def classify(args: argparse.Namespace, accelerator: Accelerator, command: str) -> list[dict]:
    """Trains the seeds that are not there yet, and returns the records of all of them.

    Raises:
        ValueError: before training, for anything that cannot be used; in training, if the loss is not finite.
    """
    folder = make_folder(args.output_dir)
    # One process downloads, the others read its cache.
    with accelerator.main_process_first():
        data = load_series(args)
    config = make_config(args, data)
    if args.model == "minirocket":
        check_minirocket(data)
    elif args.model == "lrcssm" and config.block_type == "gated":
        check_time_unit(data, config.time_constant_min)
    settings = make_settings(args, data)
    runs = read_runs(folder, settings)
    accelerator.wait_for_everyone()
    for seed in args.seeds:
        if seed in runs:
            continue
        indices = split(data, seed)
        mean, deviation = channel_statistics([data.series[i] for i in indices["train"]])
        rows = {name: make_rows(data, chosen, mean, deviation) for name, chosen in indices.items()}
        model, start = None, time.perf_counter()
        if args.model == "minirocket":
            measured = train_minirocket(rows, len(data.classes), seed)
        else:
            measured, model = train_network(args, config, rows, seed, accelerator)
        run = {
            "model": args.model,
            "seed": seed,
            "data": {
                "name": data.name,
                **{name: len(chosen) for name, chosen in indices.items()},
                "channels": data.channels,
                "steps": list(data.lengths),
                "classes": data.classes,
            },
            **measured,
            "seconds": time.perf_counter() - start,
            **describe_environment(accelerator),
            "command": command,
            "settings": settings,
        }
        if accelerator.is_main_process:
            if args.model in SAVED_MODELS and all(is_better(run, other) for other in runs.values()):
                model.config.channel_mean, model.config.channel_deviation = mean.tolist(), deviation.tolist()
                with whole_files(folder) as partial:
                    model.save_pretrained(partial)
            write_whole(folder / f"seed-{seed}.json", json.dumps(run, indent=1) + "\n")
        runs[seed] = run
    return [runs[seed] for seed in args.seeds]


def is_better(run: dict, other: dict) -> bool:
    """By validation, as epochs and learning rates are chosen."""
    one, two = ((r["validation_accuracy"], -r["validation_loss"]) for r in (run, other))
    return one > two


def mean_and_deviation(values: list[float]) -> str:
    """ "97.2 ± 1.3", in percent; of one value, without a deviation."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def table(runs: list[dict]) -> str:
    """Markdown: a line per run and one for all."""
    data, lines = runs[0]["data"], []
    size = f", {runs[0]['parameters']:,} parameters" if "parameters" in runs[0] else ""
    low, high = data["steps"]
    lines = [
        f"{runs[0]['model']} on {data['name']}{size}: {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test series of {data['channels']} channels and {low if low == high else f'{low} to {high}'} "
        f"steps, {len(data['classes'])} classes. Accuracy in percent, at the epoch with the best validation accuracy.",
        "",
        "| seed | validation | test | learning rate | best epoch | seconds per epoch | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        network = "- | - | -"
        if "learning_rate" in run:
            epochs = f"{run['best_epoch']} of {run['epochs']}"
            network = f"{run['learning_rate']:g} | {epochs} | {run['seconds_per_epoch']:.2f}"
        scores = f"{100 * run['validation_accuracy']:.1f} | {100 * run['test_accuracy']:.1f}"
        lines.append(f"| {run['seed']} | {scores} | {network} | {run['seconds']:.0f} |")
    means = (mean_and_deviation([run[f"{name}_accuracy"] for run in runs]) for name in ("validation", "test"))
    lines.append(f"| mean | {' | '.join(means)} | | | | |")
    return "\n".join(lines) + "\n"


def plot_confusion(runs: list[dict], path: Path) -> None:
    """Test series of all runs by class and predicted class."""
    counts, classes = np.sum([run["confusion"] for run in runs], axis=0), runs[0]["data"]["classes"]
    size = 2.5 + 0.45 * len(classes)
    figure, axes = plt.subplots(figsize=(size, size))
    axes.imshow(counts / counts.sum(1, keepdims=True).clip(min=1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if 2 * count > counts[row].sum() else "black"
        axes.text(column, row, count or "", ha="center", va="center", color=color)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    title = f"{runs[0]['model']} on {runs[0]['data']['name']}, test"
    axes.set(xlabel="predicted class", ylabel="class", title=title)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def plot_learning_curves(runs: list[dict], path: Path) -> None:
    """Losses and validation accuracy of every run, and the epoch that was chosen."""
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(10, 3.8))
    for i, run in enumerate(runs):
        epochs, color = [epoch["epoch"] for epoch in run["history"]], f"C{i}"
        losses.plot(epochs, [e["train_loss"] for e in run["history"]], color=color, label=f"seed {run['seed']}")
        losses.plot(epochs, [e["validation_loss"] for e in run["history"]], "--", color=color)
        accuracies.plot(epochs, [100 * e["validation_accuracy"] for e in run["history"]], color=color)
        accuracies.plot(run["best_epoch"], 100 * run["validation_accuracy"], "o", color=color)
    losses.set(xlabel="epoch", ylabel="loss (validation dashed)", yscale="log")
    accuracies.set(xlabel="epoch", ylabel="validation accuracy (%)")
    losses.legend()
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{runs[0]['model']} on {runs[0]['data']['name']}")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(runs: list[dict], folder: Path) -> str:
    """Writes `results.md` and its plots, all from the runs' records; returns the table."""
    plot_confusion(runs, folder / "confusion.png")
    images = "![Confusion matrix](confusion.png)\n"
    if "history" in runs[0]:
        plot_learning_curves(runs, folder / "learning_curves.png")
        images += "\n![Learning curves](learning_curves.png)\n"
    hardware = runs[0]["hardware"]
    versions = ", ".join(f"{library} {version}" for library, version in runs[0]["versions"].items())
    environment = f"{hardware['processes']} x {hardware['device']} ({hardware['threads']} threads), {versions}"
    text = f"# {runs[0]['model']} on {runs[0]['data']['name']}\n\n{table(runs)}\n{environment}\n\n"
    write_whole(folder / "results.md", f"{text}    {runs[0]['command']}\n\n{images}")
    return table(runs)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    accelerator, runs = make_runs("training/classify_series.py", arguments, functools.partial(classify, args))
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        print(f"\n{report(runs, folder)}\n{folder / 'results.md'} shows this with the plots.")
        if args.model in SAVED_MODELS:
            print(f"The best model: AutoModelForSequenceClassification.from_pretrained({str(folder)!r})")
    accelerator.end_training()


if __name__ == "__main__":
    start_missing_processes()
    main()
