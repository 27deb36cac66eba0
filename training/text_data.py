# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Text for language modelling: where it comes from, what of it is held out, and what tokenizes it."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.utils.sha import sha_fileobj
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arguments import integer, number, text
from text_files import Rows, Texts, find_cause, find_column, in_pieces, is_text, name_errors, read_file
from text_stream import TextStream
from token_blocks import TokenBlocks, Tokens, describe_tokenizer, load_tokens


# `pydoc_data` is the language reference as one generated text, not source.
_NOT_SOURCE = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
END_OF_TEXT = "<|endoftext|>"
STREAM_HELD_OUT = 1000


def add_text_arguments(parser) -> None:
    """The flags that say what is trained on and held out, the same for every script, to a parser or group."""
    parser.add_argument(
        "--dataset_name", type=text, help="Dataset on the Hub; by default the Python standard library's source."
    )
    parser.add_argument("--dataset_config_name", type=text, help="Configuration of that dataset.")
    parser.add_argument("--train_file", type=text, help="Text, JSON, CSV or Parquet file to use instead.")
    parser.add_argument("--validation_file", type=text, help="Held-out file; by default a share of the training texts.")
    percentage = number(above=0, below=100)
    parser.add_argument("--validation_split_percentage", type=percentage, default=5, help="That share (default 5).")


def add_data_arguments(parser) -> None:
    """Those flags, and the length of the sequences that a model sees."""
    add_text_arguments(parser)
    parser.add_argument(
        "--block_size", type=integer(at_least=2), default=512, help="Tokens per sequence (default 512)."
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help=f"Read the texts as they are needed; of a stream, {STREAM_HELD_OUT} texts at most are held out.",
    )


class Blocks(NamedTuple):
    """Blocks of tokens as `TokenBlocks` has them, the held-out text's tokens per byte, by which nats per token become
    nats per byte, and a SHA-256 that is another for other training data: for other tokens, or of a stream, for another
    file or dataset or another tokenizer."""

    train: TokenBlocks | TextStream
    validation: TokenBlocks
    tokens_per_byte: float
    digest: str


def load_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Blocks:
    """What those flags ask for: texts, each ended by the tokenizer's end token, joined and cut into blocks. A stream is
    in the order of the seed.

    Raises:
        ValueError: a split is shorter than one block, or what `load_text` and `stream_text` raise it for.
        OSError: what `load_tokens` raises it for.
    """
    if args.streaming:
        texts, held_out, digest = stream_text(args)
        digest = hashlib.sha256(describe_tokenizer(tokenizer) + digest).hexdigest()
        train = TextStream(texts, tokenizer, args.block_size, seed)
    else:
        texts = load_text(args)
        tokens, held_out = load_tokens(texts["train"], tokenizer), texts["validation"]
        train, digest = _cut("training", tokens, args.block_size), tokens.digest
    tokens = load_tokens(held_out, tokenizer)
    validation = _cut("validation", tokens, args.block_size)
    return Blocks(train, validation, len(tokens.ids) / tokens.bytes, digest)


def _cut(name: str, tokens: Tokens, block_size: int) -> TokenBlocks:
    blocks = TokenBlocks(tokens.ids, tokens.starts, block_size)
    if len(blocks) == 0:
        raise ValueError(f"The {name} text is shorter than one block of {block_size} tokens; lower --block_size.")
    return blocks


def standard_library(validation_percentage: float) -> DatasetDict:
    """The source files of the running Python's standard library, tests excluded, as one text per file.

    A file is held out by the hash of its path, so that the same files are held out in every run.
    """
    root = Path(sysconfig.get_path("stdlib"))
    splits = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_SOURCE.isdisjoint(name.parts):
            share = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4], "big") / 2**32
            split = "validation" if share < validation_percentage / 100 else "train"
            splits[split].append(path.read_text(encoding="utf-8", errors="replace"))
    if not splits["train"]:
        raise ValueError(f"No Python source in {root}: this Python ships without one. Pass --train_file.")
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()})


def load_text(args: argparse.Namespace) -> dict[str, Texts]:
    """`train` and `validation` texts, as the flags of `add_text_arguments` say: a Hub dataset, local files, or else the
    standard library.

    Without a validation file or split, a share of the texts is held out; of a single text, its end.

    Raises:
        ValueError: a file or dataset is missing, empty, or of a kind that cannot be read; also when the texts are read.
    """
    if args.dataset_name is None and args.train_file is None:
        if args.validation_file is not None:
            raise ValueError("--validation_file needs --train_file.")
        library = standard_library(args.validation_split_percentage)
        return {split: _in_memory(library[split]["text"]) for split in library}
    if args.dataset_name is not None:
        texts = {split: _dataset_rows(args, split, rows) for split, rows in _load_dataset(args).items()}
    else:
        texts = {"train": _read_file("--train_file", args.train_file)}
        if args.validation_file is not None:
            texts["validation"] = _read_file("--validation_file", args.validation_file)
    return texts if "validation" in texts else _hold_out(texts["train"], args.validation_split_percentage)


def stream_text(args: argparse.Namespace) -> tuple[IterableDataset, Texts, bytes]:
    """As `load_text`, but the training texts are a stream (column `text`); without a validation file or split its first
    texts are held out. With a SHA-256 of what can be known of the stream before it is read: the file's content, or the
    dataset's name and revision, or where it is a folder, the names and sizes of its files."""
    if args.dataset_name is None and args.train_file is None:
        raise ValueError("--streaming is for --dataset_name or --train_file; the standard library is small.")
    if args.dataset_name is not None:
        data = {split: _dataset_stream(args, split, rows) for split, rows in _load_dataset(args, True).items()}
        digest = _dataset_digest(args)
    else:
        data = {"train": _stream_file("--train_file", args.train_file)}
        if args.validation_file is not None:
            data["validation"] = _stream_file("--validation_file", args.validation_file)
        digest = _file_digest(Path(args.train_file))
    train = data["train"]
    if "validation" not in data:
        data["validation"], train = train.take(STREAM_HELD_OUT), train.skip(STREAM_HELD_OUT)
    held_out = name_errors("The held-out stream", data["validation"].take(STREAM_HELD_OUT))
    held_out = [row["text"] for row in held_out]
    if not held_out or next(name_errors("The stream", train), None) is None:
        raise ValueError(f"The data is too short to stream: {len(held_out)} texts are held out; leave out --streaming.")
    return train, _in_memory(held_out), digest


def _in_memory(strings: list[str]) -> Texts:
    return Texts(lambda: map(in_pieces, strings))


def _read_file(flag: str, name: str) -> Texts:
    return read_file(f"{flag} {name!r}", Path(name))


def _stream_file(flag: str, name: str) -> IterableDataset:
    rows = _read_file(flag, name)
    if not isinstance(rows, Rows):
        raise ValueError(f"{flag} {name!r} is one text; --streaming is for files of many, JSON, CSV or Parquet.")
    return IterableDataset.from_generator(lambda: ({"text": text} for text in rows.strings()))


def _load_dataset(args: argparse.Namespace, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Its splits `train` and, where it has one, `validation`."""
    try:
        data = load_dataset(args.dataset_name, args.dataset_config_name, streaming=streaming)
    except Exception as error:
        raise ValueError(f"--dataset_name {args.dataset_name!r} could not be loaded: {find_cause(error)}") from error
    if "train" not in data:
        raise ValueError(f"--dataset_name {args.dataset_name!r} has no split 'train', only {', '.join(data)}.")
    return {split: data[split] for split in ("train", "validation") if split in data}


def _dataset_rows(args: argparse.Namespace, split: str, data: Dataset) -> Rows:
    source = f"--dataset_name {args.dataset_name!r}, split {split!r}"

    def rows(columns):
        chosen = name_errors(source, data.select_columns(columns or data.column_names))
        return ((f"row {number}", row) for number, row in enumerate(chosen, 1))

    return Rows(source, rows, data.features.arrow_schema)


def _dataset_stream(args: argparse.Namespace, split: str, data: IterableDataset) -> IterableDataset:
    source = f"--dataset_name {args.dataset_name!r}, split {split!r}"

    def rows(columns):
        return name_errors(source, data if columns is None else data.select_columns(columns))

    column = find_column(source, rows, None if data.features is None else data.features.arrow_schema)
    data = data.select_columns(column)
    data = data if column == "text" else data.rename_column(column, "text")
    return data.filter(
        lambda text, index: is_text(text, column, f"{source}: row {index + 1}"),
        with_indices=True,
        input_columns="text",
    )


def _dataset_digest(args: argparse.Namespace) -> bytes:
    folder = Path(args.dataset_name)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        version = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
    else:
        version = [args.dataset_name, HfApi().dataset_info(args.dataset_name).sha]
    return hashlib.sha256(repr((version, args.dataset_config_name)).encode()).digest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return sha_fileobj(file)


def _hold_out(texts: Texts, percentage: float) -> dict[str, Texts]:
    """A share of several texts, the same ones in every run; of one, its end."""
    count = sum(1 for _ in texts)
    if count > 1:
        number = min(max(1, round(count * percentage / 100)), count - 1)
        is_held_out = np.zeros(count, dtype=bool)
        is_held_out[np.random.default_rng(0).permutation(count)[:number]] = True
        splits = {"train": ~is_held_out, "validation": is_held_out}
        return {split: Texts(functools.partial(itertools.compress, texts, chosen)) for split, chosen in splits.items()}
    length = sum(len(piece) for pieces in texts for piece in pieces)
    if length < 2:
        raise ValueError("The data is one text of a single character, of which no end can be held out.")
    cut = min(int(length * (1 - percentage / 100)), length - 1)
    parts = {"train": (0, cut), "validation": (cut, length)}
    return {split: Texts(functools.partial(_part, texts, *part)) for split, part in parts.items()}


def _part(texts: Texts, start: int, stop: int) -> Iterator[Iterator[str]]:
    """Of the only text, the characters from one to another."""

    def part(pieces):
        place = 0
        for piece in pieces:
            yield piece[max(start - place, 0) : max(stop - place, 0)]
            place += len(piece)

    for pieces in texts:
        yield filter(None, part(pieces))


def load_pretrained(flag: str, name: str, kind: type) -> PreTrainedTokenizerBase | PreTrainedModel:
    """What `AutoTokenizer` or an automatic model class makes of a folder, or of a name on the Hub.

    Raises:
        ValueError: it cannot be loaded; the message names the flag.
    """
    try:
        return kind.from_pretrained(name)
    # Torch, safetensors, huggingface_hub and tokenizers each have their own, and a file may hold anything.
    except Exception as error:
        cause = error if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{flag} {name!r} could not be loaded: {cause}") from error


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one token per byte and an end-of-text token."""
    if name is not None:
        return load_pretrained("--tokenizer_name", name, AutoTokenizer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(tokenizer)


def byte_level(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    """For transformers: a tokenizer of bytes, or of strings of them, whose one special token ends texts and pads."""
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
