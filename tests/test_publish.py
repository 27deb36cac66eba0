# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Publishing, with the real huggingface_hub against a Hub on loopback: what is refused, what arrives, what may fail."""

import functools
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import make_card
import publish
from elsewhere import run_elsewhere
from hub_server import CUT, Blob, HubServer
from lrcssm_hf import LrcSSMForCausalLM, LrcSSMForSequenceClassification
from test_card import train_folder
from tiny_models import make_model


ROOT = Path(__file__).resolve().parents[1]
REPO_ID = "user/a-small-model"


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = train_folder(tmp_path_factory.mktemp("run") / "model")
    make_card.main([str(folder), REPO_ID])
    return folder


@pytest.fixture
def folder(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    """The Hub that the script talks to in this process, without pauses before huggingface_hub tries again."""
    with HubServer() as server:
        monkeypatch.setattr(publish, "HfApi", functools.partial(HfApi, endpoint=server.url))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


def run(folder, *options):
    """The exit status of the script."""
    try:
        publish.main([str(folder), REPO_ID, "--yes", *options])
    except SystemExit as ended:
        return ended.code
    return 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub):
    files = hub.repositories[REPO_ID].head.files
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


# --- What is refused ------------------------------------------------------------------------------------------------


def edit_json(name, **fields):
    def edit(folder):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **fields}))

    return edit


def edit_card(pattern, replacement):
    def edit(folder):
        text, count = re.subn(pattern, replacement, (folder / "README.md").read_text(), flags=re.DOTALL)
        assert count
        (folder / "README.md").write_text(text)

    return edit


def edit_weights(change):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def link(name):
    def replace(folder):
        elsewhere = folder.with_name("elsewhere")
        elsewhere.write_text("x")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(elsewhere)

    return replace


def index_weights(index, *names):
    def replace(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in names:
            (folder / name).write_text("x")

    return replace


def edit_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["z"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


NORM = "model.norm.weight"
REFUSED = {
    "truncated weights": (cut_weights, "weights do not load"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights do not load"),
    "a weight is missing": (edit_weights(lambda weights: weights.pop(NORM)), f"missing_keys {NORM}"),
    "a weight too many": (edit_weights(lambda weights: weights.update(x=torch.ones(1))), "unexpected_keys x"),
    "not a number": (
        edit_weights(lambda weights: weights[NORM].fill_(torch.nan)),
        f"NaN or infinite.*in {NORM}",
    ),
    "weights of another size": (edit_json("config.json", state_size=24), "weights do not load"),
    "pickled weights": (pickle_weights, "pytorch_model.bin is a pickle"),
    "a configuration out of range": (edit_json("config.json", conv_kernel=0), "config.json does not load.*conv_kernel"),
    "a configuration of something else": (edit_json("config.json", model_type="mamba"), "'mamba', not 'lrcssm'"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json does not load"),
    "no architecture": (edit_json("config.json", architectures=None), "architectures"),
    "code that is not found": (edit_json("config.json", auto_map={}), "does not lead to the code"),
    "changed code": (
        lambda folder: (folder / "recurrence.py").write_text(""),
        "recurrence.py is not that",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "an unexpected file": (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt is not part of a model"),
    "shards of another model": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b""),
        "model-00001-of-00002.safetensors is not part",
    ),
    "a checkpoint": (lambda folder: (folder / "checkpoint-7").mkdir(), "checkpoint-7 is not part of a model"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md, the model card, is missing"),
    "no licence": (edit_card("license: .*?\n", ""), "`license` is missing"),
    "no tags": (edit_card("tags:.*model-index", "model-index"), "`tags` is missing"),
    "another library": (edit_card("library_name: transformers", "library_name: keras"), "`library_name` must be"),
    "another task": (edit_card("pipeline_tag: .*?\n", "pipeline_tag: fill-mask\n"), "`pipeline_tag` must be"),
    "a card without text": (edit_card("\n# .*", "\n"), "no text below"),
    "a card for another name": (edit_card(REPO_ID, "user/another"), f"how to load '{REPO_ID}'"),
    "a placeholder": (edit_card("## Limits.*## ", "## Limits\n\n[More Information Needed]\n\n## "), "placeholder"),
    "a picture that is not there": (lambda folder: (folder / "loss.png").unlink(), "links to loss.png"),
    "a link in a model's file's place": (link("LICENSE"), "LICENSE is a symbolic link"),
    "linked weights": (link("model.safetensors"), "model.safetensors is a symbolic link"),
    "a linked index": (link("model.safetensors.index.json"), "index.json is a symbolic link"),
    "a pipe": (lambda folder: os.mkfifo(folder / "LICENSE"), "LICENSE is not part of a model"),
    "a name of two lines": (lambda folder: (folder / "a\nb").write_text(""), r"'a\\nb' is not part of a model"),
    "a name that is no text": (
        lambda folder: (folder / os.fsdecode(b"\xff")).write_text(""),
        r"'\\udcff' is not part of a model",
    ),
    "a hidden file": (lambda folder: (folder / ".env").write_text(""), ".env is not part of a model"),
    "an index of something else": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
        "index.json cannot be read",
    ),
    "an index that is a list": (index_weights([]), "index.json must be an object"),
    "an index without names": (index_weights({"weight_map": {"x": None}}), "weight_map: x must be a string, got None"),
    "a key among the weights": (
        index_weights({"weight_map": {"x": "id_rsa"}}, "id_rsa"),
        "id_rsa is not part of a",
    ),
    "a list of settings": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "config.json does not load",
    ),
    "tokens with larger ids than the model's": (edit_tokenizer, "largest id is 999, the model's 256"),
    "data that others lack": (
        edit_card("tags:", "datasets: /home/me/texts\\ntags:"),
        "`datasets` must be names",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_before_anything_is_sent(case, folder, hub, capsys):
    spoil, message = REFUSED[case]
    spoil(folder)
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: .*{message}", error, flags=re.DOTALL), error
    assert hub.requests == []


def random_letters(count):
    return "".join(random.Random(count).choices(string.ascii_letters + string.digits, k=count))


# Put together here, or this file would look like one with secrets.
SECRETS = {
    "Hugging Face": "hf" + "_" + random_letters(34),
    "OpenAI": "sk" + "-" + random_letters(48),
    "OpenAI or Anthropic": "sk" + "-ant-api03-" + random_letters(40),
    "GitHub": "ghp" + "_" + random_letters(36),
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "GitLab": "glpat" + "-" + random_letters(20),
    "Google": "AIza" + random_letters(35),
    "Slack": "xoxb" + "-" + random_letters(24),
    "npm": "npm" + "_" + random_letters(36),
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + random_letters(60),
    "private key, PuTTY's": "PuTTY-User-" + "Key-File-3: ssh-ed25519",
    "password": "https://me:" + random_letters(12) + "@host.org/texts",
    "password, without a user": "https://:" + random_letters(12) + "@host.org/texts",
    "password, which is a token": "https://" + random_letters(12) + "@github.com/me/texts",
}
WRITTEN = ["README.md", "LICENSE", "training.json", "metrics.jsonl", "tokenizer.json", "config.json", "loss.png"]


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_gives_access_to_an_account_is_found_and_not_repeated(name, kind, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"\xff\n" + json.dumps({"command": f"train --token '{SECRETS[kind]}'"}).encode())
    with pytest.raises(ValueError, match=f"{name}, line 2: .* looks like .*{kind.split(',')[0]}") as refused:
        publish.check_secrets([path])
    assert SECRETS[kind] not in str(refused.value)


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("before", ["x \n", "x\t", "x\r\n", "é", "TOKEN_", "'", "x="])
def test_what_stands_before_a_secret_does_not_hide_it(before, kind, tmp_path):
    path = tmp_path / "training.json"
    for text in (json.dumps({"command": before + SECRETS[kind]}), before + SECRETS[kind]):
        for written in (text, text.replace("/", "\\/")):
            path.write_text(written)
            with pytest.raises(ValueError, match="looks like"):
                publish.check_secrets([path])


@pytest.mark.parametrize(
    "line",
    [
        "https://host.org/@me",
        "https://host.org:80/a?mail=me@host.org",
        "https://host.org?mail=me@host.org",
        "git+ssh://git@github.com/me/texts",
        "https:// @me",
        "mailto:me@host.org",
        "npm_config_registry_of_the_whole_organization",
        "the task-list-of-everything-there-is-to-do",
        r"C:\texts\names",
    ],
)
def test_what_only_looks_a_little_like_a_secret_is_published(line, tmp_path):
    for text in (line, json.dumps(line)):
        (tmp_path / "README.md").write_text(text)
        publish.check_secrets([tmp_path / "README.md"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_text_in_which_nothing_can_be_found_is_refused(encoding, tmp_path):
    (tmp_path / "LICENSE").write_text(f"Permission is granted {SECRETS['GitHub']}", encoding=encoding)
    with pytest.raises(ValueError, match="LICENSE, line 1: a NUL byte, as in UTF-16; convert it to UTF-8"):
        publish.check_secrets([tmp_path / "LICENSE"])


def test_a_secret_among_the_weights_metadata_is_found(folder, hub, capsys):
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt", "command": f"--token\n{SECRETS['Hugging Face']}"})
    assert run(folder) == 2
    assert "model.safetensors, metadata: 'hf_" in capsys.readouterr().err and hub.requests == []


def test_a_secret_is_never_sent(folder, hub, capsys):
    edit_json("training.json", command=f"train --hub_token {SECRETS['Hugging Face']}")(folder)
    assert run(folder) == 2
    assert "training.json, line 1: 'hf_" in capsys.readouterr().err and hub.requests == []


@pytest.mark.parametrize(
    "link",
    [
        "[a](file:///etc/hosts)",
        "[a](/etc/hosts)",
        "[a](../config.json)",
        "[a](<../a b.txt>)",
        "[a]( /etc/hosts 'a title')",
        "[a](notes.txt#there)",
        "[a](%2e%2e/config.json)",
        "[a](C:\\\\texts)",
        "[![a](loss.png)](/etc/hosts)",
        "![a](/home/me/loss.png)",
        "[a][1]\n\n[1]: /etc/hosts",
        "[a]\n\n> [a]: <file:///etc/hosts> 'a title'",
        "<file:///etc/hosts>",
        "file:///etc/hosts",
        '<img alt="a" src="/etc/hosts">',
        "<IMG SRC=notes.png>",
        '<img alt=">" src="/etc/hosts">',
        "<a title=\"a\" href='https://host.org'><img src=/etc/hosts></a>",
        "<a\nhref = '../config.json'>a</a>",
        '<a href="&#47;etc/hosts">a</a>',
        "`code` [a](/etc/hosts) `code`",
        "```\ncode\n```\n[a](/etc/hosts)",
        "`not code\n\n[a](/etc/hosts) `",
    ],
)
def test_a_link_to_what_is_not_published_is_refused(link, folder):
    with (folder / "README.md").open("a") as card:
        card.write(f"\n\n{link}\n")
    config, names = publish.check_config(folder), {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="README.md: links to .*, which is not in the folder"):
        publish.check_card(folder / "README.md", REPO_ID, config, names)


def test_what_is_published_and_what_is_on_the_web_may_be_linked(folder):
    links = ["[a](https://host.org/a_(b))", "[a](#limits)", "[a](./loss.png 'title')", "<img src='loss.png'>", "[1]"]
    links += ["<https://host.org>", "<me@host.org>", "`[a](/etc/hosts)`", "``a ` [a](/etc/hosts)``", "a[i] (b)"]
    links += ["~~~~python\nx[0](y)\n~~~\n<img src=x>\n~~~~", r"\[a\](/etc/hosts)", "[a](config.json#L3)"]
    links += [
        "[a](recurrence.py)",
        "[1]: <training.json> 'title'",
        "1 < 2, src=/etc/hosts",
        "```\n[a](/etc/hosts) {{ x }} TODO",
    ]
    with (folder / "README.md").open("a") as card:
        card.write("\n\n" + "\n\n".join(links))
    names = {path.name for path in folder.iterdir()}
    publish.check_card(folder / "README.md", REPO_ID, publish.check_config(folder), names)


@pytest.mark.parametrize("repo_id", ["no-namespace/", "a/b/c", "user/na me"])
def test_a_name_that_the_hub_would_not_take_is_refused(repo_id, folder, hub, capsys):
    with pytest.raises(SystemExit) as ended:
        publish.main([str(folder), repo_id, "--yes"])
    assert ended.value.code == 2 and repo_id in capsys.readouterr().err
    assert hub.requests == []


def test_a_folder_that_is_not_there_and_nobody_to_ask(folder, tmp_path, capsys):
    assert run(tmp_path / "nothing") == 2
    with pytest.raises(SystemExit) as ended:
        publish.main([str(folder), REPO_ID])
    assert ended.value.code == 2 and "--yes" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [False, True])
def test_the_other_heads_pass_the_checks(shards, tmp_path):
    model = make_model(LrcSSMForSequenceClassification, num_channels=3)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "5GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > shards
    data = ModelCardData(library_name="transformers", license="mit", tags=["a"], pipeline_tag="tabular-classification")
    ModelCard(f'---\n{data.to_yaml()}\n---\n"{REPO_ID}"').save(tmp_path / "README.md")
    assert {path.name for path in publish.check(tmp_path, REPO_ID)} == {path.name for path in tmp_path.iterdir()}


# --- What arrives ---------------------------------------------------------------------------------------------------


def test_the_folder_arrives_in_one_commit(folder, hub, capsys):
    assert run(folder) == 0
    assert published(hub) == contents(folder)
    commits = hub.repositories[REPO_ID].commits
    assert len(commits) == 2, "one commit beside the first, which a new repository has"
    assert not hub.repositories[REPO_ID].private
    output = capsys.readouterr().out
    assert f"commit {commits[1].oid}" in output
    for path in folder.iterdir():
        assert re.search(rf"^new +{path.stat().st_size:,} bytes  {re.escape(path.name)}$", output, flags=re.MULTILINE)
    # It was downloaded for comparison, every file of it.
    for path in folder.iterdir():
        assert f"GET /{REPO_ID}/resolve/{commits[1].oid}/{path.name}" in hub.requests


def test_what_arrives_is_what_was_checked(folder, hub, monkeypatch, tmp_path):
    """Also where the files are exchanged while the question waits for its answer."""
    before = contents(folder)
    (tmp_path / "key").write_text("a key")

    def answer(question):
        for name in ("training.json", "model.safetensors"):
            (folder / name).unlink()
            (folder / name).symlink_to(tmp_path / "key")
        return "y"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    publish.main([str(folder), REPO_ID])
    assert published(hub) == before


def test_a_link_that_appears_after_the_names_were_seen_is_refused(folder, hub, monkeypatch, capsys):
    copyfile = shutil.copyfile

    def copy_late(source, target, **options):
        if source.name == "training.json":
            link(source.name)(folder)
        return copyfile(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copy_late)
    assert run(folder) == 2
    assert "training.json is a symbolic link" in capsys.readouterr().err and hub.requests == []


def test_a_folder_may_have_any_name(folder, hub):
    named = folder.rename(folder.with_name("мой модель, v1.0 {{x}}"))
    make_card.main([str(named), REPO_ID])
    assert run(named) == 0
    assert published(hub) == contents(named)


def test_code_that_is_not_beside_the_weights_comes_from_the_package(folder, hub):
    whole = contents(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    assert run(folder) == 0
    assert published(hub) == whole


def test_the_repository_becomes_the_folder(folder, hub, capsys):
    assert run(folder) == 0
    repository = hub.repositories[REPO_ID]
    stale = {**repository.head.files, "pytorch_model.bin": Blob(b"old", True), "old/notes.txt": Blob(b"old", False)}
    repository.add("by hand", stale)
    card = ModelCard.load(folder / "README.md")
    card.text += "\nOne more line.\n"
    card.save(folder / "README.md")
    capsys.readouterr()
    assert run(folder) == 0
    assert published(hub) == contents(folder)
    assert ".gitattributes" in repository.head.files
    words = {line.split()[-1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if " bytes  " in line}
    expected = dict.fromkeys(contents(folder), "same")
    assert words == expected | {"README.md": "changed", "pytorch_model.bin": "deleted", "old/notes.txt": "deleted"}
    assert len(repository.commits) == 4


def test_nothing_to_upload_makes_no_commit(folder, hub, capsys):
    assert run(folder) == 0
    assert run(folder) == 0
    assert len(hub.repositories[REPO_ID].commits) == 2
    assert "already holds this folder" in capsys.readouterr().out


def test_private_repositories(folder, hub, capsys):
    assert run(folder, "--private") == 0
    assert hub.repositories[REPO_ID].private
    hub.repositories[REPO_ID].private = False
    assert run(folder, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "commits"), [("y", 2), ("", 0), ("no", 0)])
def test_it_asks_before_it_uploads(answer, commits, folder, hub, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    if commits:
        publish.main([str(folder), REPO_ID])
        assert len(hub.repositories[REPO_ID].commits) == commits
    else:
        with pytest.raises(SystemExit) as ended:
            publish.main([str(folder), REPO_ID])
        assert ended.value.code == 1 and not hub.repositories


# --- What may fail --------------------------------------------------------------------------------------------------


def test_a_repository_that_cannot_be_made_gets_nothing(folder, hub, capsys):
    hub.fail("POST /api/repos/create", 403)
    assert run(folder) == 1
    assert "403" in capsys.readouterr().err and not hub.repositories and not hub.uploads


@pytest.mark.parametrize(
    "request_",
    ["POST .*/preupload/", "POST .*/objects/batch", "PUT /storage", "POST .*/commit/"],
)
@pytest.mark.parametrize("how", [500, 403, CUT])
def test_a_broken_upload_commits_nothing_and_can_be_repeated(request_, how, folder, hub, capsys):
    HfApi(endpoint=hub.url).create_repo(REPO_ID)
    before = hub.repositories[REPO_ID].head
    hub.fail(request_, how, times=99)
    status = run(folder)
    if request_ == "POST .*/commit/" and how == CUT:
        # The Hub had committed before the connection ended. Only a repetition can know.
        assert published(hub) == contents(folder)
    else:
        assert hub.repositories[REPO_ID].head is before
    assert status == 1
    error = capsys.readouterr().err
    assert re.search(r"error: \S", error) and "The same command again uploads what is missing" in error
    hub.failures.clear()
    assert run(folder) == 0
    assert published(hub) == contents(folder)
    assert len(hub.repositories[REPO_ID].commits) == 2


@pytest.mark.parametrize("request_", ["POST .*/preupload/", "POST .*/objects/batch", "PUT /storage"])
@pytest.mark.parametrize("how", [503, CUT])
def test_a_passing_failure_is_waited_out(request_, how, folder, hub):
    hub.fail(request_, how)
    assert run(folder) == 0
    assert published(hub) == contents(folder)
    assert len(hub.repositories[REPO_ID].commits) == 2


def test_an_interrupted_download_goes_on_where_it_ended(folder, hub, monkeypatch):
    # What comes in smaller pieces than this is not kept.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.fail(r"GET /.*/model\.safetensors", CUT)
    assert run(folder) == 0
    first, second = (request for request in hub.requests if re.match(r"GET .*/model\.safetensors", request))
    half = (folder / "model.safetensors").stat().st_size // 2
    assert second == f"{first} bytes={half // 1024 * 1024}-"


def test_what_arrived_changed_is_noticed(folder, hub, capsys):
    weights = folder / "model.safetensors"
    oid = Blob(weights.read_bytes(), is_large=True).oid
    # The Hub says that it has this file already, and what it has is something else.
    hub.uploads[oid] = weights.read_bytes()[:-1] + b"x"
    assert run(folder) == 1
    assert "differs from the folder in model.safetensors" in capsys.readouterr().err


def test_a_branch_that_moved_in_the_meantime_is_left_alone(folder, hub, monkeypatch, capsys):
    assert run(folder) == 0
    repository = hub.repositories[REPO_ID]
    edit_card("## Limits", "## Known limits")(folder)
    create_commit = HfApi.create_commit

    def meanwhile(*arguments, **options):
        repository.add("by somebody else", repository.head.files)
        return create_commit(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    assert run(folder) == 1
    assert repository.head.message == "by somebody else"
    assert "error: " in capsys.readouterr().err


def test_without_the_right_token_nothing_is_made(folder, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_another_token")
    assert run(folder) == 1
    assert "401" in capsys.readouterr().err and not hub.repositories


# --- As its users run it --------------------------------------------------------------------------------------------

PUSH = """
import sys
from lrcssm_hf import LrcSSMForCausalLM

LrcSSMForCausalLM.from_pretrained(sys.argv[1]).push_to_hub("user/pushed")
"""
PULL = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        found[name] = model(torch.arange(2, 40).reshape(2, 19)).logits
    print(type(model).__module__)
save_file(found, "found.safetensors")
print(AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)("def").input_ids)
"""


def hub_variables(hub, cache):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def test_from_push_and_publish_to_from_pretrained_elsewhere(folder, tmp_path):
    """Both ways up, and down again on a machine without this package, through nothing but HTTP."""
    with HubServer() as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **hub_variables(hub, tmp_path / "here")}
        script = [sys.executable, ROOT / "scripts" / "publish.py", folder, REPO_ID, "--yes"]
        for command in ([sys.executable, "-c", PUSH, folder], script):
            result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stderr[-3000:]
        assert published(hub) == contents(folder)
        with torch.no_grad():
            expected = LrcSSMForCausalLM.from_pretrained(folder)(torch.arange(2, 40).reshape(2, 19)).logits
        names = ["user/pushed", REPO_ID]
        result = run_elsewhere(PULL, *names, modules_cache=tmp_path, **hub_variables(hub, tmp_path / "there"))
        assert result.returncode == 0, result.stderr[-3000:]
        *modules, ids = result.stdout.splitlines()
        assert ids == str(AutoTokenizer.from_pretrained(folder)("def").input_ids)
        found = load_file(tmp_path / "found.safetensors")
        for name, module in zip(names, modules, strict=True):
            assert module.startswith("transformers_modules.user.") and hub.repositories[name].head.oid in module
            assert torch.allclose(found[name], expected, atol=2e-5)
