# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What a model and transformers have to agree on: the name of the cache, what `forward` is passed, tables of names.

transformers 5.24 renamed the argument and the field of outputs that hold a state, `past_key_values` (of Mamba,
`cache_params`), to `cache`. `CACHE` is the name that the installed release uses, found in its outputs and not by its
version; every name is taken.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils import TransformersKwargs


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)

# What transformers passes to any model: the keywords that it declares for every `forward`, what its `can_return_tuple`
# reads, and what tokenizers made for BERT return, which its pipelines pass on.
_HOST_KEYWORDS = frozenset(TransformersKwargs.__optional_keys__) | {"return_dict", "token_type_ids"}
# And to a language model's loss beside what the model itself knows.
LOSS_KEYWORDS = frozenset(inspect.signature(ForCausalLMLoss).parameters) - {"logits", "labels", "vocab_size", "kwargs"}


def rename_cache(arguments: dict[str, Any], name: str = "cache") -> dict[str, Any]:
    """Keyword arguments in which the cache, by whichever of its names it was passed, is called `name`.

    Raises:
        ValueError: it was passed by two names.
    """
    given = [each for each in CACHE_NAMES if each in arguments]
    passed = [each for each in given if arguments[each] is not None]
    if len(passed) > 1:
        raise ValueError(f"`{passed[0]}` and `{passed[1]}` are names of the same argument; pass `{CACHE}` only.")
    if not given:
        return arguments
    renamed = {key: value for key, value in arguments.items() if key not in given}
    return {**renamed, name: arguments[passed[0]] if passed else None}


def keywords(method: Callable) -> tuple[str, ...]:
    """The names of a method's arguments, in their order."""
    _, *parameters = inspect.signature(method).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD)


def takes_cache(method: Callable) -> Callable:
    """Decorates a method with an argument `cache`, to take it by all its names and show that of the installed
    transformers, which looks for it in signatures."""

    @functools.wraps(method)
    def renaming(self, *args, **kwargs):
        return method(self, *args, **rename_cache(kwargs))

    shown = inspect.signature(method)
    parameters = [each.replace(name=CACHE) if each.name == "cache" else each for each in shown.parameters.values()]
    renaming.__signature__ = shown.replace(parameters=parameters)
    return renaming


def refuses_unknown(more: Iterable[str] = ()) -> Callable:
    """Decorates a `forward` that passes `**kwargs` on: only its own arguments, `more`, and what transformers passes to
    any model are let through. What is None counts as not passed.

    Raises (when called):
        ValueError: another name was passed; the message has the one that was probably meant.
    """

    def decorate(forward: Callable) -> Callable:
        own = dict.fromkeys((*keywords(forward), *more, *CACHE_NAMES))
        known = own.keys() | _HOST_KEYWORDS

        @functools.wraps(forward)
        def refusing(self, *args, **kwargs):
            for name, value in kwargs.items():
                if name not in known and value is not None:
                    similar = [each for each in own if name in each and len(name) > 2]
                    similar = similar or difflib.get_close_matches(name, own)
                    remedy = f"did you mean `{similar[0]}`?" if similar else f"it takes {', '.join(own)}."
                    raise ValueError(f"{type(self).__name__} takes no argument `{name}`; {remedy}")
            return forward(self, *args, **kwargs)

        return refusing

    return decorate


def checkpoint_activations(model: PreTrainedModel, **options) -> None:
    """Recompute what blocks hold for their gradients; `options` are of `torch.utils.checkpoint`. The method's name has
    changed in transformers 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def register_names(model_type: str, names: dict[str, str]) -> None:
    """Enters classes into the tables of names by which transformers knows what a model of its own does: its Trainer
    shifts the labels of those in the table of causal language models only.

    Args:
        names: of the class by that of the table in `transformers.models.auto.modeling_auto`.
    """
    for table, name in names.items():
        getattr(modeling_auto, table)[model_type] = name
