# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What the models and transformers agree on: names of the cache, keywords, tables of names, modes, tuples."""

import inspect
import warnings

import pytest
import torch
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto
from transformers.utils import generic

from lrcssm_hf import (
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
    host,
)
from lrcssm_hf.host import CACHE, CACHE_NAMES, checkpoint_activations
from lrcssm_hf.recurrent_cache import repeat_rows
from tiny_models import make_model, make_writer, pad, random_ids


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
HEADS = (LrcSSMModel, LrcSSMForCausalLM, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling)


@pytest.fixture(scope="module")
def writer():
    return make_writer()


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 14)


def read(model, ids):
    return model(ids, use_cache=True)[CACHE]


# --- The names of the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_every_head_takes_the_cache_by_every_name_and_returns_it_by_the_hosts(head, name, ids):
    model = make_model(head)
    expected = read(model, ids)
    outputs = model(ids[:, 9:], use_cache=True, **{name: read(model, ids[:, :9])})
    for layer, other in zip(outputs[CACHE].layers, expected.layers):
        assert torch.allclose(layer.recurrent_states[0], other.recurrent_states[0], atol=1e-5)
    assert CACHE in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_generate_and_states_in_files_take_every_name(name, writer, ids, tmp_path):
    expected = writer.generate(ids, **GREEDY)[:, 14:]
    continued = writer.generate(ids[:, 9:], **{name: read(writer, ids[:, :9])}, **GREEDY)
    assert torch.equal(continued[:, 5:], expected)
    writer.save_state(**{name: read(writer, ids[:, :9])}, path=tmp_path / "state.safetensors")
    loaded = writer.load_state(tmp_path / "state.safetensors")
    assert torch.equal(writer.generate(ids[:, 9:], **{name: loaded}, **GREEDY)[:, 5:], expected)


@torch.no_grad()
def test_no_name_is_deprecated_by_us(writer, ids, monkeypatch):
    monkeypatch.setattr(generic.logger, "warning_once", pytest.fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in CACHE_NAMES:
            writer.generate(ids, **{name: read(writer, ids[:, :9])}, **GREEDY)
            writer(ids, **{name: read(writer, ids[:, :9])}, use_cache=True)


@torch.no_grad()
def test_two_names_at_once_are_refused(writer, ids):
    caches = {"past_key_values": read(writer, ids), "cache": read(writer, ids)}
    with pytest.raises(ValueError, match="`cache` and `past_key_values` are names of the same argument"):
        writer(ids, **caches)
    with pytest.raises(ValueError, match="are names of the same argument"):
        writer.generate(ids, **caches)
    assert torch.equal(writer(ids, cache=None, past_key_values=None).logits, writer(ids).logits)


# --- Keywords -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize(
    ("name", "meant"),
    [("attention_masks", "attention_mask"), ("mask", "attention_mask"), ("past_key_value", "past_key_values")],
)
def test_a_name_that_is_not_known_is_refused_with_the_one_that_was_meant(head, name, meant, ids):
    with pytest.raises(ValueError, match=rf"{head.__name__} takes no argument `{name}`; did you mean `{meant}`\?"):
        make_model(head)(ids, **{name: torch.ones_like(ids)})


def test_labels_are_for_models_with_a_head(ids):
    with pytest.raises(ValueError, match="LrcSSMModel takes no argument `labels`; it takes input_ids, attention_mask"):
        make_model(LrcSSMModel)(ids, labels=ids)
    with pytest.raises(ValueError, match="takes no argument `logits`"):
        make_model()(ids, logits=ids)


@torch.no_grad()
def test_what_transformers_passes_to_any_model_is_let_through(ids):
    """Also what is None: that is how it passes what there is not."""
    for head in HEADS:
        model = make_model(head)
        expected = model(ids)[0]
        passed = {"output_attentions": False, "return_dict": True, "is_causal": True, "pixel_values": None}
        # As tokenizers made for BERT return it.
        passed["token_type_ids"] = torch.zeros_like(ids)
        assert torch.equal(model(ids, **passed)[0], expected)
    assert {"num_items_in_batch", "cu_seq_lens_k", "max_length_q", "output_router_logits"} <= host._HOST_KEYWORDS
    assert {"num_items_in_batch", "ignore_index", "shift_labels"} == host.LOSS_KEYWORDS


def test_shifted_labels_without_labels_are_refused(ids):
    with pytest.raises(ValueError, match="`shift_labels` are `labels` that were shifted; pass both"):
        make_model()(ids, shift_labels=ids)


def test_the_loss_is_told_what_is_for_it(ids):
    model = make_model()
    labels = ids.masked_fill(torch.arange(14) < 9, 0)
    some = model(ids, labels=labels, ignore_index=0).loss
    assert torch.allclose(some, model(ids, labels=ids.masked_fill(torch.arange(14) < 9, -100)).loss)
    total = model(ids, labels=ids, num_items_in_batch=torch.tensor(1)).loss
    assert torch.allclose(total, model(ids, labels=ids).loss * 2 * 13)


# --- Tables of names ------------------------------------------------------------------------------------------------


def test_trainer_smooths_labels_that_are_shifted(tmp_path, ids):
    """It tells a causal language model by its name; with hardly any smoothing, the loss is the model's own."""
    model = make_model()
    options = {"report_to": "none", "use_cpu": True, "label_smoothing_factor": 1e-9}
    trainer = Trainer(model, TrainingArguments(tmp_path, **options))
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    assert torch.allclose(loss, model(ids, labels=ids).loss, atol=1e-5)


def test_the_names_of_the_heads_are_in_transformers_tables():
    for table, head in {
        "MODEL_MAPPING_NAMES": LrcSSMModel,
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": LrcSSMForCausalLM,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": LrcSSMForSequenceClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": LrcSSMForSequenceModeling,
        "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES": LrcSSMForSequenceModeling,
    }.items():
        assert getattr(modeling_auto, table)["lrcssm"] == head.__name__
    assert type(AutoModelForCausalLM.from_config(make_model().config)) is LrcSSMForCausalLM


def test_gradients_of_every_row_by_torch_func(ids):
    model = make_model(num_hidden_layers=1).double()
    weights = dict(model.named_parameters())

    def loss(weights, row):
        return functional_call(model, weights, (row[None],), {"labels": row[None], "use_cache": False}).loss

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(rows[name].mean(0), parameter.grad, rtol=1e-8, atol=1e-10)


# --- Modes: training, gradients, inference --------------------------------------------------------------------------


def gradients(model, ids, checkpointing, cut=6):
    """Of the second piece of a text, given the state of the first."""
    model.train()
    if checkpointing is not None:
        checkpoint_activations(model, use_reentrant=checkpointing)
        model.enable_input_require_grads()
    with torch.no_grad():
        cache = read(model, ids[:, :cut])
    loss = model(ids[:, cut:], labels=ids[:, cut:], cache=cache, use_cache=True).loss
    model.zero_grad()
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block_type", ["gated", "paper"])
def test_checkpointing_changes_no_gradient_given_a_state(reentrant, block_type, ids):
    model = make_model(block_type=block_type).double()
    loss, expected = gradients(model, ids, None)
    checkpointed, found = gradients(model, ids, reentrant)
    assert torch.allclose(checkpointed, loss, rtol=1e-12)
    for gradient, other in zip(found, expected):
        assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-12)


def test_checkpointed_pieces_have_the_gradient_of_the_whole(ids):
    model = make_model().double().train()
    checkpoint_activations(model)
    whole = torch.autograd.grad(model(ids).logits[:, 6:].square().sum(), list(model.parameters()))
    cache = read(model, ids[:, :6])
    loss = model(ids[:, 6:], cache=cache, use_cache=True).logits.square().sum()
    for gradient, other in zip(torch.autograd.grad(loss, list(model.parameters())), whole):
        assert torch.allclose(gradient, other, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_a_model_in_training_mode_generates_with_its_memory(ids):
    """`generate` has no gradients on, and so nothing to do without a cache for."""
    model = make_writer()
    expected = model.generate(ids, **GREEDY)
    model.train()
    checkpoint_activations(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert model(ids)[CACHE] is not None
    with torch.enable_grad():
        assert model(ids).get(CACHE) is None


@pytest.mark.parametrize("block_type", ["gated", "paper"])
def test_a_state_made_in_inference_mode_goes_on_outside(block_type, ids):
    model = make_model(block_type=block_type)
    with torch.no_grad():
        expected = model(ids).logits[:, 9:]
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with torch.inference_mode():
            cache = read(model, ids[:, :9])
        with mode():
            first = model(ids[:, 9:12], cache=cache, use_cache=True)
            second = model(ids[:, 12:], cache=first[CACHE], use_cache=True)
        found = torch.cat([first.logits, second.logits], 1)
        assert torch.allclose(found, expected, atol=1e-5)
        if mode is torch.enable_grad:
            found.sum().backward()


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_a_configuration_without_dictionaries_gives_tuples(head, ids):
    changes = {"num_labels": 3}
    model, other = make_model(head, **changes), make_model(head, return_dict=False, **changes)
    labels = {
        LrcSSMModel: {},
        LrcSSMForCausalLM: {"labels": ids},
        LrcSSMForSequenceClassification: {"labels": torch.tensor([0, 2])},
        LrcSSMForSequenceModeling: {"labels": ids % 3},
    }[head]
    expected, found = model(ids, **labels).to_tuple(), other(ids, **labels)
    assert type(found) is tuple and len(found) == len(expected)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(other(ids, return_dict=True, **labels)[0], expected[0])


def test_forecasts_and_texts_of_a_configuration_without_dictionaries(ids):
    changes = {"num_channels": 2, "prediction_length": 3}
    series = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0))
    forecasts = [
        make_model(LrcSSMForSequenceModeling, return_dict=return_dict, **changes).forecast(series, horizon=7)
        for return_dict in (True, False)
    ]
    assert torch.equal(*forecasts)
    assert torch.equal(make_writer(return_dict=False).generate(ids, **GREEDY), make_writer().generate(ids, **GREEDY))


# --- Which cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 1),
        ({"num_beams": 3}, 2),
        ({"do_sample": True, "num_return_sequences": 4, "top_k": 3}, 1),
        ({}, 1),
    ],
    ids=["beams", "beams and several of them", "beams of two rows", "samples", "a row for two prompts"],
)
@torch.no_grad()
def test_a_state_is_given_to_all_rows_that_ask_for_it(options, rows, writer, ids):
    """And stays what it was for the next question."""
    document, questions = ids[:rows, :9], ids[:, 9:] if not options else ids[:rows, 9:]
    together = torch.cat([document.expand(len(questions), -1), questions], 1)
    cache = read(writer, document)
    before = cache.layers[0].recurrent_states[0].clone()
    torch.manual_seed(0)
    expected = writer.generate(together, **{**GREEDY, **options})[:, 14:]
    torch.manual_seed(0)
    assert torch.equal(writer.generate(questions, cache=cache, **{**GREEDY, **options})[:, 5:], expected)
    assert torch.equal(cache.layers[0].recurrent_states[0], before)


@torch.no_grad()
def test_a_state_goes_on_in_its_cache_and_only_for_as_many_prompts(writer, ids):
    cache = read(writer, ids[:, :9])
    expected = writer.generate(ids, **GREEDY)[:, 14:]
    with pytest.raises(ValueError, match="would read the prompt again after"):
        writer.generate(ids[:, 9:], cache=cache, use_cache=False, **GREEDY)
    for rows, beams in ((1, 2), (1, 1)):
        with pytest.raises(ValueError, match=rf"`{CACHE}` must be.*\({rows}, 32\); got the shapes \(2, 32, 3\)"):
            writer.generate(ids[:rows, 9:], cache=cache, num_beams=beams, **GREEDY)
    assert torch.equal(writer.generate(ids[:, 9:], cache=cache, **GREEDY)[:, 5:], expected)
    # It has read all but the last of these tokens.
    whole = read(writer, torch.cat([ids, expected[:, :-1]], 1))
    assert torch.allclose(cache.layers[2].recurrent_states[0], whole.layers[2].recurrent_states[0], atol=1e-4)


def of_other_layers(model, ids):
    return read(make_model(num_hidden_layers=2), ids)


def of_other_widths(model, ids):
    return read(make_model(state_size=20), ids)


def of_another_convolution(model, ids):
    return read(make_model(conv_kernel=3), ids)


def of_other_rows(model, ids):
    return repeat_rows(read(model, ids), model.config, 3)


def half_written(model, ids):
    cache, whole = DynamicCache(config=model.config), read(model, ids)
    cache.update_conv_state(whole.layers[0].conv_states[0], 0)
    cache.update_recurrent_state(whole.layers[0].recurrent_states[0], 0)
    return cache


def of_attention(model, ids):
    return DynamicCache(config=LlamaConfig(num_hidden_layers=3))


def recording(model, ids):
    cache = read(model, ids)
    cache.activate_past_recording()
    return cache


CACHES = {
    of_other_layers: "got one of 2 layers",
    of_other_widths: r"got the shapes \(2, 20, 3\) and \(2, 20\) in layer 0",
    of_another_convolution: r"got the shapes \(2, 32, 2\)",
    of_other_rows: r"shapes \(2, 32, 3\) and \(2, 32\); got the shapes \(6, 32, 3\)",
    half_written: "layer 1 has read other steps",
    of_attention: "layer 0 is of the type DynamicLayer",
    recording: "take back what it has read",
    lambda model, ids: DynamicCache(): "got one of 0 layers",
    lambda model, ids: ((ids, ids),) * 3: "got an object of type tuple",
}


@pytest.mark.parametrize("make", CACHES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("head", [LrcSSMForCausalLM, LrcSSMForSequenceModeling], ids=lambda head: head.__name__)
@torch.no_grad()
def test_a_cache_of_another_model_is_refused_before_it_is_used(make, head, ids):
    model = make_model(head)
    with pytest.raises(ValueError, match=f"`{CACHE}` must be what this model returned.*{CACHES[make]}"):
        model(ids, cache=make(model, ids), attention_mask=torch.ones(2, 28))
    new = model(ids, cache=DynamicCache(config=model.config), use_cache=True)
    static = model(ids, cache=StaticCache(config=model.config, max_cache_len=40), use_cache=True)
    assert torch.equal(new.logits, model(ids).logits) and torch.equal(static.logits, new.logits)


@torch.no_grad()
def test_this_model_does_not_draft_for_another(writer, ids):
    """A draft that is not taken would have to be taken back."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    with pytest.raises(ValueError, match="take back what it has read"):
        llama.generate(ids[:1], assistant_model=writer, **GREEDY)


# --- Ranges ---------------------------------------------------------------------------------------------------------

MASK = torch.ones(2, 14)
SERIES = {"num_channels": 2, "scaling": "std"}
RANGES = {
    "additive mask": ({"attention_mask": (1 - MASK).masked_fill(MASK.tril() == 0, -1e9)}, "attention_mask.*1 for what"),
    "NaN in the mask": ({"attention_mask": MASK * torch.nan}, "attention_mask.*got values from nan"),
    "NaN time": ({"time_deltas": MASK * torch.nan}, "time_deltas.*units of the regular step.*got nan"),
    "infinite time": ({"time_deltas": MASK * torch.inf}, "time_deltas.*got inf"),
    "negative time": ({"time_deltas": MASK - 3}, "time_deltas.*got -2"),
    "documents unordered": ({"cu_seq_lens_q": torch.tensor([0, 9, 4, 14])}, r"cu_seq_lens_q.*got \[0, 9, 4, 14\]"),
    "documents not from 0": ({"cu_seq_lens_q": torch.tensor([2, 14])}, "cu_seq_lens_q.*ascend from 0 to the 14"),
    "documents beyond the row": ({"cu_seq_lens_q": torch.tensor([0, 15])}, "cu_seq_lens_q.*ascend from 0 to the 14"),
    "documents that end early": ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q.*ascend from 0 to the 14"),
    "negative logits_to_keep": ({"logits_to_keep": -2}, "logits_to_keep.*at least 0"),
}


@pytest.mark.parametrize("case", RANGES)
def test_arguments_out_of_range_are_refused(case, ids):
    arguments, message = RANGES[case]
    rows = ids[:1] if "cu_seq_lens_q" in arguments else ids
    with pytest.raises(ValueError, match=message):
        make_model()(rows, **arguments)


def test_what_stands_in_the_padding_is_not_looked_at(ids):
    model = make_model()
    padded, mask = pad(random_ids(4, 23), "left")
    deltas = torch.ones(4, 23).masked_fill(mask == 0, torch.nan)
    expected = model(padded, attention_mask=mask).logits
    assert torch.allclose(model(padded, attention_mask=mask.float(), time_deltas=deltas).logits, expected, atol=1e-5)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 0.0), (0.0, -1.0), (0.0, torch.nan), (torch.inf, 1.0)], ids=str)
def test_statistics_that_cannot_be_are_refused(mean, deviation):
    model = make_model(LrcSSMForSequenceModeling, **SERIES, num_labels=1)
    statistics = torch.full((2, 1, 2), mean), torch.full((2, 1, 2), deviation)
    with pytest.raises(ValueError, match="`statistics` must be finite, and deviations positive"):
        model(input_values=torch.randn(2, 9, 2), statistics=statistics)


def test_masks_of_values_hold_zeros_and_ones():
    model = make_model(LrcSSMForSequenceModeling, num_channels=2, prediction_length=3)
    series, future = torch.randn(2, 9, 2), torch.randn(2, 3, 2)
    for name, values in (("observed_mask", series), ("future_observed_mask", future)):
        with pytest.raises(ValueError, match=f"`{name}` must hold 1 for what is there"):
            model(input_values=series, future_values=future, **{name: torch.full_like(values, torch.nan)})


@pytest.mark.parametrize(
    "field", ["initializer_range", "norm_eps", "time_constant_max", "hidden_dropout", "jacobian_bound"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_fields_that_are_not_finite_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        make_model(**{field: value})
