# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Labelled series are read as they are, split without leaks, and refused where they cannot be trained on."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification
from series_data import (
    SeriesData,
    channel_moments,
    channel_statistics,
    check,
    check_time_unit,
    collate,
    load_archive,
    load_npz,
    load_series,
    make_rows,
)
from series_data import split as split_series


def make_data(counts=(20, 20), steps=(9, 12), channels=2, seed=0, **changes):
    """A set with `counts` series of each class, of lengths from `steps[0]` to `steps[1]`."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    lengths = random.integers(steps[0], steps[1] + 1, len(labels))
    series = [random.standard_normal((length, channels)) for length in lengths]
    data = SeriesData("made", series, labels, [f"class {i}" for i in range(len(counts))])
    return data._replace(**changes)


def write_npz(folder, **arrays):
    file = folder / "made.npz"
    np.savez(file, **arrays)
    return str(file)


def test_an_archive_set_is_all_of_aeons_with_the_channels_last():
    pytest.importorskip("aeon")
    data = load_archive("BasicMotions")
    assert data.classes == ["badminton", "running", "standing", "walking"] and data.channels == 6
    assert data.lengths == (100, 100) and np.bincount(data.labels).tolist() == [20, 20, 20, 20]
    from aeon.datasets import load_classification

    series, labels = load_classification("BasicMotions")
    assert data.series[7].dtype == np.float64
    np.testing.assert_array_equal(data.series[7], series[7].T)
    assert data.classes[data.labels[7]] == labels[7]
    check(data, missing_values=False)


def test_an_archive_set_of_unequal_lengths():
    pytest.importorskip("aeon")
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


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint16, np.int64, np.bool_])
def test_npz_of_any_numbers_is_float64_of_the_same(dtype, tmp_path):
    values = np.random.default_rng(0).integers(2, size=(3, 4, 2)).astype(dtype)
    data = load_npz(write_npz(tmp_path, X=values, y=Y, time_deltas=np.ones((3, 4), np.float16)))
    assert data.series[0].dtype == data.time_deltas[0].dtype == np.float64
    np.testing.assert_array_equal(np.stack(data.series), values)


@pytest.mark.parametrize(
    "y", [np.array(["läuft", "ruht", "läuft"]), np.array([b"l\xc3\xa4uft", b"ruht", b"l\xc3\xa4uft"])]
)
def test_class_names_in_bytes_are_text(y, tmp_path):
    data = load_npz(write_npz(tmp_path, X=X, y=y))
    assert data.classes == ["läuft", "ruht"] and data.labels.tolist() == [0, 1, 0]


def test_a_file_may_have_any_name(tmp_path):
    Path(write_npz(tmp_path, X=X, y=Y)).rename(tmp_path / "series of 2020.data")
    data = load_npz(str(tmp_path / "series of 2020.data"))
    assert data.name == "series of 2020" and data.classes == ["0", "1", "2"]


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
        ({"X": X.astype(complex), "y": Y}, "`X` must be numbers .* got complex128"),
        ({"X": X.astype("datetime64[s]"), "y": Y}, "`X` must be numbers .* got datetime64"),
        ({"X": X, "y": Y, "lengths": [4.0, 4, 4]}, "`lengths` must be 3 whole numbers"),
        ({"X": X, "y": Y, "length": [4, 4, 3]}, "arrays length, and only X, y, lengths and time_deltas are read"),
        ({"X": X, "y": np.array([b"ok", b"r\xe4uft", b"ok"])}, r"class b'r\\xe4uft', which is not UTF-8"),
        ({"X": np.full((3, 4, 2), 2**60 + 1), "y": Y}, "`X` holds 1152921504606846977, which float64 rounds to"),
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
    pytest.importorskip("aeon")
    with pytest.raises(ValueError, match="--dataset_name 'NoSuchSet' cannot be loaded; is the name right"):
        load_archive("NoSuchSet")


def test_a_set_that_cannot_be_downloaded(monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    pytest.importorskip("aeon")
    monkeypatch.setattr("aeon.datasets.load_classification", offline)
    with pytest.raises(ValueError, match="'Heartbeat' cannot be loaded; .* a network to download it.*no route to host"):
        load_archive("Heartbeat")


def with_value(value):
    data = make_data()
    data.series[3][2, 1] = value
    return data


def with_times(step, value):
    deltas = [np.ones(len(x)) for x in make_data().series]
    deltas[0][step] = value
    return make_data(time_deltas=deltas)


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
        (with_times(4, np.nan), r"`time_deltas` of series 0 of made .* not negative, got nan \(step 4\)"),
        (with_times(2, np.inf), r"`time_deltas` of series 0 of made .* not negative, got inf \(step 2\)"),
        (make_data(series=[np.zeros((5, 0))] * 40), "have no channels"),
        (make_data(classes=["run", "run "]), "The classes 'run' and 'run ' of made look the same"),
        (make_data(classes=["\u00e9", "e\u0301"]), "look the same"),
        (make_data(classes=["run", " "]), "has the name ' '"),
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


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        (3600.0, "in units of the regular step; their median is 3600, .* above 5 .*Divide them by 3600"),
        (6.0, "their median is 6, and states grow without bound"),
        (1e-6, "their median is 1e-06, and in the longest series, which takes 1.2e-05 in all, .*Divide them by 1e-06"),
        (0.0, "are all 0"),
    ],
)
def test_times_in_another_unit_are_refused(deltas, message):
    data = make_data()
    data = data._replace(time_deltas=[np.full(len(x), deltas) for x in data.series])
    check(data, missing_values=False)
    with pytest.raises(ValueError, match=f"`time_deltas` of made.*{message}"):
        check_time_unit(data, 2.5)


@pytest.mark.parametrize("deltas", [1.0, 0.25, 4.9, [0, 1, 1, 1, 1, 1, 1, 1, 3600], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
def test_regular_steps_and_rare_gaps_are_times(deltas):
    data = make_data(steps=(9, 9))
    check_time_unit(data, 2.5)
    check_time_unit(data._replace(time_deltas=[np.broadcast_to(np.array(deltas, float), 9)] * 40), 2.5)


def test_statistics_are_of_the_observed_values():
    one = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, np.nan]])
    mean, deviation = channel_statistics([one, np.array([[5.0, 5.0, 6.0]])])
    np.testing.assert_allclose(mean, [3, 5, 4])
    np.testing.assert_allclose(deviation, [np.sqrt(8 / 3), 1, 2], rtol=1e-6)


@pytest.mark.parametrize("origin", [0.0, 1e9, -3e12])
def test_statistics_of_small_changes_far_from_zero(origin):
    """Of values that float64 holds, against whole numbers in Python; the first is far from all others."""
    numbers = np.random.default_rng(0).integers(-50, 50, 20_000)
    numbers[0] = 10_000
    mean, deviation = channel_moments((numbers + origin)[:, None].repeat(3, 1))
    variance = sum((20_000 * int(x) - int(numbers.sum())) ** 2 for x in numbers) / 20_000**3
    assert mean - origin == pytest.approx([numbers.mean()] * 3, rel=0, abs=1e-12 + np.spacing(abs(origin)))
    assert deviation == pytest.approx([variance**0.5] * 3, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9, 1e9 + 0.1, -1e-12, 1e200])
def test_a_constant_channel_has_no_deviation(value):
    mean, deviation = channel_moments(np.full((1001, 1), value))
    assert mean == pytest.approx(value) and deviation == 0
    values, statistics = np.full((1001, 1), value), channel_statistics([np.full((1001, 1), value)])
    assert np.abs((values - statistics[0]) / statistics[1]).max() <= 1e-15 * abs(value)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_a_channel_in_any_unit_is_normalised(unit):
    values = np.random.default_rng(0).normal(size=(100, 1))
    _, deviation = channel_moments(values * unit)
    assert deviation / unit == pytest.approx(values.std())


@pytest.mark.parametrize("origin", [1e9, -1e9, 2**40])
def test_rows_are_the_same_wherever_the_series_are(origin):
    """With differences of about 1, of which float32 would hold none."""
    data = make_data()
    numbers = [np.round(x * 100) for x in data.series]
    rows = {}
    for place in (0.0, origin):
        moved = data._replace(series=[x + place for x in numbers])
        mean, deviation = channel_statistics([moved.series[i] for i in range(28)])
        rows[place] = make_rows(moved, np.arange(40), mean, deviation)
    for here, there in zip(*rows.values()):
        assert here["input_values"].dtype == there["input_values"].dtype == torch.float32
        torch.testing.assert_close(here["input_values"], there["input_values"], rtol=0, atol=1e-6)
    assert len(torch.cat([row["input_values"] for row in rows[origin]]).unique()) > 150


def test_rows_are_normalised_with_the_given_statistics():
    data = make_data()
    (row,) = make_rows(data, np.array([25]), np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    np.testing.assert_allclose(row["input_values"], (data.series[25] - [1, 2]) / [2, 4], rtol=1e-5)
    assert row["labels"] == 1


def rows_of(data, indices):
    return make_rows(data, np.array(indices), np.zeros(2), np.ones(2))


def test_a_batch_of_equal_lengths_needs_no_mask():
    batch = collate(rows_of(make_data(steps=(9, 9)), [0, 1, 39]))
    assert set(batch) == {"input_values", "labels"}
    assert batch["input_values"].shape == (3, 9, 2) and batch["labels"].tolist() == [0, 0, 1]


def test_unequal_lengths_missing_values_and_times_are_said():
    data = make_data(series=[np.ones((length, 2)) for length in range(1, 41)])
    data.series[1][0, 1] = np.nan
    data = data._replace(time_deltas=[np.full(len(x), 0.5) for x in data.series])
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
