# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Classifiers of time series side by side: same splits, budget and selection by validation, every seed a new split.

    python scripts/compare_series.py models --data_dir FOLDER     # LrcSSM and its rivals
    python scripts/compare_series.py options --data_dir FOLDER    # the options of LrcSSM, each on its own
    python scripts/compare_series.py pretraining --data_dir FOLDER    # with and without self-pretraining

trains what STUDIES says with training/classify_series.py, each pair of data set and variant in a folder of its own
under --runs_dir, and writes tables, after every seed, to scripts/results. A finished run is not run again, so that an
interrupted study goes on where it was. A set is read from DATA SET.npz in --data_dir where that is, and else from aeon.

EthanolConcentration has three channels, all of them spectra; the paper's code drops the first, which it takes for time,
and its figures for this set are of the other two. Here all three are read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from accelerate import Accelerator
from scipy.stats import rankdata
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
sys.path.insert(0, str(ROOT / "training"))

from arguments import integer, text  # noqa: E402
from classify_series import PAPER_SEEDS, classify, mean_and_deviation, parse_args  # noqa: E402
from free_memory import keep_freed_memory  # noqa: E402
from markdown_table import markdown_table  # noqa: E402
from whole_files import write_whole  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


BUNDLED = ("BasicMotions", "JapaneseVowels", "ACSF1", "ArrowHead", "OSULeaf", "GunPoint")
LONG = ("SelfRegulationSCP1", "EthanolConcentration")
NOT_A_NETWORK = "MiniRocket"
BUDGET = "--num_train_epochs 60 --patience 20"


class Study(NamedTuple):
    """`variants` and `arguments` (of all) are arguments of classify_series.py. Either their ranks are shown, in a
    `diagram`, or the gains over the first."""

    title: str
    output: str
    data_sets: tuple[str, ...]
    arguments: str
    variants: dict[str, str]
    diagram: str | None = None
    seeds: tuple[int, ...] = PAPER_SEEDS[:3]


STUDIES = {
    "models": Study(
        title="LrcSSM and its rivals",
        output="series_classification",
        data_sets=BUNDLED + LONG,
        arguments=f"--learning_rate 1e-3 3e-3 {BUDGET}",
        variants={
            "LrcSSM": "--model lrcssm",
            "LrcSSM, bidirectional": "--model lrcssm --config_overrides bidirectional=True",
            "LRU": "--model lru",
            "S5": "--model s5",
            "LinOSS": "--model linoss",
            "Mamba": "--model mamba",
            "Transformer": "--model transformer",
            NOT_A_NETWORK: "--model minirocket",
        },
        diagram="series_ranks.png",
    ),
    "options": Study(
        title="Options of LrcSSM, each on its own",
        output="series_options",
        data_sets=("JapaneseVowels", "ArrowHead", "GunPoint"),
        arguments=BUDGET,
        variants={
            "default": "",
            "one block, iterated": "--config_overrides num_hidden_groups=1",
            "one step per token": "--config_overrides patch_length=1",
            "bidirectional": "--config_overrides bidirectional=True",
            "gates without the state": "--config_overrides state_dependence=input",
        },
    ),
    "pretraining": Study(
        title="LrcSSM with and without self-pretraining",
        output="series_pretraining",
        data_sets=("BasicMotions", "JapaneseVowels", "ACSF1", "ArrowHead", *LONG),
        arguments=BUDGET,
        variants={"from scratch": "", "self-pretrained": "--self_pretrain"},
    ),
}


def run(arguments: list[str]) -> dict:
    """A run of classify_series.py in this process: its record."""
    command = shlex.join(["accelerate", "launch", "training/classify_series.py", *arguments])
    # Its progress bars would be several at a time.
    with contextlib.redirect_stderr(io.StringIO()):
        (record,) = classify(parse_args(arguments), Accelerator(cpu=True), command)
    return record


def make_arguments(study: Study, data_set: str, variant: str, seed: int, data_dir: str | None, runs_dir: str) -> list:
    source = ["--dataset_name", data_set]
    if data_dir is not None and (file := Path(data_dir) / f"{data_set}.npz").exists():
        source = ["--data_file", str(file)]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{study.output} {variant}".lower()).strip("-")
    output = ["--seeds", str(seed), "--output_dir", f"{runs_dir}/{slug}/{data_set}"]
    return [*source, *study.arguments.split(), *study.variants[variant].split(), *output]


KEPT = (
    "seed", "validation_accuracy", "test_accuracy", "parameters", "learning_rate", "epochs", "best_epoch",
    "seconds_per_epoch", "seconds", "command",
)  # fmt: skip


def compare(study: Study, data_dir: str | None, runs_dir: str, run_all: Callable, output: Path = RESULTS) -> dict:
    """Runs what is not there yet with `run_all(run, lists of arguments)`, a `map`; writes and returns the results."""
    results = {"title": study.title, "diagram": study.diagram, "data": {}, "runs": {}}
    pairs = [(data_set, variant) for data_set in study.data_sets for variant in study.variants]
    with tqdm(total=len(pairs) * len(study.seeds), desc="Runs") as bar:
        for seed in study.seeds:
            tasks = [make_arguments(study, *pair, seed, data_dir, runs_dir) for pair in pairs]
            for (data_set, variant), record in zip(pairs, run_all(run, tasks)):
                kept = {name: record[name] for name in KEPT if name in record}
                results["data"][data_set] = {k: v for k, v in record["data"].items() if k != "name"}
                results["runs"].setdefault(data_set, {}).setdefault(variant, []).append(kept)
                bar.update()
            hardware, versions = record["hardware"], record["versions"]
            libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
            results["environment"] = f"{hardware['device']} ({hardware['threads']} thread per run), {libraries}"
            write(study, results, output)
    return results


def write(study: Study, results: dict, folder: Path) -> None:
    """The JSON file, and what is made from it: the tables and the diagram of the ranks."""
    write_whole(folder / f"{study.output}.json", json.dumps(results, indent=1) + "\n")
    if study.diagram is not None:
        plot_ranks(results, folder / study.diagram)
    write_whole(folder / f"{study.output}.md", tables(results))


def mean_accuracies(results: dict) -> np.ndarray:
    """Test accuracies (data sets, variants), means over the seeds."""
    return np.array(
        [
            [statistics.mean(run["test_accuracy"] for run in runs) for runs in variants.values()]
            for variants in results["runs"].values()
        ]
    )


def mean_ranks(accuracies: np.ndarray) -> np.ndarray:
    """(data sets, variants) -> (variants,); 1 is the best, equals share the mean of their ranks."""
    return rankdata(-accuracies, axis=1).mean(0)


def tables(results: dict) -> str:
    """Test accuracy, gains, and what it costs, as Markdown."""
    data_sets, variants = list(results["runs"]), list(next(iter(results["runs"].values())))
    seeds = len(results["runs"][data_sets[0]][variants[0]])

    def by_pair(cell: Callable[[list[dict]], str]) -> list[list[str]]:
        return [[name, *(cell(results["runs"][name][variant]) for variant in variants)] for name in data_sets]

    accuracies = mean_accuracies(results)
    accuracy = by_pair(lambda runs: mean_and_deviation([run["test_accuracy"] for run in runs]))
    for row, means in zip(accuracy, accuracies):
        for column in np.flatnonzero(means == means.max()):
            row[column + 1] = f"**{row[column + 1]}**"
    accuracy.append(["mean", *(f"{100 * mean:.1f}" for mean in accuracies.mean(0))])
    accuracy.append(["mean rank", *(f"{rank:.2f}" for rank in mean_ranks(accuracies))])
    networks = [i for i, variant in enumerate(variants) if variant != NOT_A_NETWORK]
    if len(networks) < len(variants):
        ranks = dict(zip(networks, mean_ranks(accuracies[:, networks])))
        accuracy.append(["mean rank of networks"])
        accuracy[-1] += [f"{ranks[i]:.2f}" if i in ranks else "" for i in range(len(variants))]
    text = (
        f"# {results['title']}\n\nTest accuracy in percent at the epoch with the best validation accuracy, mean ± "
        f"standard deviation over {seeds} splits (70% training, 15% validation, 15% test); "
        f"{results['environment']}.\n\n"
    )
    text += markdown_table(["", *variants], accuracy)
    if results["diagram"] is not None:
        text += f"\n![Mean ranks]({results['diagram']})\n"
    else:
        text += f"\nGain over {variants[0]!r} on the same splits, in percentage points:\n\n"
        text += markdown_table(["", *variants[1:]], gains(results, data_sets, variants))
    cost = by_pair(lambda runs: f"{statistics.median(run.get('seconds_per_epoch', np.nan) for run in runs):.2f}")
    sizes = ([variants_[v][0].get("parameters", np.nan) for variants_ in results["runs"].values()] for v in variants)
    cost.append(["thousand parameters (mean)", *(f"{statistics.mean(size) / 1000:.0f}" for size in sizes)])
    cost = [[cell.replace("nan", "") for cell in row] for row in cost]
    text += "\nSeconds per training epoch (median) and size:\n\n" + markdown_table(["", *variants], cost)
    text += "\nThe data sets:\n\n"
    columns = ["train", "validation", "test", "channels", "steps", "classes"]
    sizes = []
    for name, data in results["data"].items():
        low, high = data["steps"]
        steps = str(low) if low == high else f"{low} to {high}"
        counts = [str(data[split]) for split in columns[:4]]
        sizes.append([name, *counts, steps, str(len(data["classes"]))])
    return text + markdown_table(["", *columns], sizes)


def gains(results: dict, data_sets: list[str], variants: list[str]) -> list[list[str]]:
    """Rows of the mean difference to the first variant over the seeds, and last over the data sets."""
    rows, means = [], []
    for name in data_sets:
        runs = {variant: [run["test_accuracy"] for run in results["runs"][name][variant]] for variant in variants}
        differences = [[a - b for a, b in zip(runs[variant], runs[variants[0]])] for variant in variants[1:]]
        means.append([statistics.mean(values) for values in differences])
        rows.append([name, *(mean_and_deviation(values) for values in differences)])
    return [*rows, ["mean", *(f"{100 * statistics.mean(column):+.1f}" for column in zip(*means))]]


def plot_ranks(results: dict, path: Path) -> None:
    """Critical-difference diagram (Demsar 2006): mean ranks, and a line where they do not differ significantly."""
    from aeon.visualisation import plot_critical_difference

    accuracies = mean_accuracies(results)
    figure, _ = plot_critical_difference(accuracies, list(next(iter(results["runs"].values()))), width=8, textspace=2)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data_dir", type=text, help="Folder of .npz files, for sets that aeon has not, or downloads.")
    parser.add_argument("--runs_dir", type=text, default="runs", help="Folder of the runs (default runs).")
    processes = {"type": integer(at_least=1), "default": 1}
    parser.add_argument("--num_processes", **processes, help="Runs at a time, of one thread each (default 1).")
    args = parser.parse_args(arguments)
    if args.data_dir is not None and not Path(args.data_dir).is_dir():
        parser.error(f"--data_dir {args.data_dir!r} is no folder.")
    study = STUDIES[args.study]
    # Read by the workers' libraries when they are imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.num_processes, get_context("spawn"), keep_freed_memory) as workers:
        try:
            print(tables(compare(study, args.data_dir, args.runs_dir, workers.map)))
        except (ValueError, OSError) as error:
            workers.shutdown(cancel_futures=True)
            parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
