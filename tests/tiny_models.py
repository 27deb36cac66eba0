# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Models that are small enough to test, and padded batches for them."""

import contextlib

import pytest
import torch

from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM, modeling_lrcssm


def make_config(**changes):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
    return LrcSSMConfig(**{**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **changes})


def make_model(head=LrcSSMForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    model = head(make_config(**changes)).eval()
    # Larger weights than a fresh model's, so that tokens far back still matter to the logits.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def make_writer(seed=0, **changes):
    """A language model whose greedy text depends on what it has read: weights are large, and the output layer does not
    see what all hidden states have in common, by which the same few tokens would always win."""
    torch.manual_seed(seed)
    model = LrcSSMForCausalLM(make_config(**changes)).eval()
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    ids = random_ids(16, 20, seed=9) % model.config.vocab_size
    common = model.model(ids, use_cache=False, return_dict=True).last_hidden_state.mean((0, 1))
    weight = model.lm_head.weight
    weight.sub_(torch.outer(weight @ common, common) / common.dot(common))
    return model


def random_ids(rows, length, seed=0):
    return torch.randint(2, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


LENGTHS = (23, 1, 9, 16)


def pad(ids, side):
    """The first LENGTHS tokens of each row, padded to 23."""
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(23 - length, 23) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    return padded, mask


@contextlib.contextmanager
def without_memory():
    """In its context, models forget what their caches hold: a text that then stays the same shows nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_lrcssm, "read_state", lambda cache, layer_idx: (None, None))
        yield
