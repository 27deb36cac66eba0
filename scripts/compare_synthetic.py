# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""State tracking, LrcSSM and its rivals side by side: learned up to 128 steps, tested on up to 64 times as many.

    python scripts/compare_synthetic.py

trains every model on every task of TRAINING with training/synthetic_tasks.py, each pair in a folder of its own under
--runs_dir, and writes `state_tracking.json`, its tables and its plot to scripts/results, after every seed. A finished
run is not run again, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import matplotlib
from accelerate import Accelerator
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
sys.path.insert(0, str(ROOT / "training"))

from arguments import integer, text  # noqa: E402
from classify_series import mean_and_deviation  # noqa: E402
from free_memory import keep_freed_memory  # noqa: E402
from synthetic_tasks import TASKS, parse_args, plot_accuracy, run_seeds  # noqa: E402
from whole_files import whole_files, write_whole  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


# How each task is trained, for all models.
TRAINING = {
    "parity": "--max_train_steps 1500",
    "mod3": "--max_train_steps 1500 --learning_rate 4e-3",
    "s3": "--max_train_steps 8000 --weight_decay 0.01",
}
TITLES = {"parity": "parity", "mod3": "counting modulo 3", "s3": "composition of permutations, S3"}
MODELS = {"lrcssm": "LrcSSM", "lru": "LRU", "s5": "S5", "mamba": "Mamba", "transformer": "Transformer"}
SEEDS = (0, 1, 2)
SHOWN = ("128", "1024", "8192")


def run(arguments: list[str]) -> dict:
    """A run of synthetic_tasks.py in this process: its record."""
    command = shlex.join(["accelerate", "launch", "training/synthetic_tasks.py", *arguments])
    # Its progress bars would be several at a time.
    with contextlib.redirect_stderr(io.StringIO()):
        (record,) = run_seeds(parse_args(arguments), Accelerator(cpu=True), command)
    return record


def compare(runs_dir: str, run_all: Callable, output: Path = RESULTS) -> dict:
    """Runs what is not there yet with `run_all(run, lists of arguments)`, a `map`; writes and returns the results."""
    results = {"runs": {task: {model: [] for model in MODELS} for task in TRAINING}}
    pairs = [(task, model) for task in TRAINING for model in MODELS]
    with tqdm(total=len(pairs) * len(SEEDS), desc="Runs") as bar:
        for seed in SEEDS:
            plans = []
            for task, model in pairs:
                plan = f"--task {task} --model {model} {TRAINING[task]} --seeds {seed} --output_dir".split()
                plans.append([*plan, f"{runs_dir}/{task}-{model}"])
            for (task, model), record in zip(pairs, run_all(run, plans)):
                kept = {name: record[name] for name in ("seed", "parameters", "accuracy", "command")}
                results["runs"][task][model].append(kept)
                bar.update()
            hardware, versions = record["hardware"], record["versions"]
            libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
            results["environment"] = f"{hardware['device']} ({hardware['threads']} thread per run), {libraries}"
            write_whole(output / "state_tracking.json", json.dumps(results, indent=1) + "\n")
            write_whole(output / "state_tracking.md", table(results))
            plot(results, output / "state_tracking.png")
    return results


def chance(task: str) -> float:
    return 1 / TASKS[task].sizes["num_labels"]


def table(results: dict) -> str:
    """Markdown: accuracy of every task and model, by length."""
    seeds = len(results["runs"]["parity"]["lrcssm"])
    lines = [
        "Accuracy in percent of the steps in the second half of a sequence, mean ± standard deviation over "
        f"{seeds} seeds. All models were trained on sequences of up to {SHOWN[0]} steps, and have the same blocks but "
        f"for the sequence mixer and within 10% of the same number of parameters; {results['environment']}.",
        "",
        f"| task | model | {' | '.join(f'{int(length):,} steps' for length in SHOWN)} | parameters |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for task, by_model in results["runs"].items():
        best = {n: max(statistics.mean(r["accuracy"][n] for r in runs) for runs in by_model.values()) for n in SHOWN}
        for model, runs in by_model.items():
            cells = []
            for length in SHOWN:
                values = [run["accuracy"][length] for run in runs]
                bold = "**" if statistics.mean(values) == best[length] else ""
                cells.append(f"{bold}{mean_and_deviation(values)}{bold}")
            cells.append(f"{runs[0]['parameters']:,}")
            lines.append(f"| {TITLES[task]} | {MODELS[model]} | {' | '.join(cells)} |")
        lines.append(f"| {TITLES[task]} | chance | {' | '.join([f'{100 * chance(task):.1f}'] * len(SHOWN))} | |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, len(TRAINING), figsize=(4.2 * len(TRAINING), 3.8), sharey=True)
    for axes, (task, by_model) in zip(panels, results["runs"].items()):
        for model, runs in by_model.items():
            plot_accuracy(axes, MODELS[model], runs)
        axes.axhline(100 * chance(task), color="gray", linestyle=":", label="chance")
        axes.set(title=TITLES[task], xlabel="length")
    panels[0].set_ylabel("accuracy in the second half (%)")
    panels[0].legend(fontsize="small")
    with whole_files(path.parent) as partial:
        figure.savefig(partial / path.name, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs_dir", type=text, default="runs/state_tracking", help="Folder of the runs.")
    processes = {"type": integer(at_least=1), "default": 1}
    parser.add_argument("--num_processes", **processes, help="Runs at a time, of one thread each (default 1).")
    args = parser.parse_args(arguments)
    # Read by the workers' libraries when they are imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.num_processes, get_context("spawn"), keep_freed_memory) as workers:
        try:
            print(table(compare(args.runs_dir, workers.map)))
        except (ValueError, OSError) as error:
            workers.shutdown(cancel_futures=True)
            parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
