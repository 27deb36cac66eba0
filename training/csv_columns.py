# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Columns of numbers from CSV files as programs and countries write them: each number as it was meant, or a refusal.

What separates the columns (`,`, `;`, a tab, `|`), and in each column what is a decimal mark, what groups thousands and
whether all values are percentages, is found out; where it can be read in two ways, it is not read.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd


Value = TypeVar("Value")
SEPARATORS = ",;\t|"
# In lower case.
MISSING = {"", "?", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "-", "--", "."}
# Apostrophes and spaces, breaking or not.
_GROUPING = "'\u2019 \u00a0\u202f"
_TIME = re.compile("time|date|year|epoch|stamp", re.IGNORECASE)
_HOUR = pd.Timedelta(hours=1)


def _number(decimal: str, group: str) -> re.Pattern:
    """Numbers with this decimal mark, whose digits before it may be grouped by threes."""
    grouped = rf"[1-9]\d{{0,2}}(?P<group>[{group}{_GROUPING}])\d{{3}}(?:(?P=group)\d{{3}})*"
    pattern = rf"(?=[+-]?\{decimal}?\d)[+-]?(?:{grouped}|\d*)(?:\{decimal}\d*)?(?:[eE][+-]?\d+)?"
    return re.compile(pattern, re.ASCII)


_PLAIN = set("0123456789.+-eE")
# By decimal mark.
_PATTERNS = {".": _number(".", ","), ",": _number(",", ".")}
_AS_FLOATS = {
    ".": str.maketrans("", "", "," + _GROUPING),
    ",": str.maketrans({",": ".", **dict.fromkeys("." + _GROUPING)}),
}


class Columns(NamedTuple):
    """`numbers` are (T,) float64 by column, NaN where one is missing; `left_out` says of other columns why; `missing`
    counts what stood where a number is missing."""

    numbers: dict[str, np.ndarray]
    left_out: dict[str, str]
    missing: Counter


class _Column(NamedTuple):
    """Cells without blanks around them, of percentages the numbers alone; the lines they are in; which have a value."""

    name: str
    cells: list[str]
    lines: list[int]
    present: list[int]
    is_named: bool
    is_percent: bool

    @classmethod
    def of(cls, number: int, name: str, cells: list[str], lines: list[int]) -> _Column:
        present = [index for index, cell in enumerate(cells) if cell.lower() not in MISSING]
        is_percent = bool(present) and all(cells[index].endswith("%") for index in present)
        if is_percent:
            cells = [cell.removesuffix("%").rstrip() for cell in cells]
        return cls(name or f"column {number}", cells, lines, present, bool(name), is_percent)

    def refusal(self, index: int, problem: str) -> ValueError:
        """What is wrong with a cell."""
        return ValueError(f"line {self.lines[index]}, column {self.name!r}: {self.cells[index]!r} {problem}.")


class _Numbers(NamedTuple):
    """(T,) with NaN where there is none, read with this decimal mark."""

    values: np.ndarray
    mark: str


def read_columns(path: Path, wanted: list[str] | None = None) -> Columns:
    """The columns that hold numbers, or the wanted ones.

    Row numbers and times are left out unless they are wanted. A column of percentages has its unit in its name.

    Raises:
        ValueError: the file is no table with a header, a value cannot be read or in two ways, times do not rise, or a
            wanted column is missing or holds no numbers. The message has the line, the column, the value and the fix.
    """
    columns = choose({column.name: column for column in _split(_decode(path.read_bytes()))}, wanted)
    found, left_out, missing = [], {}, Counter()
    for column in columns.values():
        numbers = _read(column, must_be_numbers=wanted is not None)
        if numbers is None:
            reason = _describe_text(column)
        else:
            reason = None if wanted is not None else _describe_place(column, numbers.values)
        if reason is not None:
            left_out[column.name] = reason
            continue
        _check_digits(column, numbers)
        found.append((column, numbers))
        missing.update(column.cells[index] for index in np.flatnonzero(np.isnan(numbers.values)))
    _check_marks(found)
    names = [column.name + " (%)" * column.is_percent for column, _ in found]
    _check_distinct(names)
    return Columns(dict(zip(names, (numbers.values for _, numbers in found))), left_out, missing)


def choose(columns: dict[str, Value], wanted: list[str] | None) -> dict[str, Value]:
    """The wanted ones, or all; raises a `ValueError` if there is no such column."""
    for name in wanted or ():
        if name not in columns:
            raise ValueError(f"there is no column {name!r}, only {', '.join(map(repr, columns))}.")
    return columns if wanted is None else {name: columns[name] for name in wanted}


def _read(column: _Column, must_be_numbers: bool) -> _Numbers | None:
    """The column's numbers; None where most of its values are none, unless they have to be.

    Raises:
        ValueError: it has no values, a few that are no numbers, or some that are two.
    """
    present, cells = column.present, [column.cells[index] for index in column.present]
    values = np.full(len(column.cells), np.nan)
    if not present and column.is_named and column.cells:
        raise ValueError(f"the column {column.name!r} holds no values; leave it out with --columns.")
    if set("".join(cells)) <= _PLAIN:
        # Most files are such, and some are large. What is no number in spite of its signs is found below.
        with contextlib.suppress(ValueError):
            values[present] = [float(cell) for cell in cells]
            return _Numbers(values, ".")
    matches = {mark: [bool(pattern.fullmatch(cell)) for cell in cells] for mark, pattern in _PATTERNS.items()}
    mark = max(matches, key=lambda mark: sum(matches[mark]))
    count = sum(matches[mark])
    if count < len(cells):
        if 2 * count < len(cells) and not must_be_numbers:
            return None
        fix = "correct it, leave it empty if it is missing, remove the line, or choose other columns with --columns"
        problem = f"is not a number, and {count} of the {len(cells)} values of the column are; {fix}"
        raise column.refusal(present[matches[mark].index(False)], problem)
    if any("," in cell for cell in cells) and all(map(all, matches.values())):
        index = next(index for index in present if _is_twofold(column.cells[index]))
        ways = " or ".join(f"{_float(column.cells[index], mark):.17g}" for mark in ",.")
        problem = f"is {ways}, and no other value of the column decides"
        raise column.refusal(index, f"{problem}; write it with a decimal point, or without a comma")
    values[present] = [_float(cell, mark) for cell in cells]
    return _Numbers(values, mark)


def _float(cell: str, mark: str) -> float:
    return float(cell.translate(_AS_FLOATS[mark]))


def _is_twofold(cell: str) -> bool:
    """Whether it is a number with either decimal mark, and not the same."""
    return all(pattern.fullmatch(cell) for pattern in _PATTERNS.values()) and _float(cell, ".") != _float(cell, ",")


def _check_marks(found: list[tuple[_Column, _Numbers]]) -> None:
    """Refuses "1.234" where other columns have decimal commas, unless its own column decides."""
    with_commas = [column.name for column, numbers in found if numbers.mark == ","]
    if not with_commas:
        return
    for column, numbers in found:
        twofold = [index for index, cell in enumerate(column.cells) if "." in cell and _is_twofold(cell)]
        decides = any("." in cell and not _is_twofold(cell) for cell in column.cells)
        if numbers.mark == "." and twofold and not decides:
            problem = f"is a decimal number, or one of thousands, as {with_commas[0]!r} has decimal commas"
            raise column.refusal(twofold[0], f"{problem}; write decimal points in all columns")


def _check_digits(column: _Column, numbers: _Numbers) -> None:
    """Refuses whole numbers of more digits than float64 holds."""
    for index in np.flatnonzero(np.abs(numbers.values) > 2**53):
        digits = column.cells[index].translate(_AS_FLOATS[numbers.mark]).lstrip("+-")
        if digits.isdigit() and int(digits) != abs(int(numbers.values[index])):
            raise column.refusal(index, "has more digits than float64 holds; subtract what all values share")


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not UTF-8 (byte {data[error.start]:#x}); save the file as UTF-8, as by "
            "`iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error
    if "\0" in text:
        raise ValueError("it holds NUL characters, as files of UTF-16 or of no text do; save it as UTF-8.")
    return text


def _split(text: str) -> list[_Column]:
    """The columns of a text with their names in the first line, and as many fields in every other."""
    header = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    separators = [each for each in SEPARATORS if len(next(csv.reader([header], delimiter=each), [])) > 1]
    if len(separators) > 1:
        separators = [each for each in separators if _is_even(text, each)]
        if len(separators) != 1:
            raise ValueError(
                f"what separates the columns of {header.strip()!r}? Put names that have such signs in quotes."
            )
    table = _fields(text, *separators)
    if not table:
        raise ValueError("it is empty.")
    (first, names), *rows = table
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"line {line} has {len(row)} fields, the first of them {row[0]!r}, and line {first}, the names, "
                f"{len(names)}; remove what is no row, as a comment, a total or a source, and put numbers that have a "
                "comma in quotes."
            )
    if rows and not any(rows[-1][1]):
        raise ValueError(f"line {rows[-1][0]}, the last, has no values; remove the empty rows at the end.")
    _check_names(names)
    lines = [line for line, _ in rows]
    columns = [[row[index] for _, row in rows] for index in range(len(names))]
    return [_Column.of(number, name, cells, lines) for number, (name, cells) in enumerate(zip(names, columns), start=1)]


def _fields(text: str, separator: str = ",") -> list[tuple[int, list[str]]]:
    """Line number and fields, without blanks around them, of all lines that are not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    table, gap = [], None
    try:
        for row in reader:
            row = list(map(str.strip, row))
            if row in ([], [""]):
                gap = gap or (table and reader.line_num)
            elif gap and len(table[0][1]) == 1:
                raise ValueError(f"line {gap} is empty: remove it, or write `?` if a value is missing there.")
            else:
                table.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is no line of a CSV file: {error}.") from error
    return table


def _is_even(text: str, separator: str) -> bool:
    """Whether all lines have as many fields."""
    try:
        return len({len(row) for _, row in _fields(text, separator)}) == 1
    except ValueError:
        return False


def _check_distinct(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{count} columns have the name {name!r}; give each its own.")


def _check_names(names: list[str]) -> None:
    _check_distinct(filter(None, names))
    values = [name for name in names if re.fullmatch(r"[+-]?[.,]?\d[\d.,:/+%TZ eE-]*", name)]
    # What a table without names is written with: 0, 1, 2, ...
    is_count = len(values) > 1 and values in ([str(first + i) for i in range(len(values))] for first in (0, 1))
    # Years, say, beside a name.
    are_labels = all(map(str.isdigit, values)) and len(values) < len(names) - names.count("")
    if values and not is_count and not are_labels:
        raise ValueError(
            f"the first line has values, such as {values[0]!r}, where the names of the columns should be; write names "
            "into a line before it, or if these are names, more than numbers."
        )


def _describe_place(column: _Column, values: np.ndarray) -> str | None:
    """Of numbers that say where a row is, and not what was there, or that are none: what they are.

    Raises:
        ValueError: they are times that fall, or they have no name.
    """
    steps = np.diff(values)
    is_steady = len(steps) > 1 and (steps.min() > 0 or steps.max() < 0)
    if is_steady and np.abs(steps - steps[0]).max() <= 1e-6 * abs(steps[0]):
        change = "rises" if steps[0] > 0 else "falls"
        return f"{change} by {abs(steps[0]):g} with every row, as row numbers and times do"
    if is_steady and _TIME.search(column.name):
        if steps[0] < 0:
            raise ValueError(
                f"the times in the column {column.name!r} fall; sort the rows, the oldest first, or if these are no "
                "times, say which columns are channels with --columns."
            )
        return "rises with every row, as times do"
    if not column.is_named:
        if np.isnan(values).all():
            return "has no name and no values"
        raise ValueError(f"{column.name} has no name in the first line; write one there.")
    return None


def _describe_text(column: _Column) -> str:
    """What else than numbers a column holds; raises a `ValueError` if these are times that do not rise."""
    times = pd.to_datetime(pd.Series(column.cells), format="ISO8601", utc=True, errors="coerce")
    if len(times) < 3 or times.isna().any():
        return f"text, such as {column.cells[column.present[0]]!r}"
    steps, nothing = times.diff().iloc[1:], pd.Timedelta(0)
    # Local time goes back by an hour in autumn.
    if (steps < -_HOUR).any() or (steps <= nothing).mean() > 0.1:
        index = 1 + int((steps <= nothing).argmax())
        problem = f"comes after {column.cells[index - 1]!r}; give one series, its rows in the order of time"
        raise column.refusal(index, problem)
    is_even = steps.max() < 1.5 * steps.median() and steps.min() > 0.5 * steps.median()
    uneven = "" if is_even else f", in steps from {steps.min()} to {steps.max()}, which count as equal"
    return f"times from {column.cells[0]} to {column.cells[-1]}{uneven}"
