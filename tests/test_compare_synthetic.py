# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The table of state tracking says what the runs say, and all models are trained alike."""

import json

import pytest

import compare_synthetic
from compare_synthetic import MODELS, SEEDS, TRAINING, compare, table
from synthetic_tasks import parse_args


def fake_run(arguments):
    """The record that synthetic_tasks.py would have made: the LrcSSM is right, the others are, to some length."""
    args = parse_args(arguments)
    right = {"lrcssm": 8192, "lru": 1024}.get(args.model, 0)
    accuracy = {str(n): (0.9 if n <= right else 0.3) + 0.01 * args.seeds[0] for n in (128, 256, 512, 1024, 8192)}
    record = {"seed": args.seeds[0], "parameters": 1000, "accuracy": accuracy, "seconds": 2.0}
    record["hardware"], record["versions"] = {"device": "CPU", "threads": 1}, {"torch": "2"}
    return {**record, "command": " ".join(arguments)}


def test_the_table_says_what_the_runs_say(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_synthetic, "run", fake_run)
    results = compare("runs of mine", map, tmp_path)
    assert results["runs"]["s3"]["lru"][1]["command"].endswith("--seeds 1 --output_dir runs of mine/s3-lru")
    text = (tmp_path / "state_tracking.md").read_text()
    assert text == table(json.loads((tmp_path / "state_tracking.json").read_text())) == table(results)
    assert (tmp_path / "state_tracking.png").exists()
    lines = text.splitlines()
    assert "| parity | LrcSSM | **91.0 ± 1.0** | **91.0 ± 1.0** | **91.0 ± 1.0** | 1,000 |" in lines
    assert "| parity | LRU | **91.0 ± 1.0** | **91.0 ± 1.0** | 31.0 ± 1.0 | 1,000 |" in lines
    assert "| counting modulo 3 | chance | 33.3 | 33.3 | 33.3 | |" in lines
    assert len(lines) == 4 + len(TRAINING) * (len(MODELS) + 1)


@pytest.mark.parametrize("task", TRAINING)
def test_models_differ_in_the_mixer_only(task, monkeypatch):
    seen = []
    monkeypatch.setattr(compare_synthetic, "write_whole", lambda *_: None)
    monkeypatch.setattr(compare_synthetic, "plot", lambda *_: None)

    def remember(arguments):
        seen.append(vars(parse_args(arguments)))
        return fake_run(arguments)

    monkeypatch.setattr(compare_synthetic, "run", remember)
    compare("runs", map)
    of_task = [dict(args) for args in seen if args["task"] == task]
    assert {(args.pop("model"), args.pop("seeds")[0]) for args in of_task} == {(m, s) for m in MODELS for s in SEEDS}
    for args in of_task:
        args.pop("output_dir")
        assert args == of_task[0]


def test_flags_that_cannot_be_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        compare_synthetic.main(["--num_processes", "-1"])
    assert ended.value.code == 2 and "--num_processes: must be at least 1, got -1" in capsys.readouterr().err
