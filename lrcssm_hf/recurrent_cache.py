# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""transformers' cache with the states of this model in it: checked, read, written, given to more rows.

A layer holds `conv_states[0]` (B, D, K - 1), the inputs of its convolution before the first step to come, and
`recurrent_states[0]` (B, D), the state of its neurons, or (B, n, D) for a cell of n states a neuron. Shapes: B rows of
the batch, D state_size, K conv_kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from .cells import REGISTERED
from .configuration_lrcssm import LrcSSMConfig
from .host import CACHE


def state_shapes(config: LrcSSMConfig, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the convolution's and the recurrent state of a layer; the paper's block has no convolution."""
    past = config.conv_kernel - 1 if config.block_type == "gated" else 0
    count = len(REGISTERED[config.cell].states)
    return (rows, config.state_size, past), (rows, *[count] * (count > 1), config.state_size)


def require_cache(cache: Cache | None, config: LrcSSMConfig, rows: int | None = None) -> None:
    """
    Args:
        rows: of the batch that is to go on from it; None for any number.

    Raises:
        ValueError: it is not a cache for this model, or holds the state of other rows or of another model.
    """
    problem = None if cache is None else _find_problem(cache, config, rows)
    if problem is not None:
        conv_shape, recurrent_shape = state_shapes(config, "rows" if rows is None else rows)
        raise ValueError(
            f"`{CACHE}` must be what this model returned for as many rows, or a new `DynamicCache(config=model.config)`"
            f", of {config.num_hidden_layers} layers with states of the shapes {conv_shape} and {recurrent_shape}; "
            f"got {problem}."
        )


def _find_problem(cache: Cache, config: LrcSSMConfig, rows: int | None) -> str | None:
    layers = getattr(cache, "layers", None)
    if not isinstance(cache, Cache) or layers is None:
        return f"an object of type {type(cache).__name__}"
    if len(layers) != config.num_hidden_layers:
        return f"one of {len(layers)} layers"
    wanted = None if rows is None else state_shapes(config, rows)
    for index, layer in enumerate(layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            return f"one whose layer {index} is of the type {type(layer).__name__}"
        if layer.record_past:
            return "one that is to take back what it has read, which a recurrent state cannot (`record_past`)"
        if layer.has_previous_state[0] != layers[0].has_previous_state[0]:
            return f"one whose layer {index} has read other steps than the first"
        if layer.has_previous_state[0]:
            shapes = tuple(layer.conv_states[0].shape), tuple(layer.recurrent_states[0].shape)
            wanted = state_shapes(config, shapes[1][0]) if wanted is None else wanted  # the first layer's rows
            if shapes != wanted:
                return f"the shapes {shapes[0]} and {shapes[1]} in layer {index}"
    return None


def read_state(cache: Cache, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's past and the recurrent state; None before the first step."""
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return None, None
    conv_state, recurrent_state = layer.conv_states[0], layer.recurrent_states[0]
    if torch.is_grad_enabled():
        # The cache overwrites its tensors in place; what the graph holds on to must not change under it.
        conv_state, recurrent_state = conv_state.clone(), recurrent_state.clone()
    return conv_state, recurrent_state


def write_state(cache: Cache, layer_idx: int, conv_state: Tensor | None, recurrent_state: Tensor | None) -> None:
    """Replaces what the layer holds.

    Raises:
        ValueError: the layer has no state to go on from.
    """
    if conv_state is None or recurrent_state is None:
        raise ValueError(f"Layer {layer_idx} keeps no state; pass `use_cache=False`, no `{CACHE}`, and whole series.")
    layer = cache.layers[layer_idx]
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        for states in (layer.conv_states, layer.recurrent_states):
            # What was made under `torch.inference_mode` may only be written to there.
            if states[0] is not None and states[0].is_inference():
                states[0] = states[0].clone()
    # Given as many steps as it keeps, the cache replaces its own; without a convolution these are none.
    cache.update_conv_state(conv_state, layer_idx)
    cache.update_recurrent_state(recurrent_state, layer_idx)


def repeat_rows(cache: Cache, config: LrcSSMConfig, repeats: int) -> DynamicCache:
    """A copy with every row `repeats` times, one after the other."""
    repeated = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        write_state(repeated, index, *(state.repeat_interleave(repeats, 0) for state in read_state(cache, index)))
    return repeated
