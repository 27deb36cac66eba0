# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Blocks of tokens from texts that are read as they are needed, and the exact place to go on from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import datasets
import torch
from torch.utils.data import IterableDataset


class TextStream(IterableDataset):
    """Blocks `{"input_ids": (block_size,)}` of a stream of texts, over and over, in an order that the seed fixes.

    The texts are shuffled in windows of `WINDOW`, each on its own. So a place is one in the texts, and not what happens
    to be in a shuffle buffer: to go on from it, a window is read again.

    Args:
        texts: with a column `text`.
        tokenize: turns a list of texts into a list of lists of ids.
    """

    WINDOW = 1000

    def __init__(
        self,
        texts: datasets.IterableDataset,
        tokenize: Callable[[list[str]], list[list[int]]],
        block_size: int,
        seed: int,
    ):
        self.texts, self.tokenize, self.block_size, self.seed = texts, tokenize, block_size, seed
        # Where the iteration begins, and how many blocks after the first of all it leaves out.
        self._start, self._skipped = {"texts": None, "epoch": 0, "window": 0, "blocks": 0, "rest": []}, 0
        self._windows = []  # Where each began, in the order in which they were read.

    def place(self, blocks: int) -> dict:
        """Where to go on after so many blocks, which must have been read: for `go_to`, in this or another process.

        More may have been read, as loaders do in advance. Places are asked for in ascending order.
        """
        while len(self._windows) > 1 and self._windows[1]["blocks"] <= blocks:
            self._windows.pop(0)
        return {"window": (self._windows or [self._start])[0], "blocks": blocks}

    def go_to(self, place: dict) -> None:
        """The next iteration begins there."""
        self._start, self._skipped = place["window"], place["blocks"]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        place = self._start
        state, epoch, window, blocks, rest = (place[name] for name in ("texts", "epoch", "window", "blocks", "rest"))
        self._windows = []
        self.texts.set_epoch(epoch)
        if state is not None:
            self.texts.load_state_dict(state)
        texts = iter(self.texts)
        while True:
            self._windows.append({"texts": state, "epoch": epoch, "window": window, "blocks": blocks, "rest": rest})
            rows = [row["text"] for row in itertools.islice(texts, self.WINDOW)]
            if not rows:
                if window == 0:
                    raise ValueError("The stream holds no text.")
                state, epoch, window = None, epoch + 1, 0
                self.texts.set_epoch(epoch)
                texts = iter(self.texts)
                continue
            state = self.texts.state_dict()
            random.Random(f"{self.seed} {epoch} {window}").shuffle(rows)
            window += 1
            for ids in self.tokenize(rows):
                ids = rest + ids
                whole = len(ids) // self.block_size * self.block_size
                rest = ids[whole:]
                for start in range(0, whole, self.block_size):
                    blocks += 1
                    if blocks > self._skipped:
                        yield {"input_ids": torch.tensor(ids[start : start + self.block_size])}
