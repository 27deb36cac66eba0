# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Files each of which is there whole or not at all, whenever a script is stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


# Of what is not whole yet: a name that nobody else gives a file, so that what a killed script leaves can be removed.
PARTIAL = ".lrcssm-partial-"


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved into this one when all of them are written."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as partial:
        yield Path(partial)
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)


def remove_partial(folder: Path) -> None:
    """What a script that was killed while it wrote or removed something has left."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """The file with this text, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_files(path.parent) as partial:
        (partial / path.name).write_text(text, encoding="utf-8")
