# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The README says what is so: its Python runs, and its table is the one that the script wrote."""

import re
from pathlib import Path

import torch

import pretrain


ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_snippets_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("def mean(values):\n    return sum(values) / len(values)\n" * 99)
    arguments = ["--train_file", "corpus.txt", "--output_dir", "runs/lrcssm-python", "--max_train_steps", "2"]
    arguments += ["--config_overrides", "hidden_size=16,num_hidden_layers=1", "--block_size", "64"]
    pretrain.main(arguments)
    torch.manual_seed(0)
    namespace = {}
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(snippet, namespace)
    assert "LrcScanInfo(solver='newton'" in capsys.readouterr().out


def test_the_table_is_what_the_comparison_wrote():
    assert (ROOT / "scripts" / "results" / "block_comparison.md").read_text().strip() in README


def test_the_figures_are_what_the_benchmark_wrote():
    figures = re.findall(r"^- lrc_scan takes .*$", README, flags=re.MULTILINE)
    written = (ROOT / "scripts" / "results" / "recurrence_cpu.md").read_text()
    assert len(figures) == 2 and all(figure in written for figure in figures)


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
