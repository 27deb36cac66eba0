# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Write the model card, README.md, of a model folder from what its training left there.

    python scripts/make_card.py FOLDER REPO_ID

reads config.json, training.json and metrics.jsonl, as training/pretrain.py writes them, and, where it is there,
comparison.json, whose curves it draws into comparison.png. The text is in model_card.md.jinja. A card that is there
already is replaced.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME

from checked_json import NUMBER, check_kind, parse_json, read_json, read_text
from lrcssm_hf import LrcSSMConfig


matplotlib.use("Agg")
import matplotlib.pyplot as plt


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from whole_files import whole_files


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


class Head(NamedTuple):
    """What a card says of the models of one class: for a model of tokens and for one of series."""

    auto_class: str
    kinds: tuple[str, str]
    tasks: tuple[str, str]
    limits: str


HEADS = {
    "LrcSSMModel": Head(
        "AutoModel",
        ("model of text", "model of series"),
        ("feature-extraction", "feature-extraction"),
        "It gives hidden states, and knows nothing but what it was trained on.",
    ),
    "LrcSSMForCausalLM": Head(
        "AutoModelForCausalLM",
        ("language model", ""),
        ("text-generation", ""),
        "It has read nothing but what it was trained on and was not taught to follow instructions. What it writes\n"
        "looks like its training text, and need not be true, safe or, where it is code, correct. A recurrent state\n"
        "cannot be rolled back, so assisted generation is refused.",
    ),
    "LrcSSMForSequenceClassification": Head(
        "AutoModelForSequenceClassification",
        ("text classifier", "classifier of series"),
        ("text-classification", "tabular-classification"),
        "It knows the classes and the kind of input that it was trained on, and no others.",
    ),
    "LrcSSMForSequenceModeling": Head(
        "AutoModelForTokenClassification",
        ("tagger of text", "model of series"),
        ("token-classification", "time-series-forecasting"),
        "It knows the kind of input that it was trained on, and no other.",
    ),
}
TRAINING = {
    "command": str,
    "data": {
        "source": str,
        "dataset": str | None,
        "language": str | None,
        "training_tokens": int | None,  # Of a stream nobody knows.
        "held_out_tokens": int,
        "block_size": int,
    },
    "parameters": int,
    "steps": int,
    "tokens_per_step": int,
    "seconds": NUMBER,
    "hardware": {"device": str, "processes": int, "threads": int},
    "versions": {str: str},
}
COMPARISON = {
    "title": str,
    "environment": str,
    "steps": int,
    "tokens_per_step": int,
    "models": {str: {"parameters": int, "nats_per_byte": [NUMBER], "command": str}},
}
CURVES = {str: [[NUMBER]]}
MEASURES = {"loss": "nats per token", "nats_per_byte": "nats per byte"}
_MARKUP = re.compile(r"[\\`*\[\]<>&|~#${]|(?<![^\W_])_|_(?![^\W_])")  # An underscore within a word is none.


def find_head(config: LrcSSMConfig) -> Head:
    names = config.architectures or []
    if len(names) != 1 or names[0] not in HEADS:
        raise ValueError(f"config.json: `architectures` must name one of {', '.join(HEADS)}, got {names}.")
    return HEADS[names[0]]


def pipeline_tag(config: LrcSSMConfig) -> str:
    """The Hub's word for what the model does."""
    return find_head(config).tasks[config.num_channels is not None]


def in_text(value: str) -> str:
    """The value for the middle of a line, or a table's cell, where nothing in it is markup."""
    return " ".join(_MARKUP.sub(lambda found: f"&#{ord(found[0])};", value).split())


def in_code(language: str, code: str) -> str:
    """A block of code, in a fence that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def loading(head: Head, repo_id: str, config: LrcSSMConfig, remote_code: bool) -> str:
    """Python that loads the model and uses it."""
    auto_class = head.auto_class
    if config.num_channels is not None and auto_class == "AutoModelForTokenClassification":
        auto_class = "AutoModelForTimeSeriesPrediction"
    tokenizer = config.num_channels is None
    # The tokenizer is looked up by way of the configuration, which is code as well.
    source = f'"{repo_id}", trust_remote_code=True' if remote_code else f'"{repo_id}"'
    lines = ["import torch"] * (not tokenizer)
    lines += [f"from transformers import {auto_class}{', AutoTokenizer' * tokenizer}", ""]
    lines += [f"model = {auto_class}.from_pretrained({source})"]
    if tokenizer:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({source})"]
        lines += ['inputs = tokenizer("def mean(values):", return_tensors="pt")']
    else:
        lines += [f'inputs = {{"input_values": torch.randn(1, 100, {config.num_channels})}}  # batch, steps, channels']
    if auto_class == "AutoModelForCausalLM":
        lines += ["ids = model.generate(**inputs, max_new_tokens=100, do_sample=True, temperature=0.6)"]
        lines += ["print(tokenizer.decode(ids[0], skip_special_tokens=True))"]
    else:
        lines += ["outputs = model(**inputs)"]
    return "\n".join(lines)


def read_config(folder: Path) -> LrcSSMConfig:
    """The configuration of the model in the folder.

    Raises:
        ValueError: it does not load, or is of another kind of model.
    """
    path = folder / CONFIG_NAME
    try:
        read_json(path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Strict dataclasses have their own, and others come from what is not checked.
        raise ValueError(f"{path} does not load: {error}") from error
    if not isinstance(config, LrcSSMConfig):
        raise ValueError(f"{path} is of a model of type {config.model_type!r}, not 'lrcssm'.")
    return config


def read_training(path: Path) -> dict:
    """What training.json says."""
    training = read_json(path, TRAINING)
    dataset = training["data"]["dataset"]
    if dataset is not None:
        try:
            validate_repo_id(dataset)
        except ValueError as error:
            raise ValueError(f"{path}: data: dataset must be a name on the Hub, or null; got {dataset!r}.") from error
    return training


def read_results(path: Path, data: dict, task: str) -> list[EvalResult]:
    """What the last line of metrics.jsonl says was measured on the held-out data."""
    where, last = str(path), {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        last = parse_json(line, dict, where)
    prefix = "validation_"
    measured = {field: value for field, value in last.items() if field.startswith(prefix)}
    if f"{prefix}nats_per_byte" not in measured:
        raise ValueError(f"{path} does not end with `{prefix}nats_per_byte`: the training was not finished.")
    check_kind(measured, {str: NUMBER}, where)
    names = {field: field.removeprefix(prefix) for field in measured}
    return [
        EvalResult(
            task_type=task,
            dataset_type=data["dataset"] or "custom",
            dataset_name=data["source"],
            dataset_split="validation",
            metric_type=names[field],
            metric_name=f"held-out {MEASURES.get(names[field], names[field])}",
            metric_value=value,
        )
        for field, value in measured.items()
    ]


def read_comparison(folder: Path) -> dict | None:
    path = folder / "comparison.json"
    if not path.exists():
        return None
    comparison = read_json(path, COMPARISON)
    if curves := comparison.get("curves"):
        check_kind(curves, CURVES, f"{path}: curves")
        if any(len(point) != 2 for points in curves.values() for point in points):
            raise ValueError(f"{path}: curves: a point is a step and the nats per byte, two numbers.")
    return comparison


def comparison_rows(models: dict[str, dict]) -> list[dict]:
    """A row per model of comparison.json, the best in bold."""
    means = {name: statistics.mean(model["nats_per_byte"]) for name, model in models.items()}
    rows = []
    for name, model in models.items():
        scores = model["nats_per_byte"]
        score = f"{means[name]:.3f}"
        if len(scores) > 1:
            score += f" ± {statistics.stdev(scores):.3f}"
        if means[name] == min(means.values()):
            score = f"**{score}**"
        rows.append({**model, "name": name, "seeds": len(scores), "score": score})
    return rows


def draw_curves(curves: dict[str, list], path: Path) -> None:
    """A line per model of `curves`, which has (step, held-out nats per byte) points by model."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for points in curves.values():
        axes.plot(*zip(*points), "o-", markersize=4)
    axes.set(xlabel="training steps", ylabel="held-out nats per byte")
    axes.grid(alpha=0.3)
    # Names are shown as they are, also with a dollar, or an underscore in front.
    with plt.rc_context({"text.parse_math": False}):
        axes.legend(axes.lines, curves)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def make_card(folder: Path, repo_id: str) -> ModelCard:
    """The card, not yet written.

    Raises:
        ValueError: the repository has no possible name, or a file is missing or does not hold what is needed; the
            message names it.
    """
    validate_repo_id(repo_id)
    config = read_config(folder)
    head, task = find_head(config), pipeline_tag(config)
    training = read_training(folder / "training.json")
    data, hardware, minutes = training["data"], training["hardware"], training["seconds"] / 60
    results = read_results(folder / "metrics.jsonl", data, task)
    if data["training_tokens"] is None:
        tokens = f"{training['steps'] * training['tokens_per_step']:,} tokens of a stream"
    else:
        tokens = f"{data['training_tokens']:,} tokens"
    comparison = read_comparison(folder)
    name = repo_id.split("/")[-1]
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=task,
        language=data["language"],
        datasets=[data["dataset"]] if data["dataset"] else None,
        tags=["lrcssm", "liquid-neural-network", "state-space-model", "recurrent-neural-network"],
        model_name=name,
        eval_results=results,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        in_text=in_text,
        in_code=in_code,
        model_name=name,
        kind=head.kinds[config.num_channels is not None],
        limits=head.limits,
        config=config,
        loading=loading(head, repo_id, config, remote_code=False),
        loading_remote_code=loading(head, repo_id, config, remote_code=True),
        training=training,
        tokens=tokens,
        duration=f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours",
        hardware=f"{hardware['processes']} x {hardware['device']} ({hardware['threads']} threads each)",
        versions=", ".join(f"{library} {version}" for library, version in training["versions"].items()),
        results=results,
        has_loss_plot=(folder / "loss.png").is_file(),
        comparison=comparison,
        rows=comparison_rows(comparison["models"]) if comparison else [],
        has_comparison_plot=bool(comparison and comparison.get("curves")),
    )


def write_card(folder: Path, repo_id: str) -> None:
    """The card and the plot it shows, both moved into place when they are whole."""
    card = make_card(folder, repo_id)
    with whole_files(folder) as partial:
        card.save(partial / "README.md")
        if curves := (read_comparison(folder) or {}).get("curves"):
            draw_curves(curves, partial / "comparison.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="A model folder that training/pretrain.py wrote.")
    parser.add_argument("repo_id", help="The name under which it is to be published, user/name.")
    args = parser.parse_args(arguments)
    try:
        write_card(args.folder, args.repo_id)
    except (ValueError, OSError) as refused:
        parser.exit(2, f"error: {refused}\n")
    print(f"{args.folder / 'README.md'} written.")


if __name__ == "__main__":
    main()
