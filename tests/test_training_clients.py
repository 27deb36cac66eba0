# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Programs that train transformers models train these, unmodified: each does a tiny real run here."""

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import two_processes
from lrcssm_hf import LrcSSMForCausalLM, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling
from lrcssm_hf.host import CACHE
from text_data import load_tokenizer
from tiny_models import make_model, random_ids


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}


# --- Trainer --------------------------------------------------------------------------------------------------------


def rows_for(head):
    """Eight rows of training data; those of a language model count for different numbers of tokens."""
    if head is LrcSSMForCausalLM:
        ids = random_ids(8, 12)
        return [{"input_ids": row, "labels": row.where(torch.arange(12) < 4 + i, -100)} for i, row in enumerate(ids)]
    values = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2 if head is LrcSSMForSequenceClassification else values.roll(-1, 1)
    return [{"input_values": value, "labels": label} for value, label in zip(values, labels)]


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (LrcSSMForCausalLM, {}),
        (LrcSSMForSequenceClassification, {"num_channels": 3, "num_labels": 2}),
        (LrcSSMForSequenceModeling, {"num_channels": 3, "num_labels": 3}),
    ],
)
def test_trainer_accumulates_gradients(head, changes, tmp_path):
    """Two batches of four give the gradient of one of eight; models of series are fed by their own input name."""
    losses = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        model = make_model(head, **changes)
        assert model.main_input_name == ("input_values" if changes else "input_ids")
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            logging_steps=1,
            **QUIET,
        )
        trainer = Trainer(model, arguments, train_dataset=rows_for(head))
        trainer.train()
        losses.append([(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3)


def test_trainer_loads_the_best_model_and_resumes(tmp_path):
    """Random rows can be learned by heart only: held-out rows fare worse with every step, and the first is best."""

    def train(name, seed, resume=None):
        arguments = TrainingArguments(
            tmp_path / name,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
            **QUIET,
        )
        train_rows, held_out = ([{"input_ids": row, "labels": row} for row in random_ids(8, 12, i)] for i in (0, 1))
        trainer = Trainer(make_model(seed=seed), arguments, train_dataset=train_rows, eval_dataset=held_out)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = train("whole", seed=0)
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert list(losses) == [2, 4, 6]
    best = min(losses, key=losses.get)
    assert best < 6 and trainer.state.best_model_checkpoint == str(tmp_path / "whole" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)

    train("resumed", seed=1, resume=tmp_path / "whole" / "checkpoint-2")
    whole, resumed = (
        load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


# --- Documents in one row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks",
    [
        {},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True, "position_ids_start": 2},
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens_q", "all, positions from 2"],
)
@torch.no_grad()
def test_a_flattened_batch_equals_its_documents(marks):
    model = make_model()
    documents = [row[:length] for row, length in zip(random_ids(4, 20), (20, 1, 2, 11))]
    batch = DataCollatorWithFlattening(**marks)([{"input_ids": document} for document in documents])
    outputs = model(**batch)
    alone = [model(document[None], labels=document[None]) for document in documents]
    assert torch.allclose(outputs.logits, torch.cat([document.logits for document in alone], 1), atol=2e-5)
    predicted = torch.tensor([len(document) - 1 for document in documents])
    losses = torch.stack([document.loss for document in alone]).nan_to_num()
    assert torch.allclose(outputs.loss, (losses * predicted).sum() / predicted.sum(), atol=1e-5)
    leaking = model(batch["input_ids"], labels=batch["labels"])
    assert not torch.allclose(outputs.loss, leaking.loss, atol=1e-3), "the documents do not matter to each other anyway"


@torch.no_grad()
def test_documents_that_go_on_after_a_cut():
    """Neither `seq_idx` nor `cu_seq_lens_q` says that the first step starts a document: it continues the cached one."""
    model, ids = make_model(), random_ids(1, 20)
    expected = torch.cat([model(ids[:, :11]).logits[:, 5:], model(ids[:, 11:]).logits], 1)
    for marks in ({"seq_idx": torch.tensor([[0] * 6 + [1] * 9])}, {"cu_seq_lens_q": torch.tensor([0, 6, 15])}):
        cache = model(ids[:, :5], use_cache=True)[CACHE]
        assert torch.allclose(model(ids[:, 5:], cache=cache, **marks).logits, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "marks", "message"),
    [
        (2, {"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "cu_seq_lens_q.*2 rows.*position_ids"),
        (1, {"cu_seq_lens_q": torch.tensor([[0, 3, 8]])}, r"cu_seq_lens_q.*\(documents \+ 1,\)"),
        (2, {"seq_idx": torch.zeros(2, 7)}, r"seq_idx.*\(2, 8\)"),
    ],
)
def test_marks_that_do_not_fit_are_refused(rows, marks, message):
    with pytest.raises(ValueError, match=message):
        make_model()(random_ids(rows, 8), **marks)


def test_trl_packs_documents_without_mixing_them(tmp_path):
    """Packed, flattened and padded, the same documents give the same losses and gradients."""
    trl = pytest.importorskip("trl")
    tokenizer = load_tokenizer(None)
    texts = ["def f(x): return x", "a text that goes on " * 2, "short", "import os; print(os)", "x=1", "for i in y: z"]
    layouts = {
        "padded": {"max_length": 64},
        "packed": {"max_length": 64, "packing": True},
        "flattened": {"max_length": None, "padding_free": True},
    }
    losses, shapes = {}, {}
    for name, options in layouts.items():
        model = make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        arguments = trl.SFTConfig(
            tmp_path,
            per_device_train_batch_size=len(texts),
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-3,
            bf16=False,
            save_strategy="no",
            **options,
            **QUIET,
        )
        data = Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        shapes[name] = next(iter(trainer.get_train_dataloader()))["input_ids"].shape
        trainer.train()
        losses[name] = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    tokens = sum(len(tokenizer(text).input_ids) + 1 for text in texts)
    assert shapes["packed"] == shapes["flattened"] == (1, tokens)
    assert shapes["padded"][0] == len(texts)
    for name in ("packed", "flattened"):
        assert torch.allclose(torch.tensor(losses[name]), torch.tensor(losses["padded"]), rtol=1e-4), name


# --- PEFT -----------------------------------------------------------------------------------------------------------


def test_lora_trains_saves_merges_and_unloads(tmp_path):
    model, ids = make_model(), random_ids(4, 23)
    model.save_pretrained(tmp_path / "base")
    expected = model(ids).logits
    projections = ["in_proj", "currents", "out_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=projections, base_model_name_or_path=tmp_path / "base"
    )
    tuned = get_peft_model(LrcSSMForCausalLM.from_pretrained(tmp_path / "base"), config).train()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(projections) * model.config.num_hidden_layers
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(tuned(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5

    tuned.eval()
    logits = tuned(input_ids=ids).logits
    assert not torch.allclose(logits, expected, atol=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    merged = loaded.merge_and_unload()
    assert type(merged) is LrcSSMForCausalLM
    assert torch.allclose(merged(ids).logits, logits, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)
    assert torch.equal(tuned.unload()(ids).logits, expected)


# --- Autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_type", ["gated", "paper"])
def test_autocast_is_close_and_solves_states_in_float32(dtype, block_type):
    model, ids = make_model(block_type=block_type).train(), random_ids(4, 40)

    def step():
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=True)
        outputs.loss.backward()
        return outputs, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected, expected_gradient = step()
    with torch.autocast("cpu", dtype):
        outputs, gradient = step()
    assert outputs.logits.dtype == dtype
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in outputs[CACHE].layers)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=0.01)
    assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > 0.99
    assert gradient.norm().item() == pytest.approx(expected_gradient.norm().item(), rel=0.05)


# --- Two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    two_processes.run(folder)
    return folder


@pytest.mark.parametrize("name", two_processes.MAKERS)
def test_ddp_averages_gradients(trained_by_two, name):
    model, batch = two_processes.MAKERS[name]()
    model(**batch).loss.backward()
    first, second = (load_file(trained_by_two / f"{name}.ddp{rank}") for rank in range(2))
    for key, parameter in model.named_parameters():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], parameter.grad, rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name", two_processes.MAKERS)
def test_a_step_of_fsdp_equals_a_step_of_one_process(trained_by_two, name):
    model, batch = two_processes.MAKERS[name]()
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), two_processes.LEARNING_RATE).step()
    weights = load_file(trained_by_two / f"{name}.fsdp")
    for key, parameter in model.named_parameters():
        assert torch.allclose(weights[key], parameter, rtol=1e-5, atol=1e-6), key
    # Every block by itself, and the rest with the model.
    assert (trained_by_two / f"{name}.wrapped").read_text() == str(model.config.num_hidden_layers + 1)
