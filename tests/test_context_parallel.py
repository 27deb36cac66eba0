# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A sequence spread over two and four processes has the states and gradients of one."""

import pytest
import torch
import torch.distributed as dist

import several_ranks
from lrcssm_hf import (
    LrcParameters,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
    lrc_scan,
    prefix_scan,
)
from lrcssm_hf.context_parallel import _match
from processes import join
from tiny_models import make_model, random_ids


def test_pieces_on_several_ranks_are_the_whole_sequence(tmp_path):
    several_ranks.run(tmp_path)
    for name in several_ranks.CASES:
        gatherings = {torch.load(tmp_path / f"{name}-{rank}") for rank in range(several_ranks.RANKS)}
        # As many on all ranks; at most a sweep per rank, and one going back.
        assert len(gatherings) == 1 and 2 <= gatherings.pop() <= several_ranks.RANKS + 1, name


def test_a_right_start_has_a_right_end_and_a_guess_is_a_number():
    starts, ends = torch.zeros(4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    slopes = torch.tensor([torch.inf, 0.5, torch.inf, 1.0]).view(4, 1, 1)
    # The second start moves by 1, the third by 2 + 0.5; what follows an infinite slope is the plain end.
    assert _match(starts, ends, slopes).flatten().tolist() == [0, 1, 2.5, 3]


def test_scans_refuse_what_does_not_go_with_a_group():
    parameters = LrcParameters(*torch.randn(8, 5))
    with pytest.raises(ValueError, match="return_info"):
        lrc_scan(torch.randn(1, 3, 5), torch.randn(1, 3, 5), parameters, return_info=True, group=object())
    with pytest.raises(ValueError, match="reverse"):
        prefix_scan(torch.randn(1, 3, 5), torch.randn(1, 3, 5), reverse=True, group=object())


@pytest.fixture
def group_of_one(tmp_path):
    threads = torch.get_num_threads()
    join(0, 1, tmp_path)
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def test_what_was_made_under_inference_mode_can_be_learned_with(group_of_one):
    with torch.inference_mode():
        update_input, initial_state = torch.randn(2, 7, 5), torch.randn(2, 5)
        parameters = LrcParameters(*torch.randn(8, 5))
    forget_input = torch.randn(2, 7, 5, requires_grad=True)
    results = []
    for group in (group_of_one, None):
        options = {"initial_state": initial_state, "group": group}
        states, _ = lrc_scan(forget_input, update_input, parameters, **options)
        states = prefix_scan(states, update_input, **options)
        results.append([states, *torch.autograd.grad(states.sum(), forget_input)])
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*results))


def test_forward_mode_over_a_group_is_refused(group_of_one):
    parameters, inputs = LrcParameters(*torch.randn(8, 5)), torch.randn(1, 3, 5)
    scans = (
        lambda x: lrc_scan(x, inputs, parameters, group=group_of_one)[0],
        lambda x: prefix_scan(x, inputs, group=group_of_one),
    )
    for scan in scans:
        with pytest.raises(ValueError, match="Forward mode.*group"):
            torch.func.jvp(scan, (inputs,), (inputs,))


@pytest.mark.parametrize(
    ("head", "changes", "inputs", "message"),
    [
        (LrcSSMModel, {}, {"use_cache": True}, "`use_cache` does not go with"),
        (LrcSSMModel, {}, {"seq_idx": torch.zeros(1, 6, dtype=torch.long)}, "`seq_idx` does not go with"),
        (LrcSSMModel, {"num_channels": 2, "patch_length": 2}, {}, "A model with `patch_length` has to"),
        (LrcSSMModel, {"num_channels": 2, "scaling": "std"}, {}, "A model with `scaling` has to"),
        (LrcSSMModel, {"num_channels": 2, "bidirectional": True}, {}, "A model with `bidirectional` has to"),
        (LrcSSMForSequenceClassification, {}, {}, "The pooled label would be of one rank's piece"),
        (LrcSSMForSequenceModeling, {}, {"labels": torch.zeros(1, 6).long()}, "The loss of `labels` would be"),
        (LrcSSMForSequenceModeling, {"num_channels": 2, "prediction_length": 3}, {}, "A forecast would be"),
    ],
)
def test_models_refuse_what_does_not_go_with_a_group(head, changes, inputs, message):
    model = make_model(head, **changes)
    given = {"input_values": torch.zeros(1, 6, 2)} if "num_channels" in changes else {"input_ids": random_ids(1, 6)}
    with pytest.raises(ValueError, match=message):
        model(**given, **inputs, context_parallel_group=object())
