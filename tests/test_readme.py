# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The README and the docstrings say what is so: their Python runs, and the tables are those that scripts wrote."""

import doctest
import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import lrcssm_hf
import pretrain
from lrcssm_hf import (
    backends,
    blocks,
    cell_compiler,
    cells,
    configuration_lrcssm,
    forecasting,
    generation,
    host,
    initialization,
    inputs,
    mixing,
    modeling_lrcssm,
    recurrence,
    recurrent_cache,
    saved_states,
    series,
    solvers,
    steps,
)
from lrcssm_hf.host import CACHE


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_snippets_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model_cards").symlink_to(ROOT / "model_cards")
    Path("corpus.txt").write_text("def mean(values):\n    return sum(values) / len(values)\n" * 99)
    arguments = ["--train_file", "corpus.txt", "--output_dir", "runs/lrcssm-python", "--max_train_steps", "2"]
    arguments += ["--config_overrides", "hidden_size=16,num_hidden_layers=1", "--block_size", "64"]
    pretrain.main(arguments)
    torch.manual_seed(0)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 4
    for snippet in snippets:
        # Its name is older transformers' in them.
        exec(snippet.replace("outputs.cache", f"outputs.{CACHE}"), namespace)
    assert "ScanInfo(solver='newton'" in capsys.readouterr().out


def test_the_cell_that_contributors_are_shown_is_right():
    """Its snippet compares the scan with the function in a loop."""
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    namespace = {"torch": torch}
    exec(snippet, namespace)
    x, expected = torch.zeros(2, 64), []
    for drive in namespace["drive"].unbind(1):
        x = x + namespace["leaky"](x, drive, **namespace["parameters"])
        expected.append(x)
    assert torch.allclose(namespace["states"], torch.stack(expected, 1), atol=1e-5)
    assert namespace["drive"].grad.isfinite().all()


def test_the_first_example_writes_what_is_shown(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippet, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL).groups()
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == shown.strip()


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("block_comparison", None),
        ("rival_comparison", None),
        ("state_tracking", None),
        ("context_parallel", None),
        ("scaling_law", None),
        # The first of several tables.
        ("series_forecasting", "\nMean absolute error"),
        ("series_classification", "\n![Mean ranks]"),
        ("series_pretraining", "\nSeconds per"),
    ],
)
def test_the_tables_are_what_the_comparisons_wrote(name, end):
    written = (ROOT / "scripts" / "results" / f"{name}.md").read_text(encoding="utf-8")
    without_title = re.sub(r"^# .*\n", "", written.split(end)[0] if end else written)
    assert without_title.strip() in README


def test_the_figure_of_the_model_in_this_repository_is_what_its_training_wrote():
    lines = (ROOT / "model_cards" / "lrcssm-python-nano" / "metrics.jsonl").read_text().splitlines()
    assert f"{json.loads(lines[-1])['validation_nats_per_byte']:.3f} nats per byte of held-out files" in README


def test_the_figures_are_what_the_benchmark_wrote():
    figures = re.findall(r"^- lrc_scan takes .*$", README, flags=re.MULTILINE)
    written = (ROOT / "scripts" / "results" / "recurrence_cpu.md").read_text(encoding="utf-8")
    assert len(figures) == 2 and all(figure in written for figure in figures)


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


MODULES = [configuration_lrcssm, forecasting, host, modeling_lrcssm, recurrence]
MODULES += [
    backends,
    blocks,
    cell_compiler,
    cells,
    generation,
    initialization,
    inputs,
    mixing,
    recurrent_cache,
    saved_states,
    series,
    solvers,
    steps,
]


@pytest.mark.parametrize("module", [configuration_lrcssm, modeling_lrcssm], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_everything_public_is_documented():
    public = {name: getattr(lrcssm_hf, name) for name in lrcssm_hf.__all__}
    for module in MODULES:
        public |= {
            name: item for name, item in vars(module).items() if getattr(item, "__module__", 0) == module.__name__
        }
    undocumented = []
    for name, item in public.items():
        members = {f"{name}.{key}": value for key, value in vars(item).items()} if inspect.isclass(item) else {}
        for key, value in {name: item, **members}.items():
            hidden = any(part.startswith("_") for part in key.split("."))
            if not hidden and (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__:
                undocumented.append(key)
    assert not undocumented
