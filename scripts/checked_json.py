# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""JSON that a script relies on: read, and refused by file and field where it is not what it should be.

A kind says what a value must be: a type, `[kind]` for a list of one or more, `{str: kind}` for an object of one or
more, and `{"field": kind, ...}` for an object with these fields, beside others.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import UnionType


NUMBER = int | float
_WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", NUMBER: "a number"}
_WORDS |= {str | None: "a string or null", int | None: "a whole number or null"}


def read_text(path: Path) -> str:
    """Raises a `ValueError` where this is no file of UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; training/pretrain.py writes it.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_json(path: Path, kind: type | dict = dict) -> dict:
    """What the file holds, which must be of this kind; a `ValueError` names the file and the field that is not."""
    return parse_json(read_text(path), kind, str(path))


def parse_json(text: str, kind: type | dict, where: str) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    check_kind(content, kind, where)
    return content


def check_kind(content: object, kind: type | UnionType | list | dict, where: str) -> None:
    """Raises a `ValueError`, which begins with `where` and the field, unless the content is of the kind and its numbers
    are finite."""
    kind_of_whole = type(kind) if isinstance(kind, dict | list) else kind
    if not isinstance(content, kind_of_whole) or isinstance(content, bool):
        raise ValueError(f"{where} must be {_WORDS[kind_of_whole]}, got {content!r:.80}.")
    if isinstance(content, float) and not math.isfinite(content):
        raise ValueError(f"{where} must be finite, got {content}.")
    if kind_of_whole is kind:
        return
    if isinstance(kind, list):
        parts = dict.fromkeys(range(len(content)), kind[0])
    else:
        parts = dict.fromkeys(content, kind[str]) if str in kind else kind
        if missing := [name for name in parts if name not in content]:
            raise ValueError(f"{where} does not say {', '.join(missing)}.")
    if not parts:
        raise ValueError(f"{where} is empty.")
    for name, part in parts.items():
        check_kind(content[name], part, f"{where}: {name}")
