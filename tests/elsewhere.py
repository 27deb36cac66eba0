# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A machine that has torch and transformers, and neither this package nor numba nor a triton that works.

By default it is this interpreter with those three made impossible to import. Where LRCSSM_SECOND_PYTHON names the
interpreter of an environment into which nothing else was installed, as `.ci/run` makes one, it is that.
"""

import os
import subprocess
import sys
from pathlib import Path


_BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lrcssm_hf", "numba", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run_elsewhere(script: str, *arguments, modules_cache: Path, **variables: str) -> subprocess.CompletedProcess:
    """The script's result, run in `modules_cache`, where transformers also puts the code of the models it loads."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"HF_MODULES_CACHE": str(modules_cache), **variables}
    python = os.environ.get("LRCSSM_SECOND_PYTHON", sys.executable)
    command = [python, "-c", _BLOCK + script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=modules_cache, stdin=subprocess.DEVNULL
    )
