# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Several processes on CPUs without MPI.

`accelerate launch --cpu --num_processes N` starts N processes through mpirun only; without it, it starts one, sets
MASTER_ADDR, and does not tell that one of the others (accelerate.utils.launch.prepare_simple_launcher_cmd_env).
"""

import os
import sys

import psutil
from accelerate.commands.launch import launch_command_parser


def start_missing_processes() -> None:
    """Where accelerate was asked for several CPU processes and started one, become torchrun with all of them."""
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    is_alone = not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if not (is_cpu and is_alone and "MASTER_ADDR" in os.environ):
        return
    launcher = psutil.Process().parent().cmdline()
    first = next((i for i, word in enumerate(launcher) if word.startswith("-") and word != "-m"), None)
    if first is None or "launch" not in " ".join(launcher[:first]):
        return
    options, _ = launch_command_parser().parse_known_args(launcher[first:])
    if (options.num_machines or 1) > 1 or (options.num_processes or 1) < 2:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*torchrun, f"--nproc_per_node={options.num_processes}", *sys.argv])
