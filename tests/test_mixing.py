# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The block's fused operators, by every backend, against loops over time in float64, gradients included."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM, backends, cells, mixing


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "cpu", "triton"] if DEVICE == "cpu" else [pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """What serves the tensors of this device."""
    if request.param != "torch" and isinstance(backends.kernels_of(request.param), str):
        pytest.skip(backends.kernels_of(request.param))
    monkeypatch.setitem(backends._BACKEND_OF_DEVICE, DEVICE, request.param)
    if request.param == "torch":
        monkeypatch.delitem(backends._BACKEND_OF_DEVICE, DEVICE)

    def refuse(backend, error):
        raise error

    monkeypatch.setattr(backends, "give_up", refuse)
    return request.param


def convolution_loop(inputs, weight, bias, past, reset, lengths, silu):
    """A row, a step and a document at a time."""
    before, outputs, lasts = weight.shape[1] - 1, [], []
    for b, row in enumerate(inputs):
        window = torch.zeros_like(row[0]).repeat(before, 1) if past is None else past[b].T
        end, last = len(row) if lengths is None else lengths[b], window
        for t, x in enumerate(row):
            if reset is not None and reset[b, t]:
                window = torch.zeros_like(window)
            window = torch.cat([window, x[None]])
            z = bias + (weight.T * window).sum(0)
            outputs.append(z * torch.sigmoid(z) if silu else z)
            window = window[1:]
            last = window if t + 1 == end else last
        lasts.append(last.T)
    return torch.stack(outputs).view(inputs.shape), torch.stack(lasts)


def gradients(function, arguments, cotangents):
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    pairs = [(result, grad.to(result)) for result, grad in zip(results, cotangents, strict=True)]
    results, cotangents = zip(*pairs)
    return results, torch.autograd.grad(results, leaves, cotangents, allow_unused=True)


def as_leaves(arguments, dtype, device="cpu"):
    return [
        x.detach().to(device, dtype).requires_grad_()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x.to(device)
        if isinstance(x, torch.Tensor)
        else x
        for x in arguments
    ]


def assert_equal(got, wanted, tolerance):
    for x, expected in zip(got, wanted, strict=True):
        if x is None or expected is None or x.numel() == 0:
            assert not any(y is not None and y.any() for y in (x, expected))
        else:
            expected = expected.double()
            largest = expected.abs().max().item()
            torch.testing.assert_close(x.double().cpu(), expected, rtol=0, atol=tolerance * max(1, largest))


def check(function, definition, arguments, cotangents, dtype, tolerance):
    wanted = gradients(definition, as_leaves(as_leaves(arguments, dtype), torch.float64), cotangents)
    got = gradients(function, as_leaves(arguments, dtype, DEVICE), cotangents)
    for results, expected in zip(got, wanted):
        assert_equal(results, expected, tolerance)


TOLERANCES = {torch.float32: 5e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def draw(shape, taps, with_all, seed=0):
    """The arguments of a convolution, of which the inputs are part of a wider tensor."""
    torch.manual_seed(seed)
    batch, steps, size = shape
    inputs, weight, bias = torch.randn(batch, steps, 2 * size)[..., size:], torch.randn(size, taps), torch.randn(size)
    if not with_all:
        return [inputs, weight, bias, None, None, None]
    lengths = torch.randint(0, steps + 1, (batch, 2))[:, 1]
    reset = (torch.rand(batch, steps) < 0.2) & (torch.arange(steps) < lengths[:, None])
    return [inputs, weight, bias, torch.randn(batch, size, taps - 1), reset, lengths]


@pytest.mark.parametrize(("taps", "silu"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("with_all", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 70, 19)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_convolution(backend, dtype, shape, with_all, taps, silu):
    if backend == "triton" and DEVICE == "cpu" and dtype == torch.float64:
        pytest.skip("the interpreter is slow")
    arguments = draw(shape, taps, with_all)
    cotangents = torch.randn(shape), torch.randn(shape[0], shape[2], taps - 1)
    function = lambda *arguments: mixing.convolution(*arguments, silu=silu)  # noqa: E731
    check(function, lambda *x: convolution_loop(*x, silu), arguments, cotangents, dtype, TOLERANCES[dtype])


def test_only_the_past_of_a_convolution_goes_back(backend):
    arguments = draw((2, 9, 5), 4, True)
    function = lambda *arguments: mixing.convolution(*arguments)[1]  # noqa: E731
    check(function, lambda *x: convolution_loop(*x, True)[1], arguments, [torch.randn(2, 5, 3)], torch.float32, 1e-6)


def test_the_past_after_inputs_alone():
    inputs, weight, bias, *rest = draw((4, 11, 3), 4, True)
    _, wanted = mixing.convolution(inputs, weight, bias, *rest)
    assert torch.equal(mixing.last_steps(inputs, *rest, 3), wanted)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_the_gate(backend, dtypes, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW", 0)
    torch.manual_seed(0)
    gate, values = 5 * torch.randn(2, 9, 66)[..., 33:].to(dtypes[0]), torch.randn(2, 9, 33).to(dtypes[1])
    gate[0, 0, :3] = torch.tensor([-1000.0, 1000.0, 0.0])
    cotangent, tolerance = torch.randn(2, 9, 33), TOLERANCES[dtypes[0]]
    leaves = [x.to(DEVICE).requires_grad_() for x in (values, gate)]
    (got,), got_gradients = gradients(mixing.silu_gate, leaves, [cotangent])
    definition = lambda values, gate: values * gate * torch.sigmoid(gate)  # noqa: E731
    wanted, wanted_gradients = gradients(definition, as_leaves((values, gate), torch.float64), [cotangent])
    assert [got.dtype, *(gradient.dtype for gradient in got_gradients)] == [dtypes[0], dtypes[1], dtypes[0]]
    assert_equal((got, *got_gradients), (*wanted, *wanted_gradients), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 70, 1100)])
def test_the_norm(backend, shape, dtype):
    torch.manual_seed(0)
    inputs, weight = torch.randn(*shape[:2], 2 * shape[2])[..., shape[2] :], torch.randn(shape[2])
    inputs[0, 0] = 0

    def definition(inputs, weight):
        return inputs * (inputs.square().mean(-1, keepdim=True) + 1e-3) ** -0.5 * weight

    function = lambda inputs, weight: mixing.rms_norm(inputs, weight, 1e-3)  # noqa: E731
    check(function, definition, [inputs, weight], [torch.randn(shape)], dtype, TOLERANCES[dtype])


def test_not_a_number_is_seen(backend, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW", 0)
    x = torch.zeros(1, 4, 17, dtype=torch.bfloat16, device=DEVICE)
    x[0, 1, 16] = float("nan")
    outputs, _ = mixing.convolution(x, torch.ones(17, 2, device=DEVICE), torch.ones(17, device=DEVICE), None)
    assert outputs.isnan().nonzero().tolist() == [[0, 1, 16], [0, 2, 16]]
    assert mixing.silu_gate(x, torch.ones_like(x)).isnan().nonzero().tolist() == [[0, 1, 16]]
    assert mixing.rms_norm(x, torch.ones(17, device=DEVICE), 1e-6)[0].isnan().all(1).tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", [cells.LRC, cells.LRC_SYMMETRIC, cells.GRU, cells.LSTM], ids=lambda cell: cell.name)
def test_a_gated_step(backend, cell, dtype):
    torch.manual_seed(0)
    batch, size, count = 2, 21, len(cell.states)
    inputs = {name: torch.randn(batch, 1, 3 * size)[..., size : 2 * size].to(dtype) for name in cell.inputs}
    parameters = {name: torch.randn(size) for name in cell.parameters}
    gate, state = torch.randn(batch, 1, 2 * size)[..., size:].to(dtype), torch.randn(batch, count, size)
    exact = {name: x[:, 0].double() for name, x in inputs.items()}
    following = cell.advance(state.double().unbind(1), exact, {k: p.double() for k, p in parameters.items()})
    wanted = F.silu(gate[:, 0].double()) * following[-1]
    for start in (state, None):
        if start is None:
            zeros = torch.zeros_like(state).double().unbind(1)
            following = cell.advance(zeros, exact, {k: p.double() for k, p in parameters.items()})
            wanted = F.silu(gate[:, 0].double()) * following[-1]
        else:
            start = (start if count > 1 else start[:, 0]).to(DEVICE)
        with torch.no_grad():
            output, next_state = mixing.gated_step(
                cell,
                {name: x.to(DEVICE) for name, x in inputs.items()},
                [p.to(DEVICE) for p in parameters.values()],
                start,
                gate.to(DEVICE),
            )
        assert output.dtype == dtype
        assert_equal([output[:, 0]], [wanted], TOLERANCES[dtype])
        assert_equal([next_state.view(batch, count, size)], [torch.stack(following, 1)], 2e-6)


@pytest.mark.parametrize("options", [{}, {"elastance_input": True, "elastance": "symmetric"}, {"cell": "lstm"}])
def test_a_model_decodes_by_steps_what_it_reads_at_once(backend, options, monkeypatch):
    torch.manual_seed(0)
    config = LrcSSMConfig(vocab_size=50, hidden_size=24, state_size=40, num_hidden_layers=2, **options)
    model = LrcSSMForCausalLM(config).to(DEVICE).eval()
    ids = torch.randint(50, (2, 12), device=DEVICE)
    counted, run = [], backends.by_kernels
    monkeypatch.setattr(mixing, "by_kernels", lambda operator, *rest: counted.append(operator) or run(operator, *rest))
    with torch.no_grad():
        whole, cache, logits = model(ids).logits, None, []
        for t in range(12):
            outputs = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)
    # A step of the LRC or another cell takes two operations in each layer.
    assert counted.count("gated_step") == (0 if backend == "torch" else 24)


def test_a_kernel_that_fails_gives_way_to_the_definition(monkeypatch):
    kernels = backends.kernels_of("cpu")
    if isinstance(kernels, str) or DEVICE != "cpu":
        pytest.skip("is about the kernels of CPUs")

    def fail(*arguments):
        raise SystemError("no machine code for this machine")

    monkeypatch.setattr(
        backends, "loaded", {"cpu": kernels._replace(convolution_backward=fail, silu_gate_backward=fail)}
    )
    arguments = draw((2, 9, 5), 4, True)
    cotangents = torch.randn(2, 9, 5), torch.randn(2, 5, 3)
    check(mixing.convolution, lambda *x: convolution_loop(*x, True), arguments, cotangents, torch.float32, 1e-5)
    assert isinstance(backends.loaded["cpu"], str)


def test_transforms_and_second_derivatives_see_the_definition(backend):
    arguments = [x.to(DEVICE) for x in draw((1, 5, 3), 2, False)[:3]]

    def loss(inputs, convolution):
        return (convolution(inputs, *arguments[1:])[0] ** 2).sum()

    wanted = torch.func.hessian(loss)(arguments[0], lambda *x: convolution_loop(*x, None, None, None, True))
    fused = lambda *x: mixing.convolution(*x, None)  # noqa: E731
    torch.testing.assert_close(torch.func.hessian(loss)(arguments[0], fused), wanted)
    twice = torch.autograd.functional.hessian(lambda inputs: loss(inputs, fused), arguments[0])
    torch.testing.assert_close(twice, wanted)


def test_the_block_moves_little_beside_its_matrix_products(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import count_traffic

    monkeypatch.setattr(count_traffic, "SHAPE", (2, 512))
    for name, forward, backward in count_traffic.measure():
        if name.startswith("mixer"):
            casts = forward.pop("_to_copy")  # of weights, which in a batch this small count
            assert casts < 10
            assert 20 < sum(forward.values()) < 24 and sum(backward.values()) < 100


def test_what_is_elsewhere_is_not_read():
    """An address on another device would end the process."""
    x, weight = torch.zeros(1, 2000, 4), torch.zeros(4, 2, device="meta")
    for call in (
        lambda: mixing.convolution(x, weight, torch.zeros(4), None),
        lambda: mixing.rms_norm(x, weight[:, 0], 1e-6),
        lambda: mixing.silu_gate(x, x.to("meta")),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            call()
    with torch.no_grad():
        step = dict.fromkeys(cells.MGU.inputs, x[:, :1])
        with pytest.raises((RuntimeError, NotImplementedError)):
            mixing.gated_step(cells.MGU, step, [weight[:, 0]] * 2, None, x[:, :1])
