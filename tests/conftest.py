# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Tests need no network and must not wait for one."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
