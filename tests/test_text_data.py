# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Texts in blocks: kept apart, and streamed in an order that does not depend on where the stream was left."""

import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset

from context_pieces import ContextPieces
from evaluate import model_inputs
from text_data import document_positions
from text_stream import TextStream
from tiny_models import make_model, random_ids


@torch.no_grad()
def test_no_state_leaks_from_one_text_to_the_next():
    end = 1
    ids = random_ids(2, 20)
    ids[0, 6], ids[1, 12], ids[1, 13] = end, end, end
    positions = document_positions(ids, end)
    assert positions[0].tolist() == [*range(7), *range(13)]
    assert positions[1].tolist() == [*range(13), 0, *range(6)]
    model = make_model()
    logits = model(**model_inputs(model, ids, end, ContextPieces(Accelerator(), 1))).logits
    for row, start, stop in ((0, 0, 7), (0, 7, 20), (1, 0, 13), (1, 13, 14), (1, 14, 20)):
        alone = model(input_ids=ids[row : row + 1, start:stop]).logits
        assert torch.allclose(logits[row : row + 1, start:stop], alone, atol=1e-5)
    assert document_positions(ids, None)[0].tolist() == list(range(20))


@pytest.fixture
def make_stream(tmp_path, monkeypatch):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} " * 5}) + "\n" for i in range(50)))
    monkeypatch.setattr(TextStream, "WINDOW", 7)

    def make(seed=3):
        texts = load_dataset("json", data_files=str(path), split="train", streaming=True).filter(
            bool, input_columns="text"
        )
        next(iter(texts))  # A look at what it holds is no part of the stream.
        return TextStream(texts, lambda texts: [list(text.encode()) for text in texts], 64, seed)

    return make


def read(stream, count):
    return [block["input_ids"].tolist() for block in itertools.islice(stream, count)]


def test_a_stream_goes_on_where_it_was_left(make_stream):
    whole = read(make_stream(), 220)  # several times all texts
    for count in (0, 1, 5, 17, 40, 66, 67, 68, 69, 150):
        stream = make_stream()
        read(stream, count + 3)  # as a loader that reads in advance
        place = json.loads(json.dumps(stream.place(count)))
        later = make_stream()
        later.go_to(place)
        assert read(later, 60) == whole[count : count + 60]
        # And once more from there.
        again = make_stream()
        again.go_to(later.place(count + 30))
        assert read(again, 20) == whole[count + 30 : count + 50]


def test_a_stream_reads_every_text_once_per_epoch_in_the_order_of_its_seed(make_stream):
    blocks = read(make_stream(), 100)
    assert blocks == read(make_stream(), 100) != read(make_stream(seed=4), 100)
    text = bytes(itertools.chain.from_iterable(blocks)).decode()
    length = sum(len(f"text {i} " * 5) for i in range(50))
    first, second = text[:length], text[length : 2 * length]
    for epoch in (first, second):
        assert sorted(epoch.split()) == sorted(" ".join(f"text {i} " * 5 for i in range(50)).split())
    assert first != second
