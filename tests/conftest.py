# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Tests need no network but for transformers' own (`conformance`, fetched once), and must not wait for one; and no GPU:
without one, Triton's kernels are interpreted."""

import os

import torch


os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes of pytest's share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
if not torch.cuda.is_available():
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
