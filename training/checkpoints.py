# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a training run: there whole or not at all, the last few kept, and proved intact before they are used.

A checkpoint is a folder `checkpoint-STEP` of what training_state.py writes, and `manifest.json`, written last: the
time, and size and SHA-256 of every other file. It has another name until all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import signal
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.utils.sha import sha_fileobj

from training_state import SUFFIXES
from whole_files import PARTIAL, write_whole


MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**24  # bytes


def save_checkpoint(
    accelerator: Accelerator, folder: Path, step: int, keep: int, write: Callable[[Path], None]
) -> None:
    """Has `write` fill `folder/checkpoint-STEP`, and then removes all but the last `keep` checkpoints.

    To be called by all processes, which share the folder; all of them write.

    Raises:
        OSError: it could not be written, in any process; what was there before is as it was.
    """
    partial, final = folder / f"{PARTIAL}checkpoint-{step}", folder / f"checkpoint-{step}"
    try:
        with _together(accelerator):
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                # Not its parents: an output folder that has gone is not to come back empty.
                partial.mkdir()
        with _together(accelerator):
            write(partial)
        with _together(accelerator):
            if accelerator.is_main_process:
                _finish(partial, final)
                others = [path for path in _checkpoints(folder) if path != final and _manifest(path) is not None]
                for old in others[keep - 1 :]:
                    _remove(old)
    except OSError as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint-{step} could not be written to {folder}: {error}") from error


def find_checkpoint(accelerator: Accelerator, folder: Path, name: str) -> Path | None:
    """The checkpoint of that path, or for "latest" the last one in the folder that is intact, saying which are not.

    None where there is no checkpoint yet, so that a run that is started again and again may always ask for the latest.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    found = [None]
    if accelerator.is_main_process:
        paths = _checkpoints(folder) if name == "latest" else [Path(name)]
        if not paths:
            print(f"There is no checkpoint in {folder} yet: the run begins.", flush=True)
            found = ["none"]
        for path in paths:
            problem = find_damage(path)
            if problem is None:
                found = [path]
                break
            print(f"{path} is not used: {problem}.", flush=True)
    (found,) = broadcast_object_list(found)
    if found == "none":
        return None
    if found is None:
        where = f"latest: there is no checkpoint in {folder} that can be used" if name == "latest" else repr(name)
        wrong = "" if name == "latest" else " is not a checkpoint that can be used"
        raise ValueError(f"--resume_from_checkpoint {where}{wrong}.")
    return found


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads nothing but the plain files that are in its folder."""
    try:
        files = {path.name: path for path in checkpoint.iterdir()}
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if foreign := sorted(name for name in files if not name.endswith(SUFFIXES)):
        return (
            f"it holds {foreign[0]!r}, and a checkpoint is only JSON and safetensors: other files, such as version 0.1 "
            "wrote, could run code when they are read; remove it"
        )
    manifest = _manifest(checkpoint)
    if manifest is None:
        return f"it has no readable {MANIFEST}"
    del files[MANIFEST]
    for name in sorted(files.keys() | manifest["files"].keys()):
        if name not in files:
            return f"{name!r} is not in it"
        if name not in manifest["files"]:
            return f"{name!r} is not in its {MANIFEST}"
        size, digest = manifest["files"][name]
        try:
            if _size(files[name]) != size or _digest(files[name]) != digest:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def require_shared(accelerator: Accelerator, folder: Path) -> None:
    """Raises a `ValueError` in all processes, which may be on several machines, unless all of them see the folder."""
    token = folder / f"{PARTIAL}{uuid.uuid4().hex}"
    (token,) = broadcast_object_list([token])
    if accelerator.is_main_process:
        token.mkdir()
    accelerator.wait_for_everyone()
    missing = [process for process, sees in gather_object([(accelerator.process_index, token.exists())]) if not sees]
    if accelerator.is_main_process:
        token.rmdir()
    if missing:
        raise ValueError(
            f"--output_dir {str(folder)!r} is not the same folder in the processes {missing}, whose shares of the "
            "checkpoints would be lost; name one that all machines share."
        )


class StopSignals:
    """In its context, SIGTERM and Ctrl-C do not interrupt but are remembered as `received`, so that a run can stop
    between two steps. The second of them does interrupt."""

    def __enter__(self) -> StopSignals:
        self.received = None
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        self.received = signal.Signals(number)
        self.__exit__()


@contextlib.contextmanager
def _together(accelerator: Accelerator):
    """Waits for all processes, and raises in all of them what was raised in any, as an `OSError`."""
    failure = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    # Whatever it is, the others wait; what torch's distributed checkpoints raise is no `Exception`.
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
    failures = [each for each in gather_object([failure]) if each is not None]
    if failures:
        raise OSError(failures[0])


def _finish(partial: Path, final: Path) -> None:
    """Has all files on the disk before the folder gets its name."""
    files = sorted(partial.iterdir())
    sizes = {path.name: [_size(path), _digest(path)] for path in files}
    # Later than the others', also where this machine's clock is behind that of the last one.
    latest = max((_written(path) for path in _checkpoints(final.parent)), default=0.0)
    manifest = {"time": max(time.time(), latest + 0.001), "files": sizes}
    write_whole(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for path in [*files, partial / MANIFEST, partial]:
        _sync(path)
    old = None
    if final.exists():
        old = final.rename(final.with_name(f"{PARTIAL}{final.name}-old"))
    partial.rename(final)
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no way to.
        return
    # Windows flushes only what may be written.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Under another name, so that nothing half removed is taken for a checkpoint."""
    gone = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}-removed")
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The last written first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted(found, key=_written, reverse=True)


def _written(checkpoint: Path) -> float:
    """When, by the manifest, or the folder's own time where that cannot be read."""
    manifest = _manifest(checkpoint)
    return checkpoint.lstat().st_mtime if manifest is None else manifest["time"]


def _manifest(checkpoint: Path) -> dict | None:
    path = checkpoint / MANIFEST
    try:
        if _size(path) > LARGEST_MANIFEST:
            return None
        manifest = json.loads(path.read_text(encoding="utf-8"))
        is_right = isinstance(manifest["time"], float) and math.isfinite(manifest["time"])
        for size, digest in manifest["files"].values():
            is_right = is_right and type(size) is int and isinstance(digest, str)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return manifest if is_right else None


def _size(path: Path) -> int:
    """Of a plain file: raises an `OSError` for a link, a device or a pipe, which may lead anywhere or never end."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    return status.st_size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()
