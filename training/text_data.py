# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Text for language modelling: where it comes from, and how it becomes blocks of tokens."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arguments import integer, number, text
from text_stream import TextStream


# `pydoc_data` is the language reference as one generated text, not source.
_NOT_SOURCE = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
_LOADERS = {".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json"}
_LOADERS |= {".csv": "csv", ".parquet": "parquet"}
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
    """Blocks of token ids, `{"input_ids": (block_size,)}`, the held-out text's tokens per byte, by which nats per token
    become nats per byte, and a SHA-256 that is another for other training data (of a stream, for another file or
    dataset)."""

    train: Dataset | TextStream
    validation: Dataset
    tokens_per_byte: float
    digest: str


def load_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Blocks:
    """What those flags ask for; a stream is in the order of the seed.

    Raises:
        ValueError: what `load_text` and `make_blocks` raise it for.
    """
    if not args.streaming:
        return make_blocks(load_text(args), tokenizer, args.block_size)
    texts, held_out = stream_text(args)
    held_out, tokens_per_byte = _cut(held_out, "validation", tokenizer, args.block_size)
    stream = TextStream(texts, functools.partial(tokenize, tokenizer=tokenizer), args.block_size, seed)
    return Blocks(stream, held_out, tokens_per_byte, _stream_digest(args))


def _stream_digest(args: argparse.Namespace) -> str:
    digest = hashlib.sha256(f"{args.dataset_name} {args.dataset_config_name}".encode())
    if args.train_file is not None:
        with open(args.train_file, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def document_positions(ids: Tensor, end: int | None) -> Tensor:
    """Where each token of a block (B, T) stands in its text: 0 after every `end`, and at the block's first. With these
    as `position_ids`, a model remembers nothing of the text before."""
    step = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if end is None:
        return step
    starts = F.pad(ids[:, :-1] == end, (1, 0))
    return step - torch.where(starts, step, 0).cummax(1).values


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


def load_text(args: argparse.Namespace) -> DatasetDict:
    """`train` and `validation` texts (column `text`), as the flags of `add_text_arguments` say: a Hub dataset, local
    files, or else the standard library.

    Without a validation file or split, a share of the texts is held out; of a single text, its end.

    Raises:
        ValueError: a file or dataset is missing, empty, or of a kind that cannot be read.
    """
    if not 0 < args.validation_split_percentage < 100:
        raise ValueError(f"--validation_split_percentage must be in (0, 100), got {args.validation_split_percentage}.")
    if args.dataset_name is None and args.train_file is None:
        if args.validation_file is not None:
            raise ValueError("--validation_file needs --train_file.")
        return standard_library(args.validation_split_percentage)
    if args.dataset_name is not None:
        try:
            data = load_dataset(args.dataset_name, args.dataset_config_name)
        except Exception as error:
            raise ValueError(f"--dataset_name {args.dataset_name!r} could not be loaded: {error}") from error
        if "train" not in data:
            raise ValueError(f"--dataset_name {args.dataset_name!r} has no split 'train', only {', '.join(data)}.")
    else:
        data = DatasetDict({"train": _read_file("--train_file", args.train_file)})
        if args.validation_file is not None:
            data["validation"] = _read_file("--validation_file", args.validation_file)
    data = DatasetDict({split: _text_column(data[split]) for split in data if split in ("train", "validation")})
    if "validation" not in data:
        data = _hold_out(data["train"], args.validation_split_percentage)
    return data


def stream_text(args: argparse.Namespace) -> tuple[IterableDataset, Dataset]:
    """As `load_text`, but the training texts are a stream; without a validation file or split its first texts are held
    out."""
    if args.dataset_name is None and args.train_file is None:
        raise ValueError("--streaming is for --dataset_name or --train_file; the standard library is small.")
    if args.dataset_name is not None:
        try:
            data = load_dataset(args.dataset_name, args.dataset_config_name, streaming=True)
        except Exception as error:
            raise ValueError(f"--dataset_name {args.dataset_name!r} could not be loaded: {error}") from error
        if "train" not in data:
            raise ValueError(f"--dataset_name {args.dataset_name!r} has no split 'train', only {', '.join(data)}.")
        train, held_out = data["train"], data.get("validation")
    else:
        train, held_out = _read_file("--train_file", args.train_file, streaming=True), None
        if args.validation_file is not None:
            held_out = _read_file("--validation_file", args.validation_file, streaming=True)
    train = _text_column(train)
    if held_out is None:
        held_out, train = train.take(STREAM_HELD_OUT), train.skip(STREAM_HELD_OUT)
    texts = [row["text"] for row in _text_column(held_out).take(STREAM_HELD_OUT)]
    if not texts or next(iter(train), None) is None:
        raise ValueError(f"The data is too short to stream: it has {len(texts)} texts or less; leave out --streaming.")
    return train, Dataset.from_dict({"text": texts})


def _read_file(flag: str, name: str, streaming: bool = False) -> Dataset | IterableDataset:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{flag} {name!r} does not exist.")
    if path.stat().st_size == 0:
        raise ValueError(f"{flag} {name!r} is empty.")
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        raise ValueError(f"{flag} {name!r}: cannot read {path.suffix!r}, only {', '.join(_LOADERS)}.")
    if loader == "text" and streaming:
        raise ValueError(f"{flag} {name!r} is one text; --streaming is for files of many, JSON, CSV or Parquet.")
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        return load_dataset(loader, data_files=str(path), split="train", streaming=streaming, **options)
    except Exception as error:
        raise ValueError(f"{flag} {name!r} could not be read: {error}") from error


def _text_column(data: Dataset | IterableDataset) -> Dataset | IterableDataset:
    # A stream may not know its columns before it has read a row.
    names = data.column_names or list(next(iter(data), {"text": ""}))
    column = "text" if "text" in names else names[0]
    if data.features is not None and data.features[column].dtype not in ("string", "large_string"):
        raise ValueError(
            f"The data has no column 'text', and {column!r} holds {data.features[column].dtype}, not text."
        )
    data = data.select_columns(column)
    data = data if column == "text" else data.rename_column(column, "text")
    data = data.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if isinstance(data, Dataset) and len(data) == 0:
        raise ValueError("The data holds no text.")
    return data


def _hold_out(data: Dataset, percentage: float) -> DatasetDict:
    if len(data) > 1:
        held_out = min(max(1, round(len(data) * percentage / 100)), len(data) - 1)
        split = data.train_test_split(test_size=held_out, seed=0)
        return DatasetDict({"train": split["train"], "validation": split["test"]})
    text = data[0]["text"]
    cut = min(int(len(text) * (1 - percentage / 100)), len(text) - 1)
    parts = {"train": text[:cut], "validation": text[cut:]}
    return DatasetDict({split: Dataset.from_dict({"text": [part]}) for split, part in parts.items()})


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one token per byte and an end-of-text token."""
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer_name {name!r} could not be loaded: {error}") from error
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


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of every text, ended by the tokenizer's end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Texts are longer than what attention models were trained on; that warning is not for this one.
    return [ids + end for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]


def make_blocks(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Blocks:
    """Texts, each ended by the tokenizer's end token, joined and cut into blocks; what is left over at the end is
    dropped.

    Raises:
        ValueError: a split is shorter than one block.
    """
    train, _ = _cut(data["train"], "training", tokenizer, block_size)
    digest = hashlib.sha256()
    for batch in train.with_format("numpy").iter(1000):
        digest.update(batch["input_ids"].tobytes())
    return Blocks(train, *_cut(data["validation"], "validation", tokenizer, block_size), digest.hexdigest())


def _cut(data: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, block_size: int) -> tuple[Dataset, float]:
    """Blocks of a split, and its tokens per byte."""

    def tokens(texts):
        ids = tokenize(texts, tokenizer)
        return {"input_ids": ids, "tokens": list(map(len, ids)), "bytes": [len(text.encode()) for text in texts]}

    def cut(documents):
        ids = list(itertools.chain.from_iterable(documents))
        return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}

    rows = data.map(tokens, batched=True, input_columns="text", remove_columns="text", desc="Tokenizing")
    tokens_per_byte = sum(rows["tokens"]) / sum(rows["bytes"])
    # Texts are joined in groups, of a whole split where it is small: only each group's remainder is lost.
    options = {"batch_size": 10_000, "input_columns": "input_ids", "remove_columns": ["tokens", "bytes"]}
    blocks = rows.map(cut, batched=True, desc="Cutting into blocks", **options)
    if len(blocks) == 0:
        raise ValueError(f"The {name} text is shorter than one block of {block_size} tokens; lower --block_size.")
    return blocks.with_format("torch"), tokens_per_byte
