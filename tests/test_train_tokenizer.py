# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The trained tokenizer is shorter than bytes and loses none of them."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import train_tokenizer as train_tokenizer_script
from train_tokenizer import train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
TEXT = "def total(values):\n    return sum(value for value in values)\n" * 20


def test_the_script_writes_what_auto_tokenizer_loads(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    command = [sys.executable, str(ROOT / "training" / "train_tokenizer.py"), "--vocab_size", "280"]
    command += ["--train_file", str(tmp_path / "corpus.txt"), "--output_dir", str(tmp_path / "tokenizer")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "280 tokens" in result.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 280
    assert len(tokenizer(TEXT).input_ids) < len(TEXT) / 2
    for text in (TEXT, "naïve\t— 図\r\n  \x00", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="`vocab_size` must be above the 256 bytes, got 256"):
        train_tokenizer([[TEXT]], 256)


def test_a_long_text_is_learned_from_in_pieces_as_if_whole():
    text = (Path(__file__).read_text() + "naïve  \n\n\t and — more" * 3) * 2
    for size in (7, 100, 1000):
        pieces = (text[start : start + size] for start in range(0, len(text), size))
        learned = [train_tokenizer([each], 400).backend_tokenizer.to_str() for each in (pieces, [text])]
        assert learned[0] == learned[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size", "256"], "argument --vocab_size: must be at least 257, got 256"),
        (["--vocab_size", "many"], "argument --vocab_size: must be a whole number, got 'many'"),
        (["--output_dir", ""], "argument --output_dir: must not be empty"),
    ],
)
def test_arguments_are_checked_before_any_text_is_read(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", "--output_dir", str(tmp_path / "t"), *arguments])
    with pytest.raises(SystemExit) as ended:
        train_tokenizer_script.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_script_names_what_it_cannot_read(tmp_path):
    command = [sys.executable, str(ROOT / "training" / "train_tokenizer.py"), "--output_dir", str(tmp_path / "t")]
    result = subprocess.run([*command, "--train_file", "missing.txt"], capture_output=True, text=True)
    assert result.returncode == 2 and "'missing.txt' does not exist" in result.stderr
    assert not (tmp_path / "t").exists()
