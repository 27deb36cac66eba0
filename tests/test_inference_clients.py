# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Programs that run transformers models run these, unmodified: spread over devices, quantised, piped, evaluated."""

import json

import lm_eval
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from bitsandbytes.nn import Linear8bitLt
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
    pipeline,
)

from lrcssm_hf import LrcSSMForSequenceClassification
from lrcssm_hf.host import CACHE
from text_data import load_tokenizer
from tiny_models import make_model, pad, random_ids


GREEDY = {"max_new_tokens": 6, "do_sample": False}
PROMPTS = ["a", "def f(x):\n    return", "no"]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer(None)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def text_model(tokenizer, *head, **changes):
    end = tokenizer.eos_token_id
    return make_model(*head, vocab_size=len(tokenizer), pad_token_id=end, bos_token_id=end, eos_token_id=end, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("language_model")
    text_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- Devices --------------------------------------------------------------------------------------------------------


def assert_computes_the_same(model, reference):
    ids, mask = pad(random_ids(4, 23), "left")
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits)
    generated, expected = (m.generate(ids, attention_mask=mask, **GREEDY) for m in (model, reference))
    assert torch.equal(generated, expected)


LAYERS_ON_DISK = {"model.layers.1": "disk", "model.layers.2": "disk"}
KEPT = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"], "cpu")


@pytest.mark.parametrize("block_type", ["gated", "paper"])
@pytest.mark.parametrize(
    ("device_map", "offloaded"),
    [({"": "cpu"}, 0), ("auto", 0), ({**KEPT, **LAYERS_ON_DISK}, 2), ({"": "disk"}, 3)],
    ids=["cpu", "auto", "two layers on disk", "disk"],
)
def test_device_maps(tmp_path, block_type, device_map, offloaded):
    reference = make_model(block_type=block_type)
    reference.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    on_meta = [all(p.device.type == "meta" for p in layer.parameters()) for layer in model.model.layers]
    assert sum(on_meta) == offloaded
    assert_computes_the_same(model, reference)


@pytest.mark.parametrize("block_type", ["gated", "paper"])
def test_too_little_memory_sends_whole_blocks_to_disk(tmp_path, block_type):
    """Whatever the limit, a block is never split: its residuals would be on two devices."""
    reference = make_model(block_type=block_type, tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "model")
    options = {"device_map": "auto", "offload_folder": tmp_path / "offloaded"}
    everything = reference.get_memory_footprint()
    spread = set()
    for share in (0.5, 0.7, 0.9):
        memory = {"cpu": int(share * everything), "disk": everything}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", max_memory=memory, **options)
        parts = getattr(model, "hf_device_map", {})
        assert all(part.count(".") <= 2 for part in parts), parts
        spread |= set(parts.values())
        assert_computes_the_same(model, reference)
    assert spread == {"cpu", "disk"}


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloading_a_model_that_is_there(tmp_path, offload):
    reference, model = make_model(), make_model()
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert_computes_the_same(model, reference)


# --- Quantisation ---------------------------------------------------------------------------------------------------

QUANTIZERS = {
    "torchao": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), lambda layer: isinstance(layer.weight, Int8Tensor)),
    "bitsandbytes": (lambda: BitsAndBytesConfig(load_in_8bit=True), lambda layer: isinstance(layer, Linear8bitLt)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@torch.no_grad()
def test_weights_in_int8(tmp_path, name):
    """All projections but the output layer, which is the embedding, become int8; the neurons' own parameters do not."""
    make_config, is_quantized = QUANTIZERS[name]
    reference = make_model()
    reference.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=make_config(), device_map="cpu"
    )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in linear.items() if not is_quantized(module)} == {"lm_head"}
    for name, parameter in model.model.layers[0].mixer.neurons.named_parameters(recurse=False):
        assert torch.equal(parameter, getattr(reference.model.layers[0].mixer.neurons, name))

    ids = random_ids(4, 23)
    expected = reference(ids).logits
    logits = model(ids).logits
    error = (logits - expected).square().mean() / expected.var()
    assert 0 < error < 0.01
    generated = model.generate(ids, eos_token_id=None, **GREEDY)
    assert generated.shape == (4, 29)

    cache = model(ids, use_cache=True)[CACHE]
    model.save_state(cache, tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors").layers[0].recurrent_states[0]
    assert torch.equal(loaded, cache.layers[0].recurrent_states[0])
    with pytest.raises(ValueError, match="other weights"):
        reference.load_state(tmp_path / "state.safetensors")

    model.save_pretrained(tmp_path / "quantized")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("quantized", "model")]
    assert sizes[0] < 0.5 * sizes[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    assert torch.equal(loaded(ids).logits, logits)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("block_type", ["gated", "paper"])
@torch.no_grad()
def test_series_into_an_int8_encoder(tmp_path, name, block_type):
    """The series stay what they are, whatever the dtype of the weights."""
    make_config, _ = QUANTIZERS[name]
    reference = make_model(LrcSSMForSequenceClassification, num_channels=4, num_labels=3, block_type=block_type)
    reference.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=make_config(), device_map="cpu"
    )
    values = torch.randn(2, 14, 4, generator=torch.Generator().manual_seed(0))
    expected = reference(input_values=values).logits
    assert torch.allclose(model(input_values=values).logits, expected, atol=0.05 * expected.abs().max().item())


# --- Pipelines and chats --------------------------------------------------------------------------------------------


def test_text_generation_pipeline(folder):
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    together = [outputs[0]["generated_text"] for outputs in generate(PROMPTS, batch_size=3, **GREEDY)]
    assert together == [generate(prompt, **GREEDY)[0]["generated_text"] for prompt in PROMPTS]
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(together, PROMPTS))


def test_text_classification_pipeline(tokenizer):
    model = text_model(tokenizer, LrcSSMForSequenceClassification, num_labels=3)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    together = classify(PROMPTS, batch_size=3)
    for prompt, scores in zip(PROMPTS, together):
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0]
        expected = {f"LABEL_{i}": p.item() for i, p in enumerate(logits.softmax(-1))}
        assert {score["label"]: score["score"] for score in scores} == pytest.approx(expected, abs=1e-5)


CHATS = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "what is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2 + 2?"},
    ],
]


def generate_with_logits(model, tokenizer, **inputs):
    """Greedily in letters and signs, as which alone a chat's template can pass the answers on: the tokens generated,
    the logits that chose them, and the state."""
    unprintable = [i for i in range(len(tokenizer)) if not (" " <= tokenizer.decode(i) <= "~")]
    options = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": unprintable, **GREEDY}
    outputs = model.generate(**inputs, **options)
    logits = torch.stack(outputs.logits, 1)
    return outputs.sequences[:, -logits.shape[1] :], logits, outputs[CACHE]


def test_chats_padded_on_the_left(tokenizer):
    model = text_model(tokenizer)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(CHATS, padding=True, tokenizer_kwargs={"padding_side": "left"}, **options)
    assert inputs.attention_mask[0, 0] == 0 and inputs.attention_mask[:, -1].all()
    answers, logits, _ = generate_with_logits(model, tokenizer, **inputs)
    for row, chat in enumerate(CHATS):
        alone = tokenizer.apply_chat_template(chat, **options)
        expected_answer, expected_logits, _ = generate_with_logits(model, tokenizer, **alone)
        assert torch.equal(answers[row], expected_answer[0])
        assert torch.allclose(logits[row], expected_logits[0], atol=2e-5)
    assert not torch.allclose(*logits, atol=1e-3), "the model ignores its prompt: this test shows nothing"


def test_a_chat_that_goes_on_from_its_cache(tokenizer):
    """Each turn passes only what is new to the state; the answers are those of passing the whole chat each time."""
    model = text_model(tokenizer)
    chat, cache, read = [], None, 0
    for question in ("hi", "and then?", "why"):
        chat.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        expected_answer, expected_logits, _ = generate_with_logits(model, tokenizer, **inputs)
        new = inputs.input_ids[:, read:]
        answer, logits, cache = generate_with_logits(model, tokenizer, input_ids=new, cache=cache)
        assert torch.equal(answer, expected_answer)
        assert torch.allclose(logits, expected_logits, atol=2e-5)
        chat.append({"role": "assistant", "content": tokenizer.decode(answer[0])})
        # The state has not read the last generated token.
        read = inputs.input_ids.shape[1] + answer.shape[1] - 1
    _, forgetful, _ = generate_with_logits(model, tokenizer, input_ids=new)
    assert not torch.allclose(forgetful, logits, atol=1e-3), "the model needs no memory: this test shows nothing"


def test_chat_pipeline(tokenizer):
    generate = pipeline("text-generation", model=text_model(tokenizer), tokenizer=tokenizer, device="cpu")
    together = generate(CHATS, batch_size=2, **GREEDY)
    assert together == [generate(chat, **GREEDY) for chat in CHATS]
    for chat, (outputs,) in zip(CHATS, together):
        *turns, answer = outputs["generated_text"]
        assert turns == chat and answer["role"] == "assistant" and answer["content"]


# --- lm-eval --------------------------------------------------------------------------------------------------------

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path):
    """A task of eight questions of different lengths, each with two answers."""
    questions = [
        {"question": f"what is {3**i} + {i}?", "choices": [f"{3**i + i}", f"{i}, or {i + 1}"], "answer": i % 2}
        for i in range(8)
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "sums.yaml").write_text(TASK.format(data=data))
    return questions, TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize("loaded_by", ["lm-eval", "the user"])
def test_lm_eval(folder, tokenizer, tasks, loaded_by):
    """Its log-likelihoods in batches are those of the model on each text alone, and so is its accuracy."""
    questions, manager = tasks
    model = AutoModelForCausalLM.from_pretrained(folder)
    if loaded_by == "the user":
        how = {"model": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)}
    else:
        how = {"model": "hf", "model_args": {"pretrained": str(folder)}, "device": "cpu", "batch_size": 4}
    results = lm_eval.simple_evaluate(**how, tasks=["sums"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = sorted(results["samples"]["sums"], key=lambda sample: sample["doc_id"])
    correct = 0
    for question, sample in zip(questions, samples, strict=True):
        expected = [log_likelihood(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        correct += expected.index(max(expected)) == question["answer"]
    assert results["results"]["sums"]["acc,none"] == correct / len(questions)


@torch.no_grad()
def log_likelihood(model, tokenizer, question, answer):
    """Of the answer after the question, in nats."""
    prompt, text = (tokenizer(text, return_tensors="pt").input_ids for text in (question, f"{question} {answer}"))
    log_probabilities = model(text).logits[:, :-1].log_softmax(-1).gather(2, text[:, 1:, None])
    return log_probabilities[0, prompt.shape[1] - 1 :].sum().item()
