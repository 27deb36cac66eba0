# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Series for long-term forecasting: where they come from, how they are split, and windows of them.

Shapes: T steps, C channels, L context_length, P prediction_length.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.utils.data import Dataset

from arguments import Distinct, text
from csv_columns import Columns, choose, read_columns
from series_data import channel_moments, in_float64


# Of training and validation; the rest is the test part. As usual for long-term forecasting since Informer (arXiv
# 2012.07436) for sets without a split of their own.
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1


class Series(NamedTuple):
    """A regular series without gaps.

    Attributes:
        name: of the set or file.
        values: (T, C), float64, in the unit of the source.
        channels: C names, with the unit where it is known.
        step: what lies between two values, "hour".
        missing: how many of the values were missing and are interpolated.
        notes: what of a file was read as what, and what was left out.
    """

    name: str
    values: np.ndarray
    channels: list[str]
    step: str
    missing: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def with_gaps(cls, name: str, values: np.ndarray, channels: list[str], step: str) -> Series:
        """Fills missing values (NaN) linearly between their neighbours in time, at an end with the nearest."""
        values = np.asarray(values, dtype=np.float64)
        missing = np.isnan(values)
        for channel, absent in zip(channels, missing.T):
            if absent.all():
                raise ValueError(f"{name}: the column {channel!r} holds no values; leave it out with --columns.")
        if np.isinf(values).any():
            raise ValueError(f"{name}: there are infinite values; replace them, or leave them empty to interpolate.")
        filled = pd.DataFrame(values).interpolate(limit_direction="both").to_numpy()
        return cls(name, filled, list(channels), step, int(missing.sum()))

    def fingerprint(self) -> str:
        """Of the values: the same for the same series only."""
        return hashlib.sha256(np.ascontiguousarray(self.values).tobytes()).hexdigest()[:16]


def _seattle_temperature() -> Series:
    """vega_datasets: Seattle's temperature, NOAA's climate normals (for each hour of the year, the mean over 30 years).

    8,759 hours: the one that summer time skips is missing.
    """
    from vega_datasets import local_data

    hourly = local_data.seattle_temps().set_index("date").temp.asfreq("h")
    return Series.with_gaps("seattle-temperature", hourly.to_numpy()[:, None], ["temperature (°F)"], "hour")


def _co2() -> Series:
    """statsmodels: CO2 in the air of Mauna Loa, 2,284 weeks from 1958 to 2001, of which 59 are missing."""
    from statsmodels.datasets import co2

    weekly = co2.load_pandas().data.co2.asfreq("W-SAT")
    return Series.with_gaps("co2", weekly.to_numpy()[:, None], ["CO2 (ppm)"], "week")


def _elnino() -> Series:
    """statsmodels: the sea's surface temperature where El Niño is measured, 732 months from 1950 to 2010."""
    from statsmodels.datasets import elnino

    monthly = elnino.load_pandas().data.drop(columns="YEAR").to_numpy().reshape(-1, 1)
    return Series.with_gaps("elnino", monthly, ["sea surface temperature (°C)"], "month")


def _solar() -> Series:
    """aeon: national solar power in Great Britain, 289 half hours; too short for long horizons."""
    from aeon.datasets import load_solar

    return Series.with_gaps("solar", np.asarray(load_solar())[:, None], ["solar power"], "half hour")


def _lorenz(steps: int = 10_000, time_step: float = 0.01, seed: int = 0) -> Series:
    """The Lorenz attractor (sigma 10, rho 28, beta 8/3), without noise, every `time_step` units of time.

    Errors grow by e in 1.1 units. The integrator's own error stays below 1e-10 per step, and its start, drawn with
    `seed`, has 20 units to reach the attractor.
    """

    def derivative(_, state):
        x, y, z = state
        return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z

    start = np.array([1.0, 1.0, 25.0]) + np.random.default_rng(seed).normal(size=3)
    times = 20 + time_step * np.arange(steps)
    solution = solve_ivp(derivative, (0, times[-1]), start, "DOP853", t_eval=times, rtol=1e-10, atol=1e-10)
    return Series("lorenz", solution.y.T, ["x", "y", "z"], f"{time_step} units of time")


def _mackey_glass(steps: int = 10_000, seed: int = 0) -> Series:
    """The Mackey-Glass equation x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x, without noise, at every unit of time.

    scipy integrates no delay equations: classical Runge-Kutta, 10 steps per unit; between two of them the past is a
    cubic through the four nearest, which keeps the fourth order. The constant past, 1.2 and a little drawn with
    `seed`, has 500 units to be forgotten.
    """
    per_unit, unused = 10, 500
    delay, step = 17 * per_unit, 1 / per_unit

    def derivative(x, past):
        return 0.2 * past / (1 + past**10) - 0.1 * x

    states = [1.2 + 0.1 * float(np.random.default_rng(seed).normal())] * (delay + 2)
    while len(states) < (unused + steps) * per_unit:
        before, past, following, after = states[-delay - 2 : -delay + 2]
        between = (9 * (past + following) - before - after) / 16
        x = states[-1]
        k1 = derivative(x, past)
        k2 = derivative(x + step / 2 * k1, between)
        k3 = derivative(x + step / 2 * k2, between)
        k4 = derivative(x + step * k3, following)
        states.append(x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return Series("mackey-glass", np.array(states[unused * per_unit :: per_unit])[:, None], ["x"], "unit of time")


DATASETS = {
    "seattle-temperature": _seattle_temperature,
    "co2": _co2,
    "elnino": _elnino,
    "solar": _solar,
    "lorenz": _lorenz,
    "mackey-glass": _mackey_glass,
}


def add_data_arguments(parser) -> None:
    """The flags that say what is forecast, to a parser or group."""
    source = parser.add_mutually_exclusive_group()
    names = ", ".join(DATASETS)
    source.add_argument("--dataset_name", choices=DATASETS, default="seattle-temperature", metavar="NAME", help=names)
    source.add_argument("--data_file", type=text, help="CSV (a row per step) or npz (arrays, likewise) instead.")
    columns = "Columns of that file; by default all that hold numbers, but for row numbers and times."
    parser.add_argument("--columns", nargs="+", action=Distinct, help=columns)


def load_series(args: argparse.Namespace) -> Series:
    """What those flags ask for.

    Raises:
        ValueError: a file or column is missing or holds no numbers, or a package that has the set is not installed.
    """
    if args.data_file is not None:
        return read_series(args.data_file, args.columns)
    if args.columns is not None:
        raise ValueError("--columns needs --data_file.")
    return named_series(args.dataset_name)


@functools.cache
def named_series(name: str) -> Series:
    """One of DATASETS."""
    try:
        return DATASETS[name]()
    except ModuleNotFoundError as error:
        raise ValueError(f"--dataset_name {name} comes with {error.name}; `pip install -e '.[train]'`.") from error


def read_series(name: str, columns: list[str] | None = None) -> Series:
    """The numbers of a CSV or npz file; `notes` of the series say what else it holds, such as dates, and is left out.

    The arrays of an npz are of shape (T,) or (T, C'), which gives the columns `name_0`, `name_1`, ...

    Raises:
        ValueError: there is no such file or column, or a column holds no numbers, or what cannot be read for sure.
    """
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--data_file {name!r} does not exist.")
    readers = {".csv": read_columns, ".tsv": read_columns, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise ValueError(f"--data_file {name!r}: cannot read {path.suffix!r}, only {', '.join(readers)}.")
    try:
        table = readers[path.suffix.lower()](path, columns)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, csv.Error) as error:
        raise ValueError(f"--data_file {name!r} could not be read: {error}") from error
    notes = [f"Channels: {', '.join(table.numbers)}."]
    notes += [f"Left out: {column}, {reason}." for column, reason in table.left_out.items()]
    if table.missing:
        marks = (f"{count} {'empty' if mark == '' else repr(mark)}" for mark, count in table.missing.items())
        notes += [f"Read as missing: {', '.join(marks)}."]
    if not any(map(len, table.numbers.values())):
        raise ValueError(f"--data_file {name!r} holds no numbers. {' '.join(notes[1:])}")
    values = np.stack(list(table.numbers.values()), axis=1)
    return Series.with_gaps(path.stem, values, list(table.numbers), "step")._replace(notes=tuple(notes))


def _read_npz(path: Path, wanted: list[str] | None) -> Columns:
    columns: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            if array.ndim not in (1, 2):
                raise ValueError(f"the array {name!r} has shape {array.shape}; expected (steps,) or (steps, channels).")
            parts = {name: array} if array.ndim == 1 else {f"{name}_{i}": part for i, part in enumerate(array.T)}
            if twice := columns.keys() & parts.keys():
                raise ValueError(f"two arrays give a column {min(twice)!r}; give one another name.")
            columns |= parts
    columns = choose(columns, wanted)
    numbers = {name: in_float64(name, column) for name, column in columns.items() if column.dtype.kind in "iuf"}
    left_out = {name: f"of {column.dtype}" for name, column in columns.items() if name not in numbers}
    if wanted is not None and left_out:
        raise ValueError(f"the column {min(left_out)!r} holds {columns[min(left_out)].dtype}, no real numbers.")
    lengths = {name: len(column) for name, column in numbers.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its columns are of different lengths: {lengths}; choose those of one length with --columns.")
    missing = sum(int(np.isnan(column).sum()) for column in numbers.values())
    return Columns(numbers, left_out, Counter({"NaN": missing} if missing else {}))


class Windows(Dataset):
    """Windows of a series (T, C): `input_values` (L, C) and the `future_values` (P, C) after them, float32.

    `starts` are the steps at which the futures begin.
    """

    def __init__(self, values: Tensor, starts: range | list[int], context_length: int, prediction_length: int):
        self.values, self.starts = values, starts
        self.context_length, self.prediction_length = context_length, prediction_length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self.starts[index]
        return {
            "input_values": self.values[start - self.context_length : start],
            "future_values": self.values[start : start + self.prediction_length],
        }

    def spaced(self, number: int) -> Windows:
        """At most so many of them, evenly spaced."""
        chosen = np.linspace(0, len(self) - 1, min(number, len(self))).round().astype(int)
        return Windows(self.values, [self.starts[i] for i in chosen], self.context_length, self.prediction_length)


class Split(NamedTuple):
    """A series as a model sees it: standardised with the mean and standard deviation (C,) of its training part.

    Training windows lie within that part. Those of validation and test have their futures within theirs, and may read
    their contexts from before it.
    """

    train: Windows
    validation: Windows
    test: Windows
    mean: np.ndarray
    std: np.ndarray


def split_series(series: Series, context_length: int, prediction_length: int) -> Split:
    """70% training, then 10% validation, then 20% test.

    Raises:
        ValueError: a part is too short for one window, or a channel is constant in the training part.
    """
    total = len(series.values)
    train, validation = int(TRAIN_SHARE * total), int((TRAIN_SHARE + VALIDATION_SHARE) * total)
    if prediction_length > validation - train:
        raise ValueError(
            f"--prediction_length {prediction_length}: the validation part of {series.name} has {validation - train} "
            f"of its {total} steps; forecast at most that many."
        )
    if context_length + prediction_length > train:
        raise ValueError(
            f"--context_length {context_length} and --prediction_length {prediction_length} exceed the training part "
            f"of {series.name}, {train} of its {total} steps; lower one."
        )
    mean, std = channel_moments(series.values[:train])
    for channel, deviation in zip(series.channels, std):
        if deviation == 0:
            raise ValueError(f"{series.name}: {channel!r} does not change in the training part; leave it out.")
    values = torch.tensor((series.values - mean) / std, dtype=torch.float32)
    parts = ((context_length, train), (train, validation), (validation, total))
    windows = (
        Windows(values, range(first, end - prediction_length + 1), context_length, prediction_length)
        for first, end in parts
    )
    return Split(*windows, mean, std)
