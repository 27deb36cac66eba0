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
# As a word of its own or a capitalised one: in "start_time", "DateTime" and "eventTime", and not in "candidates".
_TIME = re.compile(
    r"(?:(?<![^\W\d_])|(?<=[a-z])(?=[A-Z]))(?i:(?:unix|utc)?(?:date|time|year|epoch|stamp)+s?)(?![^\W\d_])"
)
_ROW = re.compile(r"unnamed: \d+|index|id|row|no\.?", re.IGNORECASE)
# What stands where a name should, if the names are missing.
_VALUE = re.compile(r"[+-]?[.,]?\d(?:[\d.,:/+% eE-]*|(?=.*[-:])[\d.,:/+%TZ eE-]*)")
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
    between_semicolons: bool

    @classmethod
    def of(cls, number: int, name: str, cells: list[str], lines: list[int], between_semicolons: bool) -> _Column:
        present = [index for index, cell in enumerate(cells) if cell.lower() not in MISSING]
        is_percent = bool(present) and all(cells[index].endswith("%") for index in present)
        if is_percent:
            cells = [cell.removesuffix("%").rstrip() for cell in cells]
        return cls(name or f"column {number}", cells, lines, present, bool(name), is_percent, between_semicolons)

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
        ValueError: the file is no table with a header, a value cannot be read or in two ways, times do not rise or are
            none in a few rows, or a wanted column is missing or holds no numbers. The message has the line, the column,
            the value and the fix.
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
        # Semicolons are between columns where commas are decimal.
        if column.between_semicolons and not any("." in cell for cell in cells):
            values[present] = [_float(cell, ",") for cell in cells]
            return _Numbers(values, ",")
        index = next(index for index in present if _is_twofold(column.cells[index]))
        ways = " or ".join(f"{_float(column.cells[index], mark):.15g}" for mark in ",.")
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
    """Refuses what is another number with the decimal mark of other columns, unless its own column decides."""
    with_marks = [
        (column.name, mark)
        for column, (_, mark) in found
        if any("," in column.cells[index] or "." in column.cells[index] for index in column.present)
    ]
    for column, numbers in found:
        others = [name for name, mark in with_marks if mark != numbers.mark]
        marked = [index for index in column.present if numbers.mark in column.cells[index]] if others else []
        twofold = [index for index in marked if _is_twofold(column.cells[index])]
        if twofold and len(twofold) == len(marked):
            has = f"{'' if numbers.mark == '.' else 'no '}decimal commas"
            problem = f"is a decimal number, or one of thousands, as {others[0]!r} has {has}"
            raise column.refusal(twofold[0], f"{problem}; write decimal points in all columns")


def _check_digits(column: _Column, numbers: _Numbers) -> None:
    """Refuses whole numbers of more digits than float64 holds."""
    for index in np.flatnonzero(np.isfinite(numbers.values) & (np.abs(numbers.values) > 2**53)):
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
    _check_names(names, rows[0][1] if rows else [])
    lines = [line for line, _ in rows]
    return [
        _Column.of(index + 1, name, [row[index] for _, row in rows], lines, separators == [";"])
        for index, name in enumerate(names)
    ]


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


def _check_names(names: list[str], first_row: list[str]) -> None:
    """Refuses names of which none has to be one, or that are the same."""
    _check_distinct(filter(None, names))
    values = [name for name in names if _VALUE.fullmatch(name)]
    # What a table without names is written with: 0, 1, 2, ...
    is_count = len(values) > 1 and values in ([str(first + i) for i in range(len(values))] for first in (0, 1))
    # Years, say, beside a name.
    are_labels = all(map(str.isdigit, values)) and len(values) < len(names) - names.count("")
    # An index has none, and no text is in a row above numbers or times.
    is_header = not names[0] or any(
        _VALUE.fullmatch(cell) and not _VALUE.fullmatch(name) and name.lower() not in MISSING
        for name, cell in zip(names, first_row)
    )
    if values and not is_count and not are_labels and not is_header:
        raise ValueError(
            f"the first line has values, such as {values[0]!r}, where the names of the columns should be; write names "
            "into a line before it, or if these are names, more than numbers."
        )


def _describe_place(column: _Column, values: np.ndarray) -> str | None:
    """Of numbers that say where a row is, and not what was there, or that are none: what they are.

    Raises:
        ValueError: they are times that fall, or they have no name.
    """
    is_time = _TIME.search(column.name)
    steps = np.diff(values[~np.isnan(values)] if is_time else values)
    if is_time and len(steps) > 1 and steps.min() < 0 and steps.max() <= 0:
        raise ValueError(
            f"the times in the column {column.name!r} fall; sort the rows, the oldest first, or if these are no times, "
            "say which columns are channels with --columns."
        )
    if len(steps) > 1 and (steps.min() > 0 or steps.max() < 0):
        change = "rises" if steps[0] > 0 else "falls"
        if np.abs(steps - steps[0]).max() <= 1e-6 * abs(steps[0]):
            return f"{change} by {abs(steps[0]):g} with every row, as row numbers and times do"
        if is_time:
            return "rises with every row, as times do"
        if (values == np.round(values)).all() and (not column.is_named or _ROW.fullmatch(column.name)):
            return f"{change} with every row, as row numbers do where rows were removed"
    if not column.is_named:
        if np.isnan(values).all():
            return "has no name and no values"
        raise ValueError(f"{column.name} has no name in the first line; write one there.")
    return None


def _describe_text(column: _Column) -> str:
    """What else than numbers a column holds.

    Raises:
        ValueError: most are times and one is none, or the last is missing, or they do not rise, or do so in one of two
            readings only.
    """
    cells = pd.Series([column.cells[index] for index in column.present])
    readings = _read_times(cells)
    count = max(times.count() for times in readings)
    if len(cells) < 3 or 2 * count < len(cells):
        unchecked = "; the order of time was not checked" if _TIME.search(column.name) else ""
        return f"text, such as {cells[0]!r}{unchecked}"
    readings = [times for times in readings if times.count() == count]
    last = len(column.cells) - 1
    if count < len(cells) or column.present[-1] < last:
        index = column.present[int(readings[0].isna().argmax())] if count < len(cells) else last
        problem = f"is no time, and {count} of the {len(cells)} values of the column are"
        fix = "remove the line if it is a footer, such as a total or a source, or correct the time"
        raise column.refusal(index, f"{problem}; {fix}")
    falls = [_first_fall(times) for times in readings]
    if (falls[0] is None) != (falls[-1] is None):
        index = next(index for index in falls if index is not None)
        problem = f"comes after {cells[index - 1]!r} if the day is first, or if the month is"
        raise column.refusal(column.present[index], f"{problem}; write dates as 2020-12-31")
    if falls[0] is not None:
        problem = f"comes after {cells[falls[0] - 1]!r}; give one series, its rows in the order of time"
        raise column.refusal(column.present[falls[0]], problem)
    absent = len(column.cells) - len(cells)
    without = f", {absent} of them missing" if absent else ""
    return f"times from {cells.iloc[0]} to {cells.iloc[-1]}{without}{_describe_steps(readings)}"


def _read_times(cells: pd.Series) -> list[pd.Series]:
    """The cells as times, NaT where one is none, with the month first in "07/01/2016" and with the day first."""
    cells = cells.str.replace(r" ?(?:UTC|GMT|Z)$", "", regex=True)
    cells = cells.str.replace(r"^(\d\d?)\.(\d\d?)\.(\d{4})\b", r"\3-\2-\1", regex=True)
    dates = r"^(\d\d?)([/-])(\d\d?)\2(\d{4})\b"
    readings = [cells.str.replace(dates, order, regex=True) for order in (r"\4-\1-\3", r"\4-\3-\1")]
    return [pd.to_datetime(each, format="ISO8601", utc=True, errors="coerce") for each in readings]


def _first_fall(times: pd.Series) -> int | None:
    """Where times that do not rise first do not."""
    steps, nothing = times.diff().iloc[1:], pd.Timedelta(0)
    # Local time goes back by an hour in autumn.
    if (steps < -_HOUR).any() or (steps <= nothing).mean() > 0.1:
        return 1 + int((steps <= nothing).argmax())
    return None


def _describe_steps(readings: list[pd.Series]) -> str:
    """The steps between times, if they are uneven in every reading."""
    for times in readings:
        steps = times.diff().iloc[1:]
        if steps.max() < 1.5 * steps.median() and steps.min() > 0.5 * steps.median():
            return ""
    return f", in steps from {steps.min()} to {steps.max()}, which count as equal"
