# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The GPU kernels against the definition in float64: interpreted on tiny problems, or compiled with `pytest -m gpu`."""

import ast
import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lrcssm_hf import LrcParameters, backends, cell_scan, lrc_scan, prefix_scan, recurrence
from lrcssm_hf.cells import GRU, LRC, LSTM, OSCILLATING_LRC
from problems import (
    cast,
    cell_definition,
    cell_outputs_and_gradients,
    definition,
    leaves,
    map_tensors,
    outputs_and_gradients,
    random_cell_problem,
    random_problem,
    relative_error,
)
from tiny_models import make_writer, random_ids


recurrence_triton = pytest.importorskip("lrcssm_hf.recurrence_triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The same tests twice: what is tiny for the interpreter is only a first check of the compiled kernels.
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
only_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]
SOLVERS = ["sequential", "chunked", "newton"]
SCANS = ["sweep", "stitch", "newton", "adjoint", "find_starts", "_linear_kernel"]
SCRIPTS = Path(__file__).parents[1] / "scripts"
SHAPES = [(1, 1, 1), (2, 19, 3), *[pytest.param(shape, marks=only_gpu) for shape in [(3, 1000, 70), (2, 4097, 129)]]]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks, and several tiles of chunks, in problems that the interpreter can do."""
    if DEVICE == "cpu":
        monkeypatch.setattr(recurrence_triton, "_SHORTEST_CHUNK", 4)
        monkeypatch.setattr(recurrence_triton, "_CHUNKS_TILE", 2)
        monkeypatch.setattr(recurrence_triton, "_NEWTON_TILE", 8)


def to_device(problem, dtype=torch.float64):
    forget_input, update_input, parameters, options = cast(problem, dtype)
    move = lambda tensor: None if tensor is None else tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)  # noqa: E731
    parameters = LrcParameters(*map(move, parameters))
    return move(forget_input), move(update_input), parameters, {name: move(value) for name, value in options.items()}


def check(problem, solver, tolerance, dtype=torch.float64):
    """States and all gradients of the kernels, for inputs and parameters of a dtype, against the float64 definition."""
    cotangent = torch.randn(problem[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scan = functools.partial(lrc_scan, backend="triton", solver=solver)
    states, gradients = outputs_and_gradients(scan, to_device(problem, dtype), cotangent.to(DEVICE))
    expected, expected_gradients = outputs_and_gradients(definition, cast(problem, torch.float64), cotangent)
    assert relative_error(states.cpu(), expected) < tolerance
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient.cpu(), expected_gradient) < 10 * tolerance


@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_float64_equals_definition(solver, shape, symmetric, full):
    check(random_problem(*shape, symmetric=symmetric, full=full, scale=0.4), solver, 1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_equals_definition(solver):
    check(random_problem(2, 19, 3, full=True, scale=0.4), solver, 2e-5, torch.float32)


@pytest.mark.parametrize(
    "cell, full", [(GRU, True), (LSTM, True), (OSCILLATING_LRC, False)], ids=["gru", "lstm", "oscillator"]
)
@pytest.mark.parametrize("shape", [(2, 19, 3), pytest.param((2, 4097, 129), marks=only_gpu)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_kind_of_cell(solver, shape, cell, full):
    """Of one state and of two, with time steps and without."""
    problem = random_cell_problem(cell, *shape, full=full, scale=0.4)
    there = map_tensors(lambda x: x.detach().to(DEVICE).requires_grad_(x.requires_grad), problem)
    scan = functools.partial(cell_scan, cell, backend="triton", solver=solver)
    states, gradients = cell_outputs_and_gradients(scan, there)
    expected, expected_gradients = cell_outputs_and_gradients(functools.partial(cell_definition, cell), problem)
    assert relative_error(states.cpu(), expected) < 1e-10
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient.cpu(), expected_gradient) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_strided_inputs(dtype):
    """Inputs that are slices of one projection are read where they are, and solved in float32."""
    torch.manual_seed(0)
    projection = torch.randn(2, 19, 3 * 5, device=DEVICE, dtype=dtype, requires_grad=True)
    parameters = LrcParameters(*torch.randn(8, 5, device=DEVICE))

    def scan(projection, **options):
        forget_input, update_input, elastance_input = projection.split(5, -1)
        states, final_state = lrc_scan(
            forget_input, update_input, parameters, elastance_input=elastance_input, **options
        )
        assert states.dtype == final_state.dtype == torch.float32
        return states, torch.autograd.grad(states.square().sum(), projection)[0]

    states, gradient = scan(projection, backend="triton")
    expected, expected_gradient = scan(projection, backend="torch")
    assert torch.allclose(states, expected, atol=1e-5)
    assert gradient.dtype == dtype
    assert relative_error(gradient.float(), expected_gradient.float()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", ["chunked", "newton"])
def test_adversarial_weights_fall_back_and_are_right(solver, monkeypatch):
    """Chaos, with weights of order 10: the kernels notice that they do not converge and return the definition."""
    monkeypatch.setattr(recurrence_triton, "_SHORTEST_CHUNK", 4)
    fell_back = 0
    for seed in range(3):
        problem = to_device(random_problem(1, 48, 2, scale=10.0, seed=seed), torch.float32)
        scan = functools.partial(lrc_scan, backend="triton", return_info=True)
        with torch.no_grad():
            states, _, info = scan(*problem[:3], solver=solver)
            expected, _, _ = scan(*problem[:3], solver="sequential")
        fell_back += info.fell_back
        assert info.solver == solver and info.fell_back == (info.residual > 16 * torch.finfo(torch.float32).eps)
        if info.fell_back:
            assert torch.equal(states, expected)
    assert fell_back > 0


def test_contracting_problems_need_few_sweeps(monkeypatch):
    monkeypatch.setattr(recurrence_triton, "_SHORTEST_CHUNK", 4)
    forget_input, update_input, parameters, _ = to_device(random_problem(1, 64, 3, scale=0.2))
    for solver, most in (("chunked", 6), ("newton", 6)):
        with torch.no_grad():
            *_, info = lrc_scan(
                forget_input, update_input, parameters, solver=solver, backend="triton", tolerance=1e-8,
                return_info=True,
            )  # fmt: skip
        assert info.solver == solver and not info.fell_back
        assert 1 < info.iterations <= most and 0 <= info.residual <= 1e-8


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_time_step_leaves_the_state_bit_for_bit(solver):
    problem = to_device(random_problem(2, 30, 3, full=True, scale=0.5), torch.float32)
    forget_input, update_input, parameters, options = problem
    time_step = options["time_step"].detach().clone()
    time_step[0, 5:22], time_step[1, 20:] = 0, 0
    options |= {"time_step": time_step}
    with torch.no_grad():
        states, _ = lrc_scan(forget_input, update_input, parameters, solver=solver, backend="triton", **options)
    previous = torch.cat([options["initial_state"][:, None], states[:, :-1]], 1)
    held = (time_step == 0) & ~options["reset"]
    assert torch.equal(states[held], previous[held])
    assert (states[(time_step == 0) & options["reset"]] == 0).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_a_step_of_no_time_would_have_read_does_not_matter(solver):
    problem = to_device(random_problem(1, 16, 2, full=True), torch.float32)
    masked = problem[3]["time_step"] == 0
    scan = functools.partial(lrc_scan, solver=solver, backend="triton")
    results = []
    for filling in (0.0, float("nan")):
        filled = to_device(problem, torch.float32)
        with torch.no_grad():
            for tensor in (filled[0], filled[1], filled[3]["elastance_input"]):
                tensor[masked] = filling
        results.append(outputs_and_gradients(scan, filled, torch.ones(1, 16, 2, device=DEVICE)))
    (expected, expected_gradients), (states, gradients) = results
    assert torch.allclose(states, expected, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert torch.allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize("full", [False, True], ids=["four at a time", "one at a time"])
def test_the_gradient_of_the_final_state_passes_many_chunks(full):
    problem = random_problem(2, 70, 3, full=full, scale=0.2)

    def outputs(problem, backend):
        forget_input, update_input, parameters, options = problem
        _, final_state = lrc_scan(forget_input, update_input, parameters, backend=backend, **options)
        return torch.autograd.grad(final_state.sum(), leaves(*problem))

    gradients = outputs(to_device(problem, torch.float32), "triton")
    expected = outputs(cast(problem, torch.float64), "torch")
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert relative_error(gradient.cpu(), expected_gradient) < 1e-4


@pytest.fixture
def memory_of_nans(monkeypatch):
    """New tensors are full of NaNs, or of largest integers."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("solver", SOLVERS)
def test_kernels_read_nothing_but_what_was_written(memory_of_nans, solver):
    check(random_problem(2, 19, 3, full=True, scale=0.4), solver, 1e-10)


def test_newton_may_begin_at_the_solution(memory_of_nans):
    inputs, parameters = torch.zeros(1, 9, 2, device=DEVICE), LrcParameters(*torch.zeros(8, 2, device=DEVICE))
    with torch.no_grad():
        states, final_state, info = lrc_scan(
            inputs, inputs, parameters, solver="newton", backend="triton", return_info=True
        )
    assert info.iterations == 0 and not info.fell_back
    assert (states == 0).all() and (final_state == 0).all()


def test_nan_is_not_hidden():
    forget_input, update_input, parameters, _ = to_device(random_problem(1, 12, 3), torch.float32)
    forget_input = forget_input.detach().clone()
    forget_input[0, 5, 1] = float("nan")
    for solver in SOLVERS:
        with torch.no_grad():
            states, _ = lrc_scan(forget_input, update_input, parameters, solver=solver, backend="triton")
        assert states[0, 5:, 1].isnan().all()
        assert states.isfinite().sum() == states.numel() - 7


def test_operators_are_what_compilers_expect():
    forget_input, update_input, parameters, options = to_device(random_problem(1, 6, 2, full=True), torch.float32)
    weights = [parameter.detach().requires_grad_() for parameter in parameters[:8]]
    inputs = [forget_input, update_input, options["elastance_input"]]
    steps = (options["time_step"], options["reset"], options["initial_state"].unsqueeze(1))
    operands = (LRC.key(LRC.inputs, True), inputs, *steps, weights)
    torch.library.opcheck(recurrence._cell_scan_op, (*operands, torch.float32, "chunked", "triton", 1e-6, True))


def test_empty_shapes():
    for batch, steps, size in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        inputs = torch.randn(batch, steps, size, device=DEVICE, requires_grad=True)
        parameters = LrcParameters(*torch.randn(8, size, device=DEVICE))
        states, final_state = lrc_scan(inputs, inputs, parameters, backend="triton")
        assert states.shape == (batch, steps, size) and final_state.shape == (batch, size)
        if steps:
            assert torch.autograd.grad(states.sum(), inputs)[0].shape == inputs.shape


def test_backend_refuses_what_it_does_not_serve():
    inputs, parameters = torch.zeros(1, 4, 2, dtype=torch.complex64), LrcParameters(*torch.zeros(8, 2))
    with pytest.raises(ValueError, match="triton.*complex64"):
        lrc_scan(inputs, inputs, parameters, backend="triton")


# --- prefix_scan ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scan_by_triton(monkeypatch):
    monkeypatch.setitem(backends._BACKEND_OF_DEVICE, DEVICE, "triton")


def scan_definition(decay, inputs, initial_state, reverse):
    state, states = initial_state, [None] * inputs.shape[1]
    for t in reversed(range(inputs.shape[1])) if reverse else range(inputs.shape[1]):
        state = states[t] = decay[:, t] * state + inputs[:, t]
    return torch.stack(states, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("repeated", [False, True], ids=["", "one decay"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 21, 3), (2, 50, 3), pytest.param((2, 70000, 65), marks=only_gpu)])
def test_prefix_scan(scan_by_triton, shape, repeated, reverse, dtype):
    """Also with one decay for all rows and steps, repeated by a stride of 0."""
    torch.manual_seed(0)
    tensors = torch.rand(shape[2:] if repeated else shape), torch.randn(shape), torch.randn(shape[0], shape[2])
    arguments = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]
    wide = [argument.detach().double().cpu().requires_grad_() for argument in arguments]
    expected = scan_definition(wide[0].expand(shape), *wide[1:], reverse)
    cotangent = torch.randn_like(expected)
    states = prefix_scan(arguments[0].expand(shape), *arguments[1:], reverse=reverse)
    assert states.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(states.double().cpu(), expected) < (1e-12 if dtype == torch.float64 else 1e-5)
    gradients = torch.autograd.grad(states, arguments, cotangent.to(states))
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, wide, cotangent), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 8e-3
        assert relative_error(gradient.double().cpu(), expected_gradient) < tolerance


@pytest.mark.parametrize("steps", [12, 50], ids=["one chunk", "chunks"])
def test_prefix_scan_stays_finite_where_products_overflow(scan_by_triton, steps):
    decay = torch.full((1, steps, 2), 1e30, device=DEVICE)
    inputs = torch.zeros(1, steps, 2, device=DEVICE)
    inputs[:, -2] = 1e-20
    expected = scan_definition(decay, inputs, inputs[:, 0], False)
    assert expected[0, -1].isfinite().all() and (expected[0, -1] > 0).all()
    assert torch.equal(prefix_scan(decay, inputs), expected)


# --- Compiled -------------------------------------------------------------------------------------------------------


def compiled_for(*targets):
    """The table of compile_kernels.py, or what it said of those that spill registers."""
    return without_interpreter(SCRIPTS / "compile_kernels.py", *targets)


def without_interpreter(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_scan_launches_few_kernels():
    """Forward and backward, less than half of those of version 0.1."""
    script = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import count_launches as count\n"
    script += "print({name: (passes, count.OF_VERSION_0_1[name]) for name, passes in count.measure().items()})"
    counts = ast.literal_eval(without_interpreter("-c", script))
    totals = {name: [sum(map(sum, passes)) for passes in both] for name, both in counts.items()}
    assert all(now < before / 2 for now, before in totals.values())
    assert [now for now, _ in totals.values()] == [4, 5, 12, 14, 5, 7]


@pytest.mark.parametrize("targets", [("sm_90",), pytest.param(("sm_80", "sm_100", "gfx942"), marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus_that_are_not_here(targets):
    """Ahead of time, without spilling registers."""
    table = compiled_for(*targets)
    for target in targets:
        for kernel in (*SCANS, "step", "convolution", "convolution_backward", "_silu_gate_kernel"):
            assert f"| {target} | lrc, bfloat16 | {kernel} |" in table
            assert f"| {target} | lrc_symmetric, float64, inputs, steps | {kernel} |" in table
        assert f"| {target} | lstm, bfloat16, steps | _hold_kernel |" in table


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("shape", [(64, 512, 1024), (2, 8192, 64)], ids=["many chains", "few chains"])
    def test_the_host_never_waits(self, shape):
        """Forward and backward are captured in a CUDA graph, and replayed on other inputs."""
        torch.manual_seed(0)
        inputs = torch.randn(shape, device="cuda", requires_grad=True)
        parameters = LrcParameters(*(0.3 * torch.randn(8, shape[2], device="cuda")))

        def step():
            states, _ = lrc_scan(inputs, inputs, parameters)
            return states, torch.autograd.grad(states.square().sum(), inputs)[0]

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            inputs.copy_(torch.randn(shape, device="cuda"))
        graph.replay()
        for replayed, expected in zip(captured, step()):
            assert torch.equal(replayed, expected)

    def test_the_same_result_every_time(self):
        problem = to_device(random_problem(4, 4096, 256, full=True, scale=0.3), torch.float32)
        cotangent = torch.ones(4, 4096, 256, device="cuda")
        first, *others = [outputs_and_gradients(lrc_scan, problem, cotangent) for _ in range(3)]
        for states, gradients in others:
            assert torch.equal(states, first[0])
            assert all(torch.equal(*pair) for pair in zip(gradients, first[1]))

    def test_more_than_two_to_the_31_elements(self):
        """The last rows of a tensor whose offsets do not fit 32 bits, against the same rows on their own."""
        steps, size = 140_000, 16_384
        inputs = torch.randn(1, steps, size, device="cuda", dtype=torch.bfloat16)
        parameters = LrcParameters(*(0.3 * torch.randn(8, size, device="cuda")))
        with torch.no_grad():
            states, final_state = lrc_scan(inputs, inputs, parameters)
            last = inputs[:, -500:].clone()
            expected, _ = lrc_scan(last, last, parameters, initial_state=states[:, -501])
        assert torch.allclose(states[:, -500:], expected, atol=1e-5)
        assert torch.equal(final_state, states[:, -1])

    def test_memory_of_forward_and_backward(self):
        """Inputs, states and gradients, and at most a tenth more."""
        shape = (8, 4096, 1024)
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
        parameters = LrcParameters(*(0.3 * torch.randn(8, shape[2], device="cuda", requires_grad=True)))
        cotangent = torch.ones(shape, device="cuda")
        torch.autograd.grad(lrc_scan(*inputs, parameters)[0], inputs, cotangent)
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(lrc_scan(*inputs, parameters)[0], inputs, cotangent)
        elements = inputs[0].numel()
        # Two inputs and their gradients in bfloat16, the states and their gradient in float32.
        assert torch.cuda.max_memory_allocated() <= 1.1 * elements * (4 * 2 + 2 * 4)

    def test_compiled_model_code(self):
        problem = to_device(random_problem(2, 256, 64, full=True), torch.float32)
        forget_input, update_input, parameters, options = problem
        scan = torch.compile(lambda c, d: lrc_scan(c, d, parameters, **options)[0] * 2, fullgraph=True)
        expected = lrc_scan(forget_input, update_input, parameters, **options)[0] * 2
        states = scan(forget_input, update_input)
        assert torch.allclose(states, expected, atol=1e-5)
        gradients, expected_gradients = (torch.autograd.grad(x.sum(), leaves(*problem)) for x in (states, expected))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert relative_error(gradient, expected_gradient) < 1e-5

    @pytest.mark.parametrize("options", [{}, {"cell": "lstm"}, {"elastance_input": True}], ids=str)
    def test_a_model_is_the_same_as_on_the_cpu(self, options):
        """Loss and gradients, with documents in a row; and the text that it writes, by a CUDA graph too."""
        on_cpu = make_writer(hidden_size=32, num_hidden_layers=2, **options)
        on_gpu = copy.deepcopy(on_cpu).cuda()
        ids = random_ids(2, 300)
        position_ids = torch.cat([torch.arange(170), torch.arange(130)]).expand(2, -1)
        losses, gradients = [], []
        for model in (on_cpu, on_gpu):
            inputs = {name: x.to(model.device) for name, x in (("input_ids", ids), ("position_ids", position_ids))}
            losses.append(model(**inputs, labels=inputs["input_ids"]).loss)
            gradients.append(torch.autograd.grad(losses[-1], list(model.parameters()), allow_unused=True))
        torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=1e-6)
        for found, expected in zip(*reversed(gradients), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert relative_error(found.cpu(), expected) < 1e-3
        greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        written = on_cpu.generate(ids[:, :16], **greedy)
        for caches in ({}, {"cache_implementation": "static"}):
            assert torch.equal(on_gpu.generate(ids[:, :16].cuda(), **greedy, **caches).cpu(), written)
