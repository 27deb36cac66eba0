# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Processes of a test, over gloo."""

import datetime
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, size: int, folder: Path) -> None:
    """Makes this process, of one thread, one of so many that meet in a folder."""
    torch.set_num_threads(1)
    # gloo would otherwise look up the machine's name, which need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    # Where one process fails, the others must not wait for it long.
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timeout, world_size=size, rank=rank)
