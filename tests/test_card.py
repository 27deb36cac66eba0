# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The model card says what was trained, how, and what came of it, in the words that the Hub's search knows."""

import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

import lrcssm_hf
import make_card
import pretrain
import publish
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


TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def train_folder(folder, *options, file="corpus.txt", content=TEXT * 99):
    """What the shortest run of pretrain.py leaves in the folder."""
    text = folder.with_name(file)
    text.write_text(content)
    arguments = ["--train_file", str(text), "--output_dir", str(folder), "--max_train_steps", "2", *options]
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


def test_the_card_of_a_stream_says_what_was_read_of_it(tmp_path):
    rows = (json.dumps({"text": TEXT}) + "\n") * 1099
    folder = train_folder(tmp_path / "model", "--streaming", file="texts.jsonl", content=rows)
    training = json.loads((folder / "training.json").read_text())
    assert training["data"]["training_tokens"] is None
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    text = read_card(folder).text
    assert f"Trained on texts.jsonl: {last['tokens']:,} tokens of a stream in blocks of 64" in text
    assert f"2 steps of {last['tokens'] // 2:,} tokens" in text
    assert f"On the {training['data']['held_out_tokens']:,} tokens that were held out" in text


# What a file's, a dataset's or a model's name, and the text in a command, may be.
NAMES = {
    "HTML": "<script>alert(1)</script> <img src=/etc/hosts> &lt; <!-- <b",
    "links": "[a](/etc/hosts) ![a](../b.png) [a][1] <https://host.org>",
    "emphasis": "**a** _b_ __c__ a_b_c *d ~~e~~ f__ `",
    "code": "`a` ``b`` ```c``` ```",
    "a fence": "a\n```\n\n<b>free</b>\n\n````bash\nb\n~~~~",
    "lines": "a\n---\nb: c\n\n# Heading\r\n- item\n    code",
    "a table": "a | b || c \\| d \\\\| e",
    "quotes": "a 'b' '' ' \"" + '"c" "" """ x',
    "a template": "{{ training }} {% raw %} {# a #} {{ x",
    "YAML": "a: b # c",
    "a list": "- a: [b, {c: d}], *e &f !g %h @i",
    "backslashes": r"\\(x\\) \a \* \[ $$x$$ $y$ \\",
    "other letters": "мой-датасет 数据 \u2028 \x85 \U0001f600",
    "a heading": "# a ## #",
    "a number": "1_000",
}


def use_name(folder, name):
    """Puts it into every place where a name or a command can be."""
    training = json.loads((folder / "training.json").read_text())
    data = {**training["data"], "source": name, "language": name}
    change(folder / "training.json", command=f"train {name}", data=data)
    change(folder / "training.json", hardware={**training["hardware"], "device": name}, versions={name: name})
    models = {f"{name} 1": COMPARISON["models"]["LrcSSM"], name: {**COMPARISON["models"]["Llama"], "command": name}}
    comparison = {**COMPARISON, "title": name, "environment": name, "models": models}
    (folder / "comparison.json").write_text(json.dumps(comparison))
    record = {"validation_loss": 1.5, "validation_nats_per_byte": 1.5, f"validation_{name}": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record))


def parse(markdown):
    """What a page consists of, and its words."""
    structure, words = [], []

    def walk(tokens):
        for token in tokens:
            if token.children is not None:
                walk(token.children)
                words.append("\n")
            else:
                words.append(" " if token.type == "softbreak" else token.content)
            # How many pieces the words are in says nothing.
            if token.type not in ("text", "text_special", "softbreak"):
                structure.append((token.type, token.tag, token.info, token.attrs))

    walk(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown))
    return structure, "".join(words)


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    """What the page consists of where the names are plain."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("plain") / "model")
    use_name(folder, "plain")
    return parse(read_card(folder).text)[0]


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_is_shown_as_it_is_and_is_neither_markup_nor_code(kind, folder, plain):
    name = NAMES[kind]
    use_name(folder, name)
    card = read_card(folder)
    structure, words = parse(card.text)
    assert structure == plain
    shown = " ".join(name.split())
    places = [f"Trained on {shown}: ", f" on 1 x {shown} (", f"with {shown} {shown}:", f"held-out {shown}\n0.500"]
    places += [f"lower is better; {shown}.", f"{shown}\n1,400,000", f"\n{shown}\nHeld-out nats per byte"]
    for place in places:
        assert place in words, place
    lines = name.replace("\r\n", "\n")
    assert f"train {lines}\n" in words and f"train --model_type lrcssm\n{lines}\n" in words

    results = {result.metric_type: result for result in card.data.eval_results}
    assert card.data.language == name and results[name].metric_value == 0.5
    assert results[name].metric_name == f"held-out {name}" and results["loss"].dataset_name == name
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)[1])
    assert front["language"] == name and front["license"] == "apache-2.0"
    # And it can be published.
    names = {path.name for path in folder.iterdir()}
    publish.check_card(folder / "README.md", REPO_ID, make_card.read_config(folder), names)


def test_names_in_a_picture_are_shown_as_they_are(tmp_path, monkeypatch):
    figures, names = [], ["$x", r"$\frac{$", "_a", "<b>"]
    monkeypatch.setattr(make_card.plt, "close", figures.append)
    make_card.draw_curves({name: [[1, 2.5]] for name in names}, tmp_path / "comparison.png")
    monkeypatch.undo()
    legend = figures[0].axes[0].get_legend()
    make_card.plt.close(figures[0])
    assert [text.get_text() for text in legend.get_texts()] == names


@pytest.mark.parametrize("repo_id", ['user/a");print(1)#', "user/a\nb", "../a", "/home/me/a", "user/a--b"])
def test_a_repository_that_cannot_be_is_refused(repo_id, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        make_card.main([str(folder), repo_id])
    assert ended.value.code == 2 and repo_id in capsys.readouterr().err
    assert not (folder / "README.md").exists()


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
        ("config.json", "[]", r"config.json must be an object, got \[\]"),
        ("config.json", '{"model_type": "gpt2"}', "config.json is of a model of type 'gpt2', not 'lrcssm'"),
        ("config.json", '{"model_type": "lrcssm", "hidden_size": null}', "config.json does not load"),
        ("config.json", '{"model_type": 5}', "config.json does not load"),
        ("training.json", "[]", r"training.json must be an object, got \[\]"),
        ("training.json", b"\xff\xfe", "training.json cannot be read"),
        ("training.json", "[" * 100_000, "training.json is not JSON"),
        ("training.json", {"parameters": None}, "training.json: parameters must be a whole number, got None"),
        ("training.json", {"parameters": True}, "training.json: parameters must be a whole number, got True"),
        ("training.json", {"seconds": float("nan")}, "training.json: seconds must be finite, got nan"),
        ("training.json", {"data": None}, "training.json: data must be an object, got None"),
        ("training.json", {"data": {"source": "x"}}, "training.json: data does not say dataset, language"),
        ("training.json", {"versions": {"torch": None}}, "training.json: versions: torch must be a string, got None"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "tra\n{"step": 3}\n', "metrics.jsonl, line 2 is not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"validation_loss": 2.0, "vali', "metrics.jsonl, line 2 is not JSON"),
        ("metrics.jsonl", "[1]\n", r"metrics.jsonl, line 1 must be an object, got \[1\]"),
        ("metrics.jsonl", "", "was not finished"),
        (
            "metrics.jsonl",
            '{}\n{"validation_loss": NaN, "validation_nats_per_byte": 1.0}\n',
            "metrics.jsonl, line 2: validation_loss must be finite, got nan",
        ),
        (
            "metrics.jsonl",
            '{"validation_nats_per_byte": null}\n',
            "metrics.jsonl, line 1: validation_nats_per_byte must be a number, got None",
        ),
        ("comparison.json", {**COMPARISON, "models": {}}, "comparison.json: models is empty"),
        (
            "comparison.json",
            {**COMPARISON, "models": {"A": {"parameters": 1, "command": "x", "nats_per_byte": [1.0, None]}}},
            "comparison.json: models: A: nats_per_byte: 1 must be a number, got None",
        ),
        (
            "comparison.json",
            {**COMPARISON, "models": {"A": {"parameters": 1, "command": "x", "nats_per_byte": []}}},
            "comparison.json: models: A: nats_per_byte is empty",
        ),
        ("comparison.json", {**COMPARISON, "curves": {"A": [[1, "x"]]}}, "curves: A: 0: 1 must be a number, got 'x'"),
        ("comparison.json", {**COMPARISON, "curves": {"A": [[1]]}}, "curves: a point is a step and the nats per byte"),
    ],
)
def test_what_is_missing_is_named_and_no_card_is_written(file, content, message, folder, capsys):
    path = folder / file
    if isinstance(content, dict):
        content = json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **content})
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as ended:
        make_card.main([str(folder), REPO_ID])
    assert ended.value.code == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err, flags=re.DOTALL)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("dataset", ["/home/me/texts", "../texts", "a/b/c"])
def test_data_that_is_not_on_the_hub_is_not_named_as_such(dataset, folder, capsys):
    training = json.loads((folder / "training.json").read_text())
    change(folder / "training.json", data={**training["data"], "dataset": dataset})
    with pytest.raises(SystemExit):
        make_card.main([str(folder), REPO_ID])
    assert f"data: dataset must be a name on the Hub, or null; got '{dataset}'" in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="architectures"):
        make_card.pipeline_tag(make_config(architectures=["LlamaForCausalLM"]))
