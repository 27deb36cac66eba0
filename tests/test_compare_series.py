# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The studies are of equal budget and size, and their tables say what the runs say."""

import json

import numpy as np
import pytest

import compare_series
from classify_series import PAPER_SEEDS, make_config, new_model, parse_args
from compare_series import STUDIES, Study, compare, make_arguments, mean_ranks, tables
from series_data import SeriesData


STUDY = Study(
    title="Three models",
    output="three",
    data_sets=("A", "B", "C"),
    arguments="--num_train_epochs 3",
    variants={"LrcSSM": "--model lrcssm", "GRU": "--model gru", "MiniRocket": "--model minirocket"},
    diagram="ranks.png",
    seeds=(1, 2),
)
# By data set and model, the test accuracies of the two seeds.
ACCURACIES = {
    ("A", "lrcssm"): (0.9, 0.8), ("A", "gru"): (0.7, 0.7), ("A", "minirocket"): (0.5, 0.6),
    ("B", "lrcssm"): (0.6, 0.6), ("B", "gru"): (0.6, 0.6), ("B", "minirocket"): (1.0, 1.0),
    ("C", "lrcssm"): (0.3, 0.5), ("C", "gru"): (0.2, 0.4), ("C", "minirocket"): (0.9, 0.7),
}  # fmt: skip


def fake_run(arguments):
    """The record that classify_series.py would have made, with the accuracy above."""
    args = parse_args(arguments)
    (seed,) = args.seeds
    record = {"seed": seed, "test_accuracy": ACCURACIES[args.dataset_name, args.model][seed - 1], "seconds": 1.0}
    record["data"] = {"name": args.dataset_name, "train": 7, "validation": 2, "test": 2, "channels": 3}
    record["data"] |= {"steps": [5, 9], "classes": ["a", "b"]}
    record |= {"hardware": {"device": "CPU", "threads": 1}, "versions": {"torch": "2"}, "command": " ".join(arguments)}
    if args.model != "minirocket":
        record |= {"parameters": 1000, "seconds_per_epoch": 0.25 * seed}
    return record


def lines_of(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}


def test_the_tables_say_what_the_runs_say(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_series, "run", fake_run)
    results = compare(STUDY, None, "runs", map, tmp_path)
    text = (tmp_path / "three.md").read_text()
    assert text == tables(json.loads((tmp_path / "three.json").read_text())) == tables(results)
    accuracy, cost = text.split("Seconds per training epoch")
    lines = lines_of(accuracy)
    assert lines["A"] == "| A | **85.0 ± 7.1** | 70.0 ± 0.0 | 55.0 ± 7.1 |"
    assert lines["B"] == "| B | 60.0 ± 0.0 | 60.0 ± 0.0 | **100.0 ± 0.0** |"
    assert lines["mean"] == "| mean | 61.7 | 53.3 | 78.3 |"
    assert lines["mean rank"] == "| mean rank | 1.83 | 2.50 | 1.67 |"
    assert lines["mean rank of networks"] == "| mean rank of networks | 1.17 | 1.83 |  |"
    assert lines_of(cost)["A"] == "| A | 7 | 2 | 2 | 3 | 5 to 9 | 2 |"
    assert "| A | 0.38 | 0.38 |  |" in cost and "| thousand parameters (mean) | 1 | 1 |  |" in cost
    assert "![Mean ranks](ranks.png)" in text and (tmp_path / "ranks.png").stat().st_size > 5000


def test_gains_are_over_the_first_variant_on_the_same_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_series, "run", fake_run)
    study = STUDY._replace(diagram=None, variants={"GRU": "--model gru", "LrcSSM": "--model lrcssm"})
    text = tables(compare(study, None, "runs", map, tmp_path))
    lines = lines_of(text.split("Gain over 'GRU'")[1].split("Seconds")[0])
    assert (
        lines["A"] == "| A | 15.0 ± 7.1 |" and lines["C"] == "| C | 10.0 ± 0.0 |" and lines["mean"] == "| mean | +8.3 |"
    )
    assert not (tmp_path / "ranks.png").exists()


def test_ranks_of_equals_are_shared():
    assert mean_ranks(np.array([[0.9, 0.9, 0.5], [0.1, 0.2, 0.3]])).tolist() == [2.25, 1.75, 2.0]


def test_a_file_in_the_data_folder_comes_before_aeon(tmp_path):
    (tmp_path / "B.npz").touch()
    for data_set, source in (("A", ["--dataset_name", "A"]), ("B", ["--data_file", str(tmp_path / "B.npz")])):
        arguments = make_arguments(STUDY, data_set, "GRU", 2, str(tmp_path), "runs")
        assert arguments[:2] == source
        assert arguments[2:] == [
            "--num_train_epochs", "3", "--model", "gru", "--seeds", "2", "--output_dir", f"runs/three-gru/{data_set}"
        ]  # fmt: skip


def test_a_study_of_real_runs_goes_on_where_it_was(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    labels = np.arange(30) % 2
    for name in ("A", "B"):
        np.savez(tmp_path / f"{name}.npz", X=random.standard_normal((30, 8, 1)) + labels[:, None, None], y=labels)
    tiny = "--num_train_epochs 2 --config_overrides hidden_size=8,num_hidden_layers=1"
    variants = {"from scratch": "", "self-pretrained": "--self_pretrain --num_pretrain_epochs 1"}
    study = STUDY._replace(data_sets=("A", "B"), arguments=tiny, variants=variants, diagram=None)
    first = compare(study, str(tmp_path), str(tmp_path / "runs"), map, tmp_path)
    assert [run["seed"] for run in first["runs"]["B"]["self-pretrained"]] == [1, 2]
    monkeypatch.setattr("classify_series.train_network", None)
    assert compare(study, str(tmp_path), str(tmp_path / "runs"), map, tmp_path) == first


@pytest.mark.parametrize(("channels", "steps", "classes"), [(1, 24, 2), (12, 29, 9), (3, 1751, 4)])
def test_the_networks_are_of_equal_size(channels, steps, classes):
    series, labels = [np.zeros((steps, channels), np.float32)], np.zeros(1)
    data = SeriesData("made", series, labels, [str(i) for i in range(classes)])
    sizes = []
    for variant in STUDIES["models"].variants:
        args = parse_args(make_arguments(STUDIES["models"], "made", variant, PAPER_SEEDS[0], None, "runs"))
        if args.model != "minirocket":
            sizes.append(new_model(args.model, make_config(args, data)).num_parameters())
    assert len(sizes) == 7 and max(sizes) < 1.1 * sizes[0] and min(sizes) > 0.9 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_processes", "0"], "--num_processes: must be at least 1, got 0"),
        (["--data_dir", "missing"], "--data_dir 'missing' is no folder"),
        (["--data_dir", ""], "--data_dir: must not be empty"),
        (["--runs_dir", ""], "--runs_dir: must not be empty"),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        compare_series.main(["models", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_variants_of_a_study_differ_in_what_they_say_only():
    for study in STUDIES.values():
        common = None
        for variant in study.variants:
            args = vars(parse_args(make_arguments(study, "BasicMotions", variant, 1, None, "runs")))
            for name in ("model", "config_overrides", "self_pretrain", "output_dir"):
                del args[name]
            common = common or args
            assert args == common
