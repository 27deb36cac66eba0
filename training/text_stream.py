# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Blocks of tokens from texts that are read as they are needed, and the exact place to go on from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from text_files import in_pieces, name_errors
from token_blocks import document_positions, tokenize, vocabulary_size


class TextStream(IterableDataset):
    """Blocks as `TokenBlocks` has them of a stream of texts, over and over, in an order that the seed fixes.

    The texts are shuffled in windows of `WINDOW`, each on its own. So a place is one in the texts, and not what happens
    to be in a shuffle buffer: to go on from it, a window is read again.

    Args:
        texts: with a column `text`.
    """

    WINDOW = 1000

    def __init__(
        self,
        texts: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        seed: int,
    ):
        self.texts, self.tokenizer, self.block_size, self.seed = texts, tokenizer, block_size, seed
        # Where the iteration begins, and how many blocks after the first of all it leaves out. The ids `rest` are not
        # in a block yet, and texts begin at their places `starts`.
        self._start = {"texts": None, "epoch": 0, "window": 0, "blocks": 0, "rest": [], "starts": []}
        self._skipped = 0
        self._windows = []  # Where each began, in the order in which they were read.

    def place(self, blocks: int) -> dict:
        """Where to go on after so many blocks, which must have been read: for `go_to`, in this or another process.

        More may have been read, as loaders do in advance. Places are asked for in ascending order.
        """
        while len(self._windows) > 1 and self._windows[1]["blocks"] <= blocks:
            self._windows.pop(0)
        return {"window": (self._windows or [self._start])[0], "blocks": blocks}

    def go_to(self, place: dict) -> None:
        """The next iteration begins there.

        Raises:
            KeyError, TypeError: it is no such place.
        """
        window, blocks = place["window"], place["blocks"]
        counts = [blocks, window["epoch"], window["window"], window["blocks"], *window["rest"], *window["starts"]]
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise TypeError("a place in a stream is of counts")
        if max(window["rest"], default=0) >= vocabulary_size(self.tokenizer):
            raise TypeError("a place in a stream has ids of this tokenizer")
        if not isinstance(window["texts"], dict | None):
            raise TypeError("a place in a stream has the state of its texts")
        self._start, self._skipped = window, blocks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        place = self._start
        self._windows = []
        self.texts.set_epoch(place["epoch"])
        if place["texts"] is not None:
            self.texts.load_state_dict(place["texts"])
        texts = name_errors("The stream", self.texts)
        while True:
            self._windows.append(place)
            epoch, window, blocks = place["epoch"], place["window"], place["blocks"]
            rows = [row["text"] for row in itertools.islice(texts, self.WINDOW)]
            if not rows:
                if window == 0:
                    raise ValueError("The stream holds no text.")
                place = place | {"texts": None, "epoch": epoch + 1, "window": 0}
                self.texts.set_epoch(epoch + 1)
                texts = name_errors("The stream", self.texts)
                continue
            state = self.texts.state_dict()
            random.Random(f"{self.seed} {epoch} {window}").shuffle(rows)
            ids, starts = np.array(place["rest"], dtype=np.int64), place["starts"]
            for part, begins in tokenize(map(in_pieces, rows), self.tokenizer):
                starts = [*starts, len(ids)] if begins else starts
                ids = np.concatenate([ids, part])
                while len(ids) >= self.block_size:
                    blocks += 1
                    if blocks > self._skipped:
                        inside = [start for start in starts if start < self.block_size]
                        positions = document_positions(inside, self.block_size)
                        yield {"input_ids": torch.tensor(ids[: self.block_size]), "position_ids": positions}
                    ids = ids[self.block_size :]
                    starts = [start - self.block_size for start in starts if start >= self.block_size]
            place = {"texts": state, "epoch": epoch, "window": window + 1, "blocks": blocks}
            place |= {"rest": ids.tolist(), "starts": starts}
