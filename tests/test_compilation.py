# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""torch.compile and torch.export take the models whole, as one graph, and what comes out computes the same.

The models have one block: what is slow here is compiling, and every block is compiled again.
"""

import io

import pytest
import torch

from lrcssm_hf import LrcSSMForSequenceClassification
from lrcssm_hf.host import CACHE
from tiny_models import make_model, pad, random_ids


VARIANTS = {"gated": {}, "paper": {"block_type": "paper"}, "input-dependent": {"state_dependence": "input"}}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch._dynamo.reset()


@pytest.fixture(params=VARIANTS)
def model(request):
    return make_model(num_hidden_layers=1, **VARIANTS[request.param])


def padded_documents():
    """Rows of different lengths, padded on the left, with a second document in some."""
    ids, mask = pad(random_ids(4, 23), "left")
    positions = (torch.arange(23) - 17).where(torch.arange(23) >= 17, mask.cumsum(1) - 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


# --- torch.compile --------------------------------------------------------------------------------------------------


def assert_trains_the_same(model, inputs, **options):
    parameters = list(model.train().parameters())
    compiled = torch.compile(model, fullgraph=True, **options)
    losses = [forward(**inputs, labels=inputs["input_ids"]).loss for forward in (model, compiled)]
    assert torch.allclose(losses[1], losses[0], atol=1e-5)
    expected, gradients = (torch.autograd.grad(loss, parameters) for loss in losses)
    for gradient, reference in zip(gradients, expected):
        assert torch.allclose(gradient, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inputs", [{"input_ids": random_ids(4, 23)}, padded_documents()], ids=["plain", "padded"])
def test_a_compiled_training_step_is_one_graph(model, inputs):
    assert_trains_the_same(model, inputs, backend="aot_eager")


@pytest.mark.slow
def test_a_training_step_compiled_by_inductor():
    assert_trains_the_same(make_model(num_hidden_layers=1), padded_documents())


@torch.no_grad()
def test_a_compiled_model_continues_from_its_cache(model):
    ids = random_ids(4, 23)
    expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(ids[:, :20], use_cache=True)
    pieces = [outputs.logits]
    for step in range(20, 23):
        outputs = compiled(ids[:, step : step + 1], cache=outputs[CACHE], use_cache=True)
        pieces.append(outputs.logits)
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=2e-5)


@torch.no_grad()
def test_a_compiled_model_reads_rows_of_documents_of_any_number():
    model = make_model(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for starts in ([0, 4, 23], [0, 9], [0, 1, 13, 30, 40]):
        inputs = {"input_ids": random_ids(1, starts[-1]), "cu_seq_lens_q": torch.tensor(starts)}
        assert torch.allclose(compiled(**inputs, use_cache=False).logits, model(**inputs).logits, atol=2e-5)


# --- torch.export ---------------------------------------------------------------------------------------------------


def export(model, inputs, strict):
    """The exported program, saved and loaded, with batch and steps left open."""
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    inputs = {**inputs, "use_cache": False}
    program = torch.export.export(model, (), inputs, dynamic_shapes={**dynamic, "use_cache": None}, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@torch.no_grad()
def assert_exported_reads_any_shape(model, inputs, strict):
    exported = export(model, inputs, strict)
    for rows, length in ((4, 23), (2, 9), (12, 46)):
        other = {name: value.repeat(3, 2)[:rows, :length] for name, value in inputs.items()}
        assert torch.allclose(exported(**other, use_cache=False).logits, model(**other).logits, atol=2e-5)


def test_an_exported_model_reads_any_number_of_rows_and_steps(model):
    assert_exported_reads_any_shape(model, padded_documents(), strict=False)


def test_strict_export():
    assert_exported_reads_any_shape(make_model(num_hidden_layers=1), padded_documents(), strict=True)


def test_export_of_a_classifier_of_series():
    model = make_model(LrcSSMForSequenceClassification, num_channels=3, num_labels=2, num_hidden_layers=1)
    values, mask, deltas = torch.randn(4, 23, 3), pad(random_ids(4, 23), "right")[1], torch.rand(4, 23)
    inputs = {"input_values": values, "attention_mask": mask, "time_deltas": deltas}
    exported = export(model, inputs, strict=False)
    for rows, length in ((4, 23), (2, 9)):
        other = {name: value[:rows, :length] for name, value in inputs.items()}
        assert torch.allclose(exported(**other, use_cache=False).logits, model(**other).logits, atol=2e-5)


@torch.no_grad()
def test_export_of_patches():
    """Of a series without padding, whose length may be a multiple of the patches' or not."""
    sizes = {"num_channels": 3, "num_labels": 2, "num_hidden_layers": 1, "patch_length": 4}
    model = make_model(LrcSSMForSequenceClassification, **sizes)
    for exported_at in (23, 24):
        exported = export(model, {"input_values": torch.randn(4, exported_at, 3)}, strict=False)
        for length in (9, 16):
            values = torch.randn(2, length, 3)
            logits = exported(input_values=values, use_cache=False).logits
            assert torch.allclose(logits, model(input_values=values).logits, atol=2e-5)
