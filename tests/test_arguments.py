# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Values out of range are refused by name, value and range."""

import argparse

import pytest

from arguments import Distinct, integer, number, seed, text


def read(capsys, words, **options):
    """The value, or what argparse says on leaving with status 2."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", **options)
    try:
        return parser.parse_args(["--x", *words]).x
    except SystemExit as ended:
        assert ended.code == 2
        return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("kind", "word", "expected"),
    [
        (integer(at_least=1), "3", 3),
        (integer(at_least=1), "0", "argument --x: must be at least 1, got 0"),
        (integer(at_least=1), "9" * 30, f"argument --x: must be at most 2147483647, got {'9' * 30}"),
        (integer(at_least=1), "9" * 5000, f"argument --x: must be a whole number, got '{'9' * 5000}'"),
        (integer(at_least=1), "²", "argument --x: must be a whole number, got '²'"),
        (integer(at_least=1), "1.5", "argument --x: must be a whole number, got '1.5'"),
        (number(at_least=0), "0", 0.0),
        (number(at_least=0), "-1", "argument --x: must be at least 0, got -1"),
        (number(at_least=0), "-0.5", "argument --x: must be at least 0, got -0.5"),
        (number(above=0), "1e-3", 1e-3),
        (number(above=0), "0", "argument --x: must be above 0, got 0"),
        (number(above=0, below=1), "1", "argument --x: must be below 1, got 1"),
        (number(above=0), "nan", "argument --x: must be a finite number, got nan"),
        (number(above=0), "1e999", "argument --x: must be a finite number, got 1e999"),
        (number(), "much", "argument --x: must be a number, got 'much'"),
        (seed, "-1", "argument --x: must be at least 0, got -1"),
        (text, "a b", "a b"),
        (text, " ", "argument --x: must not be empty, got ' '; leave the argument out for its default"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_values_are_read_or_refused_by_name(kind, word, expected, capsys):
    assert read(capsys, [word], type=kind) == expected


def test_a_value_is_not_given_twice(capsys):
    options = {"type": seed, "nargs": "+", "action": Distinct}
    assert read(capsys, ["1", "2"], **options) == [1, 2]
    assert read(capsys, ["1", "2", "1"], **options) == "argument --x: 1 is given twice"
