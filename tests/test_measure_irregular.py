# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What is there is not measured again, and what is broken there is said."""

import json

import pytest

import measure_irregular
from measure_irregular import DATA_SETS, SEEDS, SHARES_KEPT, main


def fake_measure(name, seed, accelerator):
    """By the share of the steps that are kept: the more, the better, and the same for all sets and seeds."""
    by_share = {
        str(share): {
            "with": {"distance": 1 - share, "accuracy": share},
            "without": {"distance": 2 - share, "accuracy": share / 2},
        }
        for share in SHARES_KEPT
    }
    environment = {"hardware": {"device": "CPU"}, "versions": {"torch": "2"}}
    return {"accuracy": 0.9, "by_share_kept": by_share, **environment}


def test_the_table_says_what_was_measured_and_nothing_is_measured_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_irregular, "measure", fake_measure)
    main(["--results_dir", str(tmp_path)])
    text = (tmp_path / "irregular_sampling.md").read_text()
    assert "| GunPoint | 75% | 0.250 | 1.250 | 0.900 | 0.750 | 0.375 |" in text and text in capsys.readouterr().out
    results = json.loads((tmp_path / "irregular_sampling.json").read_text())
    assert {(name, seed) for name, runs in results["sets"].items() for seed in runs} == {
        (name, str(seed)) for name in DATA_SETS for seed in SEEDS
    }
    monkeypatch.setattr(measure_irregular, "measure", None)
    main(["--results_dir", str(tmp_path)])
    assert (tmp_path / "irregular_sampling.md").read_text() == text


@pytest.mark.parametrize(
    ("content", "folder", "message"),
    [
        ('{"sets": {', "", "irregular_sampling.json is not the record of a run: "),
        ("[]", "", "irregular_sampling.json is not the record of a run: "),
        ("{}", "irregular_sampling.json", "cannot be written"),
    ],
)
def test_a_broken_file_is_named_before_anything_is_measured(content, folder, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_irregular, "measure", None)
    (tmp_path / "irregular_sampling.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["--results_dir", str(tmp_path / folder)])
    assert ended.value.code == 2 and message in capsys.readouterr().err
