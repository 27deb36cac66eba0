# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Recurrent states in files, so that what was read once is continued another day."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, DynamicCache


class SavedStatesMixin:
    """`save_state` and `load_state`, for models whose cache holds a convolution's past and a state per layer."""

    @torch.no_grad()
    def save_state(self, past_key_values: Cache, path: str | os.PathLike) -> None:
        """Write a state to a safetensors file, which takes as many bytes whatever the length of what was read.

        Args:
            past_key_values: as returned by a call with `use_cache=True` or by `generate`; of any batch size.
            path: the file, for instance `state.safetensors`; an older one is replaced.

        Raises:
            ValueError: the cache holds no state, or not one of this model.
        """
        if not isinstance(past_key_values, Cache) or not past_key_values.has_previous_state():
            raise ValueError("`past_key_values` holds no state yet; call the model with `use_cache=True` first.")
        sizes = [layer.recurrent_states[0].shape[-1] for layer in past_key_values.layers]
        if sizes != [self.config.state_size] * self.config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` has states of {sizes} neurons, this model {self.config.num_hidden_layers} of "
                f"{self.config.state_size}; pass the cache that this model returned."
            )
        tensors = {}
        for index, layer in enumerate(past_key_values.layers):
            tensors[f"layers.{index}.conv_state"] = layer.conv_states[0].contiguous()
            tensors[f"layers.{index}.recurrent_state"] = layer.recurrent_states[0].contiguous()
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            written = Path(partial) / path.name
            save_file(tensors, written, metadata={"format": "pt", "model_fingerprint": self._fingerprint()})
            os.replace(written, path)

    def load_state(self, path: str | os.PathLike) -> DynamicCache:
        """Read what `save_state` wrote, as `past_key_values` for this model to continue from.

        Raises:
            ValueError: the file is missing or damaged, or was written by a model with other weights.
        """
        cache = DynamicCache(config=self.config)
        try:
            with safe_open(path, framework="pt") as file:
                fingerprint = (file.metadata() or {}).get("model_fingerprint")
                if fingerprint != self._fingerprint():
                    raise ValueError(
                        f"The state in {str(path)!r} was written by another model, or by this one with other weights "
                        "or in another dtype, and means nothing to this one; read the text again."
                    )
                for index in range(self.config.num_hidden_layers):
                    device = next(self.base_model.block(index).parameters()).device
                    cache.update_conv_state(file.get_tensor(f"layers.{index}.conv_state").to(device), index)
                    cache.update_recurrent_state(file.get_tensor(f"layers.{index}.recurrent_state").to(device), index)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(path)!r} is not a whole file of `save_state`: {error}") from error
        return cache

    def _fingerprint(self) -> str:
        """A hash of everything that a state depends on: the trunk's weights and what is done with them."""
        fields = ("hidden_act", "norm_eps", "num_hidden_layers", "scaling", "jacobian_bound")
        digest = hashlib.sha256(repr([getattr(self.config, field) for field in fields]).encode())
        for name, tensor in self.base_model.state_dict().items():
            if tensor.is_meta:
                raise ValueError(f"{name!r} is offloaded; load the model into memory to save and load states.")
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # A quantised tensor holds plain ones.
            inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
            for part in [getattr(tensor, attribute) for attribute in inner] or [tensor]:
                digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
