# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Train a forecaster of a multivariate series, LrcSSM or a rival of it, and measure it on the series' end.

    accelerate launch training/forecast_series.py --dataset_name seattle-temperature --prediction_length 96

Every learning rate is tried with the first seed; the one with the best validation error is run with the others. A run
is a folder in `--output_dir`: `run.json` and, of `lrcssm` and `patchtst`, the model. A run that is there is not run
again. Of all runs there, whatever their series, model or horizon, `results.md` and the plots are made.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate
from transformers import PatchTSTConfig, PatchTSTForPrediction, PreTrainedModel

from arguments import Distinct, integer, number, text
from arguments import seed as any_seed
from cpu_processes import start_missing_processes
from forecast_data import Split, Windows, add_data_arguments, load_series, split_series
from forecast_report import Results, best_rate, middle, read_run, write_report
from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceModeling
from pretrain import describe_environment, make_folder, parse_overrides
from series_rivals import MIXERS, build
from series_training import SCHEDULES, FitResult, fit, make_runs
from whole_files import write_whole


MODELS = (*MIXERS, "patchtst", "seasonal-naive")
# Those that from_pretrained can load: the others are our model with a mixer that it does not know.
SAVED = {"lrcssm": LrcSSMForSequenceModeling, "patchtst": PatchTSTForPrediction}
# The model of a run without arguments, and of all rivals that are made of it.
FORECASTER = {"hidden_size": 64, "num_hidden_layers": 2, "patch_length": 8, "scaling": "std"}
# The paper's (arXiv 2211.14730, appendix A.1.4), but for the width, see `patchtst_config`.
PATCHTST = {
    "patch_length": 16,
    "patch_stride": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pooling_type": None,
}
PATCHTST |= {"attention_dropout": 0.2, "ff_dropout": 0.2}
# Validation after every epoch need not look at all windows, which overlap.
MAX_VALIDATION_WINDOWS = 128
EXAMPLES = 3


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    add_data_arguments(data)
    count = integer(at_least=1)
    data.add_argument("--context_length", type=count, default=256, help="Steps that a forecast knows (default 256).")
    data.add_argument("--prediction_length", type=count, default=96, help="Steps to forecast at once (default 96).")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="lrcssm", choices=MODELS)
    model.add_argument("--config_overrides", help='"hidden_size=32,scaling=None"; for patchtst of its configuration.')
    model.add_argument(
        "--quantiles", type=number(above=0, below=1), nargs="+", help="Levels to forecast, not the mean: 0.1 0.5 0.9."
    )
    train = parser.add_argument_group("training")
    train.add_argument("--per_device_train_batch_size", type=count, default=16)
    train.add_argument("--per_device_eval_batch_size", type=count, default=128)
    train.add_argument("--windows_per_epoch", type=count, default=128, help="Drawn at random (default 128).")
    train.add_argument("--num_train_epochs", type=count, default=60, help="At most (default 60).")
    train.add_argument("--patience", type=count, default=20, help="Epochs without a better one (default 20).")
    rates = {"type": number(above=0), "nargs": "+", "action": Distinct, "default": [3e-3]}
    train.add_argument("--learning_rate", **rates, help="The best by validation is taken.")
    train.add_argument("--lr_scheduler_type", default="cosine", choices=SCHEDULES, help="Over the epochs.")
    decay = {"type": number(at_least=0), "default": 0.01}
    train.add_argument("--weight_decay", **decay, help="Of matrices; vectors do not decay.")
    train.add_argument("--seeds", type=any_seed, nargs="+", action=Distinct, default=[0])
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=text, default="runs/forecasts", help="Default runs/forecasts.")
    args = parser.parse_args(arguments)
    if args.quantiles and args.model not in MIXERS:
        parser.error(f"--quantiles: {args.model} does not forecast them.")
    return args


class SeasonalNaive(NamedTuple):
    """A forecast without a model: the last `period` steps again and again. (B, L, C) -> (B, P, C)."""

    period: int
    prediction_length: int

    def __call__(self, inputs: Tensor) -> Tensor:
        ahead = torch.arange(self.prediction_length, device=inputs.device) % self.period
        return inputs[:, inputs.shape[1] - self.period + ahead]


def best_period(windows: Windows) -> int:
    """The period with the least squared error in these windows."""
    rows = [windows[i] for i in range(len(windows))]
    inputs, futures = (torch.stack([row[name] for row in rows]) for name in ("input_values", "future_values"))

    def error(period: int) -> float:
        return (SeasonalNaive(period, windows.prediction_length)(inputs) - futures).square().mean().item()

    return min(range(1, windows.context_length + 1), key=error)


def patchtst_config(lrcssm: PreTrainedModel, context_length: int, overrides: dict) -> PatchTSTConfig:
    """Of the width that brings PatchTST's parameters nearest to those of an LrcSSM, but not below the paper's smallest,
    16: for long horizons most of them are in its last layer."""
    values = {
        "num_input_channels": lrcssm.config.num_channels,
        "context_length": context_length,
        "prediction_length": lrcssm.config.prediction_length,
        **PATCHTST,
        **overrides,
    }
    if "d_model" in values:
        return PatchTSTConfig(**values)
    widths = range(16, 129, 4)
    configs = [PatchTSTConfig(**{**values, "d_model": width, "ffn_dim": 2 * width}) for width in widths]
    return min(configs, key=lambda c: abs(PatchTSTForPrediction(c).num_parameters() - lrcssm.num_parameters()))


def make_model(args: argparse.Namespace, channels: int) -> PreTrainedModel:
    """A fresh one.

    Raises:
        ValueError: the overrides do not make a configuration of this model.
    """
    is_patchtst = args.model == "patchtst"
    overrides = parse_overrides("patchtst" if is_patchtst else "lrcssm", args.config_overrides)
    values = FORECASTER if is_patchtst else FORECASTER | overrides
    task = {"num_channels": channels, "prediction_length": args.prediction_length, "quantiles": args.quantiles}
    config = LrcSSMConfig(**{**values, **task})
    if not is_patchtst:
        return build(LrcSSMForSequenceModeling, config, args.model)
    return PatchTSTForPrediction(patchtst_config(LrcSSMForSequenceModeling(config), args.context_length, overrides))


def forecaster(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What makes (B, P, C) of (B, L, C), or (B, P, C, Q) where the model forecasts quantiles."""
    if isinstance(model, PatchTSTForPrediction):
        return lambda inputs: model(past_values=inputs).prediction_outputs
    return lambda inputs: model.forecast(inputs, model.config.prediction_length)


def point_forecast(forecasts: Tensor, quantiles: list[float] | None) -> Tensor:
    """(B, P, C): of quantiles the one nearest to the median."""
    return forecasts if quantiles is None else forecasts[..., middle(quantiles)]


class Errors(NamedTuple):
    """Mean squared and mean absolute error over windows, steps and channels, in units of the standardised series, and
    the former for each of the P steps ahead."""

    mse: float
    mae: float
    mse_by_step: list[float]


@torch.no_grad()
def measure(
    forecast: Callable[[Tensor], Tensor], loader: DataLoader, accelerator: Accelerator, quantiles=None
) -> Errors:
    squared, absolute = [], []
    for batch in loader:
        inputs, futures = batch.values()
        error = (point_forecast(forecast(inputs), quantiles) - futures).double()
        squared.append(accelerator.gather_for_metrics(error.square().mean(2)))
        absolute.append(accelerator.gather_for_metrics(error.abs().mean((1, 2))))
    by_step = torch.cat(squared).mean(0)
    return Errors(by_step.mean().item(), torch.cat(absolute).mean().item(), [round(x, 6) for x in by_step.tolist()])


def make_loaders(args: argparse.Namespace, split: Split) -> dict[str, DataLoader]:
    """Batches of (B, L, C) and (B, P, C), under the names that the model gives them."""
    names = ("past_values" if args.model == "patchtst" else "input_values", "future_values")

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        return dict(zip(names, default_collate(rows).values()))

    windows = {"validation": split.validation.spaced(MAX_VALIDATION_WINDOWS), "test": split.test}
    loaders = {
        part: DataLoader(held_out, batch_size=args.per_device_eval_batch_size, collate_fn=collate)
        for part, held_out in windows.items()
    }
    sampler = RandomSampler(split.train, num_samples=args.windows_per_epoch)
    loaders["train"] = DataLoader(
        split.train, batch_size=args.per_device_train_batch_size, sampler=sampler, collate_fn=collate
    )
    return loaders


class Study:
    """All runs of a model on a series at a horizon: what they have in common, and how one is made."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, command: str):
        """Raises a `ValueError` (or what the libraries raise in its place) for anything that cannot be used."""
        self.args, self.accelerator, self.command = args, accelerator, command
        self.folder = make_folder(args.output_dir)
        self.series = load_series(args)
        self.split = split_series(self.series, args.context_length, args.prediction_length)
        self.learns = args.model != "seasonal-naive"
        self.parameters = make_model(args, len(self.series.channels)).num_parameters() if self.learns else 0
        names = ["context_length", "prediction_length"]
        if self.learns:
            names += ["config_overrides", "quantiles", "per_device_train_batch_size", "windows_per_epoch"]
            names += ["num_train_epochs", "patience", "lr_scheduler_type", "weight_decay"]
        self.settings = {name: getattr(args, name) for name in names} | {"data": self.series.fingerprint()}
        for rate in args.learning_rate:
            for seed in args.seeds:
                self.find(rate, seed)

    def name(self, rate: float, seed: int) -> str:
        """Of a run's folder."""
        name = f"{self.series.name}-{self.args.prediction_length}-{self.args.model}"
        return f"{name}-{rate:g}-{seed}" if self.learns else name

    def find(self, rate: float, seed: int) -> dict | None:
        """A finished run.

        Raises:
            ValueError: it was made with other settings, or its record is broken.
        """
        folder = self.folder / self.name(rate, seed)
        run = read_run(folder)
        if run is not None:
            made = run["settings"] | {"learning_rate": run["learning_rate"]}
            # The name of a folder has no more than six digits of the rate.
            for name, value in {**self.settings, "learning_rate": rate if self.learns else None}.items():
                if made.get(name) != value:
                    raise ValueError(
                        f"{folder} was run with {name} {made.get(name)!r}, not {value!r}; remove it, or give another "
                        "--output_dir."
                    )
        return run

    def run_all(self) -> list[dict]:
        args = self.args
        if not self.learns:
            return [self.run(args.learning_rate[0], args.seeds[0])]
        tried = [self.run(rate, args.seeds[0]) for rate in args.learning_rate]
        rate = best_rate(tried)
        return [*tried, *(self.run(rate, seed) for seed in args.seeds[1:])]

    def run(self, rate: float, seed: int) -> dict:
        """A run's `run.json`, from its folder or from training and measuring."""
        run = self.find(rate, seed)
        if run is not None:
            return run
        args, accelerator = self.args, self.accelerator
        loaders = make_loaders(args, self.split)
        test = accelerator.prepare(loaders["test"])
        if self.learns:
            set_seed(seed)
            model = make_model(args, len(self.series.channels))
            result = self.fit(model, loaders, rate, seed)
            forecast = forecaster(model)
        else:
            forecast = SeasonalNaive(
                best_period(self.split.validation.spaced(MAX_VALIDATION_WINDOWS)), args.prediction_length
            )
            validation = measure(forecast, accelerator.prepare(loaders["validation"]), accelerator)
            result = FitResult(0, -validation.mse, [], 0.0)
        errors = measure(forecast, test, accelerator, args.quantiles)
        run = {
            "model": args.model,
            "settings": self.settings,
            "learning_rate": rate if self.learns else None,
            "seed": seed if self.learns else None,
            "period": None if self.learns else forecast.period,
            "parameters": self.parameters,
            "validation_mse": -result.best_score,
            "test": errors._asdict(),
            "best_epoch": result.best_epoch,
            "seconds_per_epoch": result.seconds_per_epoch,
            "history": result.history,
            "series": self.describe_series(),
            "quantiles": args.quantiles,
            "examples": self.examples(forecast),
            "command": self.command,
            **describe_environment(accelerator),
        }
        if accelerator.is_main_process:
            folder = self.folder / self.name(rate, seed)
            if args.model in SAVED:
                model.save_pretrained(folder)
            # Last: with it a run is finished.
            write_whole(folder / "run.json", json.dumps(run) + "\n")
        accelerator.wait_for_everyone()
        return run

    def fit(self, model, loaders: dict[str, DataLoader], rate: float, seed: int) -> FitResult:
        args, accelerator = self.args, self.accelerator

        def score(trained, loader: DataLoader) -> float:
            return -measure(forecaster(accelerator.unwrap_model(trained)), loader, accelerator, args.quantiles).mse

        return fit(
            model,
            loaders,
            accelerator,
            learning_rate=rate,
            epochs=args.num_train_epochs,
            patience=args.patience,
            score=score,
            seed=seed,
            weight_decay=args.weight_decay,
            lr_scheduler_type=args.lr_scheduler_type,
            description=self.name(rate, seed),
        )

    def describe_series(self) -> dict:
        """With what undoes the standardisation: value = mean + std * standardised value."""
        series, split = self.series, self.split
        return {
            "name": series.name,
            "channels": series.channels,
            "step": series.step,
            "steps": len(series.values),
            "missing": series.missing,
            "mean": split.mean.tolist(),
            "std": split.std.tolist(),
        }

    @torch.no_grad()
    def examples(self, forecast: Callable[[Tensor], Tensor]) -> list[dict]:
        """Forecasts of the test part's first, middle and last window: `start`, the step at which the future begins,
        `context` (L, C), `truth` (P, C), `forecast` (P, C) or, with quantiles, (P, C, Q)."""
        windows, examples = self.split.test.spaced(EXAMPLES), []
        for start, row in zip(windows.starts, (windows[i] for i in range(len(windows)))):
            context, truth = row.values()
            made = forecast(context.unsqueeze(0).to(self.accelerator.device))[0].cpu()
            values = {"context": context, "truth": truth, "forecast": made}
            examples.append(
                {"start": start} | {name: value.round(decimals=4).tolist() for name, value in values.items()}
            )
        return examples


def run_study(args: argparse.Namespace, accelerator: Accelerator, command: str) -> tuple[Study, list[dict]]:
    """All runs that are not there yet, after saying of what; raises what a `Study` and training raise."""
    study = Study(args, accelerator, command)
    # What the report is made from is broken before training, or not at all.
    Results.read(study.folder)
    series, split = study.series, study.split
    for note in series.notes:
        accelerator.print(note)
    accelerator.print(
        f"{series.name}: {len(series.values):,} steps of {len(series.channels)} channels ({series.missing} missing "
        f"values interpolated); windows: {len(split.train):,} training, {len(split.validation):,} validation, "
        f"{len(split.test):,} test. {args.model}: {study.parameters:,} parameters."
    )
    return study, study.run_all()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    work = functools.partial(run_study, args)
    accelerator, (study, runs) = make_runs("training/forecast_series.py", arguments, work)
    if accelerator.is_main_process:
        print(write_report(study.folder))
        if args.model in SAVED:
            best = min(runs, key=lambda run: run["validation_mse"])
            folder = study.folder / study.name(best["learning_rate"], best["seed"])
            kind = SAVED[args.model]
            print(
                "Load the one with the best validation error with\n\n"
                f"    from {kind.__module__.split('.')[0]} import {kind.__name__}\n"
                f"    model = {kind.__name__}.from_pretrained({str(folder)!r})\n\n"
                f"It reads and writes standardised values: {folder / 'run.json'} has each channel's mean and std."
            )
    accelerator.end_training()


if __name__ == "__main__":
    start_missing_processes()
    main()
