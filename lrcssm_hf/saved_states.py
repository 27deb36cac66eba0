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
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .host import CACHE, takes_cache
from .recurrent_cache import require_cache, write_state


class SavedStatesMixin:
    """`save_state` and `load_state`, for models whose cache holds a convolution's past and a state per layer."""

    @torch.no_grad()
    @takes_cache
    def save_state(self, cache: Cache, path: str | os.PathLike) -> None:
        """Write a state to a safetensors file, which takes as many bytes whatever the length of what was read.

        Args:
            cache: as returned by a call with `use_cache=True` or by `generate`; of any batch size.
            path: the file, for instance `state.safetensors`; an older one is replaced.

        Raises:
            ValueError: the cache holds no state, or not one of this model, or numbers that are not finite.
        """
        require_cache(cache, self.config)
        if cache is None or not cache.has_previous_state():
            raise ValueError(f"`{CACHE}` holds no state yet; call the model with `use_cache=True` first.")
        tensors = {}
        for index, layer in enumerate(cache.layers):
            tensors[f"layers.{index}.conv_state"] = layer.conv_states[0].contiguous()
            tensors[f"layers.{index}.recurrent_state"] = layer.recurrent_states[0].contiguous()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"`{CACHE}` holds NaN or infinite values, from which nothing can be continued.")
        metadata = {"format": "pt", "model_fingerprint": self._fingerprint(), "state_digest": _digest(tensors)}
        path = Path(path)
        with tempfile.TemporaryDirectory(dir=path.parent) as partial:
            written = Path(partial) / path.name
            save_file(tensors, written, metadata=metadata)
            os.replace(written, path)

    def load_state(self, path: str | os.PathLike) -> DynamicCache:
        """Read what `save_state` wrote, as a cache for this model to continue from.

        Raises:
            ValueError: the file is missing or damaged, or was written by a model with other weights.
        """
        cache, tensors = DynamicCache(config=self.config), {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("model_fingerprint") != self._fingerprint():
                    raise ValueError(
                        f"The state in {str(path)!r} was written by another model, or by this one with other weights "
                        "or in another dtype, and means nothing to this one; read the text again."
                    )
                for index in range(self.config.num_hidden_layers):
                    for part in ("conv_state", "recurrent_state"):
                        tensors[f"layers.{index}.{part}"] = file.get_tensor(f"layers.{index}.{part}")
                if len(file.keys()) != len(tensors) or metadata.get("state_digest") != _digest(tensors):
                    raise OSError("its tensors are not those that were written")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(path)!r} is not a whole file of `save_state`: {error}") from error
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{str(path)!r}: {name} must be of a floating type, got {tensor.dtype}.")
            if not tensor.isfinite().all():
                raise ValueError(f"{str(path)!r}: {name} holds NaN or infinite values.")
        for index in range(self.config.num_hidden_layers):
            device = next(self.base_model.blocks()[index].parameters()).device
            state = (tensors[f"layers.{index}.{part}"].to(device) for part in ("conv_state", "recurrent_state"))
            write_state(cache, index, *state)
        require_cache(cache, self.config)
        return cache

    def _fingerprint(self) -> str:
        """A hash of everything that a state depends on: the trunk's weights and what is done with them."""
        fields = ("hidden_act", "norm_eps", "num_hidden_layers", "scaling", "jacobian_bound")
        settings = repr([getattr(self.config, field) for field in fields])
        if self.config.cell != "lrc":
            settings += self.config.cell
        return _digest(self.base_model.state_dict(), settings)


def _digest(tensors: dict[str, Tensor], text: str = "") -> str:
    """Of the text, and of the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name!r} is offloaded; load the model into memory to save and load states.")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A quantised tensor holds plain ones.
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        for part in [getattr(tensor, attribute) for attribute in inner] or [tensor]:
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
