# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""`generate` in every mode that transformers has, and states that are saved and loaded.

Padding and the equality of cached and uncached generation are in test_modeling.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from lrcssm_hf import LrcSSMForSequenceModeling, saved_states
from lrcssm_hf.host import CACHE
from text_data import load_tokenizer
from tiny_models import make_model, make_writer, random_ids, without_memory


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return make_writer()


@pytest.fixture(scope="module")
def ids():
    return random_ids(3, 11)


# --- Modes ----------------------------------------------------------------------------------------------------------


def best_of_all_continuations(model, prompt, length):
    """The likeliest continuation, by trying every one."""
    continuations = torch.cartesian_prod(*[torch.arange(model.config.vocab_size)] * length)
    prompts = prompt.expand(len(continuations), -1)
    logits = model(torch.cat([prompts, continuations], 1)).logits[:, prompt.shape[1] - 1 : -1]
    scores = logits.log_softmax(-1).gather(2, continuations[..., None]).sum((1, 2))
    return continuations[scores.argmax()]


@torch.no_grad()
def test_beams_as_wide_as_the_vocabulary_find_the_likeliest_continuation():
    model = make_writer(vocab_size=12)
    prompt = torch.tensor([[3, 4, 5, 6]])
    found = model.generate(prompt, max_new_tokens=3, num_beams=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found[0, 4:], best_of_all_continuations(model, prompt, 3))


@torch.no_grad()
def test_several_samples_are_each_a_continuation_of_its_own_prompt(model, ids):
    """With one token left to choose from at each step, sampling is greedy, for every returned sequence."""
    greedy = model.generate(ids, **GREEDY)
    samples = model.generate(ids, **{**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2})
    assert torch.equal(samples, greedy.repeat_interleave(2, 0))
    torch.manual_seed(0)
    samples = model.generate(ids, **{**GREEDY, "do_sample": True, "num_return_sequences": 4})
    assert len(set(map(tuple, samples.tolist()))) > 3


@torch.no_grad()
def test_beam_sampling_scores_are_those_of_the_model(model, ids):
    torch.manual_seed(0)
    options = {**GREEDY, "do_sample": True, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    outputs = model.generate(ids, **options, return_dict_in_generate=True, output_scores=True, top_k=0)
    logits = model(outputs.sequences).logits[:, 10:-1].log_softmax(-1)
    scores = logits.gather(2, outputs.sequences[:, 11:, None]).sum((1, 2))
    assert torch.allclose(scores, outputs.sequences_scores, atol=1e-4)


@torch.no_grad()
def test_classifier_free_guidance_reads_the_negative_prompt(model, ids):
    plain = model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    guided = model.generate(ids, **GREEDY, guidance_scale=1.5, negative_prompt_ids=ids)
    assert torch.equal(guided, plain.sequences), "guided away from its own prompt, a model changes nothing"
    guided = model.generate(ids, **GREEDY, guidance_scale=4.0, negative_prompt_ids=ids.flip(1))
    assert not torch.equal(guided, plain.sequences)


@torch.no_grad()
def test_logits_processors_see_every_step(model, ids):
    class Count(LogitsProcessor):
        lengths = []

        def __call__(self, input_ids, scores):
            self.lengths.append(input_ids.shape[1])
            return scores

    model.generate(ids, **GREEDY, logits_processor=[Count()])
    assert Count.lengths == list(range(11, 19))


@torch.no_grad()
def test_streaming(model, ids):
    class Collect(BaseStreamer):
        pieces, ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.ended = True

    streamer = Collect()
    expected = model.generate(ids[:1], **GREEDY, streamer=streamer)
    assert streamer.ended and len(streamer.pieces) == 1 + 8
    assert torch.equal(torch.cat(streamer.pieces), expected[0])
    tokenizer = load_tokenizer(None)
    reader = make_writer(vocab_size=len(tokenizer))
    prompt = tokenizer("def f(", return_tensors="pt")
    text = TextIteratorStreamer(tokenizer, skip_prompt=True)
    sequence = reader.generate(**prompt, **GREEDY, streamer=text)[0]
    assert "".join(text) == tokenizer.decode(sequence[6:])


OFFLOADED = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a build for GPUs asks their driver for a stream, which is not there",
)


@pytest.mark.parametrize(
    "implementation",
    ["static", pytest.param("offloaded", marks=OFFLOADED), pytest.param("offloaded_static", marks=OFFLOADED)],
)
@torch.no_grad()
def test_other_caches_give_the_same_tokens(model, ids, implementation):
    assert torch.equal(
        model.generate(ids, **GREEDY, cache_implementation=implementation), model.generate(ids, **GREEDY)
    )


@torch.no_grad()
def test_compiled_steps_give_the_same_tokens(model, ids):
    """What `cache_implementation="static"` does by itself on a GPU."""
    expected = model.generate(ids, **GREEDY)
    compiled = make_writer()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    options = {"cache_implementation": "static", "compile_config": CompileConfig(backend="aot_eager")}
    assert torch.equal(compiled.generate(ids, **GREEDY, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # One graph reads the prompt, one the tokens after it, and a step more does not compile anew.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(compiled.generate(ids.flip(1), **GREEDY, **options), model.generate(ids.flip(1), **GREEDY))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "itself"}, "assisted generation takes back tokens"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation takes back tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search takes back tokens"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "use greedy decoding, sampling or beam search"),
        ({"cache_implementation": "quantized"}, "linear_attention"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"cache_implementation": "paged"}, "call `generate` on the batch"),
    ],
)
def test_what_a_recurrent_state_cannot_do_is_refused(model, ids, options, message):
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        model.generate(ids[:1], max_new_tokens=4, **options)


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="call `generate` on the batch"):
        model.generate_batch([[2, 3], [4, 5, 6]])


# --- States in files ------------------------------------------------------------------------------------------------

CONTINUE = """
import json, sys, torch, lrcssm_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
cache = model.load_state(sys.argv[2])
ids = torch.tensor(json.loads(sys.argv[3]))
print(json.dumps(model.generate(ids, cache=cache, max_new_tokens=8, eos_token_id=None).tolist()))
"""


@pytest.mark.parametrize("changes", [{}, {"block_type": "paper", "tie_word_embeddings": False}], ids=["gated", "paper"])
@torch.no_grad()
def test_a_document_read_once_is_continued_in_another_process(tmp_path, ids, changes):
    model = make_writer(**changes)
    model.save_pretrained(tmp_path / "model")
    cache = model(ids, use_cache=True)[CACHE]
    model.save_state(cache, tmp_path / "state.safetensors")
    question = ids.flip(0)[:, :4]
    expected = model.generate(torch.cat([ids, question], 1), **GREEDY)[:, 15:]
    arguments = [tmp_path / "model", tmp_path / "state.safetensors", json.dumps(question.tolist())]
    result = subprocess.run([sys.executable, "-c", CONTINUE, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == torch.cat([question, expected], 1).tolist()


@torch.no_grad()
def test_states_are_exact_small_and_shared_by_the_heads(tmp_path, model, ids):
    path = tmp_path / "state.safetensors"
    cache = model(ids, use_cache=True)[CACHE]
    sizes = []
    for length in (1, 11):
        model.save_state(model(ids[:, :length], use_cache=True)[CACHE], path)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] < 4 * 3 * 3 * 32 * 4 + 2000  # 3 rows, 3 layers, 32 neurons and 3 convolution taps
    assert list(tmp_path.iterdir()) == [path]
    for loaded, layer in zip(model.load_state(path).layers, cache.layers):
        assert torch.equal(loaded.recurrent_states[0], layer.recurrent_states[0])
        assert torch.equal(loaded.conv_states[0], layer.conv_states[0])
    # Another head on the same trunk understands it.
    tagger = LrcSSMForSequenceModeling(model.config)
    tagger.model.load_state_dict(model.model.state_dict())
    tagger.load_state(path)


@torch.no_grad()
def test_a_state_of_other_weights_is_refused(tmp_path, model, ids):
    path = tmp_path / "state.safetensors"
    model.save_state(model(ids, use_cache=True)[CACHE], path)
    tuned, negated, shuffled = make_writer(), make_writer(), make_writer()
    tuned.load_state(path)
    tuned.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-6
    negated.model.layers[1].mlp.down_proj.weight.neg_()
    shuffled.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    for other in (tuned, negated, shuffled, make_writer(seed=1), make_writer(norm_eps=1e-3), make_writer().bfloat16()):
        with pytest.raises(ValueError, match="other weights"):
            other.load_state(path)


def rewrite(path, change):
    """The file, its tensors changed under the same metadata."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


RECURRENT = "layers.1.recurrent_state"
LAYER = (RECURRENT, "layers.1.conv_state")
DAMAGE = {
    "another value": (lambda tensors, _: tensors[RECURRENT].mul_(1 + 1e-6), "not those that were written"),
    "another shape": (lambda tensors, _: tensors.update({RECURRENT: tensors[RECURRENT][:1]}), "not those that were"),
    "another dtype": (lambda tensors, _: tensors.update({RECURRENT: tensors[RECURRENT].half()}), "not those that were"),
    "one more": (lambda tensors, _: tensors.update(more=torch.ones(1)), "not those that were written"),
    "one less": (lambda tensors, _: tensors.pop(RECURRENT), "not a whole file"),
    "no digest": (lambda _, metadata: metadata.pop("state_digest"), "not those that were written"),
}


def with_digest(change):
    """As one who means harm, or another program, would write it."""

    def changed(tensors, metadata):
        change(tensors)
        metadata["state_digest"] = saved_states._digest(tensors)

    return changed


DAMAGE |= {
    "not finite": (with_digest(lambda tensors: tensors[RECURRENT].fill_(torch.nan)), f"{RECURRENT} holds NaN"),
    "whole numbers": (
        with_digest(lambda tensors: tensors.update({RECURRENT: tensors[RECURRENT].long()})),
        f"{RECURRENT} must be of a floating type, got torch.int64",
    ),
    "other rows": (
        with_digest(lambda tensors: tensors.update({RECURRENT: tensors[RECURRENT][:1]})),
        r"\(1, 32\) in layer 1",
    ),
    "other rows of a layer": (
        with_digest(lambda tensors: tensors.update({name: tensors[name][:1] for name in LAYER})),
        r"got the shapes \(1, 32, 3\) and \(1, 32\) in layer 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
@torch.no_grad()
def test_a_state_that_was_changed_is_refused(case, tmp_path, model, ids):
    change, message = DAMAGE[case]
    path = tmp_path / "state.safetensors"
    model.save_state(model(ids, use_cache=True)[CACHE], path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        model.load_state(path)


@torch.no_grad()
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, model, ids):
    cache = model(ids, use_cache=True)[CACHE]
    cache.layers[2].recurrent_states[0][1, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.save_state(cache, tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_what_is_no_state_is_refused(tmp_path, model, ids):
    path = tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="not a whole file"):
        model.load_state(path)
    model.save_state(model(ids, use_cache=True)[CACHE], path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole file"):
        model.load_state(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="other weights"):
        model.load_state(path)
    with pytest.raises(ValueError, match="holds no state yet"):
        model.save_state(DynamicCache(config=model.config), path)
    with pytest.raises(ValueError, match="holds no state yet"):
        model.save_state(None, path)
    for other in (make_model(num_hidden_layers=4), make_model(state_size=20)):
        with pytest.raises(ValueError, match=r"of 3 layers .* \('rows', 32, 3\)"):
            model.save_state(other(ids, use_cache=True)[CACHE], path)


# --- The model of this repository -----------------------------------------------------------------------------------

NANO = Path(__file__).resolve().parents[1] / "model_cards" / "lrcssm-python-nano"
PROMPTS = ["def mean(values):\n    if not", "class Stack:\n", "import os\nimport sys\n\n\ndef main():\n    "]


@pytest.fixture(scope="module")
def nano():
    tokenizer = AutoTokenizer.from_pretrained(NANO, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(NANO).eval(), tokenizer(PROMPTS, padding=True, return_tensors="pt")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 40},
    ],
    ids=["greedy", "beams", "sampled"],
)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(None)], ids=["one", "padded batch"])
@torch.no_grad()
def test_nano_writes_the_same_with_and_without_its_cache(nano, options, rows, tmp_path):
    """And goes on from a state in a file as from the text itself."""
    model, batch = nano
    batch = {name: values[rows] for name, values in batch.items()}
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **options}

    def write(**arguments):
        torch.manual_seed(0)
        return model.generate(**arguments, **options)

    length = batch["input_ids"].shape[1]
    text = write(**batch)[:, length:]
    assert torch.equal(write(**batch, use_cache=False)[:, length:], text)
    read, rest = ({name: values[:, part] for name, values in batch.items()} for part in (slice(-3), slice(-3, None)))
    model.save_state(model(**read, use_cache=True)[CACHE], tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    assert torch.equal(write(**rest, cache=loaded)[:, 3:], text)
    with without_memory():
        assert not torch.equal(write(**batch)[:, length:], text)
