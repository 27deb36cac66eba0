# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Texts in blocks: read exactly or refused with the place, tokenized in pieces as if whole, kept apart, and streamed in
an order that does not depend on where the stream was left."""

import argparse
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import text_files
import token_blocks
from context_pieces import ContextPieces
from evaluate import model_inputs
from text_data import add_data_arguments, load_blocks, load_text, load_tokenizer
from text_stream import TextStream
from tiny_models import make_model
from token_blocks import TokenBlocks, check_vocabulary, tokenize, vocabulary_size


ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "model_cards" / "lrcssm-python-nano"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return parser.parse_args(["--block_size", "64", *map(str, arguments)])


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def strings(texts):
    return ["".join(pieces) for pieces in texts]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["at once", "streamed"])
@pytest.mark.parametrize("end", ["<|endoftext|>", None], ids=["end token", "no end token"])
@torch.no_grad()
def test_no_state_leaks_from_one_text_to_the_next(end, streaming, tmp_path):
    """Also where no token says so; and a text that contains the end token goes on after it."""
    tokenizer = load_tokenizer(None)
    tokenizer.eos_token = end
    texts = [f"^text {i} goes on<|endoftext|> and ends." + "." * (i % 9) for i in range(30)]
    path = write_rows(tmp_path / "texts.jsonl", texts)
    blocks = load_blocks(parse("--train_file", path, "--validation_file", path, *streaming), tokenizer)
    model = make_model(vocab_size=vocabulary_size(tokenizer))
    begins = tokenizer("^").input_ids[0]
    borders = 0
    for block in itertools.chain(itertools.islice(iter(blocks.train), 10), blocks.validation):
        ids, positions = block["input_ids"], block["position_ids"]
        expected = [index for index in range(64) if index == 0 or ids[index] == begins]
        assert (positions == 0).nonzero().flatten().tolist() == expected
        borders += len(expected) - 1
        batch = {name: tensor.unsqueeze(0) for name, tensor in block.items()}
        logits = model(**model_inputs(model, batch, ContextPieces(Accelerator(), 1))).logits[0]
        for start, stop in zip(expected, [*expected[1:], 64]):
            assert positions[start:stop].tolist() == list(range(stop - start))
            alone = model(input_ids=ids[None, start:stop]).logits[0]
            assert torch.allclose(logits[start:stop], alone, atol=1e-5)
    assert borders > 15


def test_blocks_are_the_joined_texts_and_know_where_they_end():
    blocks = TokenBlocks(np.arange(11, dtype=np.uint16), np.array([0, 2, 4, 9]), 4)
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [block["position_ids"].tolist() for block in blocks] == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert blocks[-1]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        blocks[2]


def train_bpe(pre_tokenizer=None, normalizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "?"])
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    return tokenizer


def train_word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "?"])
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    return tokenizer


_DIGITS_BY_THREE = Regex(
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Whether each can be given pieces of a text that has words.
TOKENIZERS = {
    "bytes": (lambda: load_tokenizer(None).backend_tokenizer, True),
    "nano": (lambda: PreTrainedTokenizerFast.from_pretrained(NANO).backend_tokenizer, True),
    "words and lines": (
        lambda: train_bpe(
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(_DIGITS_BY_THREE, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            )
        ),
        True,
    ),
    "a space first": (lambda: train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), True),
    "metaspace": (lambda: train_bpe(pre_tokenizers.Metaspace(prepend_scheme="always")), True),
    "metaspace in one": (lambda: train_bpe(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)), True),
    "always a space first": (
        lambda: train_bpe(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        False,
    ),
    "word pieces": (train_word_piece, True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_tokenized_as_the_whole(name, monkeypatch):
    make, takes_pieces = TOKENIZERS[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<|endoftext|>")
    monkeypatch.setattr(text_files, "PIECE", 1000)
    monkeypatch.setattr(token_blocks, "PIECE", 1000)
    monkeypatch.setattr(token_blocks, "_CONTEXT", 100)
    source = (ROOT / "training" / "pretrain.py").read_text()[:9000]
    digits = "".join(str(i * i) for i in range(1500))
    odd = " \n\n\t  <|endoftext|> naïve — 図書館で本を読む。 'sand  \r\n" * 60
    for text in (source, odd, digits + source, "-" * 3000 + "a" * 3001, "図書館で本を読む。" * 300, "short"):
        parts = list(tokenize([text_files.in_pieces(text), ["next"], []], tokenizer))
        ends = [tokenizer.eos_token_id]
        whole = [tokenizer(each, add_special_tokens=False).input_ids + ends for each in (text, "next", "")]
        assert np.concatenate([ids for ids, _ in parts]).tolist() == [*whole[0], *whole[1], *whole[2]]
        starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])[:-1]
        assert [start for start, (_, begins) in zip(starts, parts) if begins] == [
            0,
            *np.cumsum(list(map(len, whole)))[:-1],
        ]
        assert not takes_pieces or text != source or len(parts) > 5


@pytest.mark.parametrize("name", ["text.txt", "rows.jsonl"])
def test_memory_does_not_grow_with_the_text(name, tmp_path, monkeypatch):
    """What is given to the tokenizer at once, and the bytes that are kept of a token."""
    monkeypatch.setattr(text_files, "PIECE", 20_000)
    monkeypatch.setattr(token_blocks, "PIECE", 20_000)
    given = []
    encode = PreTrainedTokenizerFast._encode_plus

    def watched(self, text, *arguments, **options):
        given.append(sum(map(len, text)))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", watched)
    lines = [f"line {i} of a long text, naïve\n" for i in range(5_000)]
    path = tmp_path / name
    path.write_text("".join(lines)) if name == "text.txt" else write_rows(path, lines)
    blocks = load_blocks(parse("--train_file", path), load_tokenizer(None))
    assert sum(given) > 130_000 and max(given) < 2.2 * 20_000
    assert isinstance(blocks.train.ids, np.memmap) and blocks.train.ids.dtype == np.uint16


def test_the_files_bytes_are_what_is_read(tmp_path, monkeypatch):
    """Line ends, characters that a piece is cut in, and names that look like patterns; a byte order mark is no text."""
    monkeypatch.setattr(text_files, "PIECE", 7)
    text = "one\r\ntwo\n\nnaïve — 図書館\r" * 9
    (tmp_path / "weird.txt").write_text("another file")
    path = tmp_path / "we[i]rd*.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = load_text(parse("--train_file", path, "--validation_split_percentage", "10"))
    train, held_out = strings(data["train"]), strings(data["validation"])
    assert train == [text[: len(text) * 9 // 10]] and held_out == [text[len(text) * 9 // 10 :]]
    rows = write_rows(tmp_path / "we[i]rd*.jsonl", [text, "図 "])
    (tmp_path / "weird.jsonl").write_text('{"text": "another file"}\n')
    data = load_text(parse("--train_file", rows, "--validation_file", rows))
    assert strings(data["train"]) == [text, "図 "]
    cells = tmp_path / "rows.csv"
    cells.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"one, ""two""\r\nlines"\r\n2,7\r\n3,\r\n')
    assert strings(load_text(parse("--train_file", cells, "--validation_file", cells))["train"]) == [
        'one, "two"\r\nlines',
        "7",
    ]


def test_a_share_of_the_texts_is_held_out(tmp_path):
    texts = [f"text {i}" for i in range(50)]
    data = load_text(parse("--train_file", write_rows(tmp_path / "a.jsonl", texts)))
    # As `datasets` would have it.
    split = datasets.Dataset.from_dict({"text": texts}).train_test_split(test_size=2, seed=0)
    assert sorted(strings(data["validation"])) == sorted(split["test"]["text"])
    assert sorted(strings(data["train"]) + strings(data["validation"])) == sorted(texts)


def rows_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_of(frame, tmp_path):
    pandas.DataFrame(frame).to_parquet(tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


REFUSED = {
    "latin-1": (
        "a.txt",
        "one\ntwo caf\xe9".encode("latin-1"),
        r"byte 11 \(in line 2\) is b'\\xe9', which is not UTF-8",
    ),
    "latin-1 far on": ("a.txt", b"0123456789\n" * 30_000 + b"\xff!", r"byte 330000 \(in line 30001\) is b'\\xff'"),
    "latin-1 rows": ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"byte 27 \(in line 2\) is b'\\xe9'"),
    "latin-1 cells": ("a.csv", b"text\ncaf\xe9\n", r"byte 8 \(in line 2\) is b'\\xe9'"),
    "cut": ("a.txt", "é".encode() * 5 + b"\xc3", r"byte 10 \(in line 1\) is b'\\xc3', .* \(unexpected end of data\)"),
    "UTF-16": ("a.txt", "some text".encode("utf-16"), "looks like UTF-16"),
    "UTF-16 without a mark": ("a.jsonl", '{"text": "some"}\n'.encode("utf-16-le"), "looks like UTF-16"),
    "no object": ("a.jsonl", b'{"text": "a"}\n\n"b"\n', "line 3 holds str, not an object. Wanted is"),
    "broken": ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2, column 13: this is not JSON: Expecting"),
    "broken array": (
        "a.json",
        b'[{"text": "a"},\n {"text": }]',
        "line 2, column 11: this is not JSON: Expecting value",
    ),
    "array of arrays": ("a.json", b'[["a"]]', "row 1 holds list, not an object"),
    "nested": ("a.jsonl", b"[" * 100_000, "not JSON"),
    "a number": (
        "a.jsonl",
        rows_of({"text": "a"}, {"text": 7}),
        r"line 2: the column 'text' holds int \(7\), not text",
    ),
    "a list": ("a.jsonl", rows_of({"text": ["a"]}), r"line 1: the column 'text' holds list \(\['a'\]\), not text"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: the column 'text' holds '\\ud800', half of a"),
    "no rows": ("a.csv", b"id,content\n", "holds no text"),
    "no text": ("a.jsonl", rows_of({"text": None}, {"text": " "}, {}), "holds no text"),
    "no column": (
        "a.jsonl",
        rows_of({"a": ["x"], "b": {"c": 1}, "d": 2, "id": "17", "e": None}),
        "has no column 'text', and no other holds text: 'a' holds list; 'b' holds dict; 'd' holds int; "
        "'id' holds a number in writing; 'e' holds nothing. Name the one to read 'text'",
    ),
    "several columns": ("a.jsonl", rows_of({"a": "x", "b": "y"}), "several others hold text: 'a' holds str; 'b' holds"),
    "numbers": ("a.csv", b"n,m\n1,2\n3,4\n", "no other holds text: 'n' holds a number in writing; 'm' holds"),
    "other separators": ("a.csv", b"id;text\n1;one\n", "'id;text' are not parted by commas"),
    "too many cells": ("a.csv", b"id,text\n1,one, two\n", "line 2 has 3 cells, the header 2"),
    "open quotes": ("a.csv", b'id,text\n1,"one\n2,two\n', "unexpected end of data. Wanted is CSV"),
    "same names": ("a.csv", b"text,text\n1,one\n", "several columns have the same name"),
    "cells without a name": (
        "a.csv",
        b"id,text,,\n1,one,,\n2,two, three,\n",
        "line 3 has cells in columns without a name",
    ),
    "no strings": ("a.parquet", {"n": [1.5], "m": [[1]]}, "no other holds text: 'n' holds double; 'm' holds list"),
    "no Parquet": ("a.parquet", b"PAR1 but no more", "is not Parquet that can be read"),
    "a column of numbers": (
        "a.parquet",
        {"text": [1.5, 2.5]},
        r"row 1: the column 'text' holds float \(1.5\), not text",
    ),
    "one byte": ("a.txt", b"x", "one text of a single character, of which no end can be held out"),
    "blank": ("a.txt", b" \n", "holds no text"),
    "empty": ("a.jsonl", b"", "is empty"),
    "unknown": ("a.bin", b"text", "cannot read '.bin', only .txt"),
}


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["at once", "streamed"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_with_its_place_and_cause(case, streaming, tmp_path):
    name, content, message = REFUSED[case]
    if streaming and name.endswith(".txt"):
        message = "is one text; --streaming is for files of many"
    path = tmp_path / name
    path.write_bytes(parquet_of(content, tmp_path) if isinstance(content, dict) else content)
    with pytest.raises(ValueError, match=message) as refused:
        load_blocks(parse("--train_file", path, *streaming), load_tokenizer(None))
    assert case == "one byte" or str(path) in str(refused.value)
    assert not (tmp_path / "cache" / "lrcssm_tokens").exists()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_texts_are_those_of_the_only_column_that_holds_text_which_is_said(kind, tmp_path, capsys):
    frame = pandas.DataFrame({"id": [1, 2, 3], "content": ["a text", None, "another"]})
    path = tmp_path / f"a.{kind}"
    write = {
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records", indent=2),
        "csv": lambda: frame.to_csv(path, index=False),
        "parquet": lambda: frame.to_parquet(path),
    }
    write[kind]()
    data = load_text(parse("--train_file", path, "--validation_file", path))
    assert strings(data["train"]) == ["a text", "another"]
    told = capsys.readouterr().err
    assert "has no column 'text': the texts are its column 'content', the only one that holds text" in told
    assert "1 rows have no text in the column 'content' and are left out" in told


def test_a_tokenizer_is_as_large_as_its_largest_id():
    vocabulary = {chr(97 + i): i for i in range(26)} | {"?": 26, "#": 27, "0": 40}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")))
    assert vocabulary_size(tokenizer) == 41
    tokenizer.add_tokens("added")
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)
    check_vocabulary(tokenizer, vocabulary_size(tokenizer))
    with pytest.raises(ValueError, match="largest id is 40, the model's 29"):
        check_vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), 30)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["at once", "streamed"])
def test_other_training_data_have_another_digest(streaming, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", ["held out " * 60])

    def digest(name, texts, tokenizer=None):
        path = write_rows(tmp_path / name, texts)
        arguments = ["--train_file", path, "--validation_file", held_out, *streaming]
        return load_blocks(parse(*arguments), tokenizer or load_tokenizer(None)).digest

    texts = ["one text " * 20, "another text " * 20]
    same = digest("a.jsonl", texts)
    assert same == digest("b.jsonl", texts) and len(same) == 64
    assert same != digest("a.jsonl", ["One text " * 20, "another text " * 20])
    assert same != digest("a.jsonl", texts, PreTrainedTokenizerFast.from_pretrained(NANO))
    # The same tokens, but other borders.
    no_end = load_tokenizer(None)
    no_end.eos_token = None
    assert digest("a.jsonl", texts, no_end) != digest("a.jsonl", ["".join(texts)], no_end)


def test_texts_are_tokenized_once(tmp_path, cache, monkeypatch):
    arguments = parse("--train_file", write_rows(tmp_path / "a.jsonl", [f"text {i} " * 9 for i in range(20)]))
    first = load_blocks(arguments, load_tokenizer(None))
    with monkeypatch.context() as patch:
        patch.setattr(token_blocks, "tokenize", None)
        again = load_blocks(arguments, load_tokenizer(None))
    ids = np.array(first.train.ids)
    assert again.digest == first.digest and np.array_equal(again.train.ids, ids)
    for path in cache.glob("lrcssm_tokens/*/ids.bin"):
        path.write_bytes(path.read_bytes()[:-2] + b"!!")
    again = load_blocks(arguments, load_tokenizer(None))
    assert again.digest == first.digest and np.array_equal(again.train.ids, ids)
    assert not list(cache.rglob("partial-*"))


def test_a_text_that_changes_while_it_is_read_is_not_kept(tmp_path, cache, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [f"text {i} " * 9 for i in range(20)])
    arguments, read = parse("--train_file", path, "--validation_file", path), token_blocks.tokenize
    changed = path.read_text().replace("text 7", "text 8")

    def change_and_read(*arguments):
        path.write_text(changed)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(token_blocks, "tokenize", change_and_read)
        with pytest.raises(ValueError, match="The text changed while it was read; start again"):
            load_blocks(arguments, load_tokenizer(None))
    assert not list(cache.rglob("tokens.json"))
    tokens = load_blocks(arguments, load_tokenizer(None)).train.ids
    texts = "".join(json.loads(line)["text"] + "<|endoftext|>" for line in changed.splitlines())
    assert load_tokenizer(None).decode(tokens) == texts


@pytest.mark.parametrize("spoiled", ["starts.npy", "tokens.json"])
def test_a_cache_that_is_not_whole_is_written_anew(spoiled, tmp_path, cache):
    arguments = parse("--train_file", write_rows(tmp_path / "a.jsonl", [f"text {i} " * 9 for i in range(20)]))
    first = load_blocks(arguments, load_tokenizer(None))
    for path in cache.rglob(spoiled):
        path.write_text(path.read_text().replace("bytes", "size") if spoiled == "tokens.json" else "")
    again = load_blocks(arguments, load_tokenizer(None))
    assert again.digest == first.digest and again.tokens_per_byte == first.tokens_per_byte


def test_a_cache_that_does_not_keep_what_is_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(token_blocks, "_read", lambda folder: None)
    with pytest.raises(OSError, match="are not as they were written; remove that folder"):
        token_blocks.load_tokens([["text"]], load_tokenizer(None))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["at once", "streamed"])
def test_other_releases_tokenize_anew_but_the_data_are_the_same(streaming, tmp_path, cache, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", [f"text {i} " * 9 for i in range(20)])
    arguments = parse("--train_file", path, "--validation_file", path, *streaming)
    digest = load_blocks(arguments, load_tokenizer(None)).digest
    (folder,) = (cache / "lrcssm_tokens").iterdir()
    for library in (token_blocks.transformers, token_blocks.tokenizers):
        monkeypatch.setattr(library, "__version__", "99.0")
        assert load_blocks(arguments, load_tokenizer(None)).digest == digest
    assert len(list(folder.parent.iterdir())) == 3


@pytest.fixture(params=["file", "dataset"])
def make_stream(request, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": f"text {i} " * 5, "other": i} for i in range(50)]
    blank = [{"text": None, "other": 0}, {"text": " \n", "other": 0}]
    (folder / "train.jsonl").write_bytes(rows_of(*rows[:25], *blank, *rows[25:]))
    (folder / "validation.jsonl").write_bytes(rows_of({"text": "held out " * 20, "other": 0}))
    files = ["--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl"]
    arguments = parse(*(files if request.param == "file" else ["--dataset_name", folder]), "--streaming")
    monkeypatch.setattr(TextStream, "WINDOW", 7)
    return lambda seed=3: load_blocks(arguments, load_tokenizer(None), seed).train


def read(stream, count):
    blocks = itertools.islice(stream, count)
    return [(block["input_ids"].tolist(), block["position_ids"].tolist()) for block in blocks]


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
    ids = list(itertools.chain.from_iterable(ids for ids, _ in blocks))
    texts = load_tokenizer(None).decode(ids).split("<|endoftext|>")
    first, second = texts[:50], texts[50:100]
    for epoch in (first, second):
        assert sorted(epoch) == sorted(f"text {i} " * 5 for i in range(50))
    assert first != second


def test_a_row_of_a_stream_that_is_no_text_ends_it_with_its_place(tmp_path, monkeypatch):
    rows = [{"text": f"text {i} " * 9} for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(rows_of(*rows, {"text": {"a": 1}}))
    held_out = write_rows(tmp_path / "held_out.jsonl", ["held out " * 20])
    monkeypatch.setattr(TextStream, "WINDOW", 7)
    arguments = parse("--train_file", tmp_path / "a.jsonl", "--validation_file", held_out, "--streaming")
    stream = load_blocks(arguments, load_tokenizer(None)).train
    with pytest.raises(ValueError, match=r"line 31: the column 'text' holds dict \(\{'a': 1\}\), not text"):
        read(stream, 100)


def test_too_little_to_stream_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["text"] * 3)
    with pytest.raises(ValueError, match="too short to stream: 3 texts are held out; leave out --streaming"):
        load_blocks(parse("--train_file", path, "--streaming"), load_tokenizer(None))


def test_datasets_are_read_as_files_are(tmp_path, capsys):
    """From a folder, at once and streamed."""
    folder = tmp_path / "data"
    folder.mkdir()
    frame = pandas.DataFrame({"id": range(30), "content": [f"text {i} " * 20 for i in range(29)] + [None]})
    frame.to_parquet(folder / "train.parquet")
    frame[:5].to_parquet(folder / "validation.parquet")
    once, streamed = (
        load_blocks(parse("--dataset_name", folder, *streaming), load_tokenizer(None))
        for streaming in ([], ["--streaming"])
    )
    assert np.array_equal(once.validation.ids, streamed.validation.ids)
    assert load_tokenizer(None).decode(next(iter(streamed.train))["input_ids"]).startswith("text ")
    assert capsys.readouterr().err.count("the texts are its column 'content'") == 4
    for split in ("train", "validation"):
        frame[["id"]].to_parquet(folder / f"{split}.parquet")
    for streaming in ([], ["--streaming"]):
        with pytest.raises(ValueError, match="has no column 'text', and no other holds text: 'id' holds int"):
            load_blocks(parse("--dataset_name", folder, *streaming), load_tokenizer(None))


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["at once", "streamed"])
@pytest.mark.parametrize(
    ("kind", "name"), [("sound", "text"), ("sound", "content"), ("image", "text"), ("image", "content")]
)
def test_columns_that_cannot_be_read_do_not_matter_beside_a_text(kind, name, streaming, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    features = {name: datasets.Value("string"), "other": datasets.Audio() if kind == "sound" else datasets.Image()}
    rows = {name: [f"text {i} " * 9 for i in range(20)], "other": [{"bytes": b"none", "path": None}] * 20}
    table = pyarrow.table(rows, datasets.Features(features).arrow_schema)
    with pytest.raises((ImportError, OSError, RuntimeError)):
        datasets.Dataset(table)[0]["other"]
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    blocks = load_blocks(parse("--dataset_name", folder, *streaming), load_tokenizer(None))
    expected = "".join(text + "<|endoftext|>" for text in rows[name])
    assert load_tokenizer(None).decode(blocks.validation.ids) == expected
    assert len(next(iter(blocks.train))["input_ids"]) == 64


@pytest.mark.parametrize("kind", [pyarrow.timestamp("s"), pyarrow.timestamp("s", "Nowhere/Never")], ids=str)
def test_times_that_python_has_not_do_not_matter_beside_a_text(kind, tmp_path):
    times = pyarrow.array([10**12, 10**12], pyarrow.int64()).cast(kind)
    path = tmp_path / "a.parquet"
    for name in ("text", "content"):
        pyarrow.parquet.write_table(pyarrow.table({"when": times, name: ["one", "two"]}), path)
        data = load_text(parse("--train_file", path, "--validation_file", path))
        assert strings(data["train"]) == ["one", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": times}), path)
    with pytest.raises(ValueError, match="is not Parquet that can be read, after 0 rows"):
        load_blocks(parse("--train_file", path), load_tokenizer(None))


def test_empty_columns_at_the_end_are_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,,,\none,1,,,\ntwo,2,,,\n")
    assert strings(load_text(parse("--train_file", path, "--validation_file", path))["train"]) == ["one", "two"]


@pytest.mark.parametrize(
    ("bad", "messages"),
    [
        (b'{"text": 7}', ["row 3: the column 'text' holds int \\(7\\), not text", "row 3"]),
        (b'{"text": "caf\xe9"}', ["split 'train' cannot be read, after 2 rows: .*'utf-8'", "cannot be read"]),
        (b'{"text": "a', ["could not be loaded: .*JSON", "cannot be read.*JSON"]),
    ],
    ids=["a number", "latin-1", "broken"],
)
def test_what_cannot_be_read_of_a_dataset_is_named(bad, messages, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "validation.jsonl", ["text " * 20])
    rows = write_rows(folder / "train.jsonl", ["text " * 20] * 2)
    rows.write_bytes(rows.read_bytes() + bad + b"\n")
    for streaming, message in zip(([], ["--streaming"]), messages):
        with pytest.raises(ValueError, match=message):
            list(load_blocks(parse("--dataset_name", folder, *streaming), load_tokenizer(None)).train)
