# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Runs of several processes, in each way to share the work, learn what one process learns; every configuration of
training/configs starts one. On a machine without GPUs, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrcssm_hf  # noqa: F401  registers the model


ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "training" / "configs"
SMALL = ["--config_overrides", "hidden_size=32,num_hidden_layers=2,intermediate_size=32", "--block_size", "65"]
SMALL += ["--eval_steps", "5", "--max_train_steps", "12", "--checkpointing_steps", "7"]
# Name -> arguments of accelerate launch, and of pretrain.py, by which it reads the batches of four of one process.
WAYS = {
    "DDP": (["--config_file", "ddp_8_gpus.yaml", "--num_processes", "2"], ["--per_device_train_batch_size", "2"]),
    "FSDP": (["--config_file", "fsdp2_nodes.yaml", "--num_processes", "2"], ["--per_device_train_batch_size", "2"]),
    "context": (
        ["--config_file", "cpu.yaml", "--num_processes", "2"],
        ["--per_device_train_batch_size", "4", "--context_parallel_size", "2"],
    ),
    "context and DDP": (
        ["--config_file", "ddp_8_gpus.yaml", "--num_processes", "4"],
        ["--per_device_train_batch_size", "2", "--context_parallel_size", "2"],
    ),
    "context and FSDP": (
        ["--config_file", "fsdp2_nodes.yaml", "--num_processes", "2"],
        ["--per_device_train_batch_size", "4", "--context_parallel_size", "2"],
    ),
}


def run(launch, arguments, cpu=True):
    """The result of `accelerate launch` with a configuration of training/configs."""
    launch = [CONFIGS / word if word.endswith(".yaml") else word for word in launch]
    script = ROOT / "training" / "pretrain.py"
    if any("fsdp" in str(word) for word in launch):
        launch, script = [*launch, "--num_machines", "1"], ROOT / "tests" / "fsdp_on_cpus.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"text": f"the {i}th text " * (3 + i % 7)}) + "\n" for i in range(300)]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "held_out.jsonl").write_text("".join(rows[::9]))
    return ["--train_file", folder / "train.jsonl", "--validation_file", folder / "held_out.jsonl"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, files):
    """Records of one process, by whether it streams."""
    found = {}
    for streaming in ([], ["--streaming"]):
        folder = tmp_path_factory.mktemp("one")
        arguments = [*SMALL, *files, *streaming, "--per_device_train_batch_size", "4", "--output_dir", folder]
        result = run(["--config_file", "cpu.yaml"], arguments)
        assert result.returncode == 0, result.stderr[-2000:]
        found[bool(streaming)] = records(folder)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_they_learn_what_one_process_learns_and_go_on_from_a_checkpoint(way, one, files, tmp_path):
    launch, batch_size = WAYS[way]
    streaming = way != "context"
    arguments = [*SMALL, *files, *batch_size, *["--streaming"] * streaming, "--output_dir", tmp_path]
    resumes = [[], ["--resume_from_checkpoint", "latest"]] if way in ("FSDP", "context") else [[]]
    for resume in resumes:
        result = run([*launch, "--mixed_precision", "no"], [*arguments, *resume])
        assert result.returncode == 0 and f"on {launch[-1]} x cpu" in result.stdout, result.stderr[-3000:]
        assert ("Going on from" in result.stdout) == bool(resume)
        for ours, theirs in zip(records(tmp_path), one[streaming], strict=True):
            for name in {"step", "tokens", "train_loss", "validation_loss", "validation_nats_per_byte"} & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (resume, name)
    sharded = list((tmp_path / "checkpoint-7").glob("*.safetensors"))
    assert len(sharded) == int(launch[-1])


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir()))
def test_every_configuration_starts_a_run(name, files, tmp_path):
    """In its own precision; with two processes instead of many."""
    launch = ["--config_file", name] + ["--num_processes", "2"] * (name in ("ddp_8_gpus.yaml", "fsdp2_nodes.yaml"))
    arguments = [*SMALL, *files, "--max_train_steps", "2", "--output_dir", tmp_path]
    result = run(launch, arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    hardware = json.loads((tmp_path / "training.json").read_text())["hardware"]
    assert hardware["processes"] == int(launch[-1] if len(launch) > 2 else 1)
    assert hardware["precision"] == ("no" if name == "cpu.yaml" else "bf16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="they find each other by their GPUs")
def test_processes_that_do_not_find_each_other_do_not_train(files, tmp_path):
    """Without a GPU, Accelerate lets each of them run on its own."""
    launch = ["--config_file", "ddp_8_gpus.yaml", "--num_processes", "2"]
    result = run(launch, [*SMALL, *files, "--output_dir", tmp_path / "out"], cpu=False)
    assert result.returncode != 0
    assert "error: This is one of 2 processes" in result.stdout and not (tmp_path / "out").exists()
