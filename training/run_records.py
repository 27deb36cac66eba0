# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Records of finished runs: a JSON file for each, by which a run is known not to be needed again."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType


def read_record(path: Path, wanted: dict[str, type | UnionType]) -> dict:
    """A record, which has these names with values of these types.

    Raises:
        ValueError: the file is no such record, as one that was cut or edited.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no names and values")
        for name, kind in wanted.items():
            if name not in record or not isinstance(record[name], kind):
                raise ValueError(f"it has no {name!r} of type {getattr(kind, '__name__', kind)}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the record of a run: {error}. Remove it; the run is made again.") from error
    return record
