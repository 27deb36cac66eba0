# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""pretrain.py under FSDP on CPUs, to be started by `accelerate launch` in its place on machines without GPUs.

Accelerate shards models on GPUs only, though gloo and torch do so on CPUs too. Here its state is told that these CPU
processes are FSDP's; all else is its own code.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import pretrain


plain_init = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **options):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    assert os.environ.get("ACCELERATE_USE_FSDP") == "true", "the configuration does not ask for FSDP"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState.__init__ = init
    pretrain.main()
