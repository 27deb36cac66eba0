# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What a model is given, tokens or series: checked once, and made into packed hidden states and `LrcSSMSteps`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.cache_utils import Cache

from .series import observed_values, require_features, require_finite, series_statistics
from .steps import LrcSSMSteps, as_mask, documents_of, may_look, require_times


class InputsMixin:
    """The part of `LrcSSMModel` between its arguments and its first block.

    Arguments of these methods are those of `LrcSSMModel.forward`, and what they raise is what that raises.
    """

    def _encode(
        self,
        name: str,
        values: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        *,
        observed_mask: Tensor | None,
        time_deltas: Tensor | None,
        time_features: Tensor | None,
        static_real_features: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        seq_idx: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, LrcSSMSteps]:
        """The hidden states that the first block reads, (B, N, H), and the steps in the order of the recurrences."""
        batch_size, length = values.shape[:2]
        mask = self._step_mask(attention_mask, batch_size, length, cache)
        if mask is not None and group is None and may_look(mask) and mask.all():
            # Nothing is padding. Ranks have to do the same, and would have to ask each other.
            mask = None
        of_series = {
            "observed_mask": observed_mask,
            "time_features": time_features,
            "static_real_features": static_real_features,
            "statistics": statistics,
        }
        for argument, value in of_series.items():
            if value is not None and name != "input_values":
                raise ValueError(f"`{argument}` goes with `input_values`, not with `{name}`; leave it out.")
        per_step = {"position_ids": position_ids, "time_deltas": time_deltas, "seq_idx": seq_idx}
        for argument, value in per_step.items():
            if value is not None and value.shape not in ((batch_size, length), (1, length)):
                raise ValueError(f"`{argument}` must have shape {(batch_size, length)}, got {tuple(value.shape)}.")
        if cu_seq_lens_q is not None:
            seq_idx = documents_of(cu_seq_lens_q, batch_size, length)
        reset = None if position_ids is None else (position_ids == 0).expand(batch_size, -1)
        seq_idx = None if seq_idx is None else seq_idx.expand(batch_size, -1)
        if time_deltas is not None:
            dtype = torch.promote_types(time_deltas.dtype, torch.float32)
            time_deltas = time_deltas.to(dtype).expand(batch_size, -1)
            require_times(time_deltas, mask)

        steps = LrcSSMSteps.of(mask, time_deltas, reset, seq_idx)._replace(group=group)
        if name == "input_values":
            continues = cache is not None and cache.has_previous_state()
            self._check_rows(steps, length, continues)
            values = self._prepare_series(values, mask, observed_mask, time_features, statistics, continues)
            tokens, steps = steps.patch(steps.pack(values), self.config.patch_length)
            return self._add_static(self.encoder(tokens.to(self.dtype)), static_real_features), steps
        return steps.pack(self._embed(name, values, mask)), steps

    def _check_spread(self, **asked: bool) -> None:
        """Refuses what sequences spread over ranks do not go with: arguments, by name, and fields."""
        config = self.config
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f"`{name}` does not go with `context_parallel_group`; leave it out, and tell documents apart by "
                    "`position_ids`."
                )
        fields = {"bidirectional": config.bidirectional, "patch_length": config.patch_length > 1}
        for name, is_set in (fields | {"scaling": config.scaling is not None}).items():
            if is_set:
                raise ValueError(
                    f"A model with `{name}` has to see whole sequences; leave out `context_parallel_group`, or make a "
                    f"model without `{name}`."
                )

    def _one_input(self, **inputs: Tensor | None) -> tuple[str, Tensor]:
        """Name and value of the one input that was given, its shape checked."""
        given = {name: value for name, value in inputs.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Pass exactly one of {', '.join(inputs)}; got {' and '.join(given) or 'none of them'}.")
        name, value = next(iter(given.items()))
        channels = self.config.num_channels
        if name == "input_ids" and channels is not None:
            raise ValueError(f"This model reads `input_values` of {channels} channels, not `input_ids`.")
        if name == "input_values" and channels is None:
            raise ValueError("This model reads `input_ids`; set `config.num_channels` for a model of series.")
        if name == "inputs_embeds" and self.config.patch_length > 1:
            raise ValueError(
                f"This model reads `input_values` in patches of {self.config.patch_length} steps (`patch_length`), not "
                "`inputs_embeds`."
            )
        width = {"input_ids": (), "inputs_embeds": (self.config.hidden_size,), "input_values": (channels,)}[name]
        if value.dim() != 2 + len(width) or value.shape[2:] != width or value.numel() == 0:
            shape = ", ".join(["batch", "steps", *map(str, width)])
            raise ValueError(f"`{name}` must have shape ({shape}) and not be empty, got {tuple(value.shape)}.")
        return name, value

    def _step_mask(
        self, attention_mask: Tensor | None, batch_size: int, length: int, cache: Cache | None
    ) -> Tensor | None:
        """The mask of this call's steps as bool (B, T)."""
        if attention_mask is None:
            return None
        shape = tuple(attention_mask.shape)
        continues = cache is not None and cache.has_previous_state()
        if len(shape) != 2 or shape[0] != batch_size or (shape[1] != length and not (continues and shape[1] > length)):
            raise ValueError(f"`attention_mask` must have shape {(batch_size, length)}, got {shape}.")
        return as_mask("attention_mask", attention_mask[:, -length:])

    def _embed(self, name: str, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H)."""
        if name == "input_ids":
            if may_look(values):
                low, high = (bound.item() for bound in values.aminmax())
                if low < 0 or high >= self.config.vocab_size:
                    raise ValueError(
                        f"`input_ids` must be in [0, {self.config.vocab_size}), got {low} to {high}; "
                        "is this the model's tokenizer?"
                    )
            return self.embed_tokens(values)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(-1), 0)
        require_finite(name, values)
        return values

    def _check_rows(self, steps: LrcSSMSteps, length: int, continues: bool) -> None:
        """What patches, statistics and forecasts ask of the rows of `input_values`."""
        config = self.config
        patch_length = config.patch_length
        ask_for_one = {
            "patch_length": patch_length > 1,
            "scaling": config.scaling is not None,
            "prediction_length": config.prediction_length is not None,
        }
        fields = [field for field, asks in ask_for_one.items() if asks]
        if steps.reset is not None and fields:
            raise ValueError(
                f"`{fields[0]}` ({getattr(config, fields[0])}) is for one series in a row: give each series a row, "
                "without `position_ids`, `seq_idx` and `cu_seq_lens_q`."
            )
        if not continues or patch_length == 1:
            return
        lengths = torch.tensor(length) if steps.lengths is None else steps.lengths
        if may_look(lengths) and (lengths % patch_length).any():
            raise ValueError(
                f"`input_values` has {lengths.tolist()} unmasked steps, which must be multiples of `patch_length` "
                f"({patch_length}) when the cache has read others before."
            )

    def _prepare_series(
        self,
        values: Tensor,
        mask: Tensor | None,
        observed_mask: Tensor | None,
        time_features: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        continues: bool,
    ) -> Tensor:
        """Scaled values with zeros for what is missing, and the time features: (B, T, num_channels + features)."""
        config = self.config
        values, observed = observed_values(values, mask, observed_mask)
        require_finite("input_values", values)
        shape = (values.shape[0], 1, values.shape[2])
        if statistics is not None:
            if config.scaling is None:
                raise ValueError("`statistics` are for a model with `scaling`; leave them out.")
            if len(statistics) != 2 or any(statistic.shape != shape for statistic in statistics):
                raise ValueError(
                    f"`statistics` must be a mean and a standard deviation of shape {shape} each, got shapes "
                    f"{[tuple(statistic.shape) for statistic in statistics]}."
                )
            mean, deviation = statistics
            if may_look(deviation) and not (mean.isfinite() & deviation.isfinite() & (deviation > 0)).all():
                raise ValueError(
                    "`statistics` must be finite, and deviations positive, as `series_statistics` returns them; got "
                    f"means {mean.flatten().tolist()} and deviations {deviation.flatten().tolist()}."
                )
        if config.scaling is not None:
            if statistics is None and continues:
                raise ValueError(
                    "`scaling` needs the mean and deviation of the whole series, and the cache has read other "
                    "values: pass `statistics`, as `series_statistics` returns them."
                )
            mean, deviation = series_statistics(values, observed) if statistics is None else statistics
            values = ((values - mean) / deviation).masked_fill(~observed, 0)
        expected = (*values.shape[:2], config.num_time_features)
        features = require_features("time_features", time_features, expected)
        if features is None:
            return values
        if mask is not None:
            features = features.masked_fill(~mask.unsqueeze(-1), 0)
        require_finite("time_features", features)
        return torch.cat([values, features.to(values.dtype)], dim=-1)

    def _add_static(self, hidden_states: Tensor, static_real_features: Tensor | None) -> Tensor:
        expected = (hidden_states.shape[0], self.config.num_static_real_features)
        features = require_features("static_real_features", static_real_features, expected)
        if features is None:
            return hidden_states
        require_finite("static_real_features", features)
        return hidden_states + self.static_encoder(features.to(hidden_states.dtype)).unsqueeze(1)
