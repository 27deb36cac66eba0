# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""transformers' own tests of a model, on every LrcSSM and, to know what they ask of a recurrent model, on its Mamba."""

import json
import unittest
from pathlib import Path

import pytest
import torch
import upstream
from transformers import MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.auto import modeling_auto

from lrcssm_hf import (
    LrcSSMConfig,
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
)


upstream.install()

from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


TABLE = Path(__file__).parents[2] / "scripts" / "results" / "conformance.json"
CHANNELS = 5


@pytest.fixture(autouse=True)
def named_like_transformers_models(monkeypatch):
    """The mixins tell heads apart, and what labels they take, by the names that transformers has for its own models."""
    for mapping, name in {
        "MODEL_MAPPING_NAMES": "LrcSSMModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LrcSSMForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LrcSSMForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LrcSSMForSequenceModeling",
    }.items():
        monkeypatch.setitem(getattr(modeling_auto, mapping), "lrcssm", name)


class ModelTester:
    """A tiny configuration and inputs for it, with the attributes that the mixins read."""

    __test__ = False  # not a test class itself
    batch_size, seq_length = 13, 7
    vocab_size, hidden_size, num_hidden_layers = 99, 32, 2
    is_training = True

    def __init__(self, config_class, options):
        self.config_class = config_class
        self.options = options

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        return self.config_class(**sizes, pad_token_id=98, **self.options)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        if "num_channels" in self.options:
            inputs = {"input_values": floats_tensor((*shape, self.options["num_channels"]))}
        else:
            inputs = {"input_ids": ids_tensor(shape, self.vocab_size)}
        # Row i has i + 1 steps, the others are padding.
        return self.get_config(), {**inputs, "attention_mask": torch.ones(shape, dtype=torch.long).tril()}


def skipped(reason):
    """In place of a mixin's test that cannot apply."""

    @unittest.skip(reason)
    def test(self):
        raise NotImplementedError

    return test


class ModelTests(ModelTesterMixin):
    """What the classes below have in common."""

    has_attentions = False
    config_class = LrcSSMConfig
    options = {}
    # Of transformers 5.24.
    test_bc_cache_name_forward = skipped(
        "wants a warning at the cache's older names, which are taken as well here, and asks a recurrent cache for its "
        "length, at which transformers' Mamba fails too"
    )

    def setUp(self):
        self.model_tester = ModelTester(self.config_class, self.options)

    def test_config(self):
        common = ["hidden_size", "num_hidden_layers"]
        ConfigTester(self, self.config_class, common_properties=common, hidden_size=37).run_common_tests()


class TrainingTests(TrainingTesterMixin):
    model_tester = None  # abstract there; set by setUp

    def _get_trainable_model_class(self):
        return self.all_model_classes[-1]  # The others may be without a loss.


class MambaTest(ModelTests, GenerationTesterMixin, TrainingTests, unittest.TestCase):
    all_model_classes = (MambaModel, MambaForCausalLM)
    config_class = MambaConfig


class LrcSSMModelTest(ModelTests, unittest.TestCase):
    all_model_classes = (LrcSSMModel,)


class LrcSSMForCausalLMTest(ModelTests, GenerationTesterMixin, TrainingTests, unittest.TestCase):
    all_model_classes = (LrcSSMForCausalLM,)


class LrcSSMForSequenceClassificationTest(ModelTests, TrainingTests, unittest.TestCase):
    all_model_classes = (LrcSSMForSequenceClassification,)

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        ids = torch.arange(batch_size * seq_length).view(batch_size, seq_length) % vocab_size
        return {"input_ids": ids, "labels": torch.arange(batch_size) % 2}


class LrcSSMForSequenceModelingTest(ModelTests, TrainingTests, unittest.TestCase):
    all_model_classes = (LrcSSMForSequenceModeling,)
    options = {"num_labels": ModelTester.vocab_size}  # The training mixin's labels are tokens.


class LrcSSMPaperBlockTest(ModelTests, GenerationTesterMixin, TrainingTests, unittest.TestCase):
    all_model_classes = (LrcSSMModel, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling, LrcSSMForCausalLM)
    options = {"block_type": "paper"}


class LrcSSMSeriesTest(ModelTests, TrainingTests, unittest.TestCase):
    all_model_classes = (LrcSSMModel, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling)
    options = {"num_channels": CHANNELS, "num_labels": CHANNELS}
    test_inputs_embeds_matches_input_ids = skipped("a series has no ids; `test_inputs_embeds` takes its values instead")
    test_load_with_mismatched_shapes = skipped("another vocabulary makes the mismatch, and a series has none")
    test_resize_tokens_embeddings = skipped("a series has no vocabulary")
    test_resize_embeddings_untied = test_resize_tokens_embeddings
    test_resize_embeddings_untied_no_reinit_on_post_init = test_resize_tokens_embeddings

    def _get_model_modality(self):
        return "text"  # The training mixin makes no other batches; this one is made below.

    def _create_text_training_batch(self, batch_size, seq_length, vocab_size):
        steps = torch.arange(seq_length + 1) / torch.arange(2, 2 + CHANNELS).unsqueeze(1)
        series = steps.sin().T.expand(batch_size, -1, -1)
        return {"input_values": series[:, :-1], "labels": series[:, 1:]}

    def test_inputs_embeds(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        values = inputs.pop("input_values")
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            embeds = model.get_input_embeddings()(values)
            with torch.no_grad():
                expected = model(input_values=values, **inputs)[0]
                torch.testing.assert_close(model(inputs_embeds=embeds, **inputs)[0], expected)

    def test_model_get_set_embeddings(self):
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIs(model.get_input_embeddings(), model.base_model.encoder)
            encoder = torch.nn.Linear(CHANNELS, self.model_tester.hidden_size)
            model.set_input_embeddings(encoder)
            self.assertIs(model.base_model.encoder, encoder)


class LrcSSMPaperSeriesTest(LrcSSMSeriesTest):
    options = {**LrcSSMSeriesTest.options, "block_type": "paper"}
    test_enable_input_require_grads_with_gradient_checkpointing = skipped(
        "the input layer is an MLP, and the gradient is looked for in a `weight` of its own"
    )


def test_every_skip_that_mamba_does_not_have_is_in_the_table(request):
    skips = request.config.pluginmanager.get_plugin("outcomes").skipped_here_only()
    listed = {(skip["class"], skip["test"]) for skip in json.loads(TABLE.read_text())["skips"]}
    unlisted = [skip for skip in skips if skip[:2] not in listed]
    assert not unlisted, f"Look into these, then run scripts/conformance.py to list them: {unlisted}"
