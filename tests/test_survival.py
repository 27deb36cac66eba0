# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A training run comes back from being killed, stopped, and from bad checkpoints, to where it would have been."""

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
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
from safetensors.torch import load_file, save_file
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
    model = next((tmp_path / "checkpoint-56").glob("*.safetensors"))
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


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A folder with a checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("saved")
    pretrain.main([*SMALL, *map(str, data["text"]), "--max_train_steps", "7", "--output_dir", str(folder)])
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of it to tamper with."""
    return Path(shutil.copytree(saved / "checkpoint-7", tmp_path / "checkpoint-7"))


def seal(checkpoint, **changes):
    """A manifest of what is there, as whoever tampers with a checkpoint can write one."""
    files = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    manifest = {"time": 2e9, "files": files} | changes
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


PICKLES = [
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
    "random_states_0.pkl",
    "optimizer.bin",
    "scheduler.bin",
]
PICKLES += ["sampler.bin", "dl_state_dict.bin", "scaler.pt", "pytorch_model.bin", "model.bin", "model.pt"]
PICKLES += ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_0/.metadata"]
PICKLES += ["pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp", ".metadata"]


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_checkpoint_with_pickles_is_refused_and_they_run_no_code(form, data, checkpoint, tmp_path, capsys):
    """Those of every name that Accelerate and torch's distributed checkpoints read, in one checkpoint and alone."""
    written = tmp_path / "written"

    if form == "torch":
        file = io.BytesIO()
        torch.save(Payload(written), file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        payload = file.getvalue()
    else:
        payload = pickle.dumps(Payload(written))
        pickle.loads(payload)
    assert written.exists(), "the payload does nothing"
    written.unlink()

    def plant(path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(payload)

    for name in PICKLES:
        path = checkpoint / name
        plant(path)
        seal(checkpoint)
        problem = find_damage(checkpoint)
        assert repr(path.relative_to(checkpoint).parts[0]) in problem and problem.endswith("; remove it")
        path.unlink()
        if path.parent != checkpoint:
            path.parent.rmdir()
    seal(checkpoint)
    assert find_damage(checkpoint) is None
    for name in PICKLES:
        plant(checkpoint / name)
    seal(checkpoint)
    status, output = run_here(tmp_path, data, capsys, "--resume_from_checkpoint", str(checkpoint))
    assert status == 2 and "a checkpoint is only JSON and safetensors" in output
    assert not written.exists()


@pytest.mark.parametrize("kind", ["state.json", "random-*.json", "*.safetensors"])
def test_a_pickle_under_a_name_of_ours_runs_no_code(kind, data, checkpoint, tmp_path, capsys):
    (path,) = checkpoint.glob(kind)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "written")))
    seal(checkpoint)
    assert find_damage(checkpoint) is None
    status, output = run_here(tmp_path, data, capsys, "--resume_from_checkpoint", str(checkpoint))
    assert status == 2 and f"error: {checkpoint}" in output and "cannot be" in output
    assert not (tmp_path / "written").exists()


def test_nothing_is_unpickled_on_the_way_to_a_checkpoints_state(data, checkpoint, tmp_path, monkeypatch):
    read, calls = pretrain.read_state, []

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    def read_watched(*arguments):
        calls.append(arguments)
        with monkeypatch.context() as patches:
            for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
                patches.setattr(module, name, refuse)
            read(*arguments)

    monkeypatch.setattr(pretrain, "read_state", read_watched)
    arguments = [*SMALL, *map(str, data["text"]), "--resume_from_checkpoint", str(checkpoint)]
    pretrain.main([*arguments, "--max_train_steps", "8", "--output_dir", str(tmp_path / "out")])
    assert len(calls) == 1


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"/dev/zero": [0, "0"]}, "'/dev/zero' is not in it"),
        ({"../outside": [3, "0"]}, "'../outside' is not in it"),
        ({"state.json": [-1, "0"]}, "state.json is not as it was written"),
        ({"state.json": ["9", "0"]}, "no readable manifest.json"),
        ({"state.json": [9]}, "no readable manifest.json"),
        ({"state.json": None}, "no readable manifest.json"),
        ([], "no readable manifest.json"),
        (NESTED, "no readable manifest.json"),
    ],
    ids=["device", "outside", "negative", "text", "short", "null", "list", "nested"],
)
def test_a_manifest_leads_to_nothing_outside_of_its_checkpoint(files, problem, checkpoint):
    (checkpoint.parent / "outside").write_text("abc")
    if files == NESTED:
        (checkpoint / "manifest.json").write_text(NESTED)
    else:
        kept = json.loads((checkpoint / "manifest.json").read_text())["files"]
        seal(checkpoint, files=kept | files if isinstance(files, dict) else files)
    assert problem in find_damage(checkpoint)


@pytest.mark.parametrize("kind", ["link", "device", "pipe"])
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_checkpoint_is_of_plain_files(name, kind, checkpoint, monkeypatch):
    path = checkpoint / name
    if kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.rename(checkpoint.parent / name)
        path.symlink_to("/dev/zero" if kind == "device" else checkpoint.parent / name)

    # Reading a device or a pipe does not end, and would take all memory.
    def open_file(path, *arguments, **options):
        assert path.is_file() and not path.is_symlink()
        return open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_file)
    problem = find_damage(checkpoint)
    assert (
        problem
        == ("state.json cannot be read (it is no plain file)", "it has no readable manifest.json")[
            name == "manifest.json"
        ]
    )


def test_a_time_that_is_no_number_is_no_time(checkpoint):
    for time_ in (float("nan"), float("inf"), "2026"):
        seal(checkpoint, time=time_)
        assert "no readable manifest.json" in find_damage(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "other text, tokenizer or revision; give the same, or start anew without --resume_from_"),
        ("activation", "hidden_act='silu', not 'gelu'"),
        ("dropout", "hidden_dropout=0.2, not 0.3"),
    ],
)
def test_a_checkpoint_of_other_data_or_another_model_is_refused(change, message, data, checkpoint, tmp_path, capsys):
    """Also where all sizes are the same."""
    arguments = ["--resume_from_checkpoint", "latest"]
    if change == "text":
        text = data["text"][1].read_text()
        other = tmp_path / "other.txt"
        other.write_text(text.replace("short", "quick"))
        assert other.stat().st_size == data["text"][1].stat().st_size
        arguments += ["--train_file", str(other)]
    else:
        overrides = SMALL[1] + ",hidden_act=gelu" if change == "activation" else SMALL[1].replace("0.2", "0.3")
        arguments += ["--config_overrides", overrides]
    status, output = run_here(checkpoint.parent, data, capsys, *arguments)
    assert status == 2 and message in output and "Traceback" not in output
    assert find_damage(checkpoint) is None


@pytest.fixture(scope="module")
def saved_stream(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    pretrain.main([*SMALL, *map(str, data["stream"]), "--max_train_steps", "7", "--output_dir", str(folder)])
    return folder / "checkpoint-7"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("progress.step", float("inf")),
        ("progress.step", -5),
        ("progress.step", 7.0),
        ("progress.step", True),
        ("progress.tokens", 2**63),
        ("progress.seconds", float("nan")),
        ("progress.seconds", "1"),
        ("progress.batches", -3),
        ("progress.usual_loss", ["a", "b"]),
        ("progress.usual_loss", []),
        ("progress.usual_loss", [1.0, -1.0]),
        ("progress.usual_loss", [1.0, float("inf")]),
        ("progress.usual_loss", None),
        ("place", None),
        ("place", {"window": {}, "blocks": 0}),
        ("place.blocks", -1),
        ("place.window", {}),
        ("place.window.epoch", "1"),
        ("place.window.window", None),
        ("place.window.blocks", 0.5),
        ("place.window.rest", [257]),
        ("place.window.rest", [-1]),
        ("place.window.rest", None),
        ("place.window.starts", ["0"]),
        ("place.window.texts", [1]),
    ],
    ids=str,
)
def test_progress_that_no_run_makes_is_refused(where, value, data, saved_stream, tmp_path, capsys):
    checkpoint = Path(shutil.copytree(saved_stream, tmp_path / "checkpoint-7"))
    state = json.loads((checkpoint / "state.json").read_text())
    *path, last = where.split(".")
    place = state["own"]
    for name in path:
        place = place[name]
    assert last in place
    place[last] = value
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint)
    arguments = [*SMALL, *map(str, data["stream"]), "--resume_from_checkpoint", str(checkpoint)]
    with pytest.raises(SystemExit) as stopped:
        pretrain.main([*arguments, "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"error: {checkpoint} is not what a run wrote: " in capsys.readouterr().out


def test_tensors_of_another_model_are_refused(data, checkpoint, tmp_path, capsys):
    (path,) = checkpoint.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    for others in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name][:-1].clone()},
        tensors | {name: tensors[name].double()},
    ):
        save_file(others, path)
        seal(checkpoint)
        status, output = run_here(checkpoint.parent, data, capsys, "--resume_from_checkpoint", "latest")
        assert status == 2 and "it is of another model" in output and name in output


def test_folders_of_the_users_are_left_alone(data, checkpoint, tmp_path):
    """Only what a run has made is removed."""
    theirs = ["partial-results", "partial-checkpoint-3", "checkpoint-mine-1", "checkpoint-1"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    left = tmp_path / ".lrcssm-partial-checkpoint-3"
    left.mkdir()
    arguments = [*SMALL, *map(str, data["text"]), "--resume_from_checkpoint", str(checkpoint)]
    arguments += ["--save_total_limit", "1", "--max_train_steps", "21", "--output_dir", str(tmp_path)]
    pretrain.main(arguments)
    assert all((tmp_path / name / "notes.txt").read_text() == "mine" for name in theirs)
    assert not left.exists() and not checkpoint.exists() and (tmp_path / "checkpoint-21").exists()


def test_a_checkpoint_of_a_run_with_another_order_of_the_data_is_refused(data, tmp_path, capsys):
    pretrain.main([*SMALL, *map(str, data["text"]), "--max_train_steps", "8", "--output_dir", str(tmp_path)])
    arguments = ["--resume_from_checkpoint", "latest", "--per_device_train_batch_size", "4"]
    status, output = run_here(tmp_path, data, capsys, *arguments)
    assert status == 2 and "sequences_per_batch=2, not 4" in output


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
    write = pretrain.write_state

    def write_twice(folder, *arguments):
        write(folder, *arguments)
        if "-21" in folder.name:
            raise error

    monkeypatch.setattr(pretrain, "write_state", write_twice)
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
