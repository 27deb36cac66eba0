# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The marks that transformers puts on its tests, and the record of their outcomes."""

from outcomes import Outcomes


MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: as in transformers")
    config.pluginmanager.register(Outcomes(), "outcomes")
