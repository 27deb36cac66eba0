# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Texts as token ids on the disk, a few bytes each, and blocks of them that know where texts begin."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from text_files import PIECE
from whole_files import whole_files, write_whole


_CONTEXT = 4096  # Characters after the tokens that are taken from a piece of a text.


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """A tokenizer's largest id, and one: what a model's `vocab_size` must be at least. Where ids have gaps, there are
    fewer tokens."""
    return max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder], default=-1) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises a `ValueError` unless a model of that `vocab_size` has all ids of the tokenizer."""
    if vocabulary_size(tokenizer) > vocab_size:
        largest = vocabulary_size(tokenizer) - 1
        raise ValueError(
            f"The tokenizer's largest id is {largest}, the model's {vocab_size - 1}: it is not the model's."
        )


def document_positions(starts: np.ndarray | list[int], length: int) -> torch.Tensor:
    """Where each of so many tokens stands in its text (length,), given the places at which texts begin: 0 there, and at
    the first. With these as `position_ids`, a model remembers nothing of the text before."""
    steps = np.arange(length)
    starts = np.asarray(starts, dtype=steps.dtype)
    latest = np.zeros_like(steps)
    latest[starts] = starts
    return torch.from_numpy(steps - np.maximum.accumulate(latest))


class TokenBlocks(Dataset):
    """Blocks `{"input_ids": (block_size,), "position_ids": (block_size,)}` of texts that are joined; what is left over
    at the end is dropped.

    Args:
        ids: of all texts (tokens,).
        starts: the places among them at which texts begin, ascending.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, block_size: int):
        self.ids, self.starts, self.block_size = ids, starts, block_size

    def __len__(self) -> int:
        return len(self.ids) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = range(len(self))[index] * self.block_size
        ids = self.ids[first : first + self.block_size].astype(np.int64)
        inside = slice(*np.searchsorted(self.starts, (first, first + self.block_size)))
        positions = document_positions(self.starts[inside] - first, self.block_size)
        return {"input_ids": torch.from_numpy(ids), "position_ids": positions}


class Tokens(NamedTuple):
    """Ids (tokens,) and starts (texts,) as `TokenBlocks` takes them, the bytes of the texts, and a SHA-256 of both
    arrays."""

    ids: np.ndarray
    starts: np.ndarray
    bytes: int
    digest: str


def load_tokens(texts: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Texts, of which each is the strings that it is made of, as tokens. They are read twice; the tokens are kept in
    the cache of `datasets` by the content of texts and tokenizer, for other processes and later runs.

    Raises:
        ValueError: the tokenizer makes no tokens of them, they are not the same when they are read again, or what
            reading raises it for.
        OSError: the cache cannot be written.
    """
    content = hashlib.sha256()
    size = sum(len(piece.encode()) for pieces in _watch(texts, content) for piece in pieces)
    # Another release may make other tokens of a text.
    versions = f"{transformers.__version__} {tokenizers.__version__}".encode()
    key = hashlib.sha256(versions + describe_tokenizer(tokenizer) + content.digest()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lrcssm_tokens" / key
    tokens = _read(folder)
    if tokens is None:
        _write(folder, texts, content.digest(), size, tokenizer)
        tokens = _read(folder)
    if tokens is None:
        raise OSError(f"The tokens in {folder} are not as they were written; remove that folder, and start again.")
    return tokens


def tokenize(texts: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of texts, each ended by the tokenizer's end token, in parts (tokens,), and whether a part begins a text.

    A text's parts are together what the tokenizer makes of the whole: they end where it goes on as if it began there.
    One that never does, as where it puts a space in front of whatever it is given, gets the whole text at once.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(strings):
        # Texts are longer than what attention models were trained on; that warning is not for this one.
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(strings, **options, verbose=False).input_ids

    def encode_short(strings):
        return ((np.array(ids + end, dtype=np.int64), True) for ids in (encode(strings) if strings else []))

    short, size = [], 0  # Texts of one piece, which are read together.
    for pieces in map(iter, texts):
        beginning = list(itertools.islice(pieces, 2))
        is_long = len(beginning) > 1
        if not is_long:
            short.append("".join(beginning))
            size += len(short[-1])
            if size < PIECE:
                continue
        yield from encode_short(short)
        short, size = [], 0
        if is_long:
            parts = _tokenize_long(itertools.chain(beginning, pieces), lambda text: encode([text])[0])
            for number, ids in enumerate(itertools.chain(parts, [end])):
                yield np.array(ids, dtype=np.int64), number == 0
    yield from encode_short(short)


def _tokenize_long(pieces: Iterator[str], encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    text, enough = "", PIECE
    for piece in pieces:
        text += piece
        if len(text) < enough:
            continue
        ids = encode(text)
        for cut in _places_to_cut(text):
            rest = encode(text[cut:])
            # So the tokenizer goes on as if it began there; what is before has been seen with what follows it.
            if rest and ids[-len(rest) :] == rest:
                yield ids[: -len(rest)]
                text, enough = text[cut:], PIECE
                break
        else:
            enough = 2 * len(text)
    yield encode(text)


def _places_to_cut(text: str) -> Iterator[int]:
    """Some, before the context at the end: first where words end, which hardly any tokenizer joins."""
    start, stop = len(text) - 2 * _CONTEXT, len(text) - _CONTEXT
    words = (match.start() + 1 for match in re.compile(r"\S\s").finditer(text, start, stop))
    return itertools.chain(itertools.islice(words, 8), range(start, start + 32))


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """What decides which tokens a release of transformers and tokenizers makes of a text."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    return digest.digest()


def _write(
    folder: Path, texts: Iterable[Iterable[str]], content: bytes, size: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`tokens.json` last: where it is, the other files are. The texts must have that SHA-256 still."""
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    starts, count, found = [], 0, hashlib.sha256()
    with whole_files(folder) as partial:
        with (
            (partial / "ids.bin").open("wb") as file,
            tqdm(total=size, desc="Tokenizing", unit="B", unit_scale=1) as bar,
        ):
            for ids, begins in tokenize(_watch(texts, found, bar), tokenizer):
                if begins:
                    starts.append(count)
                ids.astype(dtype).tofile(file)
                count += len(ids)
        if found.digest() != content:
            raise ValueError("The text changed while it was read; start again.")
        if count == 0:
            raise ValueError("The tokenizer makes no tokens of the text.")
        np.save(partial / "starts.npy", np.array(starts, dtype=np.int64))
        description = {"dtype": dtype.name, "bytes": size, "digest": _digest(*_open(partial, dtype.name))}
    write_whole(folder / "tokens.json", json.dumps(description) + "\n")


def _watch(texts: Iterable[Iterable[str]], content: hashlib._Hash, bar: tqdm | None = None) -> Iterator[Iterator[str]]:
    """The texts, which the hash and the bar get as they are read."""

    def watch(pieces):
        for piece in pieces:
            data = piece.encode()
            content.update(data)
            yield piece
            if bar is not None:
                bar.update(len(data))
        content.update(b"\xff")  # which is in no text

    return map(watch, texts)


def _read(folder: Path) -> Tokens | None:
    """None where they have not been written, or are not as they were."""
    try:
        description = json.loads((folder / "tokens.json").read_text())
        tokens = Tokens(*_open(folder, description["dtype"]), description["bytes"], description["digest"])
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError):
        return None
    return tokens if _digest(tokens.ids, tokens.starts) == tokens.digest else None


def _open(folder: Path, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    return np.memmap(folder / "ids.bin", dtype=dtype, mode="r"), np.load(folder / "starts.npy")


def _digest(ids: np.ndarray, starts: np.ndarray) -> str:
    digest = hashlib.sha256(ids)
    digest.update(starts)
    return digest.hexdigest()
