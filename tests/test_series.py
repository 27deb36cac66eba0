# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Models of series: missing values, patches, both directions, shared blocks, covariates, forecasts."""

import pytest
import torch

from lrcssm_hf import LrcSSMForCausalLM, LrcSSMForSequenceClassification, LrcSSMForSequenceModeling, LrcSSMModel
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
    second = model(input_values=series[:, 9:], past_key_values=first.past_key_values)
    pieces = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    assert torch.allclose(pieces, expected, atol=1e-5)
    with pytest.raises(ValueError, match="multiple of `patch_length`"):
        model(input_values=series[:, :3], past_key_values=first.past_key_values)


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
    layer = forwards.layers[1](first.flip(1), LrcSSMSteps.of(None, backwards)).flip(1)
    assert torch.allclose(second, forwards.norm(layer), atol=1e-5)
    # The first step knows of the last.
    changed = series.clone()
    changed[:, -1] += 1
    assert (model(input_values=changed)[0] - model(input_values=series)[0])[:, 0].abs().min() > 0


@torch.no_grad()
def test_documents_are_kept_apart_in_both_directions():
    model = make_model(LrcSSMModel, bidirectional=True)
    ids = torch.randint(2, 61, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    apart = torch.cat([model(ids[:, :5]).last_hidden_state, model(ids[:, 5:]).last_hidden_state], 1)
    assert torch.allclose(model(ids, position_ids=positions).last_hidden_state, apart, atol=1e-5)


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
    shared.save_state(first.past_key_values, tmp_path / "state.safetensors")
    cache = shared.load_state(tmp_path / "state.safetensors")
    assert torch.allclose(shared(ids[:, 7:], past_key_values=cache)[0], expected[:, 7:], atol=1e-5)


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


@pytest.mark.parametrize("changes", [{"scaling": "std"}, {"bidirectional": True}], ids=str)
def test_no_forecast_is_trained_that_knows_its_targets(changes):
    model = forecaster(**changes).train()
    series, future = random_series(), random_series(steps=4, seed=1)
    outputs = model(input_values=series, future_values=future)
    assert outputs.logits.shape == (3, 1, 4, CHANNELS)
    assert torch.allclose(outputs.loss, (outputs.logits[:, 0] - future).square().mean(), rtol=1e-4)


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


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"horizon": 0}, "horizon"),
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
    scaled = series_model(LrcSSMModel, scaling="std")
    cache = scaled(input_values=series, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="statistics"):
        scaled(input_values=series, past_key_values=cache)


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
        {"quantiles": []},
        {"quantiles": [0.5, 0.2]},
        {"quantiles": [0.0, 0.5]},
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
