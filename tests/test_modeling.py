# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The models behave like every other transformers model: padding, caches, saving, options, and errors that help."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from lrcssm_hf import (
    LrcSSMConfig,
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
)
from lrcssm_hf.host import CACHE, checkpoint_activations
from lrcssm_hf.modeling_lrcssm import LrcSSMSteps
from tiny_models import LENGTHS, make_config, make_model, make_writer, pad, random_ids, without_memory


VARIANTS = {
    "gated": {},
    "gated, narrow state, no convolution": {"state_size": 20, "conv_kernel": 1},
    "gated, symmetric, sensory": {"elastance": "symmetric", "sensory_activation": "sigmoid", "elastance_input": False},
    "gated, input-dependent": {"state_dependence": "input"},
    "gated, input-dependent, symmetric": {"state_dependence": "input", "elastance": "symmetric"},
    "gated, torch, chunked": {"backend": "torch", "solver": "chunked"},
    "paper": {"block_type": "paper", "tie_word_embeddings": False},
    "paper, different widths": {"block_type": "paper", "state_size": 20, "tie_word_embeddings": False},
    "gru": {"cell": "gru"},
    "lstm, narrow state": {"cell": "lstm", "state_size": 20},
    "paper, mgu, sensory": {"cell": "mgu", "block_type": "paper", "sensory_activation": "sigmoid"},
    "paper, lstm": {"cell": "lstm", "block_type": "paper", "state_size": 20, "tie_word_embeddings": False},
}


@pytest.fixture(params=VARIANTS, ids=str)
def model(request):
    return make_model(**VARIANTS[request.param])


@pytest.fixture(params=VARIANTS, ids=str)
def writer(request):
    return make_writer(**VARIANTS[request.param])


@pytest.fixture
def ids():
    return random_ids(4, 23)


# --- Padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_leaves_no_trace(model, ids, side):
    padded, mask = pad(ids, side)
    logits = model(padded, attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        expected = model(ids[row : row + 1, :length]).logits[0]
        assert torch.allclose(logits[row][mask[row].bool()], expected, atol=2e-5)
        # What stands in the padding does not matter.
    again = model(padded + 7 * (1 - mask), attention_mask=mask).logits
    assert torch.equal(again, logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_generation_equals_one_by_one(writer, ids, side):
    padded, mask = pad(ids, side)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = writer.generate(padded, attention_mask=mask, **options)[:, 23:]
    uncached = writer.generate(padded, attention_mask=mask, use_cache=False, **options)[:, 23:]
    assert torch.equal(together, uncached)
    for row, length in enumerate(LENGTHS):
        alone = writer.generate(ids[row : row + 1, :length], **options)[0, length:]
        assert torch.equal(together[row], alone)
    assert len({tuple(row.tolist()) for row in together}) > 1, "the model ignores its prompt: this test shows nothing"


@torch.no_grad()
def test_the_texts_of_these_tests_are_others_without_memory(writer, ids):
    """Of every row, or a `generate` that drops the state would pass them."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    text = writer.generate(ids, **options)
    with without_memory():
        forgetful = writer.generate(ids, **options)
    assert (text != forgetful).any(1).all()
    assert all(len(set(row)) > 1 for row in text[:, 23:].tolist())


@torch.no_grad()
def test_padding_in_the_middle_and_after_a_cached_prompt(model, ids):
    """A ragged second turn: each row continues from its own last real token, wherever the padding was."""
    first, first_mask = pad(ids, "right")
    second, second_mask = pad(ids.flip(1), "left")
    cache = model(first, attention_mask=first_mask, use_cache=True)[CACHE]
    # The mask of both turns, as `generate` passes it.
    mask = torch.cat([first_mask, second_mask], 1)
    logits = model(second, attention_mask=mask, cache=cache).logits
    at_once = model(torch.cat([first, second], 1), attention_mask=mask).logits
    for row, length in enumerate(LENGTHS):
        dialogue = torch.cat([ids[row, :length], ids.flip(1)[row, :length]])[None]
        expected = model(dialogue).logits[0]
        assert torch.allclose(logits[row, 23 - length :], expected[length:], atol=2e-5)
        assert torch.allclose(at_once[row][mask[row].bool()], expected, atol=2e-5)


def test_padding_gets_no_gradient(ids):
    model = make_model()
    padded, mask = pad(ids, "right")
    embeds = model.get_input_embeddings()(padded).detach()
    embeds[mask == 0] = float("nan")
    embeds.requires_grad_()
    labels = padded.masked_fill(mask == 0, -100)
    model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
    assert (embeds.grad[mask == 0] == 0).all()
    assert (embeds.grad[0, :-1] != 0).any(-1).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


# --- Cache ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_in_pieces_equals_the_prompt_whole(model, ids):
    expected = model(ids).logits
    for cuts in ([1], [2, 3], [3, 7, 8, 20], range(1, 23)):
        cache, pieces = DynamicCache(config=model.config), []
        for first, last in zip([0, *cuts], [*cuts, 23]):
            outputs = model(ids[:, first:last], cache=cache, use_cache=True)
            cache = outputs[CACHE]
            pieces.append(outputs.logits)
        assert torch.allclose(torch.cat(pieces, 1), expected, atol=2e-5)


def cache_elements(cache):
    return sum(
        state.numel() for layer in cache.layers for states in (layer.conv_states, layer.recurrent_states)
        for state in states.values()
    )  # fmt: skip


@torch.no_grad()
def test_the_size_of_the_cache_does_not_depend_on_the_prompt(model, ids):
    config = model.config
    sizes = {cache_elements(model(ids[:, :length], use_cache=True)[CACHE]) for length in (1, 2, 5, 23)}
    window = 0 if config.block_type == "paper" else config.conv_kernel - 1
    states = 2 if config.cell == "lstm" else 1
    assert sizes == {4 * config.num_hidden_layers * config.state_size * (states + window)}


@torch.no_grad()
def test_generation_continues_from_a_returned_cache(writer, ids):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    first = writer.generate(ids, return_dict_in_generate=True, **options)
    # The last token was generated but not read yet; the next turn's prompt starts with it.
    turn, dialogue = (torch.cat([read, ids[:, :5]], 1) for read in (first.sequences[:, -1:], first.sequences))
    # With masks, because the text may hold the token by which `generate` would otherwise tell padding.
    continued = writer.generate(turn, attention_mask=torch.ones_like(turn), cache=first[CACHE], **options)
    expected = writer.generate(dialogue, attention_mask=torch.ones_like(dialogue), **options)
    assert torch.equal(continued[:, turn.shape[1] :], expected[:, first.sequences.shape[1] + 5 :])


@torch.no_grad()
def test_beam_search_and_sampling_do_not_depend_on_the_cache(writer, ids):
    beams = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": None}
    cached = writer.generate(ids, **beams)
    assert cached.shape == (8, 31)
    assert torch.equal(cached, writer.generate(ids, use_cache=False, **beams))
    torch.manual_seed(0)
    sampled = writer.generate(ids, max_new_tokens=5, do_sample=True, use_cache=True, eos_token_id=None)
    torch.manual_seed(0)
    assert torch.equal(
        sampled, writer.generate(ids, max_new_tokens=5, do_sample=True, use_cache=False, eos_token_id=None)
    )


@torch.no_grad()
def test_generation_from_embeddings(ids):
    model = make_writer()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(ids, **options)[:, 23:])


@torch.no_grad()
def test_generation_from_a_prompt_of_several_documents(ids):
    model = make_writer()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    positions = torch.cat([torch.arange(15), torch.arange(8)]).expand(4, -1)
    expected = model.generate(ids[:, 15:], **options)[:, 8:]
    assert torch.equal(model.generate(ids, position_ids=positions, **options)[:, 23:], expected)
    documents = (torch.arange(23) >= 15).long().expand(4, -1)
    assert torch.equal(model.generate(ids, seq_idx=documents, **options)[:, 23:], expected)
    ends = torch.tensor([0, 15, 23])
    assert torch.equal(model.generate(ids[:1], cu_seq_lens_q=ends, **options)[:, 23:], expected[:1])


@torch.no_grad()
def test_a_document_whose_first_step_is_masked_is_still_a_document(ids):
    model = make_model()
    mask, documents = torch.ones(4, 23, dtype=torch.long), (torch.arange(23) >= 15).long().expand(4, -1)
    mask[:, 14:17] = 0
    logits = model(ids, attention_mask=mask, seq_idx=documents).logits
    assert torch.allclose(logits[:, :14], model(ids[:, :14]).logits, atol=2e-5)
    assert torch.allclose(logits[:, 17:], model(ids[:, 17:]).logits, atol=2e-5)
    alone = model(ids[:1], attention_mask=mask[:1], cu_seq_lens_q=torch.tensor([0, 15, 23])).logits
    assert torch.allclose(alone, logits[:1], atol=2e-5)


def test_training_through_a_cache(ids):
    """Truncated backpropagation: the state passes from piece to piece with its gradient."""
    model = make_model().train()
    whole = torch.autograd.grad(model(ids).logits[:, 11:].square().sum(), model.model.layers[0].mixer.in_proj.weight)
    outputs = model(ids[:, :11], use_cache=True)
    second = model(ids[:, 11:], cache=outputs[CACHE], use_cache=True)
    pieces = torch.autograd.grad(second.logits.square().sum(), model.model.layers[0].mixer.in_proj.weight)
    assert torch.allclose(pieces[0], whole[0], rtol=1e-3, atol=1e-4)


# --- Documents in one row, and time ---------------------------------------------------------------------------------


@torch.no_grad()
def test_positions_that_restart_separate_documents(model, ids):
    positions = torch.cat([torch.arange(10), torch.arange(6), torch.arange(7)]).expand(4, -1)
    logits = model(ids, position_ids=positions).logits
    documents = [model(ids[:, first:last]).logits for first, last in ((0, 10), (10, 16), (16, 23))]
    assert torch.allclose(logits, torch.cat(documents, 1), atol=2e-5)
    padded, mask = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.ones(4, 26, dtype=torch.long)
    mask[:, :3] = 0
    positions = torch.cat([torch.zeros(4, 3, dtype=torch.long), positions], 1)
    assert torch.allclose(model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], logits, atol=2e-5)


@torch.no_grad()
def test_documents_do_not_leak_through_the_cache(model, ids):
    """A document starts shortly before the sequence is cut: the convolution's past must not reach behind it."""
    positions = torch.cat([torch.arange(11), torch.arange(12)]).expand(4, -1)
    expected = model(ids, position_ids=positions).logits
    mask = torch.ones(4, 23, dtype=torch.long)
    for cut in (11, 12, 13, 14, 16):
        for first_mask in (None, mask[:, :cut]):
            first = model(ids[:, :cut], position_ids=positions[:, :cut], attention_mask=first_mask, use_cache=True)
            cache = first[CACHE]
            second = model(ids[:, cut:], position_ids=positions[:, cut:], cache=cache)
            assert torch.allclose(second.logits, expected[:, cut:], atol=2e-5)


@pytest.mark.parametrize("state_dependence", ["full", "input"])
@torch.no_grad()
def test_no_time_means_no_change(state_dependence):
    model = make_model(LrcSSMModel, num_channels=3, conv_kernel=1, state_dependence=state_dependence)
    values = torch.randn(2, 20, 3)
    deltas = torch.rand(2, 20) + 0.5
    deltas[:, 7:12] = 0
    before = model(input_values=values[:, :7], time_deltas=deltas[:, :7], use_cache=True)[CACHE]
    state = before.layers[0].recurrent_states[0].clone()
    held = model(input_values=values[:, 7:12], time_deltas=deltas[:, 7:12], cache=before, use_cache=True)
    assert torch.equal(held[CACHE].layers[0].recurrent_states[0], state)
    cache = model(input_values=values, time_deltas=deltas, use_cache=True)[CACHE]
    kept = [step for step in range(20) if not 7 <= step < 12]
    expected = model(input_values=values[:, kept], time_deltas=deltas[:, kept], use_cache=True)[CACHE]
    assert torch.allclose(cache.layers[0].recurrent_states[0], expected.layers[0].recurrent_states[0], atol=1e-6)


# --- Saving and loading ---------------------------------------------------------------------------------------------

LOAD = """
import json, sys, torch, lrcssm_hf
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, auto = sys.argv[1:]
model = getattr(sys.modules["__main__"], auto).from_pretrained(folder)
with torch.no_grad():
    outputs = model(torch.arange(2, 40).reshape(2, 19))
print(json.dumps(outputs[0].tolist()))
"""


@pytest.mark.parametrize("block_type", ["gated", "paper"])
@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModel, LrcSSMModel),
        (AutoModelForCausalLM, LrcSSMForCausalLM),
        (AutoModelForSequenceClassification, LrcSSMForSequenceClassification),
    ],
)
def test_loading_in_a_fresh_process_gives_identical_logits(tmp_path, auto, head, block_type):
    model = make_model(head, block_type=block_type)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        expected = model(torch.arange(2, 40).reshape(2, 19))[0]
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), auto.__name__], capture_output=True, text=True, check=True
    )
    assert torch.equal(torch.tensor(json.loads(result.stdout)), expected)


def test_configuration_round_trip_and_registration(tmp_path):
    config = make_config(elastance="symmetric", time_constant_max=100)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LrcSSMConfig
    for field in LrcSSMConfig.__annotations__:
        assert getattr(loaded, field) == getattr(config, field), field
    assert type(AutoModel.from_config(config)) is LrcSSMModel
    assert type(AutoModelForCausalLM.from_config(config)) is LrcSSMForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is LrcSSMForSequenceClassification


def test_weights_are_tied_or_not(tmp_path):
    tied = make_model()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied.save_pretrained(tmp_path)
    assert LrcSSMForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (61, 32)
    untied = make_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# --- Options --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_hidden_states_and_kept_logits(model, ids):
    outputs = model(ids, output_hidden_states=True)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, outputs.logits)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert torch.allclose(model(ids, logits_to_keep=3).logits, outputs.logits[:, -3:], atol=1e-6)
    kept = torch.tensor([0, 5])
    assert torch.allclose(model(ids, logits_to_keep=kept).logits, outputs.logits[:, kept], atol=1e-6)
    as_tuple = model(ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.logits)
    padded, mask = pad(ids, "left")
    hidden = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[2:3, :9], output_hidden_states=True).hidden_states
    for ours, expected in zip(hidden, alone):
        assert torch.allclose(ours[2, 14:], expected[0], atol=2e-5)


def test_every_parameter_gets_a_gradient(model, ids):
    model.train()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(ids, use_reentrant):
    model = make_model().train()
    padded, mask = pad(ids, "right")
    model(padded, attention_mask=mask, labels=padded).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    model(padded, attention_mask=mask, labels=padded, use_cache=True).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_dropout_acts_in_training_only(ids):
    model = make_model(hidden_dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16_is_close_and_keeps_its_state_in_float32(model, ids):
    expected = model(ids).logits.softmax(-1)
    outputs = model.bfloat16()(ids, use_cache=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert (outputs.logits.float().softmax(-1) - expected).abs().max() < 0.1
    assert outputs[CACHE].layers[0].recurrent_states[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(ids).logits.isfinite().all()


def test_labels_may_be_ignored(ids):
    model = make_model()
    labels = ids.clone()
    labels[:, 10:] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :9].flatten(0, 1), ids[:, 1:10].flatten())
    assert torch.allclose(model(ids, labels=labels).loss, expected)


def test_the_papers_mlps_are_initialised_he_uniform():
    config = make_config(block_type="paper", num_channels=50, hidden_size=200, intermediate_size=200, num_labels=4)
    model = LrcSSMForSequenceClassification(config)
    for mlp in (model.model.encoder, model.model.layers[0].mlp, model.score):
        for layer in (mlp[0], mlp[2]):
            bound = (6 / layer.in_features) ** 0.5
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()


def test_the_input_dependent_recurrence_stays_in_float64():
    model = make_model(LrcSSMModel, state_dependence="input").double()
    embeds = torch.randn(1, 9, 32, dtype=torch.float64)
    first = model(inputs_embeds=embeds).last_hidden_state
    with torch.no_grad():
        model.layers[0].mixer.neurons.elastance_bias += 1e-9
    assert 0 < (model(inputs_embeds=embeds).last_hidden_state - first).abs().max() < 1e-7


def test_accelerate_can_move_a_batchs_steps_to_another_device():
    """As its hooks do between the layers of a model that is spread over devices."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    steps = send_to_device(LrcSSMSteps.of(mask, None, mask.clone(), None), "meta")
    assert isinstance(steps, LrcSSMSteps)
    assert all(tensor.device.type == "meta" for tensor in steps[:-1])


def test_loading_in_another_dtype_and_with_missing_weights(tmp_path, ids):
    model = make_model()
    model.save_pretrained(tmp_path)
    half = LrcSSMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    classifier = LrcSSMForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    weights, expected = (m.model.layers[0].mixer.neurons.currents.weight for m in (classifier, model))
    assert torch.equal(weights, expected)
    assert classifier(ids).logits.isfinite().all()
    model.resize_token_embeddings(70)
    assert model(ids).logits.shape[-1] == 70


@pytest.mark.parametrize("head", [LrcSSMForSequenceClassification, LrcSSMForSequenceModeling, LrcSSMModel])
@pytest.mark.parametrize("block_type", ["gated", "paper"])
@torch.no_grad()
def test_models_of_series_save_and_load(head, block_type, tmp_path):
    model = make_model(head, num_channels=3, num_labels=3, block_type=block_type)
    model.save_pretrained(tmp_path)
    values = torch.randn(2, 9, 3)
    assert torch.equal(head.from_pretrained(tmp_path)(input_values=values)[0], model(input_values=values)[0])


def test_time_constants_are_initialised_in_the_configured_range(ids):
    for elastance in ("asymmetric", "symmetric"):
        torch.manual_seed(0)
        config = make_config(elastance=elastance, time_constant_min=4, time_constant_max=100, state_size=500)
        model = LrcSSMModel(config)
        neurons = model.layers[0].mixer.neurons
        if elastance == "symmetric":
            shift = torch.nn.functional.softplus(neurons.elastance_shift)
            rest = torch.sigmoid(shift) - torch.sigmoid(-shift)
        else:
            rest = torch.sigmoid(neurons.elastance_bias)
        constants = 2 / rest
        assert constants.min() > 3.99 and constants.max() < 100.1
        assert 15 < constants.median() < 27  # the geometric mean of the range is 20


@torch.no_grad()
def test_state_tracking_neurons_count():
    """While the elastance is 1, each goes round through as many states as its threshold says, and does not tire."""
    torch.manual_seed(0)
    config = make_config(initialization="state_tracking", state_size=200)
    neurons = LrcSSMModel(config).layers[0].mixer.neurons
    neurons.elastance_bias.fill_(5.0)
    states, _ = neurons(torch.zeros(1, 5000, 200), None, LrcSSMSteps(None))
    states, periods = states[0, -200:], (neurons.activation_shift + 2.5).long()
    assert periods.unique().tolist() == [2, 3, 4]
    for k, period in enumerate(periods):
        assert (states[period:, k] - states[:-period, k]).abs().max() < 1e-3
        assert states[:, k].diff().abs().max() > 0.5
    # With the default start they come to rest.
    resting, _ = make_model(LrcSSMModel).layers[0].mixer.neurons(torch.zeros(1, 5000, 32), None, LrcSSMSteps(None))
    assert resting[0, -200:].diff(dim=0).abs().max() < 1e-3


# --- The other heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_type", ["gated", "paper"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_sequence_classification_of_padded_series(block_type, pooling):
    options = {"num_channels": 5, "num_labels": 3, "block_type": block_type, "pooling": pooling}
    model = make_model(LrcSSMForSequenceClassification, **options)
    values = torch.randn(2, 14, 5)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    values[1, 9:] = float("nan")
    outputs = model(input_values=values, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert outputs.logits.shape == (2, 3)
    expected = model(input_values=values[1:, :9]).logits
    assert torch.allclose(outputs.logits[1:], expected, atol=2e-5)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_sequence_classification_of_tokens(ids):
    model = make_model(LrcSSMForSequenceClassification, num_labels=2)
    padded, mask = pad(ids, "left")
    outputs = model(padded, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0]))
    assert torch.allclose(outputs.logits[2:3], model(ids[2:3, :9]).logits, atol=2e-5)
    assert outputs.loss.isfinite()


def test_sequence_modeling_values_and_classes():
    values = torch.randn(2, 14, 3)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    model = make_model(LrcSSMForSequenceModeling, num_channels=3, num_labels=3)
    outputs = model(input_values=values, attention_mask=mask, labels=values.roll(-1, 1))
    kept = mask.bool()
    expected = (outputs.logits[kept] - values.roll(-1, 1)[kept]).square().mean()
    assert torch.allclose(outputs.loss, expected)
    classes = torch.randint(0, 3, (2, 14))
    loss = model(input_values=values, attention_mask=mask, labels=classes).loss
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(outputs.logits[kept], classes[kept]))
    with pytest.raises(ValueError, match="labels"):
        model(input_values=values, labels=values[..., :2])


def test_the_gated_model_learns(ids):
    """A few steps on one batch: the loss falls far below that of guessing."""
    torch.manual_seed(0)
    model = LrcSSMForCausalLM(make_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": -1},
        {"state_size": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": 0},
        {"conv_kernel": 0},
        {"num_channels": 0},
        {"solver": "exact"},
        {"backend": "gpu"},
        {"block_type": "transformer"},
        {"sensory_activation": "relu"},
        {"elastance": "none"},
        {"state_dependence": "none"},
        {"pooling": "max"},
        {"time_constant_min": 1.0},
        {"time_constant_max": 2.1},
        {"hidden_dropout": 1.0},
        {"layer_types": ["linear_attention"]},
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        {"hidden_act": "wobbly"},
        {"norm_eps": 0.0},
        {"initializer_range": -1.0},
        {"initialization": "random"},
        {"initialization": "state_tracking", "elastance": "symmetric"},
        {"initialization": "state_tracking", "state_dependence": "input"},
        {"cell": "elman"},
        {"cell": "gru", "elastance": "symmetric"},
        {"cell": "gru", "elastance_input": True},
        {"cell": "lstm", "state_dependence": "input"},
        {"cell": "mgu", "jacobian_bound": 1.0},
        {"cell": "mgu", "initialization": "state_tracking"},
        {"cell": "gru", "time_constant_max": 100.0},
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        LrcSSMConfig(**{"num_hidden_layers": 3, **change})


def test_fields_changed_after_construction(ids):
    config = make_config()
    config.num_hidden_layers = 2
    assert config.layer_types == ["linear_attention"] * 2
    assert LrcSSMForCausalLM(config).generate(ids, max_new_tokens=2, eos_token_id=None).shape == (4, 25)
    config.solver = "exact"
    with pytest.raises(ValueError, match="solver"):
        LrcSSMForCausalLM(config)


def test_a_value_of_the_wrong_type_is_refused_by_name():
    with pytest.raises(Exception, match="hidden_size"):
        LrcSSMConfig(hidden_size="wide")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 32)}, "exactly one"),
        ({"input_ids": torch.full((1, 4), 61)}, r"input_ids.*\[0, 61\)"),
        ({"input_ids": torch.full((1, 4), -1)}, "input_ids"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, "input_ids.*shape"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "input_ids.*empty"),
        ({"inputs_embeds": torch.ones(1, 4, 31)}, r"inputs_embeds.*32"),
        ({"inputs_embeds": torch.full((1, 4, 32), float("nan"))}, r"inputs_embeds.*NaN"),
        ({"input_values": torch.ones(1, 4, 3)}, "num_channels"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 5)}, "attention_mask"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "position_ids": torch.ones(2, 5)}, "position_ids"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long), "time_deltas": torch.ones(3, 4)}, "time_deltas"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_token_inputs_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(LrcSSMModel)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_values": torch.ones(2, 4)}, "input_values.*shape"),
        ({"input_values": torch.ones(2, 4, 2)}, "input_values.*3"),
        ({"input_values": torch.full((2, 4, 3), float("nan"))}, "input_values.*NaN"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, "input_values.*3 channels"),
    ],
)
def test_bad_series_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(LrcSSMModel, num_channels=3)(**arguments)


def test_a_language_model_of_series_is_refused():
    with pytest.raises(ValueError, match="num_channels"):
        LrcSSMForCausalLM(make_config(num_channels=3))
