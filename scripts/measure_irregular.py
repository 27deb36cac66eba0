# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What `time_deltas` are worth: classifiers trained on regular series read the test series with steps left out.

    python scripts/measure_irregular.py

For every set and seed a classifier is trained on whole series, of which four steps are one unit of time. Then steps of
the test series are left out by chance, and the model classifies what is left, once told how much time passed at each
step and once as if nothing were left out. Compared are the class probabilities with those of the whole series (half the
sum of absolute differences) and the accuracies. The convolution is left out of the model: it counts steps, not time.

Writes scripts/results/irregular_sampling.json and .md; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

from arguments import text  # noqa: E402
from classify_series import PAPER_SEEDS, accuracy, predict  # noqa: E402
from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification  # noqa: E402
from pretrain import describe_environment, make_folder  # noqa: E402
from run_records import read_record  # noqa: E402
from series_data import channel_statistics, check, collate, load_archive, make_rows, split  # noqa: E402
from series_training import fit, make_runs  # noqa: E402
from whole_files import write_whole  # noqa: E402


RESULTS = ROOT / "scripts" / "results"
DATA_SETS = ("BasicMotions", "GunPoint", "OSULeaf")
SEEDS = PAPER_SEEDS[:3]
SHARES_KEPT = (0.75, 0.5, 0.25)
EPOCHS = 30
STEP = 0.25  # time at a step of a whole series


def thin(row: dict, share: float, generator: torch.Generator) -> dict:
    """The row with its first step and, by chance, this share of the others, and the time that passed at each."""
    kept = torch.rand(len(row["input_values"]), generator=generator) < share
    kept[0] = True
    steps = kept.nonzero().squeeze(1)
    deltas = STEP * torch.cat([torch.ones(1), steps.diff().float()])
    return {**row, "input_values": row["input_values"][steps], "time_deltas": deltas}


def regular(rows: list[dict]) -> list[dict]:
    """The rows as if no step were left out."""
    return [{**row, "time_deltas": torch.full((len(row["input_values"]),), STEP)} for row in rows]


def measure(name: str, seed: int, accelerator: Accelerator) -> dict:
    """By share of steps kept: distance from the predictions for whole series, and accuracy, with and without times."""
    data = load_archive(name)
    check(data, missing_values=False)
    parts = split(data, seed)
    scale = channel_statistics([data.series[i] for i in parts["train"]])
    rows = {part: regular(make_rows(data, indices, *scale)) for part, indices in parts.items()}

    def loader(rows: list[dict], **options) -> DataLoader:
        return DataLoader(rows, batch_size=16, collate_fn=collate, **options)

    torch.manual_seed(seed)
    config = LrcSSMConfig(
        num_channels=data.channels, num_labels=len(data.classes), hidden_size=32, num_hidden_layers=2, conv_kernel=1
    )
    model = LrcSSMForSequenceClassification(config)
    fit(
        model,
        {"train": loader(rows["train"], shuffle=True), "validation": loader(rows["validation"])},
        accelerator,
        learning_rate=3e-3,
        epochs=EPOCHS,
        patience=EPOCHS,
        score=lambda model, loader: accuracy(*predict(model, loader, accelerator)),
        seed=seed,
        description=f"{name}, seed {seed}",
    )

    @torch.no_grad()
    def classify(rows: list[dict]) -> tuple[Tensor, float]:
        logits, labels = predict(model, loader(rows), accelerator)
        return logits.softmax(-1), accuracy(logits, labels)

    whole, whole_accuracy = classify(rows["test"])
    results = {"accuracy": whole_accuracy, "by_share_kept": {}}
    generator = torch.Generator().manual_seed(seed)
    for share in SHARES_KEPT:
        thinned = [thin(row, share, generator) for row in rows["test"]]
        measured = {}
        for way, rows_of_it in (("with", thinned), ("without", regular(thinned))):
            probabilities, right = classify(rows_of_it)
            distance = (probabilities - whole).abs().sum(-1).mean().item() / 2
            measured[way] = {"distance": distance, "accuracy": right}
        results["by_share_kept"][str(share)] = measured
    return {**results, **describe_environment(accelerator)}


def table(results: dict) -> str:
    environments = {
        f"{run['hardware']['device']}, torch {run['versions']['torch']}"
        for runs in results["sets"].values()
        for run in runs.values()
    }
    lines = [
        f"Distance of class probabilities from those for the whole series, and accuracy, mean of {len(SEEDS)} seeds; "
        f"{' and '.join(sorted(environments))}.",
        "",
        "| set | steps kept | distance with `time_deltas` | without | accuracy whole | with | without |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results["sets"].items():
        whole = statistics.mean(run["accuracy"] for run in runs.values())
        for share in map(str, SHARES_KEPT):
            cells = {
                (way, what): statistics.mean(run["by_share_kept"][share][way][what] for run in runs.values())
                for way in ("with", "without")
                for what in ("distance", "accuracy")
            }
            lines.append(
                f"| {name} | {float(share):.0%} | {cells['with', 'distance']:.3f} | {cells['without', 'distance']:.3f} "
                f"| {whole:.3f} | {cells['with', 'accuracy']:.3f} | {cells['without', 'accuracy']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def measure_all(folder: Path, accelerator: Accelerator, command: str) -> dict:
    """What is not there yet is measured and written, run by run; returns all.

    Raises:
        ValueError: the folder cannot be written, what is there is broken, or a set cannot be loaded.
    """
    path = make_folder(str(folder)) / "irregular_sampling.json"
    results = read_record(path, {"sets": dict}) if path.exists() else {"sets": {}}
    for name, seed in tqdm([(name, seed) for name in DATA_SETS for seed in SEEDS], desc="Runs"):
        runs = results["sets"].setdefault(name, {})
        if str(seed) not in runs:
            runs[str(seed)] = measure(name, seed, accelerator)
            write_whole(path, json.dumps(results, indent=1) + "\n")
    write_whole(path.with_suffix(".md"), table(results))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=text, default=str(RESULTS), help="Folder of the two files.")
    args = parser.parse_args(arguments)
    work = functools.partial(measure_all, Path(args.results_dir))
    print(table(make_runs("scripts/measure_irregular.py", arguments, work)[1]))


if __name__ == "__main__":
    main()
