# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Models of series: missing values, patches, both directions, shared blocks, covariates, forecasts."""

import pytest
import torch

from lrcssm_hf import (
    LrcSSMForCausalLM,
    LrcSSMForSequenceClassification,
    LrcSSMForSequenceModeling,
    LrcSSMModel,
    series_statistics,
)
from lrcssm_hf.host import CACHE
from lrcssm_hf.steps import LrcSSMSteps
from tiny_models import make_config, make_model


CHANNELS = 3


def series_model(head=LrcSSMForSequenceClassification, **changes):
    return make_model(head, num_channels=CHANNELS, num_labels=2, **changes)


def forecaster(**changes):
    return series_model(LrcSSMForSequenceModeling, **{"prediction_length": 4, **changes})


def random_series(rows=3, steps=17, seed=0):
    return torch.randn(rows, steps, CHANNELS, generator=torch.Generator().manual_seed(seed))


def padded(series, lengths, side):
    """The first so many steps of every row, with NaN for padding on that side, and the mask."""
    values, mask = torch.full_like(series, float("nan")), torch.zeros(series.shape[:2], dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(series.shape[1] - length, None) if side == "left" else slice(0, length)
        values[row, place], mask[row, place] = series[row, :length], 1
    return values, mask


VARIANTS = {
    "attention": {"pooling": "attention"},
    "scaling": {"scaling": "std"},
    "patches": {"patch_length": 4},
    "patches and attention": {"patch_length": 4, "pooling": "attention"},
    "both directions": {"bidirectional": True},
    "one block": {"num_hidden_groups": 1},
    "everything": {
        "patch_length": 3,
        "bidirectional": True,
        "num_hidden_groups": 1,
        "scaling": "std",
        "pooling": "last",
    },
    "the paper's block": {"block_type": "paper", "patch_length": 4, "bidirectional": True, "pooling": "attention"},
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_missing_values_leave_no_trace(variant, side):
    model = series_model(**VARIANTS[variant])
    series = random_series()
    lengths = (17, 5, 1)
    values, mask = padded(series, lengths, side)
    missing = torch.zeros_like(values, dtype=torch.bool)
    missing[0, 5:8, 1] = True
    values = values.masked_fill(missing, float("nan"))
    logits = model(input_values=values, attention_mask=mask, observed_mask=~missing).logits
    for row, length in enumerate(lengths):
        alone = series[row : row + 1, :length].clone()
        alone[missing[row : row + 1, :length]] = 1e30
        expected = model(input_values=alone, observed_mask=~missing[row : row + 1, :length]).logits
        assert torch.allclose(logits[row : row + 1], expected, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    model = series_model(**VARIANTS[variant])
    values, mask = padded(random_series(), (17, 5, 1), "right")
    model(input_values=values, attention_mask=mask, labels=torch.tensor([0, 1, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@torch.no_grad()
def test_a_patch_is_its_steps_side_by_side():
    """17 steps in patches of 4: the first patch has one step, and lasts a quarter of the others."""
    patched, plain = series_model(LrcSSMModel, patch_length=4), make_model(LrcSSMModel, num_channels=4 * CHANNELS)
    plain.load_state_dict(patched.state_dict())
    series = random_series()
    tokens = torch.nn.functional.pad(series, (0, 0, 3, 0)).reshape(3, 5, 4 * CHANNELS)
    deltas = torch.tensor([0.25, 1, 1, 1, 1]).expand(3, -1)
    expected = plain(input_values=tokens, time_deltas=deltas).last_hidden_state
    assert torch.allclose(patched(input_values=series).last_hidden_state, expected, atol=1e-6)
    whole = plain(input_values=tokens[:, 1:]).last_hidden_state
    assert torch.allclose(patched(input_values=series[:, 1:]).last_hidden_state, whole, atol=1e-6)


@torch.no_grad()
def test_patched_models_label_every_step():
    model = series_model(LrcSSMForSequenceModeling, patch_length=4)
    series = random_series()
    hidden = model.model(input_values=series).last_hidden_state
    expected = model.score(hidden).reshape(3, 20, 2)[:, 3:]
    assert torch.equal(model(input_values=series).logits, expected)
    values, mask = padded(series, (17, 6, 2), "right")
    logits = model(input_values=values, attention_mask=mask).logits
    assert torch.allclose(logits[1:2, :6], model(input_values=series[1:2, :6]).logits, atol=1e-5)


@torch.no_grad()
def test_patches_go_through_the_cache():
    model = series_model(LrcSSMModel, patch_length=4)
    series = random_series()
    expected = model(input_values=series).last_hidden_state
    first = model(input_values=series[:, :9], use_cache=True)
    second = model(input_values=series[:, 9:], cache=first[CACHE])
    pieces = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    assert torch.allclose(pieces, expected, atol=1e-5)
    with pytest.raises(ValueError, match="3 unmasked steps.*multiples of `patch_length`"):
        model(input_values=series[:, :3], cache=first[CACHE])


@torch.no_grad()
def test_every_second_layer_reads_from_the_end():
    model = series_model(LrcSSMModel, bidirectional=True, num_hidden_layers=2, conv_kernel=1)
    forwards = series_model(LrcSSMModel, num_hidden_layers=2, conv_kernel=1)
    series, deltas = random_series(), torch.rand(3, 17) + 0.5
    outputs = model(input_values=series, time_deltas=deltas, output_hidden_states=True)
    first, second = outputs.hidden_states[1:]
    plain = forwards(input_values=series, time_deltas=deltas, output_hidden_states=True)
    assert torch.allclose(first, plain.hidden_states[1], atol=1e-6)
    # Read from its end, step 16 comes first and the time between it and step 15 follows.
    backwards = torch.cat([deltas[:, :1], deltas.flip(1)[:, :-1]], 1)
    layer = forwards.layers[1](first.flip(1), LrcSSMSteps.of(None, backwards))[0].flip(1)
    assert torch.allclose(second, forwards.norm(layer), atol=1e-5)
    # The first step knows of the last.
    changed = series.clone()
    changed[:, -1] += 1
    assert (model(input_values=changed)[0] - model(input_values=series)[0])[:, 0].abs().min() > 0


@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_documents_are_kept_apart_in_both_directions(side):
    model = series_model(LrcSSMModel, bidirectional=True)
    series, deltas = random_series(rows=1, steps=12), torch.rand(1, 12) + 0.5
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    pieces = [slice(0, 5), slice(5, 12)]
    apart = [model(input_values=series[:, p], time_deltas=deltas[:, p]).last_hidden_state for p in pieces]
    padding, mask = {"left": (2, 0), "right": (0, 2), None: (0, 0)}[side], None
    if side is not None:
        mask = torch.nn.functional.pad(torch.ones(1, 12), padding)
    inputs = {
        "input_values": torch.nn.functional.pad(series, (0, 0, *padding)),
        "time_deltas": torch.nn.functional.pad(deltas, padding, value=3.0),
        "position_ids": torch.nn.functional.pad(positions, padding, value=1),
    }
    hidden = model(**inputs, attention_mask=mask).last_hidden_state[:, padding[0] : padding[0] + 12]
    assert torch.allclose(hidden, torch.cat(apart, 1), atol=1e-5)


@torch.no_grad()
def test_layers_share_blocks_but_not_states(tmp_path):
    shared = make_model(LrcSSMModel, num_hidden_layers=4, num_hidden_groups=2)
    separate = make_model(LrcSSMModel, num_hidden_layers=4)
    for index, layer in enumerate(separate.layers):
        layer.load_state_dict(shared.layers[index // 2].state_dict())
    separate.embed_tokens.load_state_dict(shared.embed_tokens.state_dict())
    separate.norm.load_state_dict(shared.norm.state_dict())
    ids = torch.randint(2, 61, (2, 12))
    expected = separate(ids).last_hidden_state
    assert torch.equal(shared(ids).last_hidden_state, expected)
    first = shared(ids[:, :7], use_cache=True)
    shared.save_state(first[CACHE], tmp_path / "state.safetensors")
    cache = shared.load_state(tmp_path / "state.safetensors")
    assert torch.allclose(shared(ids[:, 7:], cache=cache)[0], expected[:, 7:], atol=1e-5)


@torch.no_grad()
def test_scaling_hides_units():
    model = series_model(scaling="std")
    series = random_series()
    unit, origin = torch.tensor([2.0, 40.0, 1e3]), torch.tensor([5.0, -200.0, 1e3])
    other = series * unit + origin
    assert torch.allclose(model(input_values=other).logits, model(input_values=series).logits, atol=1e-3)
    predict = forecaster(scaling="std")
    expected = predict.forecast(series, 11)
    assert torch.allclose((predict.forecast(other, 11) - origin) / unit, expected, atol=1e-2)


@torch.no_grad()
def test_covariates_matter_and_must_fit():
    model = forecaster(num_time_features=2, num_static_real_features=1)
    series, features, static = random_series(), torch.randn(3, 17 + 9, 2), torch.randn(3, 1)
    inputs = {"past_values": series, "horizon": 9, "time_features": features, "static_real_features": static}
    expected = model.forecast(**inputs)
    later = features.clone()
    later[:, 17] += 1  # The first step to come is read when the fifth is forecast.
    changed = model.forecast(**inputs | {"time_features": later})
    assert torch.equal(changed[:, :4], expected[:, :4]) and not torch.allclose(changed[:, 4:], expected[:, 4:])
    assert not torch.allclose(model.forecast(**inputs | {"static_real_features": static + 1}), expected)
    for name in ("time_features", "static_real_features"):
        for wrong in (None, torch.randn(3, 5)):
            with pytest.raises(ValueError, match=name):
                model.forecast(**inputs | {name: wrong})
    with pytest.raises(ValueError, match="num_time_features"):
        forecaster()(input_values=series, time_features=features[:, :17])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"scaling": "std"}, {"bidirectional": True}], ids=str)
def test_only_the_last_token_knows_no_targets(changes):
    model = forecaster(**changes)
    series, future = random_series(), random_series(steps=4, seed=1)
    outputs = model(input_values=series, future_values=future)
    assert outputs.logits.shape == (3, 1, 4, CHANNELS)
    assert torch.allclose(outputs.loss, (outputs.logits[:, 0] - future).square().mean(), rtol=1e-4)


@pytest.mark.parametrize("patch_length", [1, 3])
def test_a_scaled_forecaster_learns_from_the_second_half(patch_length):
    """The loss against one written out, with padding and missing values, and no forecast knows what comes after it."""
    model = forecaster(scaling="std", patch_length=patch_length).train()
    series, future = random_series(), random_series(steps=4, seed=1)
    lengths = (17, 8, 1)
    values, mask = padded(series, lengths, "left")
    observed = torch.rand(3, 17, CHANNELS, generator=torch.Generator().manual_seed(2)) < 0.8
    masks = {"attention_mask": mask, "observed_mask": observed}
    outputs = model(input_values=values, future_values=future, **masks)
    errors = []
    for row, length in enumerate(lengths):
        seen, there, half = series[row, :length], observed[row, 17 - length :], -(-length // 2)
        whole, all_there = torch.cat([seen, future[row]]), torch.cat([there, torch.ones(4, CHANNELS).bool()])
        known = [seen[:half, channel][there[:half, channel]] for channel in range(CHANNELS)]
        mean = torch.stack([x.mean() if len(x) else x.sum() for x in known])
        deviation = torch.stack([x.var(correction=0) if len(x) else x.sum() for x in known]).add(1e-5).sqrt()
        # A channel of which the first half says nothing is on a tenth of its later scale.
        deviation = torch.maximum(deviation, series_statistics(seen[None], there[None])[1][0, 0] / 10)
        for end in range(length, half - 1, -patch_length):
            inputs = {"input_values": seen[None, :end], "observed_mask": there[None, :end]}
            forecast = model(**inputs, statistics=(mean[None, None], deviation[None, None])).logits[0, -1]
            errors.append((forecast - whole[end : end + 4])[all_there[end : end + 4]] ** 2)
    assert torch.allclose(outputs.loss, torch.cat(errors).mean(), rtol=1e-4)
    outputs.loss.backward()


# --- Forecasts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_length", [1, 3])
def test_forecasts_from_all_tokens_are_trained(patch_length):
    """The loss against one written out, with padding and missing values."""
    model = forecaster(patch_length=patch_length)
    series, future = random_series(), random_series(steps=4, seed=1)
    lengths = (17, 8, 2)
    for side in ("left", "right"):
        values, mask = padded(series, lengths, side)
        observed = torch.rand(3, 17, CHANNELS) < 0.8
        known = torch.rand(3, 4, CHANNELS) < 0.8
        masks = {"attention_mask": mask, "observed_mask": observed, "future_observed_mask": known}
        outputs = model(input_values=values, future_values=future.masked_fill(~known, float("nan")), **masks)
        errors = []
        for row, length in enumerate(lengths):
            place = mask[row].bool()
            seen, there = values[row, place], observed[row, place]
            hidden = model.model(input_values=seen[None], observed_mask=there[None]).last_hidden_state[0]
            whole, all_there = torch.cat([seen, future[row]]), torch.cat([there, known[row]])
            for token, state in enumerate(hidden):
                end = length - (len(hidden) - 1 - token) * patch_length
                for channel in range(CHANNELS):
                    latest = seen[:end, channel][there[:end, channel]]
                    start = latest[-1] if len(latest) else 0.0
                    forecast = start + model.score(state).view(4, CHANNELS)[:, channel]
                    kept = all_there[end : end + 4, channel]
                    errors.append((forecast - whole[end : end + 4, channel])[kept] ** 2)
        assert torch.allclose(outputs.loss, torch.cat(errors).mean(), rtol=1e-4)
    outputs.loss.backward()


@torch.no_grad()
def test_the_last_step_forecasts_the_same_however_it_is_asked():
    model = forecaster()
    series = random_series()
    every = model(input_values=series).logits
    assert every.shape == (3, 17, 4, CHANNELS)
    assert torch.allclose(model(input_values=series, logits_to_keep=1).logits, every[:, -1:], atol=1e-6)
    assert torch.allclose(model.forecast(series, 3), every[:, -1, :3], atol=1e-6)
    values, mask = padded(series, (17, 9, 4), "left")
    assert torch.allclose(model.forecast(values, 4, attention_mask=mask)[1], every[1, 8], atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"patch_length": 3}, {"scaling": "std"}, {"quantiles": [0.2, 0.5, 0.8]}], ids=str
)
@torch.no_grad()
def test_longer_forecasts_read_their_own(changes):
    model = forecaster(**changes)
    series = random_series()
    found = model.forecast(series, 10)
    statistics = None
    if "scaling" in changes:
        mean, deviation = series.mean(1, keepdim=True), series.var(1, keepdim=True, correction=0)
        statistics = (mean, (deviation + 1e-5).sqrt())
    block = 3 if "patch_length" in changes else 4
    read, expected = series, []
    for _ in range(0, 10, block):
        outputs = model(input_values=read, statistics=statistics, logits_to_keep=1)
        expected.append(outputs.logits[:, -1, :block])
        read = torch.cat([read, expected[-1].median(-1).values if "quantiles" in changes else expected[-1]], 1)
    assert torch.allclose(found, torch.cat(expected, 1)[:, :10], atol=1e-4)


def test_quantiles_are_learnt():
    """Of noise that is known: its quantiles, not its mean."""
    torch.manual_seed(0)
    model = forecaster(quantiles=[0.1, 0.5, 0.9], prediction_length=1, hidden_size=16, num_hidden_layers=1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    noise = torch.distributions.Exponential(1.0)
    for _ in range(150):
        series = noise.sample((8, 33, CHANNELS))
        loss = model(input_values=series[:, :-1], future_values=series[:, -1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    forecasts = model.eval().forecast(noise.sample((64, 32, CHANNELS)), 1).mean((0, 1, 2))
    assert torch.allclose(forecasts, torch.tensor([0.105, 0.693, 2.303]), atol=0.25)


@torch.no_grad()
def test_samples_follow_the_quantiles():
    model = forecaster(quantiles=[0.1, 0.3, 0.5, 0.7, 0.9])
    series = random_series(rows=2)
    generator = torch.Generator().manual_seed(0)
    samples = model.forecast(series, 6, num_samples=400, generator=generator)
    assert samples.shape == (2, 400, 6, CHANNELS)
    quantiles = model.forecast(series, 6).sort(-1).values
    below = (samples[:, :, :4].unsqueeze(-1) < quantiles[:, None, :4]).float().mean(1)
    assert torch.allclose(below, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).expand_as(below), atol=0.08)
    # Beyond what is forecast at once, paths differ by what they read.
    assert samples[:, :, 5].std(1).min() > 0


@torch.no_grad()
def test_a_path_goes_on_from_its_own_row(monkeypatch):
    """Paths of a batch with covariates, padding and elapsed times against those of each row alone."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.3))
    model = forecaster(quantiles=[0.2, 0.5, 0.8], num_time_features=2, num_static_real_features=1, scaling="std")
    series, features = random_series(), torch.randn(3, 17 + 9, 2)
    static, deltas = torch.randn(3, 1), 0.5 + torch.randn(3, 17).abs()
    lengths = (17, 9, 4)
    values, mask = padded(series, lengths, "left")
    inputs = {"attention_mask": mask, "time_features": features, "static_real_features": static, "time_deltas": deltas}
    paths = model.forecast(values, 9, num_samples=2, **inputs)
    assert paths.shape == (3, 2, 9, CHANNELS) and torch.equal(paths[:, 0], paths[:, 1])
    for row, length in enumerate(lengths):
        alone = model.forecast(
            series[row : row + 1, :length],
            9,
            time_features=features[row : row + 1, 17 - length :],
            static_real_features=static[row : row + 1],
            time_deltas=deltas[row : row + 1, 17 - length :],
            num_samples=1,
        )
        assert torch.allclose(paths[row, :1], alone[0], atol=1e-4)


@torch.no_grad()
def test_a_path_keeps_to_one_level_in_what_is_forecast_at_once():
    model = forecaster(quantiles=[0.2, 0.5, 0.8])
    series = random_series()
    levels = torch.rand(3, 1, CHANNELS, generator=torch.Generator().manual_seed(4))
    paths = model.forecast(series, 4, num_samples=1, generator=torch.Generator().manual_seed(4))
    quantiles = model.forecast(series, 4).sort(-1).values
    low, middle, high = quantiles.unbind(-1)
    expected = torch.where(
        levels < 0.5, torch.lerp(low, middle, (levels - 0.2) / 0.3), torch.lerp(middle, high, (levels - 0.5) / 0.3)
    )
    assert torch.allclose(paths[:, 0], expected, atol=1e-5)


def test_the_loss_of_the_median_is_the_absolute_error():
    model = forecaster(quantiles=[0.5])
    series, future = random_series(steps=1), random_series(steps=4, seed=1)
    outputs = model(input_values=series, future_values=future)
    assert torch.allclose(outputs.loss, (outputs.logits[:, 0, ..., 0] - future).abs().mean())


@torch.no_grad()
def test_series_of_integers_and_half_precision():
    for changes in ({"scaling": "std"}, {"patch_length": 3}):
        model = forecaster(**changes)
        counts = torch.randint(200, 300, (3, 17, CHANNELS))
        expected = model.forecast(counts.float(), 6)
        assert torch.equal(model.forecast(counts.short(), 6), expected)
        # Sums of squares beyond the range of float16.
        assert torch.equal(model.forecast(counts.half(), 6), expected)
        assert torch.equal(model.forecast(counts, 6), model.forecast(counts.double(), 6))
        loss = model(input_values=counts, future_values=counts[:, :4], time_deltas=torch.ones(3, 17).long()).loss
        # Two runs may differ in the last bit: in how their sums are split.
        again = model(input_values=counts.double(), future_values=counts[:, :4].double()).loss
        assert torch.allclose(loss, again, rtol=1e-6)


@pytest.mark.parametrize("origin", [0, 2**27, 10**9, -(10**12)])
@torch.no_grad()
def test_scaling_sees_small_changes_of_large_values(origin):
    """Of integers and float64, whose differences float32 does not hold."""
    model, predict = series_model(scaling="std"), forecaster(scaling="std")
    counts = torch.randint(20, (3, 17, CHANNELS), generator=torch.Generator().manual_seed(0))
    future, mask = counts[:, :4] + 1, torch.ones(3, 17).tril(14)
    expected, expected_loss = (
        model(input_values=counts.float()).logits,
        predict(input_values=counts.float(), future_values=future.float(), attention_mask=mask).loss,
    )
    assert expected.std() > 0.01
    for series, later in ((counts + origin, future + origin), (counts.double() + origin, future.double() + origin)):
        assert torch.allclose(model(input_values=series).logits.double(), expected.double(), atol=1e-4)
        forecasts = predict.forecast(series, 9)
        assert forecasts.dtype == torch.float64
        assert torch.allclose(forecasts - origin, predict.forecast(counts.float(), 9).double(), atol=1e-2)
        loss = predict(input_values=series, future_values=later, attention_mask=mask).loss
        assert torch.allclose(loss, expected_loss.double(), rtol=1e-3)


def test_statistics_of_values_whose_sums_and_squares_leave_their_type():
    values = torch.tensor([[-1e30], [1e30], [3e30]]).expand(1, 3, 2)
    mean, deviation = series_statistics(values, torch.ones_like(values, dtype=torch.bool))
    assert torch.allclose(mean / 1e30, torch.ones(1, 1, 2))
    assert torch.allclose(deviation / 1e30, torch.full((1, 1, 2), (8 / 3) ** 0.5))
    # A constant stays one, of any size.
    constant = torch.full((1, 50, 1), 1e9 + 7, dtype=torch.float64)
    mean, deviation = series_statistics(constant, torch.ones_like(constant, dtype=torch.bool))
    assert mean.item() == 1e9 + 7 and deviation.item() < 0.01


def test_complex_series_are_refused():
    with pytest.raises(ValueError, match="must be real, got torch.complex64"):
        series_model()(input_values=torch.ones(2, 5, CHANNELS, dtype=torch.complex64))


@torch.no_grad()
def test_a_mean_over_many_steps_in_half_precision():
    model = series_model().half()
    model.score.bias.fill_(100.0)
    series = random_series(rows=2, steps=1000)
    logits = model(input_values=series, attention_mask=torch.ones(2, 1000)).logits
    assert torch.allclose(logits, model(input_values=series).logits, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"horizon": 0}, "horizon"),
        ({}, {"past_values": torch.ones(17)}, "past_values.*shape"),
        ({"quantiles": [0.9]}, {"horizon": 5}, "horizon.*4.*median"),
        ({"prediction_length": None}, {}, "prediction_length"),
        ({"bidirectional": True}, {"horizon": 5}, "horizon.*4.*bidirectional"),
        ({"patch_length": 5}, {"horizon": 5}, "horizon.*4.*patches of 5"),
        ({}, {"num_samples": 3}, "num_samples.*quantiles"),
        ({"quantiles": [0.1, 0.9]}, {"num_samples": 0}, "num_samples"),
        ({}, {"observed_mask": torch.ones(3, 17)}, "observed_mask.*shape"),
        ({}, {"past_values": torch.full((3, 17, CHANNELS), float("nan"))}, "NaN"),
    ],
)
def test_bad_forecasts_are_refused_by_name(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        forecaster(**changes).forecast(**{"past_values": random_series(), "horizon": 2, **arguments})


def test_other_misuse_is_refused_by_name():
    series = random_series()
    model = forecaster()
    with pytest.raises(ValueError, match="eval"):
        model.train().forecast(series, 2)
    with pytest.raises(ValueError, match=r"pass `future_values`"):
        model(input_values=series, labels=series)
    with pytest.raises(ValueError, match=r"pass `labels`"):
        series_model(LrcSSMForSequenceModeling)(input_values=series, future_values=series[:, :4])
    with pytest.raises(ValueError, match="future_values.*shape"):
        model(input_values=series, future_values=series[:, :5])
    with pytest.raises(ValueError, match="future_values.*NaN"):
        model(input_values=series, future_values=torch.full((3, 4, CHANNELS), float("nan")))
    with pytest.raises(ValueError, match="input_values.*missing"):
        model(inputs_embeds=torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match="prediction_length"):
        series_model(prediction_length=3)
    with pytest.raises(ValueError, match="bidirectional"):
        series_model(bidirectional=True)(input_values=series, use_cache=True)
    with pytest.raises(ValueError, match="position_ids"):
        series_model(patch_length=2)(input_values=series, position_ids=torch.arange(17).expand(3, -1))
    for changes in ({"scaling": "std"}, {"prediction_length": 4}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}.*position_ids"):
            forecaster(**changes)(input_values=series, position_ids=torch.arange(17).expand(3, -1))
    for argument in ("observed_mask", "time_features", "static_real_features", "statistics"):
        with pytest.raises(ValueError, match=f"{argument}.*inputs_embeds"):
            series_model(LrcSSMModel)(inputs_embeds=torch.ones(1, 2, 32), **{argument: series})
    with pytest.raises(ValueError, match="patch_length.*inputs_embeds"):
        series_model(patch_length=2)(inputs_embeds=torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match="logits_to_keep.*prediction_length"):
        series_model(LrcSSMForSequenceModeling)(input_values=series, logits_to_keep=1)
    with pytest.raises(ValueError, match="attention_mask.*shape"):
        model(input_values=series, attention_mask=torch.ones(17))
    statistics = series_statistics(series, torch.ones_like(series, dtype=torch.bool))
    with pytest.raises(ValueError, match="statistics.*scaling"):
        series_model()(input_values=series, statistics=statistics)
    scaled = series_model(LrcSSMModel, scaling="std")
    with pytest.raises(ValueError, match=r"statistics.*\(3, 1, 3\)"):
        scaled(input_values=series, statistics=(statistics[0][0], statistics[1]))
    cache = scaled(input_values=series, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="statistics"):
        scaled(input_values=series, cache=cache)


@pytest.mark.parametrize(
    "change",
    [
        {"patch_length": 0},
        {"scaling": "mean"},
        {"num_hidden_groups": 0},
        {"num_hidden_groups": 4},
        {"num_time_features": -1},
        {"num_static_real_features": -1},
        {"prediction_length": 0},
        {"quantiles": [], "prediction_length": 2},
        {"quantiles": [0.5, 0.2], "prediction_length": 2},
        {"quantiles": [0.0, 0.5], "prediction_length": 2},
        {"quantiles": [0.5]},
        {"bidirectional": True, "num_hidden_layers": 1},
        {"patch_length": 2, "num_channels": None},
        {"scaling": "std", "num_channels": None},
        {"num_time_features": 1, "num_channels": None},
        {"prediction_length": 1, "num_channels": None},
    ],
    ids=str,
)
def test_bad_configurations_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_config(**{"num_channels": CHANNELS, **change})


def test_a_language_model_reads_one_way():
    with pytest.raises(ValueError, match="bidirectional"):
        LrcSSMForCausalLM(make_config(bidirectional=True))
