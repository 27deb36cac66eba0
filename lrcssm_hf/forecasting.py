# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Forecasts from the hidden states of a series.

Shapes: B batch, T steps, C channels, N tokens, P steps ahead, Q quantiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .host import CACHE
from .series import in_full, last_observed, observed_values, require_features, require_finite, series_statistics
from .steps import LrcSSMSteps, take


class KnownSeries(NamedTuple):
    """What forecasts are made from, and the loss has targets in.

    Attributes:
        values, observed: (B, T, C), as `observed_values` returns them.
        steps: of the mask.
        statistics: mean and standard deviation, each (B, 1, C); None without scaling.
        learns_after: (B, 1), or 0: tokens that come after fewer real steps have no part in the loss.
    """

    values: Tensor
    observed: Tensor
    steps: LrcSSMSteps
    statistics: tuple[Tensor, Tensor] | None
    learns_after: Tensor | int


class ForecastingMixin:
    """`forecast`, and what `forward` needs for it, for a model with the trunk `model` and the head `score`."""

    def _known_series(
        self,
        input_values: Tensor,
        mask: Tensor | None,
        observed_mask: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        learns: bool,
    ) -> KnownSeries:
        """While the model `learns`, a series is scaled by the first half of its steps, so that all tokens after it can
        learn: their targets are no part of the statistics. Only that a channel which begins flat is not blown up, its
        deviation being at least a tenth of the whole series'."""
        values, observed = observed_values(input_values, mask, observed_mask)
        steps, learns_after = LrcSSMSteps.of(mask), 0
        if self.config.scaling is not None and statistics is None:
            statistics = series_statistics(values, observed)
            if learns:
                ends = steps.ends(1, values.shape[1], values.device)
                learns_after = (ends[:, -1:] + 1) // 2
                mean, deviation = series_statistics(values, observed & (ends <= learns_after).unsqueeze(-1))
                statistics = mean, torch.maximum(deviation, statistics[1] / 10)
        return KnownSeries(values, observed, steps, statistics, learns_after)

    def _forecasts(self, hidden_states: Tensor, series: KnownSeries, logits_to_keep: int) -> tuple[Tensor, Tensor]:
        """What follows each token, (B, N, P, C) or with quantiles (B, N, P, C, Q), and how many real steps came before,
        (B, N)."""
        values, observed, steps, statistics, _ = series
        config = self.config
        batch, length, channels = values.shape
        ends = steps.ends(config.patch_length, length, values.device).expand(batch, -1)
        hidden_states, ends = hidden_states[:, -logits_to_keep:], ends[:, -logits_to_keep:]
        if statistics is None:
            statistics = values.new_zeros(batch, 1, channels), values.new_ones(batch, 1, channels)
        mean, deviation = statistics
        latest = last_observed(steps.pack((values - mean).masked_fill(~observed, 0)), steps.pack(observed)) + mean
        start = take(latest, (ends - 1).clamp(min=0))
        change = in_full(self.score(hidden_states)).unflatten(-1, (config.prediction_length, channels, -1))
        forecasts = start[:, :, None, :, None] + change.to(start.device) * deviation[:, :, None, :, None]
        return forecasts if config.quantiles else forecasts.squeeze(-1), ends

    def _forecast_loss(
        self,
        forecasts: Tensor,
        ends: Tensor,
        series: KnownSeries,
        future_values: Tensor,
        future_observed_mask: Tensor | None,
    ) -> Tensor:
        """The mean error of the forecasts, whose targets lie in the series and, after it, in `future_values`."""
        values, observed, steps, _, learns_after = series
        batch, length, channels = values.shape
        ahead = self.config.prediction_length
        if future_values.shape != (batch, ahead, channels):
            expected = (batch, ahead, channels)
            raise ValueError(f"`future_values` must have shape {expected}, got {tuple(future_values.shape)}.")
        future_values, future_observed = observed_values(
            future_values, None, future_observed_mask, "future_observed_mask"
        )
        require_finite("future_values", future_values)
        dtype = torch.promote_types(values.dtype, future_values.dtype)
        values, future_values = values.to(dtype), future_values.to(dtype)

        # In packed order the future follows each row's last real step.
        lengths = ends.new_full((batch,), length) if steps.lengths is None else steps.lengths
        following = torch.arange(ahead, device=values.device)
        places = (lengths[:, None] + following)[..., None].expand_as(future_values)
        whole = F.pad(steps.pack(values), (0, 0, 0, ahead)).scatter(1, places, future_values)
        known = F.pad(steps.pack(observed), (0, 0, 0, ahead)).scatter(1, places, future_observed)
        index = (ends[..., None] + following).flatten(1)
        targets, known = (take(each, index).unflatten(1, (-1, ahead)) for each in (whole, known))
        # A padded token repeats the one before it, and does not count again.
        is_first = F.pad(ends[:, 1:] != ends[:, :-1], (1, 0), value=True) & (ends > 0)
        known = known & (is_first & (ends >= learns_after))[..., None, None]
        errors = _errors(forecasts, targets, self.config.quantiles)
        return errors.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def forecast(
        self,
        past_values: Tensor,
        horizon: int,
        attention_mask: Tensor | None = None,
        observed_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
        time_features: Tensor | None = None,
        static_real_features: Tensor | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a series, from a state of fixed size whatever its length.

        The first `config.prediction_length` values are forecast at once. For a longer horizon the model reads its own
        forecasts and goes on; of quantiles it reads the median, so that from there on they say nothing about how
        uncertain the values read were. Samples do.

        Args:
            past_values: (B, T, num_channels).
            horizon: number of steps to predict.
            attention_mask: (B, T), 0 for padding.
            observed_mask: (B, T, num_channels), 0 for missing values.
            time_deltas: (B, T), time elapsed at each step; the steps to come take 1.
            time_features: (B, T + horizon, num_time_features), those of the steps to come included.
            static_real_features: (B, num_static_real_features).
            num_samples: draw so many paths from the distribution that the quantiles describe. A path keeps to one level
                of it, for every channel its own, in all that is forecast at once.
            generator: the random numbers for them.

        Returns:
            (B, horizon, num_channels); with `config.quantiles` (B, horizon, num_channels, quantiles); with
            `num_samples` (B, num_samples, horizon, num_channels).

        Raises:
            ValueError: an argument does not fit the model, or the model is in training.
        """
        config = self.config
        ahead, patch_length, quantiles = config.prediction_length, config.patch_length, config.quantiles
        if ahead is None:
            raise ValueError("This model does not forecast: its `prediction_length` is not set.")
        if horizon < 1:
            raise ValueError(f"`horizon` must be at least 1, got {horizon}.")
        if self.training:
            raise ValueError("The model is in training mode; call `model.eval()` before `forecast`.")
        if horizon > ahead:
            reason = None
            if config.bidirectional:
                reason = "is `bidirectional`"
            elif ahead < patch_length:
                reason = f"reads patches of {patch_length} steps"
            elif num_samples is None and quantiles is not None and not quantiles[0] <= 0.5 <= quantiles[-1]:
                reason = f"forecasts the quantiles {quantiles}, of which no median follows to be read again"
            if reason is not None:
                raise ValueError(f"`horizon` can be {ahead} at most for this model, as it {reason}; got {horizon}.")
        if num_samples is not None and (num_samples < 1 or quantiles is None or len(quantiles) < 2):
            raise ValueError(
                f"`num_samples` must be at least 1, with a model of two `quantiles` or more; got {num_samples} and "
                f"{quantiles}."
            )
        if past_values.dim() != 3:
            raise ValueError(f"`past_values` must have shape (batch, steps, channels), got {tuple(past_values.shape)}.")
        batch, length = past_values.shape[:2]
        past_features, future_features = None, None
        if time_features is not None:
            require_features("time_features", time_features, (batch, length + horizon, config.num_time_features))
            past_features, future_features = time_features.split([length, horizon], dim=1)
        statistics = None
        if config.scaling is not None:
            mask = None if attention_mask is None else attention_mask.bool()
            statistics = series_statistics(*observed_values(past_values, mask, observed_mask))
        outputs = self(
            input_values=past_values,
            attention_mask=attention_mask,
            observed_mask=observed_mask,
            time_deltas=time_deltas,
            time_features=past_features,
            static_real_features=static_real_features,
            statistics=statistics,
            logits_to_keep=1,
            use_cache=horizon > ahead,
            return_dict=True,
        )
        # The past is read once; then every path goes on from a copy of the state.
        rows = torch.arange(batch, device=past_values.device).repeat_interleave(num_samples or 1)
        forecasts, cache = outputs.logits[rows, -1], getattr(outputs, CACHE)
        if horizon > ahead:
            cache.reorder_cache(rows)
        if statistics is not None:
            statistics = tuple(statistic[rows] for statistic in statistics)
        if static_real_features is not None:
            static_real_features = static_real_features[rows]
        # What is read again are whole patches.
        block = ahead if horizon <= ahead else ahead // patch_length * patch_length
        results = []
        for end in range(block, horizon + block, block):
            forecasts = values = forecasts[:, :block]
            if quantiles is not None:
                levels = forecasts.new_full((len(forecasts), 1, forecasts.shape[2]), 0.5)
                if num_samples is not None:
                    levels = torch.rand(levels.shape, generator=generator, device=levels.device)
                values = _interpolate(forecasts, quantiles, levels.expand(forecasts.shape[:-1]))
            results.append(forecasts if num_samples is None else values)
            if end < horizon:
                outputs = self(
                    input_values=values,
                    time_features=None if future_features is None else future_features[rows, end - block : end],
                    static_real_features=static_real_features,
                    statistics=statistics,
                    cache=cache,
                    logits_to_keep=1,
                    use_cache=True,
                    return_dict=True,
                )
                forecasts = outputs.logits[:, -1]
        forecasts = torch.cat(results, dim=1)[:, :horizon]
        return forecasts if num_samples is None else forecasts.unflatten(0, (batch, num_samples))


def _errors(forecasts: Tensor, targets: Tensor, quantiles: list[float] | None) -> Tensor:
    """Squared errors (B, N, P, C), or of quantiles (B, N, P, C, Q) twice the mean pinball loss, which at the median is
    the absolute error."""
    if quantiles is None:
        return (forecasts - targets).square()
    levels = torch.tensor(quantiles, dtype=forecasts.dtype, device=forecasts.device)
    difference = targets.unsqueeze(-1) - forecasts
    return 2 * torch.maximum(levels * difference, (levels - 1) * difference).mean(-1)


def _interpolate(quantiles: Tensor, levels: list[float], at: Tensor) -> Tensor:
    """Values at the levels `at` (...) of the distribution with the given quantiles (..., Q): linear between two of
    them, and beyond the outermost as steep as between the two next to it."""
    if len(levels) == 1:
        return quantiles[..., 0]
    known = torch.tensor(levels, dtype=quantiles.dtype, device=quantiles.device)
    quantiles = quantiles.sort(-1).values  # A model's may cross.
    right = torch.searchsorted(known, at.contiguous()).clamp(1, len(levels) - 1)
    low, high = (quantiles.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (right - 1, right))
    return torch.lerp(low, high, (at - known[right - 1]) / (known[right] - known[right - 1]))
