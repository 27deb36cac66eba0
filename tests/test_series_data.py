# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Labelled series are read as they are, split without leaks, and refused where they cannot be trained on."""

import argparse

import numpy as np
import pytest
import torch

from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification
from series_data import SeriesData, channel_statistics, check, collate, load_archive, load_npz, load_series, make_rows
from series_data import split as split_series


def make_data(counts=(20, 20), steps=(9, 12), channels=2, seed=0, **changes):
    """A set with `counts` series of each class, of lengths from `steps[0]` to `steps[1]`."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    lengths = random.integers(steps[0], steps[1] + 1, len(labels))
    series = [random.standard_normal((length, channels)).astype(np.float32) for length in lengths]
    data = SeriesData("made", series, labels, [f"class {i}" for i in range(len(counts))])
    return data._replace(**changes)


def write_npz(folder, **arrays):
    file = folder / "made.npz"
    np.savez(file, **arrays)
    return str(file)


def test_an_archive_set_is_all_of_aeons_with_the_channels_last():
    data = load_archive("BasicMotions")
    assert data.classes == ["badminton", "running", "standing", "walking"] and data.channels == 6
    assert data.lengths == (100, 100) and np.bincount(data.labels).tolist() == [20, 20, 20, 20]
    from aeon.datasets import load_classification

    series, labels = load_classification("BasicMotions")
    np.testing.assert_array_equal(data.series[7], series[7].T.astype(np.float32))
    assert data.classes[data.labels[7]] == labels[7]
    check(data, missing_values=False)


def test_an_archive_set_of_unequal_lengths():
    data = load_archive("JapaneseVowels")
    assert len(data.series) == 640 and data.lengths == (7, 29) and data.channels == 12 and len(data.classes) == 9


def test_npz_with_lengths_and_times(tmp_path):
    values = np.arange(24.0).reshape(2, 4, 3)
    deltas = np.full((2, 4), 0.5)
    file = write_npz(tmp_path, X=values, y=["up", "down"], lengths=[4, 3], time_deltas=deltas)
    data = load_npz(file)
    assert data.name == "made" and data.classes == ["down", "up"] and data.labels.tolist() == [1, 0]
    assert [len(x) for x in data.series] == [4, 3] == [len(d) for d in data.time_deltas]
    np.testing.assert_array_equal(data.series[1], values[1, :3])
    assert data.series[0].dtype == np.float32


X, Y = np.zeros((3, 4, 2)), np.arange(3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X}, "no array 'y', only X"),
        ({"X": X[0], "y": Y}, r"`X` must be numbers of shape \(series, steps, channels\), got float64 \(4, 2\)"),
        ({"X": X.astype(str), "y": Y}, "`X` must be numbers"),
        ({"X": X, "y": Y[:2]}, r"`y` must be 3 classes, whole numbers or text, got int64 \(2,\)"),
        ({"X": X, "y": Y / 2}, "`y` must be 3 classes, whole numbers or text, got float64"),
        ({"X": X, "y": Y, "lengths": [4, 4, 5]}, "`lengths` must be 3 whole numbers from 0 to 4"),
        ({"X": X, "y": Y, "time_deltas": np.ones(4)}, r"`time_deltas` must be numbers of shape \(3, 4\)"),
        ({"X": X, "y": np.array([{}, 1, "a"])}, "not a readable .npz file of plain arrays"),
    ],
)
def test_what_is_wrong_with_an_npz_file_is_said(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load_npz(write_npz(tmp_path, **arrays))


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "single array"])
def test_a_broken_npz_file_is_named(tmp_path, damage):
    file = tmp_path / "made.npz"
    if damage == "text":
        file.write_text("X,y\n1,2\n")
    elif damage == "cut":
        np.savez(file, X=X, y=Y)
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "single array":
        with file.open("wb") as stream:
            np.save(stream, X)
    with pytest.raises(ValueError, match=r"--data_file '.*made.npz' is not a readable .npz file"):
        load_npz(str(file))


def test_a_name_that_aeon_does_not_know():
    with pytest.raises(ValueError, match="--dataset_name 'NoSuchSet' cannot be loaded; is the name right"):
        load_archive("NoSuchSet")


def test_a_set_that_cannot_be_downloaded(monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr("aeon.datasets.load_classification", offline)
    with pytest.raises(ValueError, match="'Heartbeat' cannot be loaded; .* a network to download it.*no route to host"):
        load_archive("Heartbeat")


def with_value(value):
    data = make_data()
    data.series[3][2, 1] = value
    return data


def with_last(series):
    return make_data(series=[*make_data().series[:-1], series])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_value(np.nan), "Series 3 of made holds NaN; if they are missing values, pass --missing_values"),
        (with_value(np.inf), "Series 3 of made holds infinite values"),
        (make_data(series=[], labels=np.array([])), "made has no series"),
        (make_data((40,)), "All 40 series of made are of class 'class 0'"),
        (make_data((30, 6)), "Class 'class 1' of made has 6 series; at least 7 are needed"),
        (make_data(series=[*make_data().series[:-1], np.zeros((0, 2))]), "Series 39 of made has length 0"),
        (
            make_data(series=[*make_data().series[:-1], np.zeros((5, 3))]),
            "Series 39 of made has 3 channels, the first 2",
        ),
        (make_data(time_deltas=[np.full(len(x), -1.0) for x in make_data().series]), "`time_deltas` of series 0"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        check(data, missing_values=False)


def test_missing_values_can_be_declared(tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 5, 2))
    values[4, 2, 1] = np.nan
    args = argparse.Namespace(dataset_name=None, data_file=write_npz(tmp_path, X=values, y=np.arange(20) % 2))
    with pytest.raises(ValueError, match="Series 4 of made holds NaN"):
        load_series(argparse.Namespace(**vars(args), missing_values=False))
    assert len(load_series(argparse.Namespace(**vars(args), missing_values=True)).series) == 20


@pytest.mark.parametrize("counts", [(20, 40, 60), (7, 7), (7, 100)])
def test_splits_share_out_every_class(counts):
    data = make_data(counts)
    parts = split_series(data, 2345)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(sum(counts)))
    for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        for found, count in zip(np.bincount(data.labels[parts[name]], minlength=len(counts)), counts):
            assert found >= 1 and abs(found - share * count) < 1.5
    again, other = split_series(data, 2345), split_series(data, 3456)
    assert all((parts[name] == again[name]).all() for name in parts)
    assert set(parts["test"]) != set(other["test"])


def test_statistics_are_of_the_observed_values():
    one = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, np.nan]], np.float32)
    mean, deviation = channel_statistics([one, np.array([[5.0, 5.0, 6.0]], np.float32)])
    np.testing.assert_allclose(mean, [3, 5, 4])
    np.testing.assert_allclose(deviation, [np.sqrt(8 / 3), 1, 2], rtol=1e-6)


def test_rows_are_normalised_with_the_given_statistics():
    data = make_data()
    (row,) = make_rows(data, np.array([25]), np.array([1.0, 2.0], np.float32), np.array([2.0, 4.0], np.float32))
    np.testing.assert_allclose(row["input_values"], (data.series[25] - [1, 2]) / [2, 4], rtol=1e-5)
    assert row["labels"] == 1


def rows_of(data, indices):
    return make_rows(data, np.array(indices), np.zeros(2, np.float32), np.ones(2, np.float32))


def test_a_batch_of_equal_lengths_needs_no_mask():
    batch = collate(rows_of(make_data(steps=(9, 9)), [0, 1, 39]))
    assert set(batch) == {"input_values", "labels"}
    assert batch["input_values"].shape == (3, 9, 2) and batch["labels"].tolist() == [0, 0, 1]


def test_unequal_lengths_missing_values_and_times_are_said():
    data = make_data(series=[np.ones((length, 2), np.float32) for length in range(1, 41)])
    data.series[1][0, 1] = np.nan
    data = data._replace(time_deltas=[np.full(len(x), 0.5, np.float32) for x in data.series])
    batch = collate(rows_of(data, [0, 1, 2]))
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["observed_mask"].sum() == 17 and not batch["observed_mask"][1, 0, 1]
    assert batch["input_values"].isfinite().all()
    assert batch["time_deltas"].tolist() == [[0.5, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0.5]]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"patch_length": 4, "pooling": "attention"}])
def test_a_padded_batch_gives_what_each_series_gives_alone(options):
    data = make_data(steps=(5, 20))
    data.series[1][2, 0] = np.nan
    torch.manual_seed(0)
    config = LrcSSMConfig(num_channels=2, num_labels=2, hidden_size=16, num_hidden_layers=2, **options)
    model = LrcSSMForSequenceClassification(config).eval()
    rows = rows_of(data, range(6))
    with torch.no_grad():
        together = model(**collate(rows)).logits
        alone = torch.cat([model(**collate([row])).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
