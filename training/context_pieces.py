# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Sequences that are spread over several processes: which process reads which, and which piece of it."""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from arguments import integer


def add_context_argument(parser) -> None:
    """The flag, to a parser or group."""
    parser.add_argument(
        "--context_parallel_size",
        type=integer(at_least=1),
        default=1,
        help="Processes over which each sequence is spread, which then count as one device (default 1).",
    )


class ContextPieces:
    """Consecutive processes in groups of `size`, each of which shares its sequences: its first process has their first
    pieces.

    Attributes:
        group: this process's, or None where each process has whole sequences.
        num_readers: the number of groups, each of which reads sequences of its own.

    Raises:
        ValueError: the processes cannot be grouped so.
    """

    def __init__(self, accelerator: Accelerator, size: int):
        processes = accelerator.num_processes
        if processes % size:
            raise ValueError(f"--context_parallel_size {size} does not divide the number of processes, {processes}.")
        self.accelerator, self.size, self.num_readers = accelerator, size, processes // size
        self.group = None
        if size > 1:
            shape, names = (self.num_readers, size), ("data", "context")
            self.group = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)["context"].get_group()

    def check(self, model: PreTrainedModel, steps: int) -> None:
        """Raises a `ValueError` if the model cannot read pieces, or there are too few steps in a sequence."""
        if self.group is not None and "context_parallel_group" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"--context_parallel_size is for models of type lrcssm, not {model.config.model_type}.")
        if steps < self.size:
            raise ValueError(f"--block_size {steps} is too short for {self.size} pieces (--context_parallel_size).")

    def prepare(self, loader: DataLoader) -> DataLoader:
        """The loader as Accelerate prepares it, of the same sequences in all processes of a group.

        A checkpoint does not hold its sampler, whose order follows from the seed and the epoch.
        """
        accelerator = self.accelerator
        if self.group is None:
            return accelerator.prepare(loader)
        configuration = accelerator.dataloader_config
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=self.num_readers,
            process_index=accelerator.process_index // self.size,
            put_on_device=True,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            use_seedable_sampler=configuration.use_seedable_sampler,
            data_seed=configuration.data_seed,
        )

    def piece(self, steps: int) -> slice:
        """This process's steps of sequences of so many."""
        if self.group is None:
            return slice(0, steps)
        rank = self.group.rank()
        return slice(rank * steps // self.size, (rank + 1) * steps // self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of all pieces; in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """What each group has for its sequences (B,), which is the same in its processes, of all groups in order."""
        return self.accelerator.gather(values).view(self.num_readers, self.size, -1)[:, 0].flatten()
