# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The model card says what was trained, how, and what came of it, in the words that the Hub's search knows."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import lrcssm_hf
import make_card
import pretrain
from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM
from tiny_models import make_config, make_model


REPO_ID = "user/a-small-model"
COMPARISON = {
    "title": "Against a Llama",
    "environment": "2 CPU threads",
    "steps": 1000,
    "tokens_per_step": 4096,
    "models": {
        "LrcSSM": {"parameters": 1500000, "nats_per_byte": [1.25, 1.27], "command": "train --model_type lrcssm"},
        "Llama": {"parameters": 1400000, "nats_per_byte": [1.5, 1.3], "command": "train --model_type llama"},
    },
}


def train_folder(folder):
    """What the shortest run of pretrain.py leaves in the folder."""
    text = folder.with_name("corpus.txt")
    text.write_text("def mean(values):\n    return sum(values) / len(values)\n" * 99)
    arguments = ["--train_file", str(text), "--output_dir", str(folder), "--max_train_steps", "2"]
    arguments += ["--config_overrides", "hidden_size=16,num_hidden_layers=1", "--block_size", "64"]
    pretrain.main(arguments)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_folder(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "model")


def read_card(folder):
    make_card.main([str(folder), REPO_ID])
    return ModelCard.load(folder / "README.md")


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_metadata_is_what_the_hub_reads(folder):
    data = read_card(folder).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert "lrcssm" in data.tags and data.datasets is None and data.language is None
    assert data.model_name == REPO_ID.split("/")[1]
    final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"loss": final["validation_loss"], "nats_per_byte": final["validation_nats_per_byte"]}
    assert {(result.dataset_name, result.dataset_type) for result in data.eval_results} == {("corpus.txt", "custom")}


def test_the_data_on_the_hub_and_the_language_are_named(folder):
    training = json.loads((folder / "training.json").read_text())
    change(folder / "training.json", data={**training["data"], "dataset": "user/texts", "language": "code"})
    data = read_card(folder).data
    assert (data.datasets, data.language) == (["user/texts"], "code")
    assert {result.dataset_type for result in data.eval_results} == {"user/texts"}


def test_the_text_says_how_to_repeat_the_training_and_what_came_of_it(folder):
    text = read_card(folder).text
    training = json.loads((folder / "training.json").read_text())
    final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"```bash\n{training['command']}\n```" in text
    assert f"| held-out nats per byte | {final['validation_nats_per_byte']:.3f} |" in text
    assert f"{training['parameters']:,} parameters" in text and torch.__version__ in text
    assert "![Loss over the training tokens](loss.png)" in text
    assert "comparison" not in text and "{{" not in text and "{%" not in text
    assert "\n\n\n" not in text, "a gap where something was left out"
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["How to load it", "Training", "Evaluation", "Limits", "Citation"]


def test_without_a_plot_there_is_no_picture(folder):
    (folder / "loss.png").unlink()
    assert "loss.png" not in read_card(folder).text


def test_the_snippets_load_the_model(folder, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", read_card(folder).text, flags=re.DOTALL)
    assert [snippet.count(f'"{REPO_ID}", trust_remote_code=True') for snippet in snippets] == [0, 2]
    monkeypatch.chdir(folder.parent)
    (folder.parent / "user").mkdir()
    shutil.copytree(folder, REPO_ID)
    for snippet in snippets:
        capsys.readouterr()
        namespace = {}
        exec(snippet, namespace)
        assert type(namespace["model"]) is LrcSSMForCausalLM
        assert capsys.readouterr().out.startswith("def mean(values):")


def test_a_comparison_is_a_table_with_the_best_in_bold(folder):
    (folder / "comparison.json").write_text(json.dumps(COMPARISON))
    text = read_card(folder).text
    assert "### Against a Llama" in text and "1,000 steps of 4,096 tokens" in text and "2 CPU threads" in text
    assert "| LrcSSM | 1,500,000 | 2 | **1.260 ± 0.014** |\n| Llama | 1,400,000 | 2 | 1.400 ± 0.141 |" in text
    assert "```bash\ntrain --model_type lrcssm\ntrain --model_type llama\n```" in text
    assert "comparison.png" not in text and not (folder / "comparison.png").exists()
    assert "\n\n\n" not in text


def test_the_curves_of_a_comparison_are_drawn(folder):
    curves = {"LrcSSM": [[100, 1.9], [1000, 1.26]], "Llama": [[100, 2.2], [1000, 1.4]]}
    (folder / "comparison.json").write_text(json.dumps({**COMPARISON, "curves": curves}))
    assert "](comparison.png)" in read_card(folder).text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (head, changes)
        for head in make_card.HEADS
        for changes in ({}, {"num_channels": 3, "num_labels": 3})
        if make_card.HEADS[head].kinds["num_channels" in changes]
    ],
)
def test_every_heads_snippet_runs(head, changes, trained, tmp_path):
    make_model(getattr(lrcssm_hf, head), vocab_size=257, **changes).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path)
    config = LrcSSMConfig.from_pretrained(tmp_path)
    assert make_card.pipeline_tag(config)
    namespace = {}
    exec(make_card.loading(make_card.find_head(config), str(tmp_path), config, remote_code=False), namespace)
    assert type(namespace["model"]).__name__ == head


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "config.json"),
        ("training.json", None, "training.json is missing"),
        ("training.json", "{", "training.json is not JSON"),
        ("training.json", '{"command": "train"}', "training.json does not say data"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("metrics.jsonl", '{"step": 10, "train_loss": 2.0}\n', "was not finished"),
        ("comparison.json", '{"title": "T"}', "comparison.json does not say environment"),
    ],
)
def test_what_is_missing_is_named_and_no_card_is_written(file, content, message, folder, capsys):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(SystemExit) as ended:
        make_card.main([str(folder), REPO_ID])
    assert ended.value.code == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (folder / "README.md").exists()


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="architectures"):
        make_card.pipeline_tag(make_config(architectures=["LlamaForCausalLM"]))
