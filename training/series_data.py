# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Labelled time series: where they come from, what must be true of them, and how they become splits and batches.

Shapes: N series, T steps (T_i of series i), C channels.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arguments import text


# With 30% held out and the half of them for the test, what a class needs for a series in each of the three.
MINIMUM_PER_CLASS = 7


class SeriesData(NamedTuple):
    """A data set: `series[i]` is (T_i, C) float64, NaN where a value is missing; `labels[i]` is an index of `classes`.

    `time_deltas[i]` (T_i,) float64 is the time elapsed at each step, in units of the regular step; None for regular
    sampling.
    """

    name: str
    series: list[np.ndarray]
    labels: np.ndarray
    classes: list[str]
    time_deltas: list[np.ndarray] | None = None

    @property
    def channels(self) -> int:
        return self.series[0].shape[1]

    @property
    def lengths(self) -> tuple[int, int]:
        """Steps of the shortest and the longest series."""
        steps = [len(values) for values in self.series]
        return min(steps), max(steps)


def add_series_arguments(parser) -> None:
    """The flags that say which data set, the same for every script of labelled series, to a parser or group."""
    source = parser.add_mutually_exclusive_group(required=True)
    archives = "Of the UCR and UEA archives: BasicMotions, JapaneseVowels, ACSF1, ..."
    source.add_argument("--dataset_name", type=text, help=archives)
    arrays = ".npz with X (N, T, C), y (N,); also lengths (N,), time_deltas (N, T) in units of the regular step."
    source.add_argument("--data_file", type=text, help=arrays)
    parser.add_argument("--missing_values", action="store_true", help="NaN is a value that was not observed.")


def load_series(args: argparse.Namespace) -> SeriesData:
    """What the flags of `add_series_arguments` ask for; raises what `load_archive`, `load_npz` and `check` raise."""
    data = load_npz(args.data_file) if args.data_file is not None else load_archive(args.dataset_name)
    check(data, args.missing_values)
    return data


def load_archive(name: str) -> SeriesData:
    """All series, training and test, of a set of the UCR and UEA archives, from aeon: some are part of its wheel, the
    others are downloaded.

    Raises:
        ValueError: aeon is missing, does not know the name, or cannot download it.
    """
    try:
        from aeon.datasets import load_classification
    except ImportError as error:
        raise ValueError(f"--dataset_name needs aeon ({error}): pip install aeon, or use --data_file.") from error
    try:
        series, labels = load_classification(name)
    except Exception as error:  # aeon documents ValueError, URLError and HTTPError, and raises more.
        raise ValueError(
            f"--dataset_name {name!r} cannot be loaded; is the name right, and is there a network to download it? "
            f"BasicMotions and JapaneseVowels need none. {error}"
        ) from error
    classes, labels = np.unique(labels, return_inverse=True)
    # aeon has channels before steps.
    return SeriesData(name, [np.ascontiguousarray(x.T, np.float64) for x in series], labels, [str(c) for c in classes])


def load_npz(file: str) -> SeriesData:
    """A data set from arrays `X` (N, T, C) and `y` (N,), classes of any type, and perhaps `lengths` (N,), the steps of
    each series that are real, and `time_deltas` (N, T).

    Raises:
        ValueError: the file cannot be read, or an array is missing or unknown, or has the wrong shape or type, or
            numbers that float64 does not hold.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            arrays = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # Of a broken file, numpy, zipfile and zlib each raise their own.
        raise ValueError(f"--data_file {file!r} is not a readable .npz file of plain arrays: {error}") from error
    for name in ("X", "y"):
        if name not in arrays:
            raise ValueError(f"--data_file {file!r} has no array {name!r}, only {', '.join(arrays) or 'none'}.")
    if unknown := arrays.keys() - {"X", "y", "lengths", "time_deltas"}:
        raise ValueError(
            f"--data_file {file!r} has the arrays {', '.join(sorted(unknown))}, and only X, y, lengths and time_deltas "
            "are read: rename or remove them."
        )
    values, labels = arrays["X"], arrays["y"]
    count, steps = (*values.shape, 0, 0)[:2]
    lengths, deltas = arrays.get("lengths", np.full(count, steps)), arrays.get("time_deltas")
    problem = None
    if values.ndim != 3 or values.dtype.kind not in "fiub":
        problem = f"`X` must be numbers of shape (series, steps, channels), got {values.dtype} {values.shape}"
    elif labels.shape != (count,) or labels.dtype.kind not in "iubUS":
        problem = f"`y` must be {count} classes, whole numbers or text, got {labels.dtype} {labels.shape}"
    elif lengths.shape != (count,) or lengths.dtype.kind not in "iu" or (lengths < 0).any() or (lengths > steps).any():
        problem = f"`lengths` must be {count} whole numbers from 0 to {steps}, got {lengths.dtype} {lengths.shape}"
    elif deltas is not None and (deltas.shape != (count, steps) or deltas.dtype.kind not in "fiu"):
        problem = f"`time_deltas` must be numbers of shape {(count, steps)}, got {deltas.dtype} {deltas.shape}"
    if problem is not None:
        raise ValueError(f"--data_file {file!r}: {problem}.")
    try:
        values = in_float64("X", values)
        deltas = None if deltas is None else in_float64("time_deltas", deltas)
        classes, labels = np.unique(decoded(labels) if labels.dtype.kind == "S" else labels, return_inverse=True)
    except ValueError as refused:
        raise ValueError(f"--data_file {file!r}: {refused}") from None
    return SeriesData(
        Path(file).stem,
        [x[:length] for x, length in zip(values, lengths)],
        labels,
        [str(c) for c in classes],
        None if deltas is None else [d[:length] for d, length in zip(deltas, lengths)],
    )


def in_float64(name: str, values: np.ndarray) -> np.ndarray:
    """The same numbers as float64; raises a `ValueError` where it does not hold them, as of whole ones above 2^53."""
    with np.errstate(over="ignore", invalid="ignore"):
        converted = values.astype(np.float64)
        changed = (converted.astype(values.dtype) != values) & ~np.isnan(converted)
    if changed.any():
        raise ValueError(
            f"`{name}` holds {values[changed][0]}, which float64 rounds to {converted[changed][0]:.17g}; subtract what "
            "all values share."
        )
    return converted


def decoded(labels: np.ndarray) -> np.ndarray:
    """Class names in bytes as text; raises a `ValueError` if one is not UTF-8."""
    names = {}
    for label in np.unique(labels).tolist():
        try:
            names[label] = label.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"`y` has the class {label!r}, which is not UTF-8 ({error}); save it as text.") from error
    return np.array([names[label] for label in labels.tolist()])


def check(data: SeriesData, missing_values: bool) -> None:
    """Refuses what cannot be trained on.

    Args:
        missing_values: whether NaN has been declared to be a value that was not observed.

    Raises:
        ValueError: there are no series, no channels, or a series without steps; channels differ between series; a value
            is infinite, or NaN without having been declared; a time delta is negative or not finite; there is one class
            only, two have names that look the same, or a class has too few series to be split.
    """
    if not data.series:
        raise ValueError(f"{data.name} has no series.")
    if not data.channels:
        raise ValueError(f"The series of {data.name} have no channels.")
    for i, values in enumerate(data.series):
        if len(values) == 0:
            raise ValueError(f"Series {i} of {data.name} has length 0; remove it.")
        if values.shape[1] != data.channels:
            raise ValueError(f"Series {i} of {data.name} has {values.shape[1]} channels, the first {data.channels}.")
        if np.isinf(values).any():
            raise ValueError(f"Series {i} of {data.name} holds infinite values; make them finite, or NaN (missing).")
        if np.isnan(values).any() and not missing_values:
            raise ValueError(f"Series {i} of {data.name} holds NaN; if they are missing values, pass --missing_values.")
        if data.time_deltas is not None and (wrong := ~(np.isfinite(d := data.time_deltas[i]) & (d >= 0))).any():
            raise ValueError(
                f"`time_deltas` of series {i} of {data.name} must be finite and not negative, got {d[wrong][0]} (step "
                f"{wrong.argmax()})."
            )
    if len(data.classes) == 1:
        raise ValueError(f"All {len(data.series)} series of {data.name} are of class {data.classes[0]!r}.")
    seen: dict[str, str] = {}
    for name in data.classes:
        shown = " ".join(unicodedata.normalize("NFKC", name).split())
        if not shown:
            raise ValueError(f"A class of {data.name} has the name {name!r}; give it one that can be read.")
        if shown in seen:
            raise ValueError(
                f"The classes {seen[shown]!r} and {name!r} of {data.name} look the same; give them one name, or two."
            )
        seen[shown] = name
    rarest, number = Counter(data.labels.tolist()).most_common()[-1]
    if number < MINIMUM_PER_CLASS:
        raise ValueError(
            f"Class {data.classes[rarest]!r} of {data.name} has {number} series; at least {MINIMUM_PER_CLASS} are "
            "needed for all splits to have some. Add series, or leave the class out."
        )


def check_time_unit(data: SeriesData, time_constant: float) -> None:
    """Refuses `time_deltas` in which no model can learn, because their unit is another than the regular step.

    At every step a state goes dt / tau of the way to where it tends: where dt is above 2 tau it overshoots by more
    than it was away, and grows without bound. That a gap now and then is so long does no harm.

    Args:
        time_constant: the shortest tau, in regular steps.

    Raises:
        ValueError: a typical step is too long, or even the longest series too short.
    """
    if data.time_deltas is None:
        return
    deltas = np.concatenate(data.time_deltas)
    typical = float(np.median(deltas[deltas > 0])) if deltas.any() else 0.0
    whole = max(float(series.sum()) for series in data.time_deltas)
    unit = f"`time_deltas` of {data.name} must be in units of the regular step; their median is {typical:g}"
    if typical > 2 * time_constant:
        raise ValueError(
            f"{unit}, and states grow without bound where it is above {2 * time_constant:g} (twice "
            f"`time_constant_min`). Divide them by {typical:g}."
        )
    if typical == 0:
        raise ValueError(f"`time_deltas` of {data.name} are all 0, so that no time passes; leave them out, or give 1.")
    if whole < time_constant / 10:
        raise ValueError(
            f"{unit}, and in the longest series, which takes {whole:g} in all, states hardly change: their time "
            f"constants begin at {time_constant:g} (`time_constant_min`). Divide them by {typical:g}."
        )


def split(data: SeriesData, seed: int) -> dict[str, np.ndarray]:
    """Indices of the series of `train` (70%), `validation` and `test` (15% each), drawn at random by the seed.

    The sizes are those of the paper's protocol (section 4). Its code permutes the series without regard to their
    classes, in JAX; here every split has every class in its proportion, so the same seeds give other splits.
    """
    from sklearn.model_selection import train_test_split

    options = {"random_state": seed, "shuffle": True}
    train, held_out = train_test_split(np.arange(len(data.labels)), test_size=0.3, stratify=data.labels, **options)
    validation, test = train_test_split(held_out, test_size=0.5, stratify=data.labels[held_out], **options)
    return {"train": train, "validation": validation, "test": test}


def channel_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of values (T, C), missing ones left out, in float64; the deviation of a channel
    that is constant but for rounding is 0."""
    observed = ~np.isnan(values)
    count = observed.sum(0).clip(min=1)
    mean = np.where(observed, values, 0).sum(0) / count
    # What rounding took from the sum of large values.
    mean += np.where(observed, values - mean, 0).sum(0) / count
    spread = np.where(observed, values - mean, 0)
    # In this unit no square overflows or vanishes.
    unit = np.abs(spread).max(0)
    unit[unit <= 4 * np.finfo(np.float64).eps * np.abs(mean)] = 0
    return mean, unit * np.sqrt(((spread / np.where(unit > 0, unit, 1)) ** 2).sum(0) / count)


def channel_statistics(series: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of the channels over all steps of these series, missing values left out, in
    float64; the deviation of a constant channel counts as 1."""
    mean, deviation = channel_moments(np.concatenate(series))
    return mean, np.where(deviation > 0, deviation, 1)


def make_rows(
    data: SeriesData, indices: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> list[dict[str, Tensor]]:
    """Some of the series, normalised and only then in float32, as a map-style data set whose rows `collate` makes
    batches of."""
    rows = []
    for i in indices:
        values = ((data.series[i] - mean) / deviation).astype(np.float32)
        row = {"input_values": torch.from_numpy(values), "labels": int(data.labels[i])}
        if data.time_deltas is not None:
            row["time_deltas"] = torch.from_numpy(data.time_deltas[i].astype(np.float32))
        rows.append(row)
    return rows


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Rows as a model's arguments: `input_values` (B, T, C) padded on the right to the longest, `labels` (B,) and,
    where needed, `attention_mask` (B, T), `observed_mask` (B, T, C) and `time_deltas` (B, T)."""
    batch = {
        "input_values": pad_sequence([row["input_values"] for row in rows], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
    lengths = torch.tensor([len(row["input_values"]) for row in rows])
    if lengths.min() < lengths.max():
        batch["attention_mask"] = (torch.arange(lengths.max()) < lengths[:, None]).long()
    missing = batch["input_values"].isnan()
    if missing.any():
        batch["observed_mask"] = ~missing
        batch["input_values"] = batch["input_values"].masked_fill(missing, 0)
    if "time_deltas" in rows[0]:
        batch["time_deltas"] = pad_sequence([row["time_deltas"] for row in rows], batch_first=True)
    return batch
