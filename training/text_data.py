# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Text for language modelling: where it comes from, and how it becomes blocks of tokens."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sysconfig
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# `pydoc_data` is the language reference as one generated text, not source.
_NOT_SOURCE = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}
_LOADERS = {".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json"}
_LOADERS |= {".csv": "csv", ".parquet": "parquet"}
END_OF_TEXT = "<|endoftext|>"


def add_text_arguments(parser) -> None:
    """The flags that say what is trained on and held out, the same for every script, to a parser or group."""
    parser.add_argument("--dataset_name", help="Dataset on the Hub; by default the Python standard library's source.")
    parser.add_argument("--dataset_config_name", help="Configuration of that dataset.")
    parser.add_argument("--train_file", help="Text, JSON, CSV or Parquet file to use instead.")
    parser.add_argument("--validation_file", help="Held-out file; by default a share of the training texts.")
    parser.add_argument("--validation_split_percentage", type=float, default=5, help="That share (default 5).")


def add_data_arguments(parser) -> None:
    """Those flags, and the length of the sequences that a model sees."""
    add_text_arguments(parser)
    parser.add_argument("--block_size", type=int, default=512, help="Tokens per sequence (default 512).")


def load_blocks(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[DatasetDict, float]:
    """What those flags ask for, as `make_blocks` returns it; raises what `load_text` and `make_blocks` raise."""
    return make_blocks(load_text(args), tokenizer, args.block_size)


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


def _read_file(flag: str, name: str) -> Dataset:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{flag} {name!r} does not exist.")
    if path.stat().st_size == 0:
        raise ValueError(f"{flag} {name!r} is empty.")
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        raise ValueError(f"{flag} {name!r}: cannot read {path.suffix!r}, only {', '.join(_LOADERS)}.")
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        return load_dataset(loader, data_files=str(path), split="train", **options)
    except Exception as error:
        raise ValueError(f"{flag} {name!r} could not be read: {error}") from error


def _text_column(data: Dataset) -> Dataset:
    column = "text" if "text" in data.column_names else data.column_names[0]
    if data.features[column].dtype not in ("string", "large_string"):
        raise ValueError(
            f"The data has no column 'text', and {column!r} holds {data.features[column].dtype}, not text."
        )
    data = data.select_columns(column)
    data = data if column == "text" else data.rename_column(column, "text")
    data = data.filter(lambda text: bool(text and text.strip()), input_columns="text")
    if len(data) == 0:
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


def make_blocks(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int) -> tuple[DatasetDict, float]:
    """Texts, each ended by the tokenizer's end token, joined and cut into blocks of `block_size` token ids.

    Returns:
        The blocks (column `input_ids`; what is left over at the end is dropped), and the held-out text's tokens per
        byte, by which nats per token become nats per byte.

    Raises:
        ValueError: a split is shorter than one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(texts):
        # Texts are longer than what attention models were trained on; that warning is not for this one.
        return {"input_ids": [ids + end for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]}

    def cut(documents):
        ids = list(itertools.chain.from_iterable(documents))
        return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}

    tokens = data.map(tokenize, batched=True, input_columns="text", remove_columns="text", desc="Tokenizing")
    validation_bytes = sum(len(text.encode()) for text in data["validation"]["text"])
    validation_tokens = sum(map(len, tokens["validation"]["input_ids"]))
    # Texts are joined in groups, of a whole split where it is small: only each group's remainder is lost.
    blocks = tokens.map(cut, batched=True, batch_size=10_000, input_columns="input_ids", desc="Cutting into blocks")
    for split, rows in blocks.items():
        if len(rows) == 0:
            raise ValueError(f"The {split} text is shorter than one block of {block_size} tokens; lower --block_size.")
    return blocks.with_format("torch"), validation_tokens / validation_bytes
