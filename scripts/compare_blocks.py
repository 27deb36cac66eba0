# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The choices behind the gated block's defaults: each changed on its own, same data, steps and sizes, several seeds.

    python scripts/compare_blocks.py

trains every variant with training/pretrain.py and writes block_comparison.json and block_comparison.md to
scripts/results. A run found in the JSON is not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
BASE = "hidden_size=192,num_hidden_layers=4,intermediate_size=256,time_constant_max=64"
VARIANTS = {
    "gated block, time constants 2.5 to 64": "",
    "sensory sigmoid": "sensory_activation=sigmoid",
    "no elastance input": "elastance_input=False",
    "time constants 2.5 to 16 (the default)": "time_constant_max=16",
    "time constants 2.5 to 512": "time_constant_max=512",
    "symmetric elastance": "elastance=symmetric",
    "no state in the gates (linear)": "state_dependence=input",
    "no convolution": "conv_kernel=1",
    "the paper's block": "block_type=paper",
}


def train(overrides: str, seed: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "training" / "pretrain.py", "--output_dir", folder, "--seed", str(seed)]
        command += ["--max_train_steps", str(steps), "--eval_steps", str(steps), "--learning_rate", "3e-3"]
        command += ["--config_overrides", ",".join(filter(None, [BASE, overrides]))]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}\n{result.stderr}")
        final = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
        parameters = float(result.stdout.split(" M parameters")[0].split()[-1])
    return {"validation_nats_per_byte": final["validation_nats_per_byte"], "million_parameters": parameters}


def table(results: dict) -> str:
    seeds = max(len(runs) for runs in results["runs"].values())
    lines = [
        f"Held-out nats per byte after {results['steps']} steps of 8 x 512 bytes, {seeds} seeds "
        f"(mean ± standard deviation); {results['environment']}.",
        "",
        "| variant | nats/byte | M parameters |",
        "|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        losses = [run["validation_nats_per_byte"] for run in runs.values()]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        parameters = next(iter(runs.values()))["million_parameters"]
        lines.append(f"| {name} | {statistics.mean(losses):.3f} ± {spread:.3f} | {parameters:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "scripts" / "results")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "block_comparison.json"
    environment = (
        f"{torch.get_num_threads()} CPU threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    settings = {"steps": args.steps, "base": BASE, "environment": environment}
    results = {**settings, "runs": {}}
    if path.exists():
        results = json.loads(path.read_text())
        if any(results[name] != value for name, value in settings.items()):
            parser.error(f"{path} was made with other settings; give another --output_dir.")
    todo = [(seed, name) for seed in args.seeds for name in VARIANTS]
    for seed, name in tqdm(todo, desc="Runs"):
        runs = results["runs"].setdefault(name, {})
        if str(seed) not in runs:
            runs[str(seed)] = train(VARIANTS[name], seed, args.steps)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(path)
    (args.output_dir / "block_comparison.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
