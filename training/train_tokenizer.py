# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Train a byte-level BPE tokenizer, for `pretrain.py --tokenizer_name`, by default on the Python standard library.

python training/train_tokenizer.py --vocab_size 1024 --output_dir runs/tokenizer
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from arguments import integer, text
from free_memory import keep_freed_memory
from text_data import END_OF_TEXT, add_text_arguments, byte_level, load_text
from token_blocks import load_tokens
from whole_files import whole_files


def train_tokenizer(texts: Iterable[Iterable[str]], vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer of `vocab_size` tokens, every byte and the end-of-text token among them, so that no text is unknown.
    Each of the texts is the strings that it is made of.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"`vocab_size` must be above the {len(alphabet)} bytes, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END_OF_TEXT])
    tokenizer.train_from_iterator((words for pieces in texts for words in _whole_words(pieces)), trainer)
    return byte_level(tokenizer)


def _whole_words(pieces: Iterable[str]) -> Iterator[str]:
    """The strings cut in other places: where a word ends, and the tokenizer parts texts as well."""
    text = ""
    for piece in pieces:
        text += piece
        words = re.match(r".*\S(?=[ \n])", text, re.DOTALL)
        if words is not None:
            yield words[0]
            text = text[words.end() :]
    yield text


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument(
        "--vocab_size", type=integer(at_least=257), default=1024, help="Number of tokens (default 1024)."
    )
    parser.add_argument("--output_dir", type=text, required=True, help="Folder that receives the tokenizer's files.")
    args = parser.parse_args()
    try:
        data = load_text(args)
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(data["train"], args.vocab_size)
        with whole_files(folder) as partial:
            tokenizer.save_pretrained(partial)
        held_out = load_tokens(data["validation"], tokenizer)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    size = held_out.bytes / (len(held_out.ids) - len(held_out.starts))
    print(f"{len(tokenizer)} tokens, {size:.2f} bytes each in the held-out text: {args.output_dir}")


if __name__ == "__main__":
    main()
