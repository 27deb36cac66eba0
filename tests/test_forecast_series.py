# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Forecasting in small: fair selection, figures that the saved models confirm, resuming, reports, refusals."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForTimeSeriesPrediction, PatchTSTForPrediction

import compare_forecasts
import forecast_series
from forecast_data import Windows, named_series, read_series, split_series
from forecast_report import Results, read_run
from forecast_series import SeasonalNaive, best_period, main, make_model, measure, parse_args


SMALL = ["--context_length", "40", "--prediction_length", "8", "--num_train_epochs", "3", "--windows_per_epoch", "24"]
SMALL += ["--per_device_train_batch_size", "8"]
TINY = "hidden_size=16,num_hidden_layers=1,intermediate_size=16"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """400 steps of two channels with a period of 10."""
    time = np.arange(400)
    noise = np.random.default_rng(0).normal(size=(2, 400)) / 10
    columns = np.stack([np.sin(2 * np.pi * time / 10), 5 + time / 100 + np.cos(2 * np.pi * time / 10)]) + noise
    path = tmp_path_factory.mktemp("data") / "waves.csv"
    path.write_text("up,down\n" + "".join(f"{a},{b}\n" for a, b in columns.T))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_file):
    """Runs of three models: LrcSSM at two learning rates and with three seeds."""
    folder = tmp_path_factory.mktemp("runs")
    common = [*SMALL, "--data_file", data_file, "--output_dir", str(folder)]
    rates = ["--learning_rate", "1e-5", "1e-2", "--seeds", "0", "1", "2"]
    main([*common, "--config_overrides", TINY, *rates])
    main([*common, "--model", "patchtst", "--config_overrides", "d_model=8,ffn_dim=8"])
    main([*common, "--model", "seasonal-naive"])
    return folder


def test_the_best_learning_rate_is_chosen_by_validation_and_run_with_all_seeds(folder):
    runs = {path.parent.name for path in folder.glob("*/run.json")}
    assert runs == {
        "waves-8-lrcssm-1e-05-0",
        *(f"waves-8-lrcssm-0.01-{seed}" for seed in range(3)),
        "waves-8-patchtst-0.003-0",
        "waves-8-seasonal-naive",
    }
    poor, good = (read_run(folder / f"waves-8-lrcssm-{rate}-0")["validation_mse"] for rate in ("1e-05", "0.01"))
    assert good < poor
    chosen = Results.read(folder).runs["waves", 8]["lrcssm"]
    assert [(run["learning_rate"], run["seed"]) for run in chosen] == [(0.01, 0), (0.01, 1), (0.01, 2)]
    assert len({run["test"]["mse"] for run in chosen}) == 3


@pytest.mark.parametrize("name", ["waves-8-lrcssm-0.01-1", "waves-8-patchtst-0.003-0"])
def test_the_reported_errors_are_those_of_the_saved_model(name, folder, data_file):
    """Over all windows of the last fifth, standardised by the first 70%."""
    patchtst = "patchtst" in name
    kind = PatchTSTForPrediction if patchtst else AutoModelForTimeSeriesPrediction
    model = kind.from_pretrained(folder / name).eval()
    values = read_series(data_file).values
    values = torch.tensor((values - values[:280].mean(0)) / values[:280].std(0)).float()
    contexts = torch.stack([values[start - 40 : start] for start in range(320, 393)])
    truth = torch.stack([values[start : start + 8] for start in range(320, 393)])
    with torch.no_grad():
        made = model(past_values=contexts).prediction_outputs if patchtst else model.forecast(contexts, 8)
    run = read_run(folder / name)
    assert run["test"]["mse"] == pytest.approx((made - truth).square().mean().item(), rel=1e-4)
    assert run["test"]["mae"] == pytest.approx((made - truth).abs().mean().item(), rel=1e-4)
    assert run["test"]["mse_by_step"] == pytest.approx(
        (made - truth).square().mean((0, 2)).tolist(), rel=1e-3, abs=1e-6
    )
    first, middle, last = run["examples"]
    assert (first["start"], middle["start"], last["start"]) == (320, 356, 392)
    assert np.allclose(middle["truth"], truth[36], atol=1e-4) and np.allclose(
        middle["context"], contexts[36], atol=1e-4
    )
    assert np.allclose(middle["forecast"], made[36], atol=2e-4)
    in_units = np.array(run["series"]["mean"]) + np.array(run["series"]["std"]) * np.array(last["truth"])
    assert in_units == pytest.approx(read_series(data_file).values[392:], abs=1e-3)


def test_the_best_epoch_is_kept_and_the_run_describes_itself(folder):
    run = read_run(folder / "waves-8-lrcssm-0.01-0")
    scores = [epoch["score"] for epoch in run["history"]]
    assert run["validation_mse"] == -max(scores) and run["best_epoch"] == 1 + scores.index(max(scores))
    assert run["command"].startswith("accelerate launch training/forecast_series.py --context_length 40")
    model = AutoModelForTimeSeriesPrediction.from_pretrained(folder / "waves-8-lrcssm-0.01-0")
    assert run["parameters"] == model.num_parameters()


def test_the_report(folder):
    report = (folder / "results.md").read_text()
    best = min(Results.read(folder).summary(), key=lambda entry: np.mean(entry["mse"]))
    assert report.count("| waves | 8 |") == 3 and f"**{np.mean(best['mse']):.4f}**" in report
    deviation = np.std([read_run(folder / f"waves-8-lrcssm-0.01-{seed}")["test"]["mse"] for seed in range(3)], ddof=1)
    assert f"± {deviation:.4f}" in report
    for name in ("errors.png", "forecast_waves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("partial-*"))


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(folder, data_file, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(forecast_series, "fit", refuse)
    common = [*SMALL, "--data_file", data_file, "--output_dir", str(folder), "--learning_rate", "1e-5", "1e-2"]
    main([*common, "--config_overrides", TINY, "--seeds", "0", "2"])
    assert "| waves | 8 |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*common, "--config_overrides", "hidden_size=8"])
    assert ended.value.code == 2
    assert f"was run with config_overrides '{TINY}', not 'hidden_size=8'" in capsys.readouterr().err
    # Of which the folder's name has six digits only.
    with pytest.raises(SystemExit) as ended:
        main([*common[:-3], "--learning_rate", "0.01000000001", "--config_overrides", TINY])
    assert ended.value.code == 2
    assert "was run with learning_rate 0.01, not 0.01000000001" in capsys.readouterr().err


def test_an_interrupted_run_is_made_again_and_is_the_same(folder, data_file, tmp_path):
    arguments = [*SMALL, "--data_file", data_file, "--output_dir", str(tmp_path), "--learning_rate", "1e-2"]
    arguments += ["--config_overrides", TINY]
    main(arguments)
    (tmp_path / "waves-8-lrcssm-0.01-0" / "run.json").unlink()
    main(arguments)
    again, first = (read_run(path / "waves-8-lrcssm-0.01-0") for path in (tmp_path, folder))
    assert again["test"] == first["test"] and again["history"] == first["history"]


def test_quantiles_make_a_fan(data_file, tmp_path):
    quantiles = ["--quantiles", "0.1", "0.5", "0.9", "--config_overrides", TINY]
    main([*SMALL, *quantiles, "--data_file", data_file, "--output_dir", str(tmp_path), "--learning_rate", "1e-2"])
    run = read_run(tmp_path / "waves-8-lrcssm-0.01-0")
    forecasts = np.array([example["forecast"] for example in run["examples"]])
    truth = np.array([example["truth"] for example in run["examples"]])
    assert forecasts.shape == (3, 8, 2, 3)
    # The point forecast, by which the run is judged, is the median.
    model = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "waves-8-lrcssm-0.01-0")
    assert model.config.quantiles == [0.1, 0.5, 0.9]
    split = split_series(read_series(data_file), 40, 8)
    loader = DataLoader(split.test, batch_size=50)
    median = measure(lambda inputs: model.eval().forecast(inputs, 8)[..., 1], loader, Accelerator())
    assert median.mse == pytest.approx(run["test"]["mse"], rel=1e-5)
    assert ((truth > forecasts[..., 0]) & (truth < forecasts[..., 2])).any()
    assert (tmp_path / "forecast_waves.png").stat().st_size > 10_000


def test_seasonal_naive_finds_the_period_and_repeats_it():
    values = torch.sin(2 * torch.pi * torch.arange(300.0) / 7).unsqueeze(1)
    windows = Windows(values, range(40, 280), context_length=30, prediction_length=12)
    assert best_period(windows) % 7 == 0
    errors = measure(SeasonalNaive(7, 12), DataLoader(windows, batch_size=64), Accelerator())
    assert errors.mse < 1e-9 and errors.mae < 1e-4
    inputs = torch.arange(10.0).view(1, 10, 1)
    assert SeasonalNaive(3, 7)(inputs).flatten().tolist() == [7, 8, 9, 7, 8, 9, 7]
    assert SeasonalNaive(10, 3)(inputs).flatten().tolist() == [0, 1, 2]


def test_errors_count_every_window_alike_whatever_the_batches():
    values = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    windows = Windows(values, range(10, 55), context_length=10, prediction_length=5)
    truth = torch.stack([row["future_values"] for row in windows]).double()
    for batch_size in (1, 7, 45):
        loader = DataLoader(windows, batch_size=batch_size)
        errors = measure(lambda inputs: torch.zeros(len(inputs), 5, 3), loader, Accelerator())
        assert errors.mse == pytest.approx(truth.square().mean().item())
        assert errors.mae == pytest.approx(truth.abs().mean().item())
        assert errors.mse_by_step == pytest.approx(truth.square().mean((0, 2)).tolist(), abs=1e-6)


@pytest.mark.parametrize("model", ["lrcssm", "lru", "s5", "mamba", "gru", "patchtst"])
def test_models_have_as_many_parameters_as_ours_and_learn(model, data_file):
    args = parse_args(["--model", model, "--context_length", "96", "--prediction_length", "24"])
    torch.manual_seed(0)
    ours, made = make_model(parse_args(["--prediction_length", "24"]), 2), make_model(args, 2)
    assert made.num_parameters() == pytest.approx(ours.num_parameters(), rel=0.1)
    inputs, futures = torch.randn(3, 96, 2), torch.randn(3, 24, 2)
    names = ("past_values" if model == "patchtst" else "input_values", "future_values")
    optimizer = torch.optim.Adam(made.parameters(), 3e-3)
    losses = []
    for _ in range(8):
        losses.append(made(**dict(zip(names, (inputs, futures)))).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert forecast_series.forecaster(made.eval())(inputs).shape == (3, 24, 2)


def test_the_comparison_gives_all_models_the_same(tmp_path):
    pytest.importorskip("statsmodels")
    series = {"elnino": {"horizons": (4,), "context_length": 32, "scaling": None, "patch_length": 8}}
    budget = "--num_train_epochs 1 --learning_rate 2e-3 6e-3 --seeds 0 1"
    plans = compare_forecasts.plan(tmp_path, series, {"lrcssm": 8, "patchtst": 16, "seasonal-naive": 8}, budget)
    results = compare_forecasts.compare(plans)
    models = results.runs["elnino", 4]
    assert {model: len(runs) for model, runs in models.items()} == {"lrcssm": 2, "patchtst": 2, "seasonal-naive": 1}
    assert {run["settings"]["num_train_epochs"] for run in models["lrcssm"] + models["patchtst"]} == {1}
    for name in ("lrcssm", "patchtst"):
        config = json.loads((tmp_path / f"elnino-4-{name}-0.002-0" / "config.json").read_text())
        assert config["scaling"] is None and config["patch_length"] == (8 if name == "lrcssm" else 16)
    compare_forecasts.write(results, tmp_path / "results")
    entries = json.loads((tmp_path / "results" / "series_forecasting.json").read_text())
    assert [entry["model"] for entry in entries] == ["lrcssm", "patchtst", "seasonal-naive"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "forecast_errors.png",
        "forecast_elnino.png",
        "series_forecasting.json",
        "series_forecasting.md",
    }


def test_every_series_of_the_comparison_is_long_enough():
    for name, options in compare_forecasts.SERIES.items():
        pytest.importorskip({"seattle-temperature": "vega_datasets", "co2": "statsmodels"}.get(name, "scipy"))
        for horizon in options["horizons"]:
            split = split_series(named_series(name), options["context_length"], horizon)
            assert min(len(windows) for windows in split[:3]) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_file", "missing.csv"], "--data_file 'missing.csv' does not exist"),
        (["--data_file", "{data}", "--columns", "left"], "there is no column 'left', only 'up', 'down'"),
        (["--data_file", "{data}", "--columns", "up", "up"], "--columns: up is given twice"),
        (["--data_file", ""], "--data_file: must not be empty"),
        (["--dataset_name", "lorenz", "--columns", "x"], "--columns needs --data_file"),
        (["--dataset_name", "lorenz", "--data_file", "{data}"], "not allowed with"),
        (["--dataset_name", "nothing"], "invalid choice: 'nothing'"),
        (["--data_file", "{data}", "--prediction_length", "41"], "has 40 of its 400 steps"),
        (["--data_file", "{data}", "--context_length", "300"], "exceed the training part of waves, 280"),
        (["--data_file", "{data}", "--context_length", "0"], "--context_length: must be at least 1, got 0"),
        (["--data_file", "{data}", "--prediction_length", "-1"], "--prediction_length: must be at least 1, got -1"),
        (["--data_file", "{data}", "--learning_rate", "1e-3", "-1"], "--learning_rate: must be above 0, got -1"),
        (["--data_file", "{data}", "--learning_rate", "inf"], "--learning_rate: must be a finite number, got inf"),
        (["--data_file", "{data}", "--weight_decay", "-1"], "--weight_decay: must be at least 0, got -1"),
        (["--data_file", "{data}", "--patience", "0"], "--patience: must be at least 1, got 0"),
        (["--data_file", "{data}", "--windows_per_epoch", "0"], "--windows_per_epoch: must be at least 1, got 0"),
        (["--data_file", "{data}", "--seeds", "-1"], "--seeds: must be at least 0, got -1"),
        (["--data_file", "{data}", "--seeds"], "--seeds: expected at least one argument"),
        (["--data_file", "{data}", "--quantiles", "0.5", "1"], "--quantiles: must be below 1, got 1"),
        (["--data_file", "{data}", "--config_overrides", "hidden_width=3"], "has no 'hidden_width'"),
        (["--data_file", "{data}", "--config_overrides", "hidden_size=-3"], "hidden_size"),
        (["--data_file", "{data}", "--model", "patchtst", "--context_length", "16"], "patch length"),
        (["--data_file", "{data}", "--model", "patchtst", "--quantiles", "0.5"], "patchtst does not forecast them"),
        (["--data_file", "{data}", "--quantiles", "0.9", "0.1"], "`quantiles` must be ascending"),
        (["--data_file", "{data}", "--output_dir", "{data}/below"], "--output_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_one_clear_message_before_training(arguments, message, data_file, tmp_path, capsys):
    arguments = [argument.format(data=data_file) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--output_dir", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("error: ") == 1 and not output.out, output
    assert "Traceback" not in output.err and not list(tmp_path.rglob("run.json"))


def test_a_broken_record_is_named_before_training(data_file, tmp_path, monkeypatch, capsys):
    """Of whichever model's run, as all are in the report."""
    monkeypatch.setattr(forecast_series, "fit", None)
    (tmp_path / "waves-8-gru-0.003-0").mkdir()
    (tmp_path / "waves-8-gru-0.003-0" / "run.json").write_text('{"model": "gru", "settings"')
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--data_file", data_file, "--output_dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "waves-8-gru-0.003-0/run.json is not the record of a run: " in error


def test_what_is_a_channel_and_what_is_not_is_printed(data_file, tmp_path, monkeypatch, capsys):
    """And a series far from zero, whose differences float32 does not hold, is forecast as the same one near it."""
    monkeypatch.setattr(forecast_series, "write_report", lambda folder: "")
    numbers = np.round(np.loadtxt(data_file, delimiter=",", skiprows=1), 4)
    mse = {}
    for origin in (0, 1e9):
        rows = [f"{i};calm;{a:.4f};{b:.4f}".replace(".", ",") for i, (a, b) in enumerate(numbers + origin)]
        rows[7] = "7;calm;?;" + rows[7].split(";")[-1]
        path = tmp_path / f"{origin:g}.csv"
        path.write_text("\n".join([";kind;up;down", *rows]))
        main([*SMALL, "--model", "seasonal-naive", "--data_file", str(path), "--output_dir", str(tmp_path / path.stem)])
        said = capsys.readouterr().out
        assert "Channels: up, down.\n" in said and "Read as missing: 1 '?'.\n" in said
        assert "Left out: column 1, rises by 1 with every row, as row numbers and times do.\n" in said
        assert "Left out: kind, text, such as 'calm'.\n" in said
        run = read_run(tmp_path / path.stem / f"{path.stem}-8-seasonal-naive")
        expected = numbers[:280, 1].mean() + origin
        assert run["series"]["mean"][1] == pytest.approx(expected, rel=0, abs=1e-9 + 1e-15 * origin)
        mse[origin] = run["test"]["mse"]
    assert mse[1e9] == pytest.approx(mse[0], rel=1e-4) and mse[0] < 0.2
