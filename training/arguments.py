# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What values the scripts' arguments can have: for `type=` and `action=` of argparse, which names the argument, the
value and what is wanted, and exits with status 2.

    parser.add_argument("--weight_decay", type=number(at_least=0))
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(at_least: int, at_most: int = 2**31 - 1) -> Callable[[str], int]:
    """Whole numbers in this range."""

    def read(text: str) -> int:
        value = _convert(int, "a whole number", text)
        _require(value >= at_least, f"at least {at_least}", text)
        _require(value <= at_most, f"at most {at_most}", text)
        return value

    return read


def number(
    *, above: float | None = None, at_least: float | None = None, below: float | None = None
) -> Callable[[str], float]:
    """Finite numbers in this range."""

    def read(text: str) -> float:
        value = _convert(float, "a number", text)
        _require(math.isfinite(value), "a finite number", text)
        _require(above is None or value > above, f"above {above}", text)
        _require(at_least is None or value >= at_least, f"at least {at_least}", text)
        _require(below is None or value < below, f"below {below}", text)
        return value

    return read


def text(value: str) -> str:
    """Of a name or path: not empty, as a variable that is not set makes it."""
    if not value.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {value!r}; leave the argument out for its default")
    return value


# Of random numbers. numpy takes 32 bits, and processes add their index to it.
seed = integer(at_least=0)


class Distinct(argparse.Action):
    """Several values, none of them twice."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if values.count(value) > 1:
                raise argparse.ArgumentError(self, f"{value} is given twice")
        setattr(namespace, self.dest, values)


def _convert(kind: type, wanted: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}") from None


def _require(is_right: bool, wanted: str, text: str) -> None:
    if not is_right:
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
