# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The models in this repository are whole, say what was measured, and read what they were trained for."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import make_card
import publish
from text_data import standard_library


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted((ROOT / "model_cards").glob("*/"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_folder_can_be_published_and_fits_into_git(folder):
    files = publish.check(folder, f"model_cards/{folder.name}")
    assert sum(path.stat().st_size for path in files) < 11e6
    assert (folder / "model.safetensors").stat().st_size < 10e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_is_what_the_metrics_make(folder):
    card = make_card.make_card(folder, f"model_cards/{folder.name}")
    assert str(card) == (folder / "README.md").read_text(encoding="utf-8")


@torch.no_grad()
def test_python_nano_reads_python_that_it_was_not_trained_on():
    folder = ROOT / "model_cards" / "lrcssm-python-nano"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [text for text in standard_library(5)["validation"]["text"] if len(text) > 4000][:4]
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text[:4000], return_tensors="pt").input_ids
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        size += len(text[:4000].encode())
    assert nats / size < 1.2
