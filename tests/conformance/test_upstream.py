# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Without an index the test base is not had, nothing half-done is left behind, and nobody is left to guess why."""

import pytest
import upstream


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return tmp_path / "lrcssm-hf"


def test_what_cannot_be_fetched_is_an_error_and_leaves_nothing(cache):
    with pytest.raises(RuntimeError, match=r"transformers 0\.0\.1.*could not be downloaded.*pip said: \S"):
        upstream.fetch("0.0.1")
    assert not list(cache.iterdir())


def test_what_is_there_is_not_fetched_again(cache):
    folder = cache / "transformers-0.0.1"
    folder.mkdir(parents=True)
    assert upstream.fetch("0.0.1") == folder


@pytest.mark.parametrize(("in_ci", "outcome"), [("true", RuntimeError), ("", pytest.skip.Exception)])
def test_ci_fails_without_it_and_others_skip(cache, monkeypatch, in_ci, outcome):
    monkeypatch.setenv("CI", in_ci)
    monkeypatch.setattr(upstream, "version", lambda package: "0.0.1")
    with pytest.raises(outcome, match="could not be downloaded"):
        upstream.install()
