# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""transformers' own test base, as of the installed version.

It is no part of the installed package but of its source distribution, which `fetch` takes from the package index once
per version. `install` makes it importable as `transformers_tests`, a name that does not meet this repository's `tests`.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest


PACKAGE = "transformers_tests"

# What the test base imports from folders that the source distribution leaves out: two mixins, which are then without
# tests, and values that every configuration must take.
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "architectures": ["SomeModel"],
            "dtype": "float16",
            "id2label": {0: "left", 1: "right", 2: "none"},
            "output_hidden_states": True,
            "problem_type": "regression",
            "return_dict": False,
        }
    },
}


def fetch(release: str) -> Path:
    """The folder that holds the test base of a transformers release, in the user's cache, where it stays.

    Raises:
        RuntimeError: the source distribution cannot be had, or holds no tests.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lrcssm-hf")
    folder = cache / f"transformers-{release}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        # pip, because it is configured for the index that this machine uses; an environment of uv's has none, but uv
        # does. It prepares metadata, but builds nothing.
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") else ["uv", "tool", "run", "pip"]
        command = [*pip, "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        command += ["--dest", scratch, f"transformers=={release}"]
        download = subprocess.run(command, capture_output=True, text=True)
        if download.returncode != 0:
            raise RuntimeError(
                f"The source distribution of transformers {release}, which holds its test base, could not be "
                f"downloaded; run these tests once with a package index in reach. pip said: {download.stderr.strip()}"
            )
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            inside = f"transformers-{release}/tests/"
            members = [member for member in file.getmembers() if member.name.startswith(inside)]
            file.extractall(scratch, members, filter="data")
        unpacked = Path(scratch, f"transformers-{release}")
        if not members:
            raise RuntimeError(
                f"{archive.name} holds no {inside}; install a release of transformers that ships its tests."
            )
        (unpacked / "tests").rename(unpacked / PACKAGE)
        (unpacked / PACKAGE / "__init__.py").touch()
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def install():
    """Make `transformers_tests` importable. Where it cannot be had, the test module that asks for it is skipped, but in
    CI it fails."""
    try:
        folder = fetch(version("transformers"))
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error), allow_module_level=True)
    sys.path.append(str(folder))
    for name, contents in ABSENT.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(contents)
        sys.modules[module.__name__] = module
