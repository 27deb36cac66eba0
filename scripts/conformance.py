# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' own tests on LrcSSM and on its Mamba and writes scripts/results/conformance.md and .json."""

import json
import platform
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "conformance" / "test_transformers.py"
RESULTS = ROOT / "scripts" / "results" / "conformance.md"
OUTCOMES = ("passed", "skipped", "failed")

sys.path.insert(0, str(TESTS.parent))

from outcomes import REFERENCE, Outcomes  # noqa: E402


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    outcomes = Outcomes()
    # The last test compares with the table that is about to be written.
    status = pytest.main(
        [str(TESTS), "-q", "--numprocesses=0", "--tb=short", "-k", "not in_the_table"], plugins=[outcomes]
    )
    if not outcomes.classes.get(REFERENCE):
        print("No test was run; nothing is written.", file=sys.stderr)
        return int(status) or 1
    counts = {
        class_name: Counter(outcome for outcome, _ in tests.values()) for class_name, tests in outcomes.classes.items()
    }
    record = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "classes": {
            class_name: {"collected": count.total(), **{name: count[name] for name in OUTCOMES}}
            for class_name, count in counts.items()
        },
        "skips": [
            {"class": class_name, "test": test, "reason": reason}
            for class_name, test, reason in outcomes.skipped_here_only()
        ],
    }
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    RESULTS.write_text(
        "\n\n".join(
            [
                "# transformers' own tests",
                f"Written by `python scripts/conformance.py` with {versions}. Mamba is transformers' own, for "
                "comparison; what needs a GPU or looks at attention is skipped for both. A test of several models "
                "counts as skipped if it is skipped for one of them.",
                table(
                    ["test class", "collected", *OUTCOMES],
                    [[class_name, *row.values()] for class_name, row in record["classes"].items()],
                ),
                "Skipped for LrcSSM, but not for Mamba:",
                table(["test class", "test", "reason"], [list(skip.values()) for skip in record["skips"]]),
            ]
        )
        + "\n",
        encoding="utf-8",
    )
    RESULTS.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
