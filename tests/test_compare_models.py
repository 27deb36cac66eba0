# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The comparison is fair: every model gets its best learning rate, and what was run is not run again."""

import json

import pytest

import pretraining_runs
from compare_models import STUDIES, Study, compare, table


STUDY = Study(
    title="Two models",
    output="unused",
    table="unused",
    arguments="--max_train_steps 20 --eval_steps 10 --block_size 32 --per_device_train_batch_size 2",
    learning_rates=("1e-3", "1e-2"),
    variants={"LrcSSM": ("lrcssm", "hidden_size=16"), "Llama": ("llama", "hidden_size=16")},
)
# By model, learning rate and seed.
LOSSES = {
    ("lrcssm", "1e-3", 0): 2.0, ("lrcssm", "1e-2", 0): 1.0, ("lrcssm", "1e-2", 1): 1.1, ("lrcssm", "1e-2", 2): 1.2,
    ("llama", "1e-3", 0): 1.5, ("llama", "1e-2", 0): 1.6, ("llama", "1e-3", 1): 1.7, ("llama", "1e-3", 2): 1.9,
}  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Stands for pretrain.py: writes what it would have written, with the loss above; lists the runs."""
    runs = []

    def run(script, *arguments, threads=None):
        assert script == "training/pretrain.py"
        flags = dict(zip(arguments[::2], arguments[1::2]))
        key = (flags["--model_type"], flags["--learning_rate"], int(flags["--seed"]))
        runs.append(key)
        folder = pretraining_runs.ROOT / flags["--output_dir"]
        folder.mkdir(parents=True)
        records = [{"step": 10, "validation_loss": 3 * LOSSES[key]}, {"step": 15, "train_loss": 1.0}]
        records.append({"step": 20, "validation_loss": 2 * LOSSES[key], "validation_nats_per_byte": LOSSES[key]})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        training = {"parameters": 1000, "command": " ".join(arguments), "hardware": {"device": "CPU", "threads": 1}}
        training |= {"versions": {"torch": "2"}, "steps": 20, "tokens_per_step": 64}
        (folder / "training.json").write_text(json.dumps(training))

    monkeypatch.setattr(pretraining_runs, "run_script", run)
    return runs


def test_every_model_gets_its_best_learning_rate_and_all_seeds(tmp_path, trained):
    results = compare(STUDY, tmp_path)
    assert sorted(trained) == sorted(LOSSES)
    assert results["models"]["LrcSSM"]["learning_rate"] == "1e-2"
    assert results["models"]["LrcSSM"]["nats_per_byte"] == [1.0, 1.1, 1.2]
    assert results["models"]["Llama"]["nats_per_byte"] == [1.5, 1.7, 1.9]
    assert results["models"]["Llama"]["nats_per_byte_by_learning_rate"] == {"1e-3": 1.5, "1e-2": 1.6}
    assert results["curves"]["Llama"] == [(10, pytest.approx(1.5 * 1.7)), (20, pytest.approx(1.7))]
    assert "| LrcSSM | 1.100 ± 0.100 | 0.00 | 1e-2 |" in table(results)
    again = compare(STUDY, tmp_path)
    assert again == results and len(trained) == len(LOSSES)


def test_an_interrupted_comparison_goes_on(tmp_path, trained):
    expected = compare(STUDY, tmp_path)
    (tmp_path / "llama-1e-3-1" / "training.json").unlink()
    (tmp_path / "llama-1e-3-1" / "metrics.jsonl").unlink()
    (tmp_path / "llama-1e-3-1").rmdir()
    trained.clear()
    assert compare(STUDY, tmp_path) == expected
    assert trained == [("llama", "1e-3", 1)]


def test_the_rivals_are_of_equal_size():
    from transformers import AutoConfig, AutoModelForCausalLM

    import lrcssm_hf  # noqa: F401  registers the model
    from pretrain import make_config

    class Tokenizer:
        bos_token_id = eos_token_id = pad_token_id = 0

        added_tokens_decoder = {}

        def get_vocab(self):
            return {"the last token": STUDIES["rivals"].vocab_size - 1}

    sizes = []
    for model_type, overrides in STUDIES["rivals"].variants.values():
        config = make_config(model_type, overrides, Tokenizer())
        assert isinstance(config, type(AutoConfig.for_model(model_type)))
        sizes.append(AutoModelForCausalLM.from_config(config).num_parameters())
    assert max(sizes) < 1.02 * min(sizes)
