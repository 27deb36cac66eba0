# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Texts in the rows of a file or dataset, or in a file that is one text, read a piece at a time. What cannot be read is
named with its file, place and cause."""

from __future__ import annotations

import codecs
import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow.parquet


PIECE = 1 << 18  # Characters, more or less, that are in memory at a time.
_SAMPLE = 100  # Rows that show what the columns hold.
_NUMERAL = "a number in writing"
_STRINGS = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)

csv.field_size_limit(2**31 - 1)


class Texts:
    """Texts that can be read again and again: each is the strings that it is made of, in order, so that none has to be
    in memory as a whole."""

    def __init__(self, read: Callable[[], Iterator[Iterator[str]]]):
        self._read = read

    def __iter__(self) -> Iterator[Iterator[str]]:
        return self._read()


class Rows(Texts):
    """Texts that are a column of rows. Rows of no or of blank text are left out, which is said when all are read.

    Args:
        source: what the rows are of, for messages.
        rows: given the names of the columns or None for all of them, the rows, each with its place in the source.
        schema: the types of the columns, where they are known before rows are read.

    Raises:
        ValueError: no column can be told to be the texts; when they are read, that one of them is no text, or that
            there is none.
    """

    def __init__(
        self,
        source: str,
        rows: Callable[[list[str] | None], Iterator[tuple[str, dict]]],
        schema: pyarrow.Schema | None = None,
    ):
        super().__init__(lambda: map(in_pieces, self.strings()))
        self.source, self._rows = source, rows
        self.column = find_column(source, lambda columns: (row for _, row in rows(columns)), schema)
        self._said = False

    def strings(self) -> Iterator[str]:
        """Each text as one."""
        kept, left_out = 0, 0
        for place, row in self._rows([self.column]):
            if is_text(row.get(self.column), self.column, f"{self.source}: {place}"):
                kept += 1
                yield row[self.column]
            else:
                left_out += 1
        if not kept:
            raise ValueError(f"{self.source} holds no text.")
        if left_out and not self._said:
            _say(f"{self.source}: {left_out} rows have no text in the column {self.column!r} and are left out.")
            self._said = True


def in_pieces(text: str) -> Iterator[str]:
    """A text as the strings that it is made of."""
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def read_file(source: str, path: Path) -> Texts:
    """The texts of a file, by the ending of its name: `Rows`, or one.

    Raises:
        ValueError: it is missing, empty, or of a kind that cannot be read; also when the texts are read.
    """
    if not path.is_file():
        raise ValueError(f"{source} {'is not a file' if path.exists() else 'does not exist'}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{source} is empty.")
    suffix = path.suffix.lower()
    if suffix in (".txt", ".text", ".md", ".py"):
        return Texts(lambda: _document(source, path))
    readers = {".json": _json_rows, ".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if suffix not in readers:
        raise ValueError(f"{source}: cannot read {path.suffix!r}, only .txt, .text, .md, .py, {', '.join(readers)}.")
    schema = _parquet_schema(source, path) if suffix == ".parquet" else None
    return Rows(source, lambda columns: readers[suffix](source, path, columns), schema)


def _document(source: str, path: Path) -> Iterator[Iterator[str]]:
    if not any(map(str.strip, _decoded(source, path))):
        raise ValueError(f"{source} holds no text.")
    yield _decoded(source, path)


def find_column(
    source: str, rows: Callable[[list[str] | None], Iterator[dict]], schema: pyarrow.Schema | None = None
) -> str:
    """The column of texts: `text`, or else the only one that holds strings in the first rows, not all of them numbers,
    saying which it is.

    Args:
        source, rows, schema: as `Rows` has them, but of rows without their places. By a schema, no columns are read
            but those that may be the texts: others may hold what cannot be read here, such as sound.

    Raises:
        ValueError: there is none, or there are several.
    """
    kinds, candidates = {}, None
    if schema is not None:
        if "text" in schema.names:
            return "text"
        kinds = {field.name: set() if _holds_strings(field.type) else {str(field.type)} for field in schema}
        candidates = [name for name, kind in kinds.items() if not kind]
    for row in [] if candidates == [] else itertools.islice(rows(candidates), _SAMPLE):
        for name, value in row.items():
            kinds.setdefault(name, set()).update([] if value is None else [_kind(value)])
    if not kinds:
        raise ValueError(f"{source} holds no text.")
    if "text" in kinds:
        return "text"
    columns = [name for name, kind in kinds.items() if "str" in kind <= {"str", _NUMERAL}]
    if len(columns) != 1:
        held = "; ".join(f"{name!r} holds {' or '.join(sorted(kind)) or 'nothing'}" for name, kind in kinds.items())
        which = "several others hold" if columns else "no other holds"
        raise ValueError(f"{source} has no column 'text', and {which} text: {held}. Name the one to read 'text'.")
    _say(f"{source} has no column 'text': the texts are its column {columns[0]!r}, the only one that holds text.")
    return columns[0]


def _holds_strings(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(is_kind(kind) for is_kind in _STRINGS)


def _kind(value: object) -> str:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            float(value)
            return _NUMERAL
    return type(value).__name__


def is_text(value: object, column: str, place: str) -> bool:
    """Whether there is text in a row's column, and not nothing; raises a `ValueError` if there is something else."""
    if value is None:
        return False
    if not isinstance(value, str):
        raise ValueError(f"{place}: the column {column!r} holds {type(value).__name__} ({str(value)[:40]}), not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise ValueError(f"{place}: the column {column!r} holds {half}, half of a surrogate pair.") from None
    return bool(value.strip())


def name_errors(source: str, rows: Iterable) -> Iterator:
    """The rows of a library, whose errors there are of many kinds: a `ValueError` with source, place and cause."""
    count = 0
    try:
        for row in rows:
            yield row
            count += 1
    except Exception as error:
        raise ValueError(f"{source} cannot be read, after {count} rows: {find_cause(error)}") from error


def find_cause(error: BaseException) -> BaseException:
    """What was raised first: libraries wrap it into errors that do not tell."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _decoded(source: str, path: Path) -> Iterator[str]:
    """The characters of a file in UTF-8, line ends as they are; a byte order mark is none of them."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset, line, part = 0, 1, None
    with path.open("rb") as file:
        while part != b"":
            part = file.read(PIECE)
            if offset == 0:
                _refuse_utf_16(source, part)
            offset += len(part)
            try:
                text = decoder.decode(part, final=part == b"")
            except UnicodeDecodeError as error:
                bad, start = error.object, error.start
                line += bad.count(b"\n", 0, start)
                raise ValueError(
                    f"{source}: byte {offset - len(bad) + start} (in line {line}) is {bad[start : start + 1]!r}, which "
                    f"is not UTF-8 ({error.reason}). Mend it, or convert the file to UTF-8, such as with `iconv -f "
                    "LATIN1 -t UTF-8`."
                ) from None
            line += text.count("\n")
            if text:
                yield text


def _refuse_utf_16(source: str, beginning: bytes) -> None:
    # Without its mark, that of ASCII is UTF-8 as well, half of it NUL.
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or beginning.count(0) > len(beginning) / 4:
        raise ValueError(f"{source} looks like UTF-16 or UTF-32; convert it with `iconv -f UTF-16 -t UTF-8`.")


def _lines(source: str, path: Path) -> Iterator[str]:
    """With their ends."""
    rest = []
    for text in _decoded(source, path):
        *whole, last = text.split("\n")
        for line in whole:
            yield "".join([*rest, line, "\n"])
            rest = []
        rest.append(last)
    if any(rest):
        yield "".join(rest)


def _json_rows(source: str, path: Path, _) -> Iterator[tuple[str, dict]]:
    """An object per line, or an array of them."""
    wanted = 'Wanted is an object per line, such as {"text": "..."}, or one array of them.'
    begins = next((text for text in map(str.lstrip, _decoded(source, path)) if text), "")[:1]
    if begins == "[":
        try:
            rows = enumerate(json.loads("".join(_decoded(source, path))), 1)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"{source}: {place}: this is not JSON: {error.msg}. {wanted}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not JSON that can be read: {error}. {wanted}") from None
        places = ((f"row {number}", row) for number, row in rows)
    else:
        places = _json_lines(source, path, wanted)
    for place, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{source}: {place} holds {type(row).__name__}, not an object. {wanted}")
        yield place, row


def _json_lines(source: str, path: Path, wanted: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(source, path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            place = f"line {number}, column {error.colno}"
            raise ValueError(f"{source}: {place}: this is not JSON: {error.msg}. {wanted}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: line {number} is not JSON that can be read: {error}. {wanted}") from None
        yield f"line {number}", row


def _csv_rows(source: str, path: Path, _) -> Iterator[tuple[str, dict]]:
    """Cells that hold nothing are None."""
    reader = csv.reader(_lines(source, path), strict=True)
    try:
        first = next(reader, [])
        # Spreadsheets write empty columns, too, where there once was something.
        header = first[: max((number for number, name in enumerate(first, 1) if name), default=0)]
        if len(set(header)) < len(header):
            raise ValueError(f"{source}: several columns have the same name: {', '.join(header)}.")
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise ValueError(f"{source}: the columns {header[0]!r} are not parted by commas, which is wanted.")
        for cells in filter(None, reader):
            place = f"line {reader.line_num}"
            if len(cells) != len(first):
                raise ValueError(f"{source}: {place} has {len(cells)} cells, the header {len(first)}; quote commas.")
            if any(cells[len(header) :]):
                raise ValueError(f"{source}: {place} has cells in columns without a name; quote commas.")
            yield place, {name: cell or None for name, cell in zip(header, cells)}
    except csv.Error as error:
        raise ValueError(
            f"{source}: line {reader.line_num}: {error}. Wanted is CSV with commas, and with double quotes around text."
        ) from None


def _parquet_rows(source: str, path: Path, columns: list[str] | None) -> Iterator[tuple[str, dict]]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_SAMPLE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    # Of values that Python has not, such as times of the year 10000, it is no error of Arrow's.
    except Exception as error:
        raise ValueError(f"{source} is not Parquet that can be read, after {number} rows: {error}") from None


def _parquet_schema(source: str, path: Path) -> pyarrow.Schema:
    try:
        return pyarrow.parquet.read_schema(path)
    except Exception as error:
        raise ValueError(f"{source} is not Parquet that can be read: {error}") from None
