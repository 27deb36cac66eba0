# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What became of each test of test_transformers.py, for the table that scripts/conformance.py writes and its check."""

REFERENCE = "MambaTest"


class Outcomes:
    """A pytest plugin. `classes` maps the name of a test class to {test: (outcome, reason)}, the outcome being
    "passed", "skipped" or "failed". A test of several models counts as skipped if it is skipped for one of them."""

    def __init__(self):
        self.classes = {}

    def pytest_runtest_logreport(self, report):
        _, *class_name, test = report.nodeid.split("::")
        if not class_name:
            return
        tests = self.classes.setdefault(class_name[0], {})
        before, _ = tests.get(test, (None, None))
        if report.failed:
            tests[test] = ("failed", report.longreprtext.splitlines()[-1])
        elif report.skipped and before != "failed":
            tests[test] = ("skipped", report.longrepr[2].removeprefix("Skipped: "))
        elif before is None and report.when == "call":
            tests[test] = ("passed", "")

    def skipped_here_only(self) -> list[tuple[str, str, str]]:
        """The (class, test, reason) of LrcSSM's skipped tests that the reference does not skip."""
        reference = self.classes.get(REFERENCE, {})
        return [
            (class_name, test, reason)
            for class_name, tests in self.classes.items()
            for test, (outcome, reason) in tests.items()
            if outcome == "skipped" and test in reference and reference[test][0] != "skipped"
        ]
