# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The ladder counts operations as torch does, spends what it says, and its fits find the law that made the losses."""

import argparse
import itertools
import json
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import lrcssm_hf  # noqa: F401  registers the model
import scaling_law
from pretrain import parse_overrides
from pretraining_runs import PretrainingRun
from scaling_law import Ladder, fit, frontier, operations_per_token, overrides, plan, plot, tables


BUDGETS = argparse.Namespace(min_operations=1e10, max_operations=1e12)
BEST_RATE = {"lrcssm": 16e-3, "mamba": 1e-3, "llama": 4e-3}
A, B = 0.35, 0.45


@pytest.fixture
def cells():
    return plan(BUDGETS, scaling_law.DEFAULTS.split())


@pytest.fixture
def trained(monkeypatch):
    """Stands for pretrain.py, with a law of its own; lists the runs."""
    runs = []

    def pretrain(folder, arguments, threads=None):
        flags = dict(zip(arguments[::2], arguments[1::2]))
        family, steps, rate = flags["--model_type"], int(flags["--max_train_steps"]), float(flags["--learning_rate"])
        width, depth = map(int, folder.name.split("-")[1].split("x"))
        runs.append((family, (width, depth), steps, rate))
        if rate > 30e-3:
            raise RuntimeError("error: The loss is nan at step 3; lower --learning_rate.")
        config = AutoConfig.for_model(family, vocab_size=257, **parse_overrides(family, flags["--config_overrides"]))
        size, tokens = operations_per_token(config, 256) / 6, steps * 1024
        loss = 0.5 + 30 / size**A + 40 / tokens**B + 0.01 * abs(math.log2(rate / BEST_RATE[family]))
        training = {"steps": steps, "tokens_per_step": 1024, "parameters": 1000, "command": " ".join(arguments)}
        training["data"] = {"training_tokens": 10**6}
        training |= {"hardware": {"device": "CPU", "threads": 1}, "versions": {"torch": "2"}}
        return PretrainingRun(loss, [], training)

    monkeypatch.setattr(scaling_law, "pretrain", pretrain)
    return runs


def make(family, size, **changes):
    config = AutoConfig.for_model(family, vocab_size=257, **parse_overrides(family, overrides(family, size)), **changes)
    return config, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["lrcssm", "llama"])
def test_operations_are_those_that_torch_counts(family):
    """Of matrix products, and of attention without its mask."""
    config, model = make(family, (32, 2), **({"attn_implementation": "eager"} if family == "llama" else {}))
    ids = torch.randint(257, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    expected = operations_per_token(config, block_size=64)
    # Twice for steps that the mask leaves out; the cell and the convolution are no matrix products.
    others = {"llama": -3 * 2 * 2 * 32 * 64, "lrcssm": 2 * 3 * (32 * 32 + 2 * 32 * 4)}[family]
    assert counted == pytest.approx(expected - others, rel=0.03)


def test_mambas_operations_are_of_its_scan_too():
    config, model = make("mamba", (32, 2))
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and "A_log" not in name)
    assert operations_per_token(config, 64) == 6 * weights + 3 * 4 * 9 * 64 * 16


def test_budgets_are_spent_on_sizes_with_tokens_enough(cells):
    for cell in cells:
        assert cell.steps * 1024 * cell.operations_per_token == pytest.approx(cell.budget, rel=0.02)
        assert 1 <= 6 * cell.steps * 1024 / cell.operations_per_token <= 401
    assert sorted({f"{cell.budget:.1e}" for cell in cells}) == ["1.0e+10", "1.0e+11", "1.0e+12", "3.2e+10", "3.2e+11"]
    with pytest.raises(
        ValueError, match="--min_operations 1e\\+10 and --max_operations 2e\\+10 must be at least a decade"
    ):
        plan(argparse.Namespace(min_operations=1e10, max_operations=2e10), scaling_law.DEFAULTS.split())


def test_learning_rates_are_searched_for_with_all_but_the_largest_budgets(cells, trained, tmp_path):
    records = Ladder(cells, tmp_path, [], workers=2).run()
    assert len(records) == len(cells) and {record["learning_rate"] for record in records} == set(BEST_RATE.values())
    for cell in cells:
        best = BEST_RATE[cell.family]
        tried = {rate for *run, rate in trained if run == [cell.family, cell.size, cell.steps]}
        # The largest size, which has large budgets only, takes the rate of the size before it.
        assert tried >= {best / 2, best, 2 * best} if cell.budget < 0.34e12 else tried == {best}
    assert len(set(trained)) == len(trained)


@pytest.mark.parametrize(
    ("budgets", "passed", "message"),
    [
        ((1e10, 2e10), [], "must be at least a decade apart"),
        ((1e11, 1e10), [], "less than --max_operations 1e+10"),
        ((1e10, 1e12), ["--learning_rate", "1e-3"], "--learning_rate is set for every run"),
        ((1e10, 1e12), ["--model_type=llama"], "--model_type is set for every run"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(budgets, passed, message):
    budgets = argparse.Namespace(min_operations=budgets[0], max_operations=budgets[1])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(budgets, [*scaling_law.DEFAULTS.split(), *passed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min_operations", "0"], "argument --min_operations: must be above 0, got 0"),
        (["--max_operations", "nan"], "argument --max_operations: must be a finite number, got nan"),
        (["--max_operations", "1e300"], "argument --max_operations: must be below 1e+30, got 1e300"),
        (["--workers", "0"], "argument --workers: must be at least 1, got 0"),
        (["--output_dir", ""], "argument --output_dir: must not be empty"),
        (["--weight_decay", "-1"], "argument --weight_decay: must be at least 0, got -1"),
        (["--learning_r", "1"], "unrecognized arguments: --learning_r 1"),
    ],
)
def test_bad_arguments_are_refused_before_any_run(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling_law.py", *arguments])
    monkeypatch.setattr(scaling_law, "pretrain", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as ended:
        scaling_law.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_ladder_of_two_texts_is_none(cells, trained, monkeypatch, tmp_path):
    """One that was interrupted does not go on with another text."""
    train, digests = scaling_law.pretrain, itertools.chain(["first"] * 5, itertools.repeat("second"))

    def with_digest(*arguments):
        run = train(*arguments)
        run.training["data"]["digest"] = next(digests)
        return run

    monkeypatch.setattr(scaling_law, "pretrain", with_digest)
    with pytest.raises(ValueError, match="a run with other data"):
        Ladder(cells, tmp_path, [], workers=1).run()


def test_runs_that_do_not_say_what_their_data_were_are_used(cells, trained, monkeypatch, tmp_path):
    train, digests = scaling_law.pretrain, itertools.cycle([None, "first"])

    def with_digest(*arguments):
        run = train(*arguments)
        run.training["data"]["digest"] = next(digests)
        return run

    monkeypatch.setattr(scaling_law, "pretrain", with_digest)
    assert len(Ladder(cells, tmp_path, [], workers=1).run()) == len(cells)


def test_a_failed_run_ends_the_ladder(cells, monkeypatch, tmp_path):
    calls = []

    def pretrain(*_):
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scaling_law, "pretrain", pretrain)
    with pytest.raises(RuntimeError, match="out of memory"):
        Ladder(cells, tmp_path, [], workers=2).run()
    assert len(calls) <= 4


def test_intervals_hold_the_truth_and_outliers_do_little(cells, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling_law, "RESAMPLES", 60)
    records = [r for r in Ladder(cells, tmp_path, [], workers=2).run() if r["family"] == "lrcssm"]
    generator = torch.Generator().manual_seed(0)
    for record, error in zip(records, torch.randn(len(records), generator=generator).tolist()):
        record["nats_per_byte"] *= 1 + 0.004 * error
    found = fit(records)
    low, high = found["parametric"]["interval"]["exponent"]
    assert low < A * B / (A + B) < high < 3 * low
    low, high = found["power_law"]["interval"]["exponent"]
    assert low < found["power_law"]["exponent"] < high and high - low < 0.3 * low
    exponent = found["parametric"]["exponent"]
    records[7]["nats_per_byte"] *= 2
    assert scaling_law.fit_parametric(records)["exponent"] == pytest.approx(exponent, rel=0.25)


def test_fits_find_the_law(cells, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling_law, "RESAMPLES", 30)
    records = Ladder(cells, tmp_path, [], workers=2).run()
    fits = {}
    for family in scaling_law.FAMILIES:
        runs = [record for record in records if record["family"] == family]
        found = fits[family] = fit(runs)
        assert found["parametric"]["exponent"] == pytest.approx(A * B / (A + B), abs=0.02)
        assert found["parametric"]["irreducible"] == pytest.approx(0.5, abs=0.05)
        assert found["parametric"]["size_exponent"] == pytest.approx(B / (A + B), abs=0.05)
        best = frontier(runs)
        for left, right in itertools.pairwise(best):
            assert left["nats_per_byte"] > right["nats_per_byte"]
        slope = math.log(best[-1]["nats_per_byte"] / best[0]["nats_per_byte"])
        slope /= math.log(best[-1]["operations"] / best[0]["operations"])
        assert found["power_law"]["exponent"] == pytest.approx(-slope, rel=0.1)
    results = {"environment": "CPU", "runs": records, "fits": fits}
    json.dumps(results)
    assert "| 1.0e+12 | " in tables(results) and "| exponent of the loss |" in tables(results)
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_run_of_every_budget_is_the_frontier():
    runs = [(2, 1.5, 1), (1, 2.0, 1), (2, 1.2, 2), (1, 2.5, 2), (2, 1.3, 3)]
    records = [{"budget": b, "nats_per_byte": loss, "operations_per_token": size} for b, loss, size in runs]
    assert [(best["nats_per_byte"], best["at_edge"]) for best in frontier(records)] == [(2.0, True), (1.2, False)]
