# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Programs keep the memory that large tensors leave; elsewhere than on glibc nothing is done."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import free_memory


ROOT = Path(__file__).resolve().parents[1]
# Pages that the system had to find for five tensors of 64 MB, one after another. A few before them make room: blocks
# are aligned, for which the room that one of the same size leaves can be too small.
COUNT_PAGES = """
import resource, sys, torch
from free_memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_large_tensors_come_in_pages_that_are_there():
    pages = {}
    for word in ("keep", "default"):
        command = [sys.executable, "-c", COUNT_PAGES, word]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT / "training")
        pages[word] = int(result.stdout)
    assert pages["keep"] < 100 < 5 * 2**26 / 2**21 <= pages["default"], pages


@pytest.mark.parametrize("system", [("Linux", "musl"), ("Linux", ""), ("Darwin", ""), ("Windows", "")])
def test_nothing_is_done_where_it_is_not_glibc(system, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system[0])
    monkeypatch.setattr(platform, "libc_ver", lambda: (system[1], ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("a library was asked"))
    free_memory.keep_freed_memory()


def test_a_library_without_the_function_is_no_error(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())
    free_memory.keep_freed_memory()
