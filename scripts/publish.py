# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Publish a model folder on the Hub: check it, show what changes, upload it in one commit, compare what arrived.

    python scripts/publish.py FOLDER REPO_ID

The repository becomes the folder: files that are only there are deleted. Nothing is uploaded before every check has
passed and the list of changes was agreed to; what is uploaded is the copy that was checked.
"""

from __future__ import annotations

import argparse
import filecmp
import html
import itertools
import re
import shutil
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import lrcssm_hf
from checked_json import read_json
from lrcssm_hf import LrcSSMConfig
from make_card import find_head, pipeline_tag, read_config
from token_blocks import check_vocabulary


_CODE = {Path(file).name: Path(file) for file in get_relative_import_files(lrcssm_hf.modeling_lrcssm.__file__)}
_CODE["modeling_lrcssm.py"] = Path(lrcssm_hf.modeling_lrcssm.__file__)
_KNOWN = {CONFIG_NAME, GENERATION_CONFIG_NAME, *_CODE}
_KNOWN |= {FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE}
_KNOWN |= {"README.md", "LICENSE", "training.json", "metrics.jsonl", "loss.png", "comparison.json", "comparison.png"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# The forms of what gives access to an account or a machine. Letters and digits before would make it another word; an
# underscore may be the end of a variable's name.
_SECRETS = {
    "a Hugging Face token": rb"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{20,}",
    "an OpenAI or Anthropic key": rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": rb"(?<![A-Za-z0-9])(gh[oprsu]|github_pat)_[A-Za-z0-9_]{20,}",
    "a GitLab token": rb"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])",
    "a Google key": rb"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}",
    "a Slack token": rb"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,}",
    "an npm token": rb"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{30,}",
    "a PyPI token": rb"(?<![A-Za-z0-9])pypi-AgE[A-Za-z0-9_-]{20,}",
    "a private key": rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-",
    # Or a token in its place, or in the user's; `git` is the user of every host of git.
    "a password in an address": rb"://(?!(git)?:?@)([A-Za-z0-9][^\s/:@\"'<>?#]*)?(:[^\s/@\"'<>]*)?@",
}
_SECRETS = {kind: re.compile(form) for kind, form in _SECRETS.items()}
_ESCAPE = re.compile(rb"\\([nrtbf]|u[0-9A-Fa-f]{4})")
_PLACEHOLDER = re.compile(r"(?i:more information needed|lorem ipsum)|\b(TODO|TBD|FIXME)\b|\{\{")
# Of Markdown: code, which is not searched, and whatever leads from the page to somewhere else.
_CODE_BLOCK = re.compile(
    r"^ {0,3}(?P<fence>(?P<mark>[`~])(?P=mark){2,})(?![^\n]*`).*?(^ {0,3}(?P=fence)(?P=mark)*[ \t]*$|\Z)", re.M | re.S
)
_CODE_SPAN = re.compile(r"(?<!`)(?P<fence>`+)(?!`)((?!\n\s*\n).)+?(?<!`)(?P=fence)(?!`)", re.S)
_LINK = re.compile(
    r"""
    \]\(\s*(<[^<>\n]*>|[^\s)]*)                    # [text](target "title")
    | ^[ >]*\[[^\]^][^\]]*\]:\s*(<[^<>\n]*>|\S+)   # [label]: target
    | <([a-z][a-z0-9+.-]+:[^\s<>]*)>                # <target>
    | \b(file:/\S*)
    """,
    re.X | re.I | re.M,
)
_TAG = re.compile(r"""<[a-z]("[^"]*"|'[^']*'|[^<>"'])*>""", re.I)
_ATTRIBUTE = re.compile(r"""\b(?:href|src|srcset|poster)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""", re.I)
_WEB = re.compile(r"https?://|mailto:|#", re.I)
_KEPT = {".gitattributes"}  # The Hub's own.


# --- Checks ---------------------------------------------------------------------------------------------------------


def check(folder: Path, repo_id: str) -> list[Path]:
    """The files to publish, once the model in the folder is known to be whole, to load and to run: the folder's, and
    the package's code where it is not beside the weights.

    Raises:
        ValueError: it is not; the message names the file and the remedy.
    """
    files = check_names(folder)
    check_secrets(files)
    config = check_config(folder)
    files += check_code(folder)
    check_model(folder, config)
    if config.num_channels is None:
        check_tokenizer(folder, config)
    check_card(folder / "README.md", repo_id, config, {path.name for path in files})
    return files


def check_names(folder: Path) -> list[Path]:
    """The files, which are those of a model folder and lie in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    files = sorted(folder.iterdir())
    for path in files:
        if path.is_symlink():
            raise ValueError(f"{_shown(path)} is a symbolic link; put a copy of what it leads to in its place.")
    weights, index = {SAFE_WEIGHTS_NAME}, folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (folder / SAFE_WEIGHTS_NAME).is_file():
        shards = read_json(index, {"weight_map": {str: str}})["weight_map"].values()
        weights = {index.name, *(name for name in shards if name.endswith(".safetensors"))}
    for path in files:
        if path.suffix in _PICKLES:
            raise ValueError(f"{_shown(path)} is a pickle, which runs anything when loaded; publish safetensors only.")
        if not path.is_file() or path.name not in _KNOWN | weights:
            raise ValueError(f"{_shown(path)} is not part of a model folder; move it out of {folder}.")
    return files


def _shown(path: Path) -> str:
    """Its name, on one line."""
    return path.name if path.name.isprintable() else repr(path.name)


def check_secrets(files: list[Path]) -> None:
    """No file has a line that could be one, nor have the weights' metadata; what is said of it does not repeat it."""
    for path in files:
        if path.suffix == ".safetensors":
            _check_secrets(f"{path.name}, metadata", "\n".join(itertools.chain(*_metadata(path).items())).encode())
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if b"\0" in line and path.suffix != ".png":
                    raise ValueError(f"{path.name}, line {number}: a NUL byte, as in UTF-16; convert it to UTF-8.")
                _check_secrets(f"{path.name}, line {number}", line)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as weights:
            return weights.metadata() or {}
    except Exception as error:
        raise ValueError(f"{path.name}: the weights do not load: {error}") from error


def _check_secrets(place: str, line: bytes) -> None:
    # As it stands, and as JSON means it: what is before a secret may be a line's end there.
    for text in (line, _ESCAPE.sub(b" ", line.replace(rb"\/", b"/"))):
        for kind, form in _SECRETS.items():
            if found := form.search(text):
                shown = found[0][:4].decode(errors="replace")
                raise ValueError(
                    f"{place}: {shown!r}... looks like {kind}; take it out, and revoke it if others may have read it."
                )


def check_config(folder: Path) -> LrcSSMConfig:
    config = read_config(folder)
    if read_json(folder / CONFIG_NAME).get("auto_map") != config.auto_map:
        raise ValueError("config.json does not lead to the code beside it; save the model again (`save_pretrained`).")
    return config


def check_code(folder: Path) -> list[Path]:
    """The package's files of which the folder has no copy."""
    missing = [source for name, source in _CODE.items() if not (folder / name).exists()]
    for name in _CODE.keys() - {source.name for source in missing}:
        if not filecmp.cmp(folder / name, _CODE[name], shallow=False):
            raise ValueError(
                f"{name} is not that of the installed lrcssm_hf; save the model again (`save_pretrained`)."
            )
    return missing


def check_model(folder: Path, config: LrcSSMConfig) -> None:
    """It loads with every weight finite and in its place, and runs."""
    find_head(config)
    model_class = getattr(lrcssm_hf, config.architectures[0])
    try:
        model, loading = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # Torch, safetensors and transformers each have their own.
        raise ValueError(f"The weights do not load into {model_class.__name__}: {error}") from error
    for trouble in ("missing_keys", "unexpected_keys"):
        if loading[trouble]:
            names = ", ".join(sorted(loading[trouble]))
            raise ValueError(f"The weights do not fit {model_class.__name__}: {trouble} {names}.")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"The weights hold NaN or infinite values, in {name}.")
    with torch.no_grad():
        if config.num_channels is None:
            outputs = model(input_ids=torch.arange(8).unsqueeze(0) % config.vocab_size)
        else:
            outputs = model(input_values=torch.zeros(1, 8, config.num_channels))
        if not outputs[0].isfinite().all():
            raise ValueError(f"{model_class.__name__} answers with NaN or infinite values.")
        if model.can_generate():
            model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=4, do_sample=False)


def check_tokenizer(folder: Path, config: LrcSSMConfig) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = tokenizer("def mean(values):").input_ids
    except Exception as error:
        raise ValueError(f"The tokenizer does not load: {error}") from error
    if not ids:
        raise ValueError("The tokenizer makes no tokens of a text.")
    check_vocabulary(tokenizer, config.vocab_size)


def check_card(path: Path, repo_id: str, config: LrcSSMConfig, names: set[str]) -> None:
    """The card, which may lead to these files beside it."""
    if not path.is_file():
        raise ValueError("README.md, the model card, is missing; `python scripts/make_card.py` writes it.")
    try:
        card = ModelCard.load(path)
    except Exception as error:
        raise ValueError(f"README.md: its metadata cannot be read: {error}") from error
    expected = {"library_name": "transformers", "pipeline_tag": pipeline_tag(config)}
    for field, value in expected.items():
        if getattr(card.data, field) != value:
            raise ValueError(f"README.md: `{field}` must be {value!r}, got {getattr(card.data, field)!r}.")
    for field in ("license", "tags"):
        if not getattr(card.data, field):
            raise ValueError(f"README.md: `{field}` is missing from the metadata at its top.")
    for field in ("datasets", "base_model"):
        value = getattr(card.data, field) or []
        for name in [value] if isinstance(value, str) else value:
            try:
                validate_repo_id(name)
            except ValueError as error:
                raise ValueError(f"README.md: `{field}` must be names on the Hub, got {name!r}.") from error
    if not card.text.strip():
        raise ValueError("README.md: there is no text below the metadata.")
    if f'"{repo_id}"' not in card.text:
        raise ValueError(
            f"README.md: it does not say how to load {repo_id!r}; `python scripts/make_card.py` writes it anew."
        )
    prose = _CODE_BLOCK.sub("", card.text)
    # An escaped sign is no markup, and none of a file's name.
    prose = _CODE_SPAN.sub("", re.sub(r"\\[^\w\s]", "\N{REPLACEMENT CHARACTER}", prose))
    if placeholder := _PLACEHOLDER.search(prose):
        raise ValueError(f"README.md: {placeholder[0]!r} is a placeholder; fill it in.")
    attributes = (attribute for tag in _TAG.finditer(prose) for attribute in _ATTRIBUTE.finditer(tag[0]))
    for link in itertools.chain(_LINK.finditer(prose), attributes):
        target = html.unescape(link[link.lastindex].strip("<>\"'")).strip()
        name = unquote(re.split("[?#]", target)[0]).removeprefix("./")
        if not _WEB.match(target) and name not in names:
            raise ValueError(f"README.md: links to {target}, which is not in the folder.")


# --- Upload ---------------------------------------------------------------------------------------------------------


def changes(files: list[Path], remote: list[RepoSibling]) -> dict[str, str]:
    """What happens to each file's name, for those that do not stay the same."""
    there = {file.rfilename: file for file in remote if file.rfilename not in _KEPT}
    found = {}
    for path in files:
        file = there.pop(path.name, None)
        if file is None:
            found[path.name] = "new"
        elif (_sha256(path) != file.lfs.sha256) if file.lfs else (git_hash(path.read_bytes()) != file.blob_id):
            found[path.name] = "changed"
    return found | dict.fromkeys(there, "deleted")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def publish(folder: Path, repo_id: str, private: bool, ask: bool) -> str | None:
    """Returns the commit that holds the folder, or None where the upload was not agreed to.

    Raises:
        ValueError: the folder or the repository cannot be used; nothing was changed.
        Exception: huggingface_hub gave up, or what arrived is not what was sent.
    """
    # The folder may change while it is checked, and while the question waits for an answer.
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        try:
            for path in check_names(folder):
                shutil.copyfile(path, copy / path.name, follow_symlinks=False)
            files = check(copy, repo_id)
        except (ValueError, OSError) as error:
            raise ValueError(str(error).replace(str(copy), str(folder))) from error
        return upload(files, repo_id, f"Upload {folder.resolve().name}", private, ask)


def upload(files: list[Path], repo_id: str, message: str, private: bool, ask: bool) -> str | None:
    api = HfApi()
    try:
        info = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        info = None
    if info is not None and private and not info.private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or leave out --private.")
    todo = changes(files, info.siblings if info else [])
    sizes = {path.name: path.stat().st_size for path in files}
    for name in sorted(sizes.keys() | todo.keys()):
        print(f"{todo.get(name, 'same'):8} {sizes.get(name, 0):14,} bytes  {name}")
    if not todo:
        print(f"{repo_id} already holds this folder.")
        commit = info.sha
    else:
        if ask and input(f"Upload to {api.endpoint}/{repo_id}? [y/N] ").strip().lower() not in ("y", "yes"):
            return None
        if info is None:
            api.create_repo(repo_id, private=private)
        deletions = [CommitOperationDelete(name) for name, change in todo.items() if change == "deleted"]
        additions = [CommitOperationAdd(path.name, path) for path in files if path.name in todo]
        # One commit, unlike `upload_folder`, which may cut a large folder into several; and only on what was shown.
        commit = api.create_commit(
            repo_id,
            [*deletions, *additions],
            commit_message=message,
            parent_commit=info.sha if info else None,
        ).oid
    verify(api, files, repo_id, commit)
    return commit


def verify(api: HfApi, files: list[Path], repo_id: str, commit: str) -> None:
    """Downloads the commit and compares it with the files.

    Raises:
        RuntimeError: they differ.
    """
    with tempfile.TemporaryDirectory() as temporary:
        downloaded = Path(api.snapshot_download(repo_id, revision=commit, local_dir=temporary))
        arrived = [path for path in downloaded.iterdir() if path.is_file() and path.name not in _KEPT]
        sent, received = ({(path.name, _sha256(path)) for path in side} for side in (files, arrived))
    if differing := {name for name, _ in sent ^ received}:
        raise RuntimeError(f"{repo_id} at {commit} differs from the folder in {', '.join(sorted(differing))}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="A model folder, with its card (make_card.py writes it).")
    parser.add_argument("repo_id", help="user/name or organization/name.")
    parser.add_argument("--yes", action="store_true", help="Do not ask before uploading.")
    parser.add_argument("--private", action="store_true", help="Make the repository private where it is made now.")
    args = parser.parse_args(arguments)
    if not args.yes and not sys.stdin.isatty():
        parser.error("there is nobody to ask; pass --yes to upload.")
    try:
        validate_repo_id(args.repo_id)
        commit = publish(args.folder, args.repo_id, args.private, ask=not args.yes)
    except ValueError as refused:
        parser.exit(2, f"error: {refused}\n")
    except Exception as failure:
        parser.exit(1, f"error: {failure}\nThe same command again uploads what is missing, if anything is.\n")
    if commit is None:
        parser.exit(1, "Nothing was uploaded.\n")
    print(f"{HfApi().endpoint}/{args.repo_id} holds the folder, as commit {commit}.")


if __name__ == "__main__":
    main()
