# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Language models trained side by side: same data, steps and seeds, each at the best of the same learning rates.

    python scripts/compare_models.py blocks    # the choices behind the gated block, each changed on its own
    python scripts/compare_models.py rivals    # LrcSSM, Llama and Mamba of equal size: lrcssm-python-nano's card

trains every variant with training/pretrain.py into a folder of its own under --runs_dir, on as many threads as
OMP_NUM_THREADS says, and writes a JSON file and a table. A finished run is not run again, so that an interrupted
comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers import AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

from pretraining_runs import PretrainingRun, pretrain, run_script  # noqa: E402
from whole_files import write_whole  # noqa: E402


SEEDS = (0, 1, 2)


class Study(NamedTuple):
    """`arguments` of pretrain.py for all variants, and each variant's architecture and configuration.

    With several learning rates, the first seed tries them all, and the others take the best. With `vocab_size`, a
    tokenizer is trained first.
    """

    title: str
    output: str
    table: str
    arguments: str
    learning_rates: tuple[str, ...]
    variants: dict[str, tuple[str, str]]
    vocab_size: int | None = None


_BLOCK = "hidden_size=192,num_hidden_layers=4,intermediate_size=256,time_constant_max=64"

STUDIES = {
    "blocks": Study(
        title="The gated block, each choice changed on its own",
        output="scripts/results/block_comparison.json",
        table="scripts/results/block_comparison.md",
        arguments="--max_train_steps 250 --eval_steps 250",
        learning_rates=("3e-3",),
        variants={
            "gated block, time constants 2.5 to 64": ("lrcssm", _BLOCK),
            "sensory sigmoid": ("lrcssm", f"{_BLOCK},sensory_activation=sigmoid"),
            "no elastance input": ("lrcssm", f"{_BLOCK},elastance_input=False"),
            "time constants 2.5 to 16 (the default)": ("lrcssm", f"{_BLOCK},time_constant_max=16"),
            "time constants 2.5 to 512": ("lrcssm", f"{_BLOCK},time_constant_max=512"),
            "symmetric elastance": ("lrcssm", f"{_BLOCK},elastance=symmetric"),
            "no state in the gates (linear)": ("lrcssm", f"{_BLOCK},state_dependence=input"),
            "no convolution": ("lrcssm", f"{_BLOCK},conv_kernel=1"),
            "the paper's block": ("lrcssm", f"{_BLOCK},block_type=paper"),
        },
    ),
    "rivals": Study(
        title="LrcSSM, Llama and Mamba of equal size",
        output="model_cards/lrcssm-python-nano/comparison.json",
        table="scripts/results/rival_comparison.md",
        arguments="--per_device_train_batch_size 4 --max_train_steps 1000",
        learning_rates=("4e-3", "6e-3"),
        variants={
            "LrcSSM": (
                "lrcssm",
                "hidden_size=192,num_hidden_layers=4,intermediate_size=384,initializer_range=0.05",
            ),
            "Llama": (
                "llama",
                "hidden_size=192,num_hidden_layers=4,intermediate_size=512,num_attention_heads=3,"
                "num_key_value_heads=3,tie_word_embeddings=True",
            ),
            "Mamba": ("mamba", "hidden_size=192,num_hidden_layers=7,tie_word_embeddings=True"),
        },
        vocab_size=2048,
    ),
}


def train(study: Study, name: str, learning_rate: str, seed: int, runs_dir: Path) -> PretrainingRun:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder = runs_dir / f"{slug}-{learning_rate}-{seed}"
    model_type, overrides = study.variants[name]
    arguments = ["--model_type", model_type, "--config_overrides", overrides]
    if study.vocab_size is not None:
        arguments += ["--tokenizer_name", str(runs_dir / "tokenizer")]
    arguments += ["--learning_rate", learning_rate, *study.arguments.split(), "--seed", str(seed)]
    return pretrain(folder, arguments)


def prepare_tokenizer(study: Study, runs_dir: Path) -> None:
    """Trains the study's tokenizer, unless it is there already."""
    folder, size = runs_dir / "tokenizer", str(study.vocab_size)
    if not (ROOT / folder).exists():
        run_script("training/train_tokenizer.py", "--vocab_size", size, "--output_dir", str(folder))
    elif len(AutoTokenizer.from_pretrained(ROOT / folder)) != study.vocab_size:
        raise ValueError(f"{folder} is not of {size} tokens; move it away, or give another --runs_dir.")


def compare(study: Study, runs_dir: Path) -> dict:
    """Trains what is not there yet, and returns what the JSON file holds."""
    if study.vocab_size is not None:
        prepare_tokenizer(study, runs_dir)
    models, curves = {}, {}
    total = len(study.variants) * (len(study.learning_rates) + len(SEEDS) - 1)
    with tqdm(total=total, desc="Runs") as bar:
        for name in study.variants:
            rates = {}
            for rate in study.learning_rates:
                rates[rate] = train(study, name, rate, SEEDS[0], runs_dir)
                bar.update()
            best = min(rates, key=lambda rate: rates[rate].nats_per_byte)
            runs = [rates[best]]
            for seed in SEEDS[1:]:
                runs.append(train(study, name, best, seed, runs_dir))
                bar.update()
            models[name] = {
                "parameters": runs[0].training["parameters"],
                "learning_rate": best,
                "nats_per_byte": [run.nats_per_byte for run in runs],
                "nats_per_byte_by_learning_rate": {rate: run.nats_per_byte for rate, run in rates.items()},
                "command": runs[0].training["command"],
            }
            curves[name] = [
                (points[0][0], statistics.mean(nats for _, nats in points)) for points in zip(*(r.curve for r in runs))
            ]
    training = runs[0].training
    return {
        "title": study.title,
        "environment": runs[0].environment(),
        "steps": training["steps"],
        "tokens_per_step": training["tokens_per_step"],
        "models": models,
        "curves": curves,
    }


def table(results: dict) -> str:
    lines = [
        f"Held-out nats per byte after {results['steps']:,} steps of {results['tokens_per_step']:,} tokens, "
        f"{len(SEEDS)} seeds (mean ± standard deviation); {results['environment']}.",
        "",
        "| variant | nats/byte | M parameters | learning rate |",
        "|---|---|---|---|",
    ]
    for name, model in results["models"].items():
        losses = model["nats_per_byte"]
        score = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
        lines.append(f"| {name} | {score} | {model['parameters'] / 1e6:.2f} | {model['learning_rate']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Folder of the runs (default runs).")
    args = parser.parse_args()
    study = STUDIES[args.study]
    results = compare(study, args.runs_dir)
    for name, text in {study.output: json.dumps(results, indent=1) + "\n", study.table: table(results)}.items():
        write_whole(ROOT / name, text)
    print(table(results))


if __name__ == "__main__":
    main()
