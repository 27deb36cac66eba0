# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A training run comes back from being killed, stopped, and from bad checkpoints, to where it would have been."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException

import checkpoints
import pretrain
from checkpoints import find_damage


ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
SMALL = ["--config_overrides", "hidden_size=16,num_hidden_layers=1,intermediate_size=16,hidden_dropout=0.2"]
SMALL += ["--block_size", "32", "--per_device_train_batch_size", "2", "--eval_steps", "25"]
SMALL += ["--max_train_steps", str(STEPS), "--checkpointing_steps", "7"]


def start(folder, *arguments):
    """The script's process."""
    command = [sys.executable, str(ROOT / "training" / "pretrain.py"), *SMALL, *map(str, arguments)]
    command += ["--output_dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-2000:]
    return output


def wait_for(process, folder, step):
    """Until the run has logged this step."""
    path = folder / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[0][-2000:])


def assert_same_weights(folder, other):
    weights, others = (load_file(each / "model.safetensors") for each in (folder, other))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Arguments by the way the data is read."""
    folder = tmp_path_factory.mktemp("data")
    text, rows = folder / "corpus.txt", folder / "corpus.jsonl"
    text.write_text("".join(f"the {i}th line of a short text, with some {i * i} in it\n" for i in range(300)))
    records = [json.dumps({"text": f"text {i} " * (3 + i % 7)}) + "\n" for i in range(60)]
    rows.write_text("".join(records))
    (folder / "held_out.jsonl").write_text("".join(records[:20]))
    stream = ["--train_file", rows, "--validation_file", folder / "held_out.jsonl", "--streaming"]
    return {"text": ["--train_file", text], "stream": stream}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Folders of runs that nothing interrupted."""
    folders = {}
    for name, arguments in data.items():
        folders[name] = tmp_path_factory.mktemp(name)
        finish(start(folders[name], *arguments))
    return folders


@pytest.mark.parametrize("kind", ["text", "stream"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(kind, data, whole, tmp_path):
    chance = random.Random(kind)
    resume = []
    for target in (10, 25, 40):
        process = start(tmp_path, *data[kind], *resume)
        wait_for(process, tmp_path, target + chance.randrange(10))
        time.sleep(0.05 * chance.random())
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "model.safetensors").exists()
        resume = ["--resume_from_checkpoint", "latest"]
    assert "Going on from" in finish(start(tmp_path, *data[kind], *resume))
    assert_same_weights(tmp_path, whole[kind])
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        "checkpoint-42",
        "checkpoint-49",
        "checkpoint-56",
    ]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_its_state(number, data, whole, tmp_path):
    process = start(tmp_path, *data["text"])
    wait_for(process, tmp_path, 7)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, output
    assert f"Stopped by {number.name}" in output and "Traceback" not in output
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert f"checkpoint-{last} holds" in output
    finish(start(tmp_path, *data["text"], "--resume_from_checkpoint", "latest"))
    assert_same_weights(tmp_path, whole["text"])


def test_a_run_that_is_stopped_where_it_would_be_measured_ends_with_the_same_weights(
    data, whole, tmp_path, monkeypatch, capsys
):
    looks = itertools.count(1)

    class StopAt25(checkpoints.StopSignals):
        received = property(lambda self: signal.SIGTERM if next(looks) == 25 else None, lambda self, value: None)

    monkeypatch.setattr(pretrain, "StopSignals", StopAt25)
    status, output = run_here(tmp_path, data, capsys)
    assert status == 128 + signal.SIGTERM and "Stopped by SIGTERM after step 25" in output
    monkeypatch.undo()
    pretrain.main(
        [*SMALL, *map(str, data["text"]), "--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path)]
    )
    assert_same_weights(tmp_path, whole["text"])


def test_a_command_that_is_always_the_same_begins_and_goes_on(data, tmp_path, capsys):
    """With other rates, it is these that count from there on."""
    arguments = [*SMALL, *map(str, data["text"]), "--resume_from_checkpoint", "latest", "--output_dir", str(tmp_path)]
    pretrain.main(arguments)
    assert f"There is no checkpoint in {tmp_path} yet: the run begins." in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    pretrain.main([*arguments, "--learning_rate", "1e-3", "--weight_decay", "0.3"])
    assert f"Going on from {tmp_path / 'checkpoint-56'}" in capsys.readouterr().out
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(lines[-2])["learning_rate"] for lines in (before, after)]
    assert json.loads(after[-2])["step"] == STEPS and rates[1] == pytest.approx(rates[0] / 4)


def test_a_folder_that_is_not_everyones_is_refused(tmp_path, monkeypatch):
    checkpoints.require_shared(Accelerator(), tmp_path)
    monkeypatch.setattr(checkpoints, "gather_object", lambda mine: [*mine, (1, False)])
    with pytest.raises(ValueError, match=r"is not the same folder in the processes \[1\]"):
        checkpoints.require_shared(Accelerator(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_checkpoints_are_passed_over(data, whole, tmp_path):
    finish(start(tmp_path, *data["text"]))
    model = next((tmp_path / "checkpoint-56").glob("model*"))
    model.write_bytes(model.read_bytes()[:-7])
    (tmp_path / "checkpoint-49" / "manifest.json").write_text("{")
    (tmp_path / "model.safetensors").unlink()
    output = finish(start(tmp_path, *data["text"], "--resume_from_checkpoint", "latest"))
    assert f"checkpoint-56 is not used: {model.name} is not as it was written" in output
    assert "checkpoint-49 is not used: it has no readable manifest.json" in output
    assert f"Going on from {tmp_path / 'checkpoint-42'}" in output
    assert_same_weights(tmp_path, whole["text"])
    for path in (tmp_path / "checkpoint-56").iterdir():
        damaged = path.read_bytes()
        path.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
        assert find_damage(path.parent) is not None
        path.write_bytes(damaged)
    assert find_damage(tmp_path / "checkpoint-56") is None


def run_here(folder, data, capsys, *arguments):
    """The script in this process: its exit status and what it printed."""
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*SMALL, *map(str, data["text"]), *arguments, "--output_dir", str(folder)])
    return stopped.value.code, capsys.readouterr().out


def test_a_checkpoint_of_a_run_with_another_order_of_the_data_is_refused(data, tmp_path, capsys):
    pretrain.main([*SMALL, *map(str, data["text"]), "--max_train_steps", "8", "--output_dir", str(tmp_path)])
    arguments = ["--resume_from_checkpoint", "latest", "--per_device_train_batch_size", "4"]
    status, output = run_here(tmp_path, data, capsys, *arguments)
    assert status == 1 and "sequences_per_batch=2, not 4" in output


def test_the_last_checkpoints_are_kept_whatever_the_clock_says(data, tmp_path, monkeypatch):
    clock = itertools.count(2e9, -1000)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(time=lambda: next(clock)))
    pretrain.main([*SMALL, *map(str, data["text"]), "--output_dir", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [f"checkpoint-{n}" for n in (42, 49, 56)]
    assert checkpoints.find_checkpoint(Accelerator(), tmp_path, "latest").name == "checkpoint-56"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"),
        # What torch's distributed checkpoints raise.
        (CheckpointException("no space", {}), "CheckpointException"),
    ],
    ids=["plain", "distributed"],
)
def test_a_full_disk_leaves_the_last_checkpoint(error, message, data, tmp_path, monkeypatch, capsys):
    save = Accelerator.save_state

    def save_twice(self, folder):
        save(self, folder)
        if "-21" in folder:
            raise error

    monkeypatch.setattr(Accelerator, "save_state", save_twice)
    status, output = run_here(tmp_path, data, capsys)
    assert status == 1 and "checkpoint-21 could not be written" in output and message in output
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-14", "checkpoint-7"]
    assert find_damage(tmp_path / "checkpoint-14") is None


def test_a_folder_that_vanishes_is_not_made_again(data, tmp_path, monkeypatch, capsys):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    log = pretrain.Training.log

    def log_and_move(self, *arguments):
        log(self, *arguments)
        if self.step == 10:
            folder.rename(elsewhere)

    monkeypatch.setattr(pretrain.Training, "log", log_and_move)
    status, output = run_here(folder, data, capsys)
    assert status == 1 and "error: " in output and str(folder) in output
    assert not folder.exists() and find_damage(elsewhere / "checkpoint-7") is None


def test_steps_without_finite_gradients_are_left_out_and_counted(data, tmp_path, monkeypatch):
    clip, calls = Accelerator.clip_grad_norm_, []

    def clip_with_accidents(self, parameters, *arguments):
        parameters = list(parameters)
        calls.append(len(calls))
        if calls[-1] in (4, 9):
            parameters[0].grad.fill_(float("inf"))
        return clip(self, parameters, *arguments)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip_with_accidents)
    pretrain.main([*SMALL, *map(str, data["text"]), "--max_train_steps", "20", "--output_dir", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = {record["step"]: record["skipped_steps"] for record in records if "skipped_steps" in record}
    assert counts[7] == 1 and counts[20] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "model.safetensors").values())


def test_losses_that_stand_out_are_counted():
    training = pretrain.Training
    run = SimpleNamespace(step=0, loss_spikes=0, usual_loss=(0.0, 0.0), SPIKE=6, SETTLED=100, DECAY=0.98)
    noise = torch.Generator().manual_seed(0)
    for run.step in range(1, 1001):
        loss = 2 + 0.1 * torch.randn((), generator=noise).item() + 5 * (run.step in (50, 300, 700))
        training.watch(run, loss)
    assert run.loss_spikes == 2


@pytest.mark.slow
def test_20000_steps_leave_memory_flat_and_no_stray_files(data, tmp_path, monkeypatch):
    memory = {}
    log = pretrain.Training.log

    def log_memory(self, *arguments):
        log(self, *arguments)
        memory[self.step] = psutil.Process().memory_info().rss / 2**20

    monkeypatch.setattr(pretrain.Training, "log", log_memory)
    arguments = ["--max_train_steps", "20000", "--checkpointing_steps", "100", "--eval_steps", "200"]
    pretrain.main([*SMALL, *map(str, data["stream"]), *arguments, "--output_dir", str(tmp_path)])
    assert memory[20000] - memory[4000] < 30, memory
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert names == {
        *("checkpoint-19800", "checkpoint-19900", "checkpoint-20000", "config.json", "generation_config.json"),
        *("loss.png", "metrics.jsonl", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"),
    }
