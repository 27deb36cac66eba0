# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What transformers' `generate` has to know of a model whose cache is a state: it has no length and cannot be rolled
back."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin, GenerationMode

from .host import CACHE, rename_cache, takes_cache
from .recurrent_cache import repeat_rows, require_cache


class RecurrentGenerationMixin(GenerationMixin):
    """`generate` for models whose cache holds a state per layer."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        return super().generate(*args, **rename_cache(kwargs, CACHE))

    def _get_deprecated_gen_repo(self, generation_mode, *args, **kwargs):
        # The first of transformers' hooks that knows the mode; later ones would send the user to remote code.
        if generation_mode in (GenerationMode.ASSISTED_GENERATION, GenerationMode.CONTRASTIVE_SEARCH):
            raise ValueError(
                f"{generation_mode.value.replace('_', ' ')} takes back tokens that were read, and a recurrent state "
                "cannot be rolled back; use greedy decoding, sampling or beam search."
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Always raises a `ValueError`; so do `generate_batch` and `cache_implementation="paged"`, which start here."""
        raise ValueError(
            "Continuous batching pages keys and values, and a recurrent model has none; pad the prompts, on either "
            "side, and call `generate` on the batch."
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # `generate` asks the cache for its length, to cut known tokens off the prompt. A recurrent state has no length:
        # with a cache, the prompt is the new tokens. The cache takes another way to `prepare_inputs_for_generation`.
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "`prefill_chunk_size` is not supported: memory is linear in the prompt; to read it in pieces, call the "
                f"model on each with `{CACHE}`, and `generate` on the last."
            )
        cache = model_kwargs.get(CACHE)
        require_cache(cache, self.config)
        if cache is not None and cache.has_previous_state():
            if not model_kwargs.get("use_cache", True):
                raise ValueError(f"`use_cache=False` would read the prompt again after `{CACHE}` has; leave it out.")
            known, rows = cache.layers[0].recurrent_states[0].shape[0], input_ids.shape[0]
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            require_cache(cache, self.config, rows // copies if known > 1 else 1)
            if known < rows:
                cache = repeat_rows(cache, self.config, rows // known)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != CACHE}
        return super()._prefill(
            input_ids, generation_config, {**model_kwargs, "_recurrent_cache": cache}, *args, **kwargs
        )

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        _recurrent_cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As in transformers, except that a cache given to `generate` goes with the new tokens only: what it has read
        is not to be passed again."""
        # Generated tokens are never padding, and without a mask they need no packing.
        if use_cache and not is_first_iteration:
            attention_mask = None
            # They belong to the last document of the prompt.
            kwargs.pop("seq_idx", None)
            kwargs.pop("cu_seq_lens_q", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        cache = _recurrent_cache if cache is None else cache
        if cache is not None and cache.has_previous_state():
            # Positions counted from the start of the prompt would start a new document.
            model_inputs.pop("position_ids", None)
        model_inputs["cache"] = cache
        return model_inputs
