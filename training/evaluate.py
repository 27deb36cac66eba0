# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Held-out loss of a saved language model: `python training/evaluate.py --model_name_or_path FOLDER`."""

from __future__ import annotations

import argparse
import inspect
import json

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lrcssm_hf  # noqa: F401  registers the model
from arguments import integer, text
from context_pieces import ContextPieces, add_context_argument
from free_memory import keep_freed_memory
from text_data import add_data_arguments, load_blocks, load_pretrained
from token_blocks import check_vocabulary


def use_compiled_mamba(model, accelerator: Accelerator) -> None:
    """On CPUs, where transformers' Mamba is a Python loop over time, has it run compiled."""
    if model.config.model_type == "mamba" and accelerator.device.type == "cpu":
        from mamba_scan import compile_mamba_for_cpu

        compile_mamba_for_cpu()


def model_inputs(model: PreTrainedModel, batch: dict[str, Tensor], pieces: ContextPieces) -> dict:
    """Arguments for this process's piece of a batch of blocks, `input_ids` and `position_ids` (B, T), whose texts are
    kept apart if the model can."""
    part = pieces.piece(batch["input_ids"].shape[1])
    inputs = {"input_ids": batch["input_ids"][:, part], "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = batch["position_ids"][:, part]
    if pieces.group is not None:
        inputs["context_parallel_group"] = pieces.group
    return inputs


@torch.no_grad()
def nats_per_token(
    model: PreTrainedModel,
    blocks: DataLoader,
    accelerator: Accelerator,
    pieces: ContextPieces,
    progress: bool = False,
) -> float:
    """Mean negative log-likelihood of the tokens of all blocks but each block's first."""
    training = model.training
    model.eval()
    losses = []
    bar = tqdm(blocks, desc="Evaluating", disable=not (progress and accelerator.is_main_process), leave=False)
    # A loader draws a seed when it begins; the random numbers of training are not to depend on that.
    with torch.random.fork_rng(devices=[]):
        for batch in bar:
            ids = batch["input_ids"]
            logits = model(**model_inputs(accelerator.unwrap_model(model), batch, pieces)).logits.float()
            part = pieces.piece(ids.shape[1])
            following = ids[:, part.start + 1 : part.stop + 1]
            logits = logits[:, : following.shape[1]].transpose(1, 2)
            loss = pieces.sum(F.cross_entropy(logits, following, reduction="none").sum(1))
            losses.append(pieces.gather(loss / (ids.shape[1] - 1)))
    model.train(training)
    # Where processes have to have as many blocks, the last of them are blocks from the front again.
    return torch.cat(losses)[: len(blocks.dataset)].double().mean().item()


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model_name_or_path", type=text, required=True, help="Folder or Hub name of a causal language model."
    )
    add_data_arguments(parser)
    parser.add_argument("--per_device_eval_batch_size", type=integer(at_least=1), default=16)
    add_context_argument(parser)
    args = parser.parse_args()
    try:
        tokenizer, model = (
            load_pretrained("--model_name_or_path", args.model_name_or_path, kind)
            for kind in (AutoTokenizer, AutoModelForCausalLM)
        )
        check_vocabulary(tokenizer, model.config.vocab_size)
        blocks = load_blocks(args, tokenizer)
        accelerator = Accelerator()
        pieces = ContextPieces(accelerator, args.context_parallel_size)
        pieces.check(model, args.block_size)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    use_compiled_mamba(model, accelerator)
    loader = DataLoader(blocks.validation, batch_size=args.per_device_eval_batch_size)
    model, loader = accelerator.prepare(model), pieces.prepare(loader)
    loss = nats_per_token(model, loader, accelerator, pieces, progress=True)
    accelerator.print(json.dumps({"nats_per_token": loss, "nats_per_byte": loss * blocks.tokens_per_byte}))


if __name__ == "__main__":
    main()
