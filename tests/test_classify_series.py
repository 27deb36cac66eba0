# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The classifier learns, chooses by validation alone, tests once, and does not do again what is done."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification
from transformers.utils import ModelOutput

import classify_series
from classify_series import PAPER_SEEDS, MaskedSpans, main, make_config, parse_args, pretrain_trunk
from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification
from series_data import load_npz, split
from series_training import SCHEDULES, FitResult, fit


ROOT = Path(__file__).resolve().parents[1]
TINY = ["--config_overrides", "hidden_size=8,num_hidden_layers=1,intermediate_size=8"]
TINY += ["--num_train_epochs", "8", "--learning_rate", "3e-2"]


def write_waves(folder, steps=12, count=60, **changes):
    """Two classes, rising and falling series in two channels of different scale, with noise."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    slope = np.linspace(-1, 1, steps) * np.where(labels, 1, -1)[:, None]
    values = (slope[..., None] + 0.3 * random.standard_normal((count, steps, 2))) * [1, 100] + [5, 0]
    file = folder / "waves.npz"
    np.savez(file, **{"X": values, "y": np.array(["falling", "rising"])[labels], **changes})
    return file


def classify(folder, *arguments):
    """Runs the script's `main` on the waves of a folder; returns the records of its runs by their seed."""
    main(["--data_file", str(folder / "waves.npz"), *TINY, "--output_dir", str(folder / "run"), *arguments])
    return read(folder)


def read(folder):
    return {int(path.stem[5:]): json.loads(path.read_text()) for path in (folder / "run").glob("seed-*.json")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with waves and two finished runs, and their records."""
    folder = tmp_path_factory.mktemp("trained")
    write_waves(folder)
    return folder, classify(folder, "--seeds", "1", "2")


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that folder."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_says_everything_there_is_to_say(trained):
    folder, runs = trained
    assert set(runs) == {1, 2}
    for run in runs.values():
        assert run["test_accuracy"] >= 0.8 and np.sum(run["confusion"]) == 9
        assert np.trace(run["confusion"]) / 9 == pytest.approx(run["test_accuracy"])
        best = run["history"][run["best_epoch"] - 1]
        assert best["validation_accuracy"] == max(epoch["validation_accuracy"] for epoch in run["history"])
        assert run["validation_accuracy"] == best["validation_accuracy"]
        assert run["data"] | {"classes": None} == {
            "name": "waves", "train": 42, "validation": 9, "test": 9, "channels": 2, "steps": [12, 12], "classes": None
        }  # fmt: skip
        assert run["seconds_per_epoch"] > 0 and run["hardware"]["processes"] == 1 and run["versions"]["torch"]
        assert run["command"].startswith("accelerate launch training/classify_series.py --data_file")
    text = (folder / "run" / "results.md").read_text()
    assert f"| 1 | {100 * runs[1]['validation_accuracy']:.1f} | {100 * runs[1]['test_accuracy']:.1f} |" in text
    mean = 50 * (runs[1]["test_accuracy"] + runs[2]["test_accuracy"])
    assert f"{mean:.1f} ± " in text and f"{runs[1]['parameters']:,} parameters" in text
    for name in ("confusion.png", "learning_curves.png"):
        assert f"({name})" in text and (folder / "run" / name).stat().st_size > 5000


def test_the_saved_model_is_the_best_runs_and_gives_its_test_accuracy(trained):
    folder, runs = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run")
    assert model.config.id2label == {0: "falling", 1: "rising"} and model.config.label2id["rising"] == 1
    best = max(runs.values(), key=lambda run: (run["validation_accuracy"], -run["validation_loss"]))
    data = load_npz(folder / "waves.npz")
    mean, deviation = np.array(model.config.channel_mean), np.array(model.config.channel_deviation)
    values = torch.from_numpy((np.stack(data.series) - mean) / deviation).float()
    parts = split(data, best["seed"])
    # The other channel's scale is a hundred times larger, and it is all the same to the model.
    assert values[parts["train"]].std((0, 1)).tolist() == pytest.approx([1, 1], abs=0.01)
    for part in ("validation", "test"):
        predictions = model(input_values=values[parts[part]]).logits.argmax(-1).numpy()
        assert (predictions == data.labels[parts[part]]).mean() == pytest.approx(best[f"{part}_accuracy"])


def test_a_finished_run_is_not_run_again(finished, trained, monkeypatch, capsys):
    seeds = []
    train = classify_series.train_network
    monkeypatch.setattr(classify_series, "train_network", lambda *a: seeds.append(a[3]) or train(*a))
    assert classify(finished, "--seeds", "1", "2") == trained[1] and seeds == []
    assert f"| 1 | {100 * trained[1][1]['validation_accuracy']:.1f} |" in capsys.readouterr().out
    assert classify(finished, "--seeds", "2", "3")[2] == trained[1][2] and seeds == [3]


def test_an_interrupted_run_gives_the_same_when_it_is_repeated(finished, trained):
    def without_times(run):
        return {name: value for name, value in run.items() if not name.startswith("seconds") and name != "command"}

    (finished / "run" / "seed-2.json").unlink()
    assert without_times(classify(finished, "--seeds", "2")[2]) == without_times(trained[1][2])


@pytest.mark.parametrize("change", [["--patience", "3"], ["--model", "gru"], ["--learning_rate", "1e-3"]])
def test_other_settings_are_refused_in_the_same_folder(finished, change, capsys):
    with pytest.raises(SystemExit) as exit:
        classify(finished, "--seeds", "7", *change)
    assert exit.value.code == 2
    assert f"is a run with {change[0][2:]}=" in (error := capsys.readouterr().err) and "another --output_dir" in error


def test_other_data_are_refused_in_the_same_folder(finished, capsys):
    write_waves(finished, count=62)
    with pytest.raises(SystemExit):
        classify(finished)
    assert "is a run with data_sha256=" in capsys.readouterr().err


def test_validation_chooses_the_learning_rate(tmp_path, monkeypatch):
    """And of two with equal accuracy, the one with less loss; the test series are not looked at."""
    write_waves(tmp_path)
    scores = {1e-3: (0.7, -0.1), 1e-2: (0.9, -0.5), 1e-1: (0.9, -0.4), 1.0: (0.8, -0.2)}

    def fake_fit(model, loaders, accelerator, *, learning_rate, **options):
        with torch.no_grad():
            model.score.bias.fill_(learning_rate)
        history = [{"epoch": 1, "train_loss": 1.0, "score": scores[learning_rate]}]
        return FitResult(1, scores[learning_rate], history, 0.1)

    monkeypatch.setattr(classify_series, "fit", fake_fit)
    run = classify(tmp_path, "--learning_rate", "1e-3", "1e-2", "1e-1", "1")[PAPER_SEEDS[0]]
    assert run["learning_rate"] == 0.1 and run["validation_accuracy"] == 0.9 and run["validation_loss"] == 0.4
    assert run["validation_accuracy_by_learning_rate"] == {"0.001": 0.7, "0.01": 0.9, "0.1": 0.9, "1": 0.8}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.score.bias.tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("model", ["lrcssm-paper", "lru", "transformer"])
def test_every_kind_of_network_trains_and_pretrains(model, tmp_path):
    write_waves(tmp_path)
    (run,) = classify(tmp_path, "--model", model, "--self_pretrain", "--num_pretrain_epochs", "2").values()
    assert len(run["pretraining"]) == 2 and run["history"][-1]["train_loss"] < run["history"][0]["train_loss"]
    assert run["config"].get("block_type", "gated") == ("paper" if model == "lrcssm-paper" else "gated")
    assert (tmp_path / "run" / "model.safetensors").exists() == (model == "lrcssm-paper")


def test_minirocket_has_the_same_splits(tmp_path):
    pytest.importorskip("aeon")
    write_waves(tmp_path)
    main(["--data_file", str(tmp_path / "waves.npz"), "--model", "minirocket", "--output_dir", str(tmp_path / "run")])
    (run,) = read(tmp_path).values()
    assert run["test_accuracy"] >= 0.8 and np.sum(run["confusion"]) == 9 and run["data"]["train"] == 42
    assert "| - | - | - |" in (tmp_path / "run" / "results.md").read_text()
    assert (tmp_path / "run" / "confusion.png").exists()


def test_unequal_lengths_missing_values_and_times(tmp_path):
    values = np.load(write_waves(tmp_path))["X"]
    values[3, 4, 1] = np.nan
    lengths = np.random.default_rng(0).integers(6, 13, len(values))
    lengths[5] = 1
    write_waves(tmp_path, X=values, lengths=lengths, time_deltas=np.full(values.shape[:2], 0.5))
    (run,) = classify(tmp_path, "--missing_values", "--self_pretrain", "--num_pretrain_epochs", "1").values()
    assert run["test_accuracy"] > 0.5 and run["data"]["steps"] == [1, 12]


def test_where_the_series_are_makes_no_difference(tmp_path, trained):
    """A hundred thousand million away, in float64, and with class names in bytes."""
    waves = np.load(trained[0] / "waves.npz")
    write_waves(tmp_path, X=np.round(waves["X"], 4) + 2.0**36, y=waves["y"].astype("S"))
    (tmp_path / "here").mkdir()
    write_waves(tmp_path / "here", X=np.round(waves["X"], 4), y=waves["y"])
    (there,), (here,) = (classify(folder, "--seeds", "1").values() for folder in (tmp_path, tmp_path / "here"))
    assert there["test_accuracy"] == here["test_accuracy"] >= 0.8
    assert there["validation_loss"] == pytest.approx(here["validation_loss"], rel=1e-2)
    config = LrcSSMConfig.from_pretrained(tmp_path / "run")
    assert config.id2label == {0: "falling", 1: "rising"} and there["data"]["classes"] == ["falling", "rising"]
    data = load_npz(tmp_path / "waves.npz")
    train = np.concatenate([data.series[i] for i in split(data, 1)["train"]])
    assert config.channel_mean == pytest.approx([math.fsum(x) / len(x) for x in train.T], rel=0, abs=2e-5)
    assert config.channel_deviation == pytest.approx(train.std(0), rel=1e-6)


def test_times_in_seconds_are_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify_series, "train_network", None)
    write_waves(tmp_path, time_deltas=np.full((60, 12), 3600))
    with pytest.raises(SystemExit) as exit:
        classify(tmp_path)
    assert exit.value.code == 2
    assert "error: `time_deltas` of waves must be in units of the regular step; their" in (
        error := capsys.readouterr().err
    )
    assert "Divide them by 3600" in error


@pytest.mark.parametrize("model", [["lru"], ["lrcssm-paper"], ["lrcssm", "--config_overrides", "block_type=paper"]])
def test_the_unit_of_times_is_that_of_the_gated_block_only(model, tmp_path, monkeypatch):
    class Trained(Exception):
        """Where training begins."""

    def train(*_):
        raise Trained

    monkeypatch.setattr(classify_series, "train_network", train)
    write_waves(tmp_path, time_deltas=np.full((60, 12), 3600))
    with pytest.raises(Trained):
        classify(tmp_path, "--model", *model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "seed-1.json is not the record of a run: "),
        (lambda text: "", "seed-1.json is not the record of a run: "),
        (lambda text: "[]", "seed-1.json is not the record of a run: it holds no names and values"),
        (lambda text: text.replace('"settings"', '"sittings"'), "it has no 'settings' of type dict"),
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "seed-1.json is the run with seed 2"),
    ],
)
def test_a_broken_record_is_named(damage, message, finished, capsys, monkeypatch):
    monkeypatch.setattr(classify_series, "train_network", None)
    record = finished / "run" / "seed-1.json"
    record.write_text(damage(record.read_text()))
    with pytest.raises(SystemExit) as exit:
        classify(finished, "--seeds", "1", "2")
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_file", "missing.npz"], "--data_file 'missing.npz' is not a readable .npz file"),
        (["--config_overrides", "num_channels=3"], "waves has 2 channels, not num_channels=3"),
        (["--config_overrides", "hidden_sise=3"], "has no 'hidden_sise'"),
        (["--config_overrides", "hidden_size=0"], "`hidden_size` must be at least 1"),
        (["--output_dir", "/proc/none"], "--output_dir '/proc/none' cannot be written"),
        (["--model", "minirocket"], "needs series of 9 steps, got 8"),
    ],
)
def test_bad_input_ends_before_training(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classify_series, "train_network", None)
    file = write_waves(tmp_path, steps=8)
    with pytest.raises(SystemExit) as exit:
        main(["--data_file", str(file), "--output_dir", str(tmp_path / "run"), *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not list(tmp_path.glob("run/*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "BasicMotions", "--data_file", "x.npz"], "not allowed with"),
        ([], "required"),
        (["--dataset_name", "X", "--patience", "0"], "--patience: must be at least 1, got 0"),
        (["--dataset_name", "X", "--learning_rate", "1e-3", "-1"], "--learning_rate: must be above 0, got -1"),
        (["--dataset_name", "X", "--learning_rate", "nan"], "--learning_rate: must be a finite number, got nan"),
        (["--dataset_name", "X", "--learning_rate", "1e-3", "0.001"], "--learning_rate: 0.001 is given twice"),
        (["--dataset_name", "X", "--weight_decay", "-1"], "--weight_decay: must be at least 0, got -1"),
        (["--dataset_name", "X", "--adam_beta2", "2"], "--adam_beta2: must be below 1, got 2"),
        (["--dataset_name", "X", "--num_train_epochs", "0"], "--num_train_epochs: must be at least 1, got 0"),
        (["--dataset_name", "X", "--num_pretrain_epochs", "-1"], "--num_pretrain_epochs: must be at least 1, got -1"),
        (["--dataset_name", "X", "--per_device_train_batch_size", "0"], "_batch_size: must be at least 1, got 0"),
        (["--dataset_name", "X", "--seeds", "-1"], "--seeds: must be at least 0, got -1"),
        (["--dataset_name", "X", "--seeds", "1", "1"], "--seeds: 1 is given twice"),
        (["--dataset_name", "X", "--seeds"], "--seeds: expected at least one argument"),
        (["--dataset_name", "X", "--lr_scheduler_type", "warmup_stable_decay"], "invalid choice"),
        (["--dataset_name", ""], "--dataset_name: must not be empty"),
        (["--data_file", ""], "--data_file: must not be empty"),
        (["--dataset_name", "X", "--output_dir", ""], "--output_dir: must not be empty"),
        (["--dataset_name", "X", "--model", "minirocket", "--self_pretrain"], "not for minirocket"),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert message in capsys.readouterr().err


def test_the_command_line(tmp_path):
    write_waves(tmp_path, X=np.full((60, 12, 2), np.nan))
    command = [sys.executable, str(ROOT / "training" / "classify_series.py"), "--data_file", "waves.npz"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "error: Series 0 of waves holds NaN" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_papers_protocol_is_a_preset(tmp_path):
    waves = write_waves(tmp_path)
    args = parse_args(["--data_file", str(waves), "--preset", "paper", "--per_device_train_batch_size", "32"])
    assert args.model == "lrcssm-paper" and args.per_device_train_batch_size == 32 and args.weight_decay == 0
    config = make_config(args, load_npz(waves))
    assert config.block_type == "paper" and config.num_hidden_layers == 6 and config.patch_length == 1
    assert config.hidden_size == config.state_size == 64 and config.pooling == "mean"


def test_long_series_are_read_several_steps_at_a_time(tmp_path):
    data = load_npz(write_waves(tmp_path, steps=301))
    for overrides, expected in (("hidden_size=8", 4), ("patch_length=2", 2)):
        args = parse_args(["--data_file", "waves.npz", "--config_overrides", overrides])
        assert make_config(args, data).patch_length == expected


# --- The loop ---


class Line(nn.Module):
    """y = w x, with the squared error as its loss."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return ModelOutput(loss=(self.weight * x - y).square().mean())


def fit_line(scores, patience, learning_rate=0.1, y=1.0, **options):
    """Fits with these scores in turn; returns the result, the model and its weight after each epoch."""
    model, weights, scores = Line(), [], iter(scores)
    loader = DataLoader([{"x": torch.ones(1), "y": torch.full((1,), y)}] * 4, batch_size=2)

    def score(model, loader):
        assert not model.training and not torch.is_grad_enabled()
        weights.append(model.weight.item())
        return next(scores)

    options |= {"learning_rate": learning_rate, "epochs": 5, "patience": patience, "score": score, "seed": 0}
    return fit(model, {"train": loader, "validation": loader}, Accelerator(cpu=True), **options), model, weights


def test_the_best_epochs_weights_are_kept():
    result, model, weights = fit_line([0.1, 0.5, 0.3, 0.5, 0.2], patience=10)
    assert result.best_epoch == 2 and result.best_score == 0.5 and model.weight.item() == weights[1] != weights[-1]
    assert [epoch["score"] for epoch in result.history] == [0.1, 0.5, 0.3, 0.5, 0.2]
    losses = [epoch["train_loss"] for epoch in result.history]
    assert losses == sorted(losses, reverse=True) and not model.training


def test_training_ends_when_patience_does():
    result, _, weights = fit_line([0.5, 0.4, 0.4, 0.6, 0.6], patience=2)
    assert len(result.history) == len(weights) == 3 and result.best_epoch == 1


def test_equal_scores_are_decided_by_the_next_number():
    assert fit_line([(0.5, -3.0), (0.5, -2.0), (0.4, -1.0), (0.5, -2.5), (0.5, -2.0)], 9)[0].best_epoch == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_trains(schedule):
    losses = [epoch["train_loss"] for epoch in fit_line([0.5] * 5, 9, lr_scheduler_type=schedule)[0].history]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_a_loss_that_is_not_finite_ends_training():
    with pytest.raises(ValueError, match=r"The loss is inf in the first epoch; lower --learning_rate \(1e\+30\)"):
        fit_line([0.5], patience=2, learning_rate=1e30)


@pytest.mark.parametrize(("y", "seen"), [(float("nan"), "`y` from nan to nan"), (1e30, "`y` from 1e+30 to 1e+30")])
def test_data_that_have_no_loss_are_not_blamed_on_the_learning_rate(y, seen):
    with pytest.raises(ValueError, match="loss of 2 batches is not finite before anything is learned") as refused:
        fit_line([0.5], patience=2, y=y)
    assert f"`x` from 1 to 1, {seen}." in str(refused.value) and "lower" not in str(refused.value)


# --- Self-pretraining ---


def spans(**options):
    torch.manual_seed(0)
    sizes = {"num_channels": 2, "num_labels": 3, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.1}
    config = LrcSSMConfig(**sizes, **options)
    classifier = LrcSSMForSequenceClassification(config)
    return classifier, MaskedSpans(classifier).eval()


@pytest.mark.parametrize("options", [{}, {"scaling": "std"}, {"patch_length": 4}])
def test_hidden_values_are_predicted_unseen(options):
    _, masked = spans(**options)
    values = torch.randn(5, 60, 2, generator=torch.Generator().manual_seed(1))
    hidden = masked.hide(5, 60, values.device)
    assert hidden.any(1).sum() >= 4 and 0.1 < hidden.float().mean() < 0.4
    predictions = []
    masked.model.register_forward_hook(lambda module, inputs, outputs: predictions.append(outputs.logits))
    labels = torch.zeros(5, dtype=torch.long)
    first = masked(values, labels).loss
    changed = torch.where(hidden.unsqueeze(-1), values + 1, values)
    second = masked(changed, labels).loss
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=0)
    assert first != second
    if "scaling" not in options:
        expected = (predictions[0] - values)[hidden].square().mean()
        torch.testing.assert_close(first, expected)


def test_padding_and_missing_values_are_no_targets():
    _, masked = spans()
    values = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(1))
    real = torch.arange(40) < torch.tensor([[40], [25]])
    observed = torch.rand(2, 40, 2, generator=torch.Generator().manual_seed(2)) < 0.8
    labels = torch.zeros(2, dtype=torch.long)
    expected = masked(values, labels, attention_mask=real.long(), observed_mask=observed).loss
    other = values.masked_fill(~(observed & real.unsqueeze(-1)), 7.0)
    assert masked(other, labels, attention_mask=real.long(), observed_mask=observed).loss == expected


def test_spans_change_in_training_only():
    _, masked = spans()
    assert masked.hide(8, 50, torch.device("cpu")).equal(masked.hide(8, 50, torch.device("cpu")))
    masked.train()
    assert not masked.hide(8, 50, torch.device("cpu")).equal(masked.hide(8, 50, torch.device("cpu")))


def test_pretraining_teaches_the_trunk_and_leaves_the_head():
    classifier, _ = spans()
    phase = torch.rand(24, 1, 1, generator=torch.Generator().manual_seed(0)) * 6
    values = torch.sin(torch.arange(30).view(1, -1, 1) / 3 + phase).expand(-1, -1, 2)
    rows = [{"input_values": x, "labels": 0} for x in values]
    loaders = {name: DataLoader(rows, batch_size=8) for name in ("train", "validation")}
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    args = parse_args(["--dataset_name", "X", "--num_pretrain_epochs", "25", "--learning_rate", "1e-2"])
    losses = [epoch["validation_loss"] for epoch in pretrain_trunk(classifier, loaders, Accelerator(cpu=True), args, 0)]
    assert min(losses) < 0.5 * losses[0]
    changed = {name for name, value in classifier.state_dict().items() if not value.equal(before[name])}
    assert changed and all(name.startswith("model.") for name in changed)
