# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The main job in small: what it writes, that what it says is true, resuming, two processes, and refusing bad input."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import evaluate
import lrcssm_hf  # noqa: F401  registers the model
import pretrain
from text_data import load_tokenizer
from tiny_models import make_model
from token_blocks import vocabulary_size


ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--config_overrides", "hidden_size=32,num_hidden_layers=2,intermediate_size=32", "--block_size", "64"]
SMALL += ["--per_device_train_batch_size", "2", "--eval_steps", "5", "--max_train_steps", "12"]


def run(*arguments, launch=()):
    """The script's result."""
    command = [sys.executable, *launch, str(ROOT / "training" / "pretrain.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"the {i}th line of a short text — with some {i * i} in it\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("run") / "model"
    result = run(*SMALL, "--train_file", text_file, "--output_dir", folder)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder, result


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_is_a_model_folder(trained):
    folder, _ = trained
    written = {path.name for path in folder.iterdir()}
    code = {path.name for path in folder.glob("*.py")}
    assert "modeling_lrcssm.py" in code
    assert written - code == {
        "config.json",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "the 7th — line\n\tof <|endoftext|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    inputs = tokenizer(["the", "the 12th line"], return_tensors="pt", padding=True, padding_side="left")
    assert model.generate(**inputs, max_new_tokens=5).shape[0] == 2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_progress_metrics_and_closing_words(trained):
    folder, result = trained
    assert "Training: 100%" in result.stderr and "loss=" in result.stderr and "tokens_per_s=" in result.stderr
    assert f"AutoModelForCausalLM.from_pretrained('{folder}')" in result.stdout
    *steps, final = records(folder)
    assert [record["step"] for record in steps] == [5, 10, 12]
    assert all(record["tokens"] == record["step"] * 2 * 64 for record in steps)
    assert "validation_loss" in steps[0] and steps[-1]["train_loss"] < steps[0]["train_loss"]
    assert final["validation_nats_per_byte"] < 5.6  # of guessing, log(257)


def test_training_json_says_what_was_run(trained, text_file):
    folder, _ = trained
    training = json.loads((folder / "training.json").read_text())
    words = shlex.split(training["command"])
    assert words == ["accelerate", "launch", "training/pretrain.py", *SMALL, *words[-4:]]
    assert words[-4:] == ["--train_file", str(text_file), "--output_dir", str(folder)]
    assert training["data"]["source"] == "corpus.txt" and training["data"]["dataset"] is None
    assert len(training["data"]["digest"]) == 64
    assert training["data"]["training_tokens"] > 10 * training["data"]["held_out_tokens"] > 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert training["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert training["steps"] * training["tokens_per_step"] == records(folder)[-1]["tokens"]
    assert training["seconds"] > 0
    assert training["versions"]["transformers"] == transformers.__version__


def test_the_reported_loss_is_that_of_the_saved_model(trained, text_file):
    folder, _ = trained
    command = [sys.executable, str(ROOT / "training" / "evaluate.py"), "--model_name_or_path", str(folder)]
    command += ["--train_file", str(text_file), "--block_size", "64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loss = json.loads(result.stdout.splitlines()[-1])["nats_per_byte"]
    assert loss == pytest.approx(records(folder)[-1]["validation_nats_per_byte"], abs=1e-5)


def test_a_resumed_run_ends_where_the_whole_run_ends(trained, text_file, tmp_path):
    folder, _ = trained
    arguments = [*SMALL, "--train_file", text_file, "--output_dir", tmp_path, "--checkpointing_steps", "7"]
    assert run(*arguments).returncode == 0
    assert (tmp_path / "checkpoint-7").is_dir() and not list(tmp_path.glob("partial-*"))
    (tmp_path / "model.safetensors").unlink()
    result = run(*arguments, "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr[-2000:]
    expected, resumed = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert [record["step"] for record in records(tmp_path)] == [5, 7, 10, 12, 12]


def test_resuming_in_a_later_epoch_with_accumulation_and_dropout(text_file, tmp_path):
    """An epoch ends in a smaller accumulation step, and the random state is the interrupted run's."""
    arguments = ["--train_file", text_file, "--block_size", "512", "--gradient_accumulation_steps", "2"]
    arguments += ["--config_overrides", "hidden_size=16,num_hidden_layers=1,intermediate_size=16,hidden_dropout=0.3"]
    arguments += ["--max_train_steps", "9", "--checkpointing_steps", "epoch", "--output_dir", tmp_path]
    assert run(*arguments).returncode == 0
    checkpoints = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) >= 2, "the data is too long for this test"
    expected = load_file(tmp_path / "model.safetensors")
    tokens = records(tmp_path)[-1]["tokens"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "tok')  # a line that an interrupted run left behind
    result = run(*arguments, "--resume_from_checkpoint", tmp_path / f"checkpoint-{checkpoints[0]}")
    assert result.returncode == 0, result.stderr[-2000:]
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert records(tmp_path)[-1]["tokens"] == tokens


def test_a_run_that_diverges_stops_and_leaves_no_model(text_file, tmp_path):
    arguments = [*SMALL, "--train_file", text_file, "--learning_rate", "1e30", "--max_train_steps", "40"]
    result = run(*arguments, "--num_warmup_steps", "0", "--output_dir", tmp_path)
    assert result.returncode == 1
    assert "error: The " in result.stdout and "lower --learning_rate" in result.stdout
    assert not (tmp_path / "model.safetensors").exists()


def test_vectors_and_mambas_rates_do_not_decay():
    config = transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    decaying, constant = (group["params"] for group in pretrain.make_optimizer(model, 1e-3, 0.1).param_groups)
    assert pretrain.make_optimizer(model, 1e-3, 0.1).param_groups[1]["weight_decay"] == 0
    rates = model.backbone.layers[0].mixer.A_log
    assert any(p is rates for p in constant) and all(p.dim() >= 2 for p in decaying)
    assert len(decaying) + len(constant) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 4),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 2),
    ],
    ids=str,
)
def test_processes_share_all_cores_unless_the_user_says_otherwise(variables, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        pretrain.use_all_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_two_processes(text_file, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    result = run(*SMALL, "--train_file", text_file, "--output_dir", tmp_path, launch=launch)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "on 2 x cpu" in result.stdout
    assert records(tmp_path)[-2]["tokens"] == 12 * 2 * 2 * 64
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.hidden_size == 32


def test_other_data_other_tokenizer_and_a_model_to_continue(trained, tmp_path):
    folder, _ = trained
    train_file, validation_file = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    for path in (train_file, validation_file):
        path.write_text(
            "".join(json.dumps({"id": i, "text": f"record {i} of {path.stem} " * 9}) + "\n" for i in range(40))
        )
    files = ["--train_file", train_file, "--validation_file", validation_file, "--block_size", "32"]
    steps = ["--max_train_steps", "2", "--gradient_accumulation_steps", "2"]
    arguments = [*files, *steps, "--model_name_or_path", folder, "--tokenizer_name", folder, "--gradient_checkpointing"]
    tracking = ["--with_tracking", "--report_to", "tensorboard"]
    pytest.importorskip("tensorboard")
    result = run(*arguments, *tracking, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    assert records(tmp_path / "out")[-2]["tokens"] == 2 * 2 * 8 * 32
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


def test_a_tokenizer_whose_ids_have_gaps(text_file, tmp_path):
    vocabulary = {chr(97 + i): i for i in range(26)} | {"?": 26, " ": 27, "1": 40, "2": 41}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    arguments = [
        *SMALL,
        "--train_file",
        text_file,
        "--max_train_steps",
        "2",
        "--tokenizer_name",
        tmp_path / "tokenizer",
    ]
    pretrain.main([*map(str, arguments), "--output_dir", str(tmp_path / "model")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 42


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_file", "missing.txt"], "--train_file 'missing.txt' does not exist"),
        (["--train_file", "{empty}"], "is empty"),
        (["--train_file", "{blank}"], "no text"),
        (["--train_file", "{short}"], "shorter than one block of 64 tokens; lower --block_size"),
        (["--train_file", "{binary}"], "cannot read '.bin'"),
        (["--validation_file", "{short}"], "--validation_file needs --train_file"),
        (["--dataset_name", "nobody/no-such-dataset"], "--dataset_name 'nobody/no-such-dataset' could not be loaded"),
        (["--tokenizer_name", "nobody/no-such-tokenizer"], "--tokenizer_name 'nobody/no-such-tokenizer'"),
        (["--output_dir", "{short}/below-a-file"], "--output_dir"),
        (["--config_overrides", "hidden_width=3"], "has no 'hidden_width'"),
        (["--config_overrides", "hidden_size=-3"], "hidden_size"),
        (["--config_overrides", "hidden_size"], "not of the form name=value"),
        (["--config_overrides", "__class__=1"], "a lrcssm configuration has no '__class__'"),
        (["--config_overrides", "to_dict=1"], "a lrcssm configuration has no 'to_dict'"),
        (["--config_overrides", "layer_types=1"], "a lrcssm configuration has no 'layer_types'"),
        (["--config_overrides", "auto_map=1"], "a lrcssm configuration has no 'auto_map'"),
        (["--config_overrides", "model_type=llama"], "a lrcssm configuration has no 'model_type'"),
        (["--config_overrides", "architectures=1"], "a lrcssm configuration has no 'architectures'"),
        (["--config_overrides", "hiden_size=8"], "has no 'hiden_size'; the nearest is 'hidden_size'"),
        (["--config_overrides", "hidden_size="], "'hidden_size=' is not of the form name=value"),
        (["--config_overrides", "hidden_size=8,,"], "'' is not of the form name=value"),
        (["--config_overrides", "hidden_size=8, hidden_size=16"], "'hidden_size' is given twice"),
        (["--model_type", "lrcsm"], "argument --model_type: must be"),
        (["--model_type", "vit"], "argument --model_type: must be"),
        (["--max_train_steps", "0"], "argument --max_train_steps: must be at least 1, got 0"),
        (["--max_train_steps", "9" * 40], "argument --max_train_steps: must be at most"),
        (["--num_train_epochs", "1"], "--num_train_epochs: not allowed with argument --max_train_steps"),
        (["--max_grad_norm", "-1"], "argument --max_grad_norm: must be above 0, got -1"),
        (["--max_grad_norm", "nan"], "argument --max_grad_norm: must be a finite number, got nan"),
        (["--weight_decay", "-1"], "argument --weight_decay: must be at least 0, got -1"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["--peak_tflops", "0"], "argument --peak_tflops: must be above 0, got 0"),
        (["--num_warmup_steps", "-1"], "argument --num_warmup_steps: must be at least 0, got -1"),
        (["--num_warmup_steps", "13"], "--num_warmup_steps must be at most the number of steps, 12, got 13"),
        (["--checkpointing_steps", "²"], "argument --checkpointing_steps: must be a whole number or 'epoch', got '²'"),
        (["--checkpointing_steps", "0"], "argument --checkpointing_steps: must be at least 1, got 0"),
        (["--resume_from_checkpoint", ""], "argument --resume_from_checkpoint: must not be empty"),
        (["--output_dir", ""], "argument --output_dir: must not be empty"),
        (["--train_file", ""], "argument --train_file: must not be empty"),
        (["--hub_model_id", "me/model"], "--hub_model_id is for --push_to_hub"),
        (["--report_to", "tensorboard"], "--report_to is for --with_tracking"),
        (["--with_tracking", "--report_to", "tensorbord"], "argument --report_to: invalid choice: 'tensorbord'"),
        (["--validation_split_percentage", "100"], "must be below 100, got 100"),
        (["--block_size", "1"], "argument --block_size: must be at least 2, got 1"),
        (["--learning_r", "1"], "unrecognized arguments: --learning_r 1"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "--lr_scheduler_type"),
        (["--resume_from_checkpoint", "{missing}"], "is not a checkpoint that can be used"),
        (["--model_name_or_path", "{missing}", "--config_overrides", ""], "--model_name_or_path '/"),
        (["--train_file", "{numbers}"], "no column 'text', and no other holds text: 'n' holds"),
        (["--config_overrides", "hidden_size=wide"], "hidden_size"),
        (["--config_overrides", "hidden_act=foo"], "`hidden_act` must be one of"),
        (["--learning_rate", "-1"], "argument --learning_rate: must be above 0, got -1"),
        (["--lr_scheduler_type", "nonsense"], "--lr_scheduler_type"),
        (["--with_tracking", "--report_to", "comet_ml"], "no tracker of --report_to comet_ml is installed"),
        (["--context_parallel_size", "2"], "--context_parallel_size 2 does not divide the number of processes, 1"),
        (["--context_parallel_size", "0"], "argument --context_parallel_size: must be at least 1, got 0"),
        (
            ["--checkpointing_steps", "often"],
            "argument --checkpointing_steps: must be a whole number or 'epoch', got 'often'",
        ),
        (["--push_to_hub", "--train_file", "{text}"], "offline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_clear_message_before_training(arguments, message, tmp_path, capsys):
    contents = {
        "empty": ("e.txt", ""),
        "blank": ("b.txt", " \n \n"),
        "short": ("s.txt", "short"),
        "binary": ("x.bin", "x"),
        "numbers": ("n.csv", "n,m\n1,2\n3,4\n"),
        "text": ("t.txt", "a long text " * 500),
    }
    paths = {"missing": tmp_path / "missing"}
    for key, (name, content) in contents.items():
        paths[key] = tmp_path / name
        paths[key].write_text(content)
    arguments = [argument.format(**paths) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*SMALL, "--output_dir", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    output = "".join(capsys.readouterr())
    assert message in output and output.count("error: ") == 1, output
    assert "Traceback" not in output and "Training:" not in output


def edit_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("script", ["pretrain", "evaluate"])
@pytest.mark.parametrize(
    "spoil",
    [
        cut_weights,
        edit_config(hidden_size=48),
        edit_config(hidden_size="x"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    ],
    ids=["cut weights", "another width", "no width", "no configuration", "an empty tokenizer", "a list of settings"],
)
def test_a_broken_model_folder_is_named(spoil, script, text_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(None)
    make_model(vocab_size=vocabulary_size(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    spoil(folder)
    arguments = ["--model_name_or_path", str(folder), "--train_file", str(text_file), "--block_size", "64"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        if script == "pretrain":
            pretrain.main([*arguments, "--output_dir", str(tmp_path / "out")])
        else:
            evaluate.main()
    output = "".join(capsys.readouterr())
    assert ended.value.code == 2 and output.count("error: ") == 1, output
    assert f"error: --model_name_or_path {str(folder)!r} could not be loaded: " in output


def test_epochs_are_steps_and_no_warmup_is_longer(text_file, tmp_path, capsys):
    arguments = ["--config_overrides", "hidden_size=16,num_hidden_layers=1,intermediate_size=16", "--block_size", "512"]
    arguments += ["--train_file", str(text_file), "--output_dir", str(tmp_path), "--num_train_epochs"]
    for epochs, message in (("0", "must be above 0, got 0"), ("1e999", "must be a finite number"), ("1", "at most")):
        with pytest.raises(SystemExit) as ended:
            pretrain.main([*arguments, epochs, "--num_warmup_steps", "999"])
        output = "".join(capsys.readouterr())
        assert ended.value.code == 2 and message in output and "Training:" not in output
    pretrain.main([*arguments, "1.5"])
    steps = json.loads((tmp_path / "training.json").read_text())["steps"]
    blocks = json.loads((tmp_path / "training.json").read_text())["data"]["training_tokens"] // 512
    assert steps == math.ceil(1.5 * (blocks // 8))


def test_overrides_of_a_field_by_two_names_are_one_field():
    assert pretrain.parse_overrides("gpt2", "num_hidden_layers=3,n_embd=8") == {"n_layer": 3, "n_embd": 8}
    with pytest.raises(ValueError, match="'hidden_size' is given twice"):
        pretrain.parse_overrides("gpt2", "n_embd=8,hidden_size=8")


@pytest.mark.slow
def test_the_main_job_without_arguments(tmp_path):
    """About five minutes on two CPU cores to at most 1.5 nats per byte, judged by loading the folder."""
    result = run("--output_dir", tmp_path)
    assert result.returncode == 0
    assert "def mean(values):" in result.stdout
    command = [sys.executable, str(ROOT / "training" / "evaluate.py"), "--model_name_or_path", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(result.stdout.splitlines()[-1])["nats_per_byte"] <= 1.5


def test_only_what_was_trained_is_uploaded(tmp_path, monkeypatch):
    """Whatever else lies in the folder, or is linked to from there."""
    uploads = []

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"user/{name}")

        def upload_folder(self, folder_path, allow_patterns, **_):
            names = [path.name for path in folder_path.iterdir()]
            uploads.extend(filter_repo_objects(names, allow_patterns=allow_patterns))

    monkeypatch.setattr(pretrain, "HfApi", Hub)
    (tmp_path / "key").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "LICENSE").symlink_to(tmp_path / "key")
    (folder / "notes.txt").write_text("mine")
    text = tmp_path / "text.txt"
    text.write_text("some text to learn from\n" * 100)
    small = ["--config_overrides", "hidden_size=16,num_hidden_layers=1", "--max_train_steps", "2", "--block_size", "16"]
    pretrain.main([*small, "--train_file", str(text), "--push_to_hub", "--output_dir", str(folder)])
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json", "loss.png"} <= set(uploads)
    assert not {"LICENSE", "notes.txt"} & set(uploads)
