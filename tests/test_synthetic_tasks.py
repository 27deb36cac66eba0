# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The synthetic tasks are what they say, and a short run learns one of them."""

import json

import pytest
import torch

import synthetic_tasks
from lrcssm_hf import LrcParameters, lrc_scan


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weight_decay", "-1"], "argument --weight_decay: must be at least 0, got -1"),
        (["--seeds", "1", "1"], "argument --seeds: 1 is given twice"),
        (["--max_train_length", "1"], "argument --max_train_length: must be at least 8, got 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        synthetic_tasks.parse_args(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_a_task_sets_is_not_overridden():
    with pytest.raises(ValueError, match="the task sets 'use_cache'"):
        synthetic_tasks.make_config(synthetic_tasks.TASKS["parity"], "use_cache=True")


@pytest.mark.parametrize("task", synthetic_tasks.TASKS)
def test_every_task_predicts_something(task, tmp_path):
    arguments = ["--task", task, "--max_train_steps", "2", "--per_device_train_batch_size", "2", "--eval_tokens", "256"]
    arguments += ["--max_eval_length", "128", "--output_dir", str(tmp_path)]
    torch.manual_seed(0)
    synthetic_tasks.main(arguments)
    assert (tmp_path / "results.md").exists()


def test_one_neuron_composes_cycles_and_exchanges_of_five_levels():
    """Built by hand as the module's docstring says: levels -1 to 3 are five points, and the state is the image of 1."""
    slope, scale, weight, bias = 10.0, 0.1, 400.0, 10.0
    numbers = (scale, 1.0, weight, weight, -weight / 2, -1.0, -2 * bias, 0.0)
    parameters = LrcParameters(*torch.tensor(numbers, dtype=torch.float64).unsqueeze(1))

    def threshold(level: float) -> float:
        """The input with which f, or z, changes its sign at the level."""
        return slope * (1 - level)

    far = 40 * bias
    # c and d move the thresholds of f and z; q turns the elastance off, on, or on below 1/2.
    symbols = torch.tensor(
        [
            [0.0, threshold(9), -far],  # hold
            [threshold(2.5), threshold(2.5), far],  # cycle: up by a level, from the highest to the lowest
            [threshold(9), threshold(-0.5), bias],  # exchange -1 and 0
        ],
        dtype=torch.float64,
    )
    permutations = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [1, 0, 2, 3, 4]])
    inputs = torch.randint(3, (8, 8192), generator=torch.Generator().manual_seed(0))
    forget, update, elastance = symbols[inputs].split(1, dim=-1)
    states, _ = lrc_scan(forget, update, parameters, elastance_input=elastance)
    place, expected = torch.ones(8, dtype=torch.long), []
    for symbol in inputs.unbind(1):
        place = permutations[symbol, place]
        expected.append(place - 1)
    assert (states[..., 0] - torch.stack(expected, 1)).abs().max() < 0.1
