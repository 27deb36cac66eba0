# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Training in two processes over gloo, by DDP and by FSDP: what test_training_clients.py compares with one process.

A file of its own, because each process imports the file that its function is in.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lrcssm_hf import LrcSSMForSequenceModeling
from processes import join
from tiny_models import make_model, random_ids


LEARNING_RATE = 0.1


def language_model(**changes):
    """A model in training and a batch of four rows."""
    ids = random_ids(4, 23)
    return make_model(**changes).train(), {"input_ids": ids, "labels": ids}


def series_model():
    values = torch.randn(4, 23, 3, generator=torch.Generator().manual_seed(0))
    model = make_model(LrcSSMForSequenceModeling, num_channels=3, num_labels=3).train()
    return model, {"input_values": values, "labels": values.roll(-1, 1)}


def paper_model():
    return language_model(block_type="paper")


MAKERS = {"language": language_model, "series": series_model, "paper": paper_model}


def run(folder: Path) -> None:
    """Writes `{name}.ddp{rank}` with each process's gradients, `{name}.fsdp` with the weights after one step of SGD,
    and `{name}.wrapped` with the number of modules that FSDP sharded by themselves."""
    torch.multiprocessing.spawn(_train, args=(folder,), nprocs=2)


def _train(rank: int, folder: Path) -> None:
    join(rank, 2, folder)
    for name, make in MAKERS.items():
        model, batch = make()
        share = {key: value[rank::2] for key, value in batch.items()}
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        # A parameter without gradient is noticed by the step after.
        for _ in range(2):
            parallel.zero_grad()
            parallel(**share).loss.backward()
        save_file({key: value.grad for key, value in model.named_parameters()}, folder / f"{name}.ddp{rank}")

        model, _ = make()
        policy = fsdp2_prepare_auto_wrap_policy(
            FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"), model
        )
        for module in [module for module in model.modules() if policy(module)]:
            fully_shard(module)
        fully_shard(model)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        model(**share).loss.backward()
        optimizer.step()
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            save_file({key: value.clone() for key, value in weights.items()}, folder / f"{name}.fsdp")
            sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
            (folder / f"{name}.wrapped").write_text(str(len(sharded)))
    dist.destroy_process_group()
