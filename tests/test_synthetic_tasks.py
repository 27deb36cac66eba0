# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The synthetic tasks are what they say, and a short run learns one of them."""

import json

import pytest
import torch

import synthetic_tasks


def test_parity_is_learned_beyond_the_lengths_of_training(tmp_path):
    arguments = ["--task", "parity", "--max_train_steps", "400", "--eval_tokens", "8192", "--max_eval_length", "2048"]
    synthetic_tasks.main([*arguments, "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    accuracy = json.loads(path.read_text())["accuracy"]
    assert accuracy["2048"] > 0.95


def test_a_length_below_that_of_training_is_refused(capsys):
    with pytest.raises(SystemExit):
        synthetic_tasks.parse_args(["--max_train_length", "64", "--max_eval_length", "32"])
    assert "--max_eval_length must be at least --max_train_length" in capsys.readouterr().err


@pytest.mark.parametrize("task", synthetic_tasks.TASKS)
def test_every_task_predicts_something(task, tmp_path):
    arguments = ["--task", task, "--max_train_steps", "2", "--per_device_train_batch_size", "2", "--eval_tokens", "256"]
    arguments += ["--max_eval_length", "128", "--output_dir", str(tmp_path)]
    torch.manual_seed(0)
    synthetic_tasks.main(arguments)
    assert (tmp_path / "results.md").exists()
