# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Several processes on CPUs without MPI.

`accelerate launch --cpu --num_processes N` starts N processes through mpirun only; without it, it starts one, sets
MASTER_ADDR, and does not tell that one of the others (accelerate.utils.launch.prepare_simple_launcher_cmd_env).
"""

import os
import sys

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser


def start_missing_processes() -> None:
    """Where accelerate was asked for several CPU processes and started one, become torchrun with all of them."""
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    is_alone = not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if not (is_cpu and is_alone and "MASTER_ADDR" in os.environ):
        return
    # MASTER_ADDR says that there were to be several; how many, only the launcher's command line or configuration.
    words = psutil.Process().parent().cmdline()
    launch = next((i for i, word in enumerate(words) if word.endswith(("launch", "launch.py"))), None)
    if launch is None:
        return print("accelerate started one CPU process of several; use torchrun for the others.", file=sys.stderr)
    options, _ = launch_command_parser().parse_known_args(words[launch + 1 :])
    file = options.config_file or default_config_file
    if os.path.isfile(file):
        configuration = load_config_from_file(file)
        options.num_processes = options.num_processes or configuration.num_processes
        options.num_machines = options.num_machines or configuration.num_machines
    if (options.num_machines or 1) > 1:
        raise SystemExit(
            f"error: accelerate starts no CPU processes on {options.num_machines} machines; start each with `torchrun "
            f"--nnodes {options.num_machines} ...` and ACCELERATE_USE_CPU=true."
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*torchrun, f"--nproc_per_node={options.num_processes}", *sys.argv])
