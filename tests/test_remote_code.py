# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A saved model brings its code: it loads where this package is not, and where it is, the package is what loads it."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_relative_imports

import lrcssm_hf
from elsewhere import run_elsewhere
from lrcssm_hf import (
    LrcSSMConfig,
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
)
from tiny_models import make_model


PACKAGE = Path(lrcssm_hf.__file__).parent
SERIES = {"num_channels": 3, "num_labels": 3}
# What is saved, and the Auto classes that load it.
SAVED = {
    "language model": (LrcSSMForCausalLM, {}, ["AutoModelForCausalLM"]),
    "language model, paper's block": (LrcSSMForCausalLM, {"block_type": "paper"}, ["AutoModelForCausalLM"]),
    "language model, linear": (LrcSSMForCausalLM, {"state_dependence": "input"}, ["AutoModelForCausalLM"]),
    "hidden states": (LrcSSMModel, {}, ["AutoModel"]),
    "label of a text": (LrcSSMForSequenceClassification, {}, ["AutoModelForSequenceClassification"]),
    "label of a series": (LrcSSMForSequenceClassification, SERIES, ["AutoModelForSequenceClassification"]),
    "steps of a series": (
        LrcSSMForSequenceModeling,
        SERIES,
        ["AutoModelForTokenClassification", "AutoModelForTimeSeriesPrediction"],
    ),
}
CASES = [(name, auto_class) for name, (_, _, auto_classes) in SAVED.items() for auto_class in auto_classes]
# Folders of language models. Torch takes no letters beyond ASCII, without which the first two are the same.
NAMED = ["мой-модель", "наш-модель", "1.0 'a b'", "checkpoint"]
ELSEWHERE = [*CASES, *((name, "AutoModelForCausalLM") for name in NAMED)]


def inputs_of(config):
    if config.num_channels is None:
        return {"input_ids": torch.arange(2, 40).reshape(2, 19)}
    return {"input_values": torch.linspace(-1, 1, 2 * 19 * config.num_channels).reshape(2, 19, config.num_channels)}


def code_in(folder):
    """The names of the code files, which have to be the package's and all that they import from beside them."""
    names = sorted(path.name for path in folder.glob("*.py"))
    assert filecmp.cmpfiles(PACKAGE, folder, names, shallow=False) == (names, [], [])
    needed = {module for name in names for module in get_relative_imports(folder / name)}
    assert {f"{module}.py" for module in needed} <= set(names)
    return names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for name, (head, changes, _) in SAVED.items():
        make_model(head, **changes).save_pretrained(root / name)
    model = make_model()
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(2, 40).reshape(2, 19)]
    arguments = TrainingArguments(root / "run", max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    (root / "run" / "checkpoint-1").rename(root / "checkpoint")
    for name in NAMED[:-1]:
        shutil.copytree(root / "language model", root / name)
    return root


LOAD = """
import json, os, pathlib, sys, torch, transformers
from safetensors.torch import save_file

root, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
def load(name, auto_class):
    return getattr(transformers, auto_class).from_pretrained(root / name, trust_remote_code=True)

found = {}
# All are there before the first is used: another copy of the code must change nothing for it.
for (name, auto_class), model in [(case, load(*case)) for case in cases]:
    channels = model.config.num_channels
    if channels is None:
        inputs = {"input_ids": torch.arange(2, 40).reshape(2, 19)}
    else:
        inputs = {"input_values": torch.linspace(-1, 1, 2 * 19 * channels).reshape(2, 19, channels)}
    with torch.no_grad():
        found[f"{name} {auto_class}"] = model(**inputs)[0]
    if model.can_generate():
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        found[f"{name} generated"] = ids
save_file(found, "found.safetensors")

# A model that came by its code is saved with it, and gives its weights to another head.
model.save_pretrained("again")
tagger = transformers.AutoModelForTokenClassification.from_pretrained(root / "language model", trust_remote_code=True)
print(type(tagger).__name__, type(tagger).__module__.split(".")[0])
print(sorted({"lrcssm_hf", "numba", "triton"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def elsewhere(folders, tmp_path_factory):
    """What the models answer there, by name and Auto class, and the folder and the words that were left."""
    folder = tmp_path_factory.mktemp("elsewhere")
    result = run_elsewhere(LOAD, folders, json.dumps(ELSEWHERE), modules_cache=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(folder / "found.safetensors"), folder, result.stdout.splitlines()


@pytest.mark.parametrize(("name", "auto_class"), ELSEWHERE)
@torch.no_grad()
def test_a_folder_loads_without_the_package_and_answers_the_same(name, auto_class, folders, elsewhere):
    found, _, _ = elsewhere
    head = SAVED[name][0] if name in SAVED else LrcSSMForCausalLM
    model = head.from_pretrained(folders / name)
    inputs = inputs_of(model.config)
    assert torch.allclose(found[f"{name} {auto_class}"], model(**inputs)[0], atol=2e-5)
    if model.can_generate():
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(found[f"{name} generated"], ids)


def test_without_the_package_a_model_keeps_its_code_and_lends_its_weights(elsewhere):
    _, folder, words = elsewhere
    assert words == ["LrcSSMForSequenceModeling transformers_modules", "[]"]
    assert "modeling_lrcssm.py" in code_in(folder / "again")


@pytest.mark.parametrize("name", [*SAVED, "checkpoint"])
def test_every_folder_holds_the_packages_code(name, folders):
    assert {"modeling_lrcssm.py", "configuration_lrcssm.py", "recurrence_cpu.py"} <= set(code_in(folders / name))


def test_a_configuration_alone_brings_its_code(tmp_path):
    LrcSSMConfig().save_pretrained(tmp_path)
    script = "import sys, transformers\n"
    script += "print(transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).hidden_size)"
    result = run_elsewhere(script, tmp_path, modules_cache=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [str(LrcSSMConfig().hidden_size)]


def test_without_the_package_code_runs_only_where_it_is_allowed(folders, tmp_path):
    script = "import sys, transformers\ntransformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    result = run_elsewhere(script, folders / "language model", modules_cache=tmp_path)
    assert result.returncode != 0 and "trust_remote_code=True" in result.stderr
    assert not list(tmp_path.rglob("modeling_lrcssm.py"))


@pytest.fixture
def no_progress_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.usefixtures("no_progress_bars")
@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize(("name", "auto_class"), CASES)
def test_with_the_package_its_classes_are_used_without_a_word(
    name, auto_class, trust_remote_code, folders, monkeypatch, capfd
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("there was a question"))
    auto = getattr(transformers, auto_class)
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    model = auto.from_pretrained(folders / name, **options)
    assert type(model) is SAVED[name][0]
    assert type(AutoConfig.from_pretrained(folders / name, **options)) is LrcSSMConfig
    assert type(auto.from_config(model.config, **options)) is SAVED[name][0]
    assert capfd.readouterr() == ("", "")


def test_auto_classes_load_the_same_with_and_without_the_package():
    config = LrcSSMConfig()
    for auto_class, reference in config.auto_map.items():
        module, name = reference.split(".")
        assert hasattr(getattr(lrcssm_hf, module), name)
        if auto_class != "AutoConfig":
            assert getattr(transformers, auto_class)._model_mapping[LrcSSMConfig].__name__ == name


def test_a_copy_does_not_refer_to_where_it_came_from():
    """transformers notes the repository that a configuration was downloaded from."""
    config = LrcSSMConfig(auto_map={"AutoModel": "user/name--modeling_lrcssm.LrcSSMModel"})
    assert config.auto_map == LrcSSMConfig().auto_map
