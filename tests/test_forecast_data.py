# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Series are what they are said to be, and no window of a split sees what it should not."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

import forecast_data
from forecast_data import Series, named_series, read_series, split_series


def make_series(steps=200, channels=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(steps, channels)).cumsum(0)
    return Series("walk", values, [f"c{i}" for i in range(channels)], "step")


@pytest.mark.parametrize(
    ("name", "package", "shape", "missing", "season"),
    [
        ("seattle-temperature", "vega_datasets", (8760, 1), 1, 24),
        ("co2", "statsmodels", (2284, 1), 59, 52),
        ("elnino", "statsmodels", (732, 1), 0, 12),
        ("solar", "aeon", (289, 1), 0, 48),
        ("lorenz", "scipy", (10_000, 3), 0, None),
        ("mackey-glass", "scipy", (10_000, 1), 0, None),
    ],
)
def test_the_named_series(name, package, shape, missing, season):
    pytest.importorskip(package)
    series = named_series(name)
    assert (series.name, series.values.shape, series.missing) == (name, shape, missing)
    assert np.isfinite(series.values).all() and len(series.channels) == shape[1]
    if season is not None:  # the series is more like itself a season ago than half a season ago
        changes = [np.abs(series.values[lag:] - series.values[:-lag]).mean() for lag in (season, season // 2)]
        assert changes[0] < 0.7 * changes[1]


def test_lorenz_follows_its_equations():
    def derivative(_, u):
        return 10 * (u[1] - u[0]), u[0] * (28 - u[2]) - u[1], u[0] * u[1] - 8 / 3 * u[2]

    values = named_series("lorenz").values
    for start in (0, 4321):
        after = solve_ivp(derivative, (0, 1), values[start], rtol=1e-10, atol=1e-10).y[:, -1]
        assert after == pytest.approx(values[start + 100], abs=1e-5)
    assert not np.allclose(values[:50], forecast_data._lorenz(50, seed=1).values, atol=0.1)


def test_mackey_glass_follows_its_equation():
    """Against scipy, which solves the delay equation interval by interval, each driven by the one before."""
    start = 1.2 + 0.1 * np.random.default_rng(0).normal()
    past, solutions, x = (lambda t: start), [], start
    for interval in range(36):
        span = (17 * interval, 17 * (interval + 1))

        def derivative(t, x, past=past):
            delayed = past(t - 17)
            return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

        solution = solve_ivp(derivative, span, [x], "DOP853", rtol=1e-9, atol=1e-10, dense_output=True)
        past, x = (lambda t, at=solution.sol: at(t)[0]), solution.y[0, -1]
        solutions.append(solution.sol)
    values = forecast_data._mackey_glass(120).values[:, 0]
    # The first state of the integration is the last one of the constant past.
    times = (500 * 10 - 171) / 10 + np.arange(120)
    expected = [solutions[int(t // 17)](t)[0] for t in times]
    assert values == pytest.approx(expected, abs=1e-3)  # errors grow by e in about 150 units


def test_gaps_are_filled_between_neighbours_and_counted():
    values = np.array([[np.nan, 1.0], [2.0, 2.0], [np.nan, np.nan], [4.0, np.nan], [np.nan, 5.0]])
    series = Series.with_gaps("gaps", values, ["a", "b"], "step")
    assert series.values.tolist() == [[2, 1], [2, 2], [3, 3], [4, 4], [4, 5]] and series.missing == 5


def test_csv_and_npz_files(tmp_path):
    rows = [("2020-01-01", "calm", 1.5, 10), ("2020-01-02", "windy", "", 20), ("2020-01-03", "calm", 2.5, 30)]
    (tmp_path / "weather.csv").write_text("date,kind,wind,rain\n" + "".join(",".join(map(str, r)) + "\n" for r in rows))
    series = read_series(str(tmp_path / "weather.csv"))
    assert (series.name, series.channels, series.missing) == ("weather", ["wind", "rain"], 1)
    assert series.values.tolist() == [[1.5, 10], [2.0, 20], [2.5, 30]]
    assert read_series(str(tmp_path / "weather.csv"), ["rain"]).values.tolist() == [[10], [20], [30]]
    np.savez(tmp_path / "arrays.npz", level=np.arange(4), flow=np.arange(8.0).reshape(4, 2), note=np.array(["x"] * 4))
    series = read_series(str(tmp_path / "arrays.npz"))
    assert series.channels == ["level", "flow_0", "flow_1"] and series.values[3].tolist() == [3, 6, 7]


def test_the_same_values_have_the_same_fingerprint():
    series, other = make_series(), make_series()
    assert series.fingerprint() == other.fingerprint()
    other.values[-1, 0] += 1e-3
    assert series.fingerprint() != other.fingerprint()


def test_the_split_is_in_time_and_only_training_values_standardise():
    series = make_series(200)
    split = split_series(series, context_length=30, prediction_length=8)
    later = series.values.copy()
    later[140:] += 100
    assert np.array_equal(split.mean, split_series(series._replace(values=later), 30, 8).mean)
    values = split.mean + split.std * split.test.values.double().numpy()
    assert values == pytest.approx(series.values, abs=1e-5)
    assert split.train.values[:140].mean(0).abs().max() < 1e-5
    assert split.train.values[:140].std(0, correction=0).numpy() == pytest.approx([1, 1], abs=1e-5)
    # The futures, of 8 steps, cover their part and no more.
    for part, starts in (
        (split.train, range(30, 133)),
        (split.validation, range(140, 153)),
        (split.test, range(160, 193)),
    ):
        assert list(part.starts) == list(starts) and len(part) == len(starts)


def test_a_window_is_followed_by_its_future():
    split = split_series(make_series(200), context_length=30, prediction_length=8)
    row = split.validation[2]
    assert row["input_values"].shape == (30, 2) and row["future_values"].shape == (8, 2)
    assert row["input_values"].tolist() == split.validation.values[112:142].tolist()
    assert row["future_values"].tolist() == split.validation.values[142:150].tolist()


def test_spaced_windows_reach_from_the_first_to_the_last():
    split = split_series(make_series(200), context_length=30, prediction_length=8)
    assert split.test.spaced(3).starts == [160, 176, 192]
    assert split.test.spaced(1000).starts == list(range(160, 193))
    assert split.test.spaced(3)[1]["future_values"].tolist() == split.test[16]["future_values"].tolist()


@pytest.mark.parametrize(
    ("context", "ahead", "change", "message"),
    [
        (30, 21, None, "--prediction_length 21: the validation part of walk has 20 of its 200 steps"),
        (133, 8, None, "--context_length 133 and --prediction_length 8 exceed the training part of walk, 140"),
        (30, 8, "constant", "'c1' does not change in the training part"),
    ],
)
def test_a_series_that_cannot_be_split(context, ahead, change, message):
    series = make_series(200)
    if change == "constant":
        series.values[:140, 1] = 0.1
    with pytest.raises(ValueError, match=message):
        split_series(series, context, ahead)


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (None, None, "does not exist"),
        ("", None, "could not be read"),
        ("a,b\nx,y\n", None, "holds no numbers"),
        ("a,b\n", None, "holds no numbers"),
        ("a,b\nx,1\n", ["c"], "has no 'c', only 'a', 'b'"),
        ("a,b\nx,1\n", ["a"], "'a' of .* does not hold numbers but 'x'"),
        ("a,b\n1,\n2,\n", None, "the column 'b' holds no values"),
        ("a\n1\ninf\n", None, "infinite values"),
    ],
)
def test_files_that_cannot_be_used(content, columns, message, tmp_path):
    path = tmp_path / "data.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_series(str(path), columns)


def test_arrays_that_cannot_be_used(tmp_path):
    np.savez(tmp_path / "deep.npz", x=np.zeros((3, 2, 2)))
    np.savez(tmp_path / "lengths.npz", x=np.zeros(3), y=np.zeros(4))
    np.savez(tmp_path / "objects.npz", x=np.array([{}]))
    (tmp_path / "not.npz").write_text("text")
    (tmp_path / "data.parquet").write_text("text")
    messages = {"deep.npz": "has shape", "lengths.npz": "same length", "objects.npz": "allow_pickle"}
    messages |= {"not.npz": "could not be read", "data.parquet": "cannot read '.parquet', only .csv, .npz"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_series(str(tmp_path / name))
