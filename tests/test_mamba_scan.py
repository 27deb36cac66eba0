# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The rival that the comparison trains is transformers' Mamba: same logits, same gradients, in float32 rounding."""

import copy

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from mamba_scan import compile_mamba_for_cpu


@pytest.fixture
def compiled(monkeypatch):
    # Undone after the test.
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", modeling_mamba.mamba_selective_scan)
    return compile_mamba_for_cpu


def make_mamba(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 2, "state_size": 5}
    model = MambaForCausalLM(MambaConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_and_gradients(model, ids):
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    return outputs.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("steps", [2, 32, 33, 71])  # the states are kept every 32 steps
def test_logits_and_gradients_equal_those_of_transformers(compiled, steps):
    model, ids = make_mamba(), torch.randint(31, (3, steps))
    exact, exact_gradients = loss_and_gradients(copy.deepcopy(model).double(), ids)
    compiled()
    logits, gradients = loss_and_gradients(model, ids)
    assert torch.allclose(logits, exact.float(), rtol=1e-4, atol=1e-5)
    for name, exact_gradient in exact_gradients.items():
        assert (gradients[name] - exact_gradient).abs().max() <= 1e-4 * exact_gradient.abs().max(), name


@torch.no_grad()
def test_generation_keeps_its_cache(compiled):
    model, ids = make_mamba(), torch.randint(31, (2, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    compiled()
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
