# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Forecasters side by side: same series, horizons, epochs and seeds, each at the best of the same learning rates.

    python scripts/compare_forecasts.py

makes every run with training/forecast_series.py into a folder of its own under --runs_dir, on as many threads as
OMP_NUM_THREADS says, and writes `series_forecasting.json`, its tables and `forecast_*.png` to scripts/results. A
finished run is not run again, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

from arguments import text  # noqa: E402
from forecast_report import Results  # noqa: E402
from forecast_series import Study, parse_args  # noqa: E402
from free_memory import keep_freed_memory  # noqa: E402
from whole_files import write_whole  # noqa: E402


RESULTS = ROOT / "scripts" / "results"
BUDGET = "--num_train_epochs 40 --patience 15 --learning_rate 2e-3 6e-3 --seeds 0 1 2"
# What is forecast, and how all models read it: series with a trend are normalised window by window; of the chaotic
# ones the level is part of the state. A patch is a day, half a year, or a fraction of an oscillation; PatchTST's is its
# own. Longer horizons do not fit the validation part (CO2), or are beyond what can be known (Lorenz).
SERIES = {
    "seattle-temperature": {"horizons": (96, 720), "context_length": 336, "scaling": "std", "patch_length": 24},
    "co2": {"horizons": (96, 192), "context_length": 260, "scaling": "std", "patch_length": 26},
    "lorenz": {"horizons": (96, 336), "context_length": 256, "scaling": None, "patch_length": 8},
    "mackey-glass": {"horizons": (96, 720), "context_length": 256, "scaling": None, "patch_length": 8},
}
# Windows per epoch. PatchTST learns from one forecast of each, the others from one after every patch, of a normalised
# window after those of its second half: it gets four times as many, with which it takes the longest.
MODELS = {"lrcssm": 128, "lru": 128, "s5": 128, "mamba": 128, "patchtst": 512, "seasonal-naive": 128}


def plan(runs_dir: str, series: dict[str, dict], models: dict[str, int], budget: str) -> list[list[str]]:
    """The arguments of forecast_series.py for every series, horizon and model."""
    plans = []
    for name, options in series.items():
        for horizon in options["horizons"]:
            for model, windows in models.items():
                overrides = f"scaling={options['scaling']}"
                if model != "patchtst":
                    overrides += f",patch_length={options['patch_length']}"
                command = f"--dataset_name {name} --prediction_length {horizon} --model {model} {budget}"
                command += f" --context_length {options['context_length']} --config_overrides {overrides}"
                command += f" --windows_per_epoch {windows}"
                plans.append([*command.split(), "--output_dir", str(runs_dir)])
    return plans


def compare(plans: list[list[str]]) -> Results:
    """Makes the runs that are not there yet; whatever cannot be run is refused before the first."""
    accelerator, script = Accelerator(), ["accelerate", "launch", "training/forecast_series.py"]
    studies = [Study(parse_args(arguments), accelerator, shlex.join([*script, *arguments])) for arguments in plans]
    bar = tqdm(studies, desc="Series, horizons, models")
    return Results([run for study in bar for run in study.run_all()])


def write(results: Results, folder: Path) -> None:
    write_whole(folder / "series_forecasting.json", json.dumps(results.summary(), indent=1) + "\n")
    write_whole(folder / "series_forecasting.md", results.tables())
    results.plot_errors(folder / "forecast_errors.png")
    for name in results.names:
        results.plot_forecasts(name, folder / f"forecast_{name}.png")


def main(arguments: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs_dir", type=text, default="runs/forecast_study", help="Folder of the runs.")
    args = parser.parse_args(arguments)
    try:
        results = compare(plan(args.runs_dir, SERIES, MODELS, BUDGET))
    except (ValueError, OSError) as refused:
        parser.exit(2, f"error: {refused}\n")
    write(results, RESULTS)
    print(results.tables())


if __name__ == "__main__":
    main()
