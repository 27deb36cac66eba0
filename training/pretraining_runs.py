# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Runs of pretrain.py as parts of a study, each in a folder of its own, which is not run again once it has finished."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]


class PretrainingRun(NamedTuple):
    """What a finished run's folder says: nats per held-out byte at the end and as (step, nats) points on the way."""

    nats_per_byte: float
    curve: list[tuple[int, float]]
    training: dict

    @classmethod
    def read(cls, folder: Path) -> PretrainingRun:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        final = records[-1]["validation_nats_per_byte"]
        tokens_per_byte = final / records[-1]["validation_loss"]
        curve = [(r["step"], r["validation_loss"] * tokens_per_byte) for r in records if "validation_loss" in r]
        return cls(final, curve, json.loads((folder / "training.json").read_text()))

    def environment(self) -> str:
        """What it ran on and with, in words."""
        hardware = self.training["hardware"]
        versions = ", ".join(f"{library} {version}" for library, version in self.training["versions"].items())
        return f"{hardware['device']} ({hardware['threads']} threads), {versions}"


def run_script(*command: str, threads: int | None = None) -> None:
    """Runs a script of this repository from its root; raises a `RuntimeError` with its output if it fails."""
    variables = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    environment = {**os.environ, **variables}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, errors="replace", env=environment
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")


def pretrain(folder: Path, arguments: list[str], threads: int | None = None) -> PretrainingRun:
    """The run of pretrain.py with these arguments in that folder, made now unless it is there.

    Raises:
        ValueError: the folder holds a run with other arguments.
        RuntimeError: it failed.
    """
    arguments = ["--output_dir", str(folder), *arguments]
    if not (ROOT / folder / "training.json").exists():
        run_script("training/pretrain.py", *arguments, threads=threads)
    finished = PretrainingRun.read(ROOT / folder)
    if not finished.training["command"].endswith(shlex.join(arguments)):
        raise ValueError(f"{folder} holds a run with other settings; move it away, or name another folder for runs.")
    return finished
