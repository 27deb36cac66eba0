# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Every cell, and cells of one's own, by every solver and backend, against the cell's function in a loop."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from lrcssm_hf import Cell, backends, cell_scan, cells, recurrence
from lrcssm_hf.cell_compiler import CellError
from problems import (
    cast_cell_problem,
    cell_definition,
    cell_leaves,
    cell_outputs_and_gradients,
    map_tensors,
    random_cell_problem,
    relative_error,
)


@Cell
def leaky(x, drive, *, leak, gain):
    """A cell of one's own: ten lines of Python are a parallel, differentiable scan."""
    return gain * torch.tanh(drive) - torch.sigmoid(leak) * x


def _pendulum(angle, speed, torque, *, length, friction):
    return speed, torque - length.exp() * torch.sin(angle) - friction.exp() * speed


pendulum = Cell(_pendulum, states=2)
CELLS = {cell.name: cell for cell in vars(cells).values() if isinstance(cell, Cell)} | {
    "leaky": leaky,
    "pendulum": pendulum,
}
every_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
some_cells = pytest.mark.parametrize(
    "cell", [cells.LRC, cells.LSTM, cells.OSCILLATING_LRC, pendulum], ids=lambda cell: cell.name
)
no_numba = isinstance(backends.kernels_of("cpu"), str)
needs_numba = pytest.mark.skipif(no_numba, reason="numba is not installed")
plain_and_full = pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])


def problem_of(cell, *shape, **options):
    if cell is pendulum:
        inputs, parameters, others = random_cell_problem(cell, *shape, **options)
        with torch.no_grad():
            parameters["length"].mul_(0.3).sub_(2)
            parameters["friction"].mul_(0.3).sub_(1)
        return inputs, parameters, others
    return random_cell_problem(cell, *shape, **options)


def assert_close(found, expected, tolerance):
    (states, gradients), (expected_states, expected_gradients) = found, expected
    assert relative_error(states.double(), expected_states.double()) < tolerance
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient.double(), expected_gradient.double()) < tolerance


def expected_of(cell, problem):
    return cell_outputs_and_gradients(functools.partial(cell_definition, cell), problem)


def found_by(cell, problem, **options):
    return cell_outputs_and_gradients(functools.partial(cell_scan, cell, **options), problem)


@plain_and_full
@every_cell
@pytest.mark.parametrize("shape", [(2, 1, 3), (1, 33, 1), (2, 131, 3)], ids=str)
@pytest.mark.parametrize("solver", ["sequential", "newton", "chunked"])
def test_every_cell_by_every_solver(solver, shape, cell, full):
    problem = problem_of(cell, *shape, full=full)
    assert_close(found_by(cell, problem, solver=solver, backend="torch"), expected_of(cell, problem), 1e-9)


@needs_numba
@plain_and_full
@every_cell
@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 70, 17), (1, 40, 1030)], ids=str)
def test_every_cell_by_the_cpu_kernel(shape, cell, full):
    problem = problem_of(cell, *shape, full=full)
    expected = expected_of(cell, problem)
    found = found_by(cell, cast_cell_problem(problem, torch.float32), backend="cpu")
    # The symmetric elastance of unit weights can be negative: the state then grows and amplifies rounding, as does a
    # pendulum that stands on its head.
    assert_close(found, expected, 3e-3 if cell in (cells.LRC_SYMMETRIC, pendulum) else 2e-5)


@every_cell
@pytest.mark.parametrize("solver", ["newton", "chunked"])
def test_parallel_answers_are_right_at_extreme_weights(solver, cell):
    problem = random_cell_problem(cell, 2, 200, 8, full=True, scale=8.0 if cell is not pendulum else 1.0)
    with torch.no_grad():
        inputs, parameters, options = problem
        states, _, info = cell_scan(cell, inputs, parameters, **options, solver=solver, return_info=True)
        expected = cell_scan(cell, inputs, parameters, **options, solver="sequential")[0]
        previous = torch.cat([options["initial_state"].unsqueeze(1), expected[:, :-1]], 1)
    if info.fell_back:
        assert torch.equal(states, expected)
    else:
        # Where errors grow, the answers may differ; the equation holds for both at every step.
        previous = torch.cat([options["initial_state"].unsqueeze(1), states[:, :-1]], 1)
        flat = {name: tensor.detach().flatten(0, 1).unsqueeze(1) for name, tensor in inputs.items()}
        steps = {"time_step": options["time_step"].detach().reshape(-1, 1), "reset": options["reset"].reshape(-1, 1)}
        again = cell_definition(cell, flat, parameters, previous.flatten(0, 1), **steps)
        assert torch.allclose(again.squeeze(1), states.flatten(0, 1), rtol=1e-9, atol=1e-12)


@every_cell
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_numba)])
def test_steps_of_no_time_leave_every_bit(backend, cell):
    """Whatever is read there: also no number, and also a state that has none left."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    inputs, parameters, options = cast_cell_problem(problem_of(cell, 2, 120, 5, full=True), dtype)
    still = options["time_step"] == 0
    with torch.no_grad():
        for tensor in inputs.values():
            tensor[still] = float("nan")
    states, _ = cell_scan(cell, inputs, parameters, **options, backend=backend)
    before = torch.cat([options["initial_state"].unsqueeze(1), states[:, :-1]], 1)
    before = before.masked_fill(options["reset"].view(2, 120, *[1] * (before.dim() - 2)), 0)
    assert torch.equal(states[still], before[still])
    gradients = torch.autograd.grad(states.sum(), [*inputs.values(), *parameters.values(), options["initial_state"]])
    assert all(gradient.isfinite().all() for gradient in gradients)


@needs_numba
@every_cell
def test_bfloat16_inputs_are_solved_in_float32(cell):
    inputs, parameters, options = problem_of(cell, 2, 50, 6, full=True)
    half = {name: tensor.detach().bfloat16() for name, tensor in inputs.items()}
    wide = {name: tensor.float() for name, tensor in half.items()}
    parameters, options = cast_cell_problem((parameters, options), torch.float32)
    states, final_state = cell_scan(cell, half, parameters, **options)
    assert states.dtype == final_state.dtype == torch.float32
    assert torch.equal(states, cell_scan(cell, wide, parameters, **options)[0])


@some_cells
@pytest.mark.parametrize("solver", ["sequential", "newton", "chunked"])
def test_complex_states(solver, cell):
    problem = random_cell_problem(cell, 2, 6, 3, full=True, scale=0.3, dtype=torch.complex128)
    found, expected = found_by(cell, problem, solver=solver), expected_of(cell, problem)
    assert torch.allclose(found[0], expected[0], atol=1e-10)
    for gradient, expected_gradient in zip(found[1], expected[1], strict=True):
        assert torch.allclose(gradient, expected_gradient, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_numba), "triton"])
@pytest.mark.parametrize("name", ["lrc", "gru", "lstm"])
def test_inputs_side_by_side(name, backend):
    """What one projection has made, with the gradient of the whole, equals what is given by name."""
    if backend == "triton" and (torch.cuda.is_available() or isinstance(backends.kernels_of(backend), str)):
        pytest.skip("needs triton's interpreter")
    torch.manual_seed(0)
    cell = cells.REGISTERED[name]
    parameters = {each: torch.randn(5) for each in cell.parameters}
    for count in {len(cell.inputs) - len(cell.defaults), len(cell.inputs)}:
        whole = torch.randn(2, 9, 5 * count, requires_grad=True)
        by_name = dict(zip(cell.inputs, whole.chunk(count, -1)))
        found, expected = (cell_scan(cell, inputs, parameters, backend=backend)[0] for inputs in (whole, by_name))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(states.square().sum(), whole)[0] for states in (found, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("width", [5, 14, 20])
def test_inputs_side_by_side_that_do_not_fit(width):
    parameters = {name: torch.zeros(5) for name in cells.LRC.parameters}
    with pytest.raises(ValueError, match="`inputs`.*2 to 3 inputs.*5 neurons.*forget_input, update_input"):
        cell_scan(cells.LRC, torch.zeros(1, 4, width), parameters)


@some_cells
@plain_and_full
def test_operators_are_what_compilers_expect(full, cell):
    inputs, parameters, options = cast_cell_problem(problem_of(cell, 2, 40, 5, full=full), torch.float32)
    initial = torch.randn(2, len(cell.states), 5, requires_grad=True)
    weights = [parameter.detach().requires_grad_() for parameter in parameters.values()]
    steps = (options.get("time_step"), options.get("reset"), initial if full else None)
    operands = (cell.key(tuple(inputs), full), list(inputs.values()), *steps, weights, torch.float32)
    torch.library.opcheck(recurrence._cell_scan_op, (*operands, "auto", "auto", 1e-6, True))
    states = recurrence._cell_scan_op(*operands, "auto", "auto", 1e-6, False)[0].detach()
    steps = [None if x is None else x.detach() for x in steps]
    detached = (operands[0], [x.detach() for x in operands[1]], *steps, [x.detach() for x in weights])
    torch.library.opcheck(
        recurrence._cell_scan_backward_op, (torch.ones_like(states), initial.detach(), states, *detached, "auto")
    )


@some_cells
def test_compiled_without_breaks(cell):
    problem = cast_cell_problem(problem_of(cell, 2, 40, 5, full=True), torch.float32)

    def scan(inputs, parameters, **options):
        states, final_state = cell_scan(cell, inputs, parameters, **options)
        return states * 1.5, final_state

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert_close(cell_outputs_and_gradients(compiled, problem), cell_outputs_and_gradients(scan, problem), 1e-6)


@some_cells
def test_a_compiled_step_of_decoding(cell):
    inputs, parameters, options = cast_cell_problem(problem_of(cell, 2, 1, 5, full=True), torch.float32)
    with torch.no_grad():
        step = torch.compile(lambda: cell_scan(cell, inputs, parameters, **options), fullgraph=True, backend="eager")
        for found in (step()[0], cell_scan(cell, inputs, parameters, **options)[0]):
            assert torch.allclose(found, cell_definition(cell, inputs, parameters, **options), atol=1e-6)


@some_cells
def test_tangents_are_exact(cell):
    inputs, parameters, options = problem_of(cell, 2, 9, 3, full=True)
    direction = map_tensors(torch.randn_like, (inputs, parameters))

    def tangent(scan):
        with forward_ad.dual_level():
            duals = [
                {name: forward_ad.make_dual(tensor, along[name]) for name, tensor in part.items()}
                for part, along in zip((inputs, parameters), direction)
            ]
            result = scan(*duals, **options)
            return forward_ad.unpack_dual(result[0] if isinstance(result, tuple) else result).tangent

    found = tangent(functools.partial(cell_scan, cell))
    assert torch.allclose(found, tangent(functools.partial(cell_definition, cell)), atol=1e-12)


def test_a_step_of_a_cell_is_its_function():
    assert leaky(torch.tensor(2.0), torch.tensor(0.0), leak=torch.tensor(0.0), gain=torch.tensor(3.0)) == -1.0
    # x + dt * rate, by hand.
    states, final_state = cell_scan(
        leaky,
        {"drive": torch.tensor([[[0.0], [math.inf]]])},
        {"leak": torch.zeros(1), "gain": torch.tensor([3.0])},
        initial_state=torch.tensor([[2.0]]),
        time_step=torch.tensor([[1.0, 0.5]]),
    )
    assert states.flatten().tolist() == [1.0, 2.25] and final_state.item() == 2.25


def test_states_of_a_cell_of_two_are_in_an_axis_of_their_own():
    inputs, parameters, _ = random_cell_problem(cells.LSTM, 2, 5, 3)
    states, final_state = cell_scan(cells.LSTM, inputs, parameters)
    assert states.shape == (2, 5, 2, 3) and final_state.shape == (2, 2, 3)
    assert torch.equal(final_state, states[:, -1])


def test_an_lstm_is_torchs():
    """At diagonal recurrent weights, torch's own LSTM."""
    torch.manual_seed(0)
    size, order = 4, ("input", "forget", "candidate", "output")
    reference = torch.nn.LSTM(3, size, batch_first=True)
    weights = torch.randn(4, size)
    with torch.no_grad():
        reference.weight_hh_l0.copy_(torch.cat([torch.diag(weight) for weight in weights]))
    x = torch.randn(2, 50, 3)
    currents = torch.nn.functional.linear(x, reference.weight_ih_l0, reference.bias_ih_l0 + reference.bias_hh_l0)
    inputs = {f"{name}_input": current for name, current in zip(order, currents.chunk(4, -1))}
    parameters = {f"{name}_weight": weight for name, weight in zip(order, weights)}
    states, final_state = cell_scan(cells.LSTM, inputs, parameters)
    output, (h, c) = reference(x)
    assert torch.allclose(states[:, :, 1], output, atol=1e-5)
    assert torch.allclose(final_state, torch.stack([c[0], h[0]], 1), atol=1e-5)


def test_an_oscillator_turns():
    """With nothing coming in and a closed elastance, by its frequency at every unit of time."""
    cell, size = cells.OSCILLATING_LRC, 3
    frequency = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    parameters = {name: torch.zeros(size, dtype=torch.float64) for name in cell.parameters}
    parameters |= {"frequency": frequency, "elastance_bias": torch.full((size,), -60.0, dtype=torch.float64)}
    inputs = {name: torch.zeros(1, 40, size, dtype=torch.float64) for name in cell.inputs}
    start = torch.tensor([[[1.0] * size, [0.0] * size]], dtype=torch.float64)
    time_step = torch.rand(1, 40, dtype=torch.float64)
    states, _ = cell_scan(cell, inputs, parameters, initial_state=start, time_step=time_step)
    angle = time_step.cumsum(1).unsqueeze(-1) * frequency
    assert torch.allclose(states, torch.stack([angle.cos(), angle.sin()], 2), atol=1e-12)


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, states, message",
    [
        (lambda x, u, *, w: torch.relu(x) * w, 1, r"`torch.relu`.*sigmoid, tanh"),
        (lambda x, u, *, w: x.abs(), 1, "`abs`"),
        (lambda x, u, *, w: x**3, 1, "power 3"),
        (lambda x, u, *, w: u if x > 0 else w, 1, "decision"),
        (lambda x, u, *, w: torch.where(x == 0, u, w), 1, "decision"),
        (lambda x, u, *, w: x * torch.ones(3), 1, "a Tensor"),
        (lambda x, u, *, w: torch.ones(3) * x, 1, "a Tensor"),
        (lambda x, u, *, w: torch.stack([x, u]), 1, "`torch.stack`"),
        (lambda x, u, *, w: torch.softmax(x, dim=-1), 1, "`torch.softmax`"),
        (lambda x, u, *, w: None, 1, "a NoneType"),
        (lambda x, u, *, w: (x, u), 1, "returns 2 values for its 1 state"),
        (lambda x, y, u, *, w: x, 2, "returns 1 value.* for its 2 states"),
        (lambda x, u, *w: x, 1, r"\*w"),
        (lambda x, u, **w: x, 1, r"\*\*w"),
        (lambda x, *, w: x * w, 1, "no input"),
        (lambda x, u: x, 0, "positive whole number"),
        (lambda x, u, *, w=1.0: x, 1, "default for 'w'"),
        (lambda x, u=None, *, w: x, 1, "default of 'u'"),
    ],
)
def test_what_is_no_cell_is_refused_by_name(function, states, message):
    with pytest.raises(CellError, match=f"Cell '<lambda>'.*{message}"):
        Cell(function, states)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda k: k.update(cell=leaky.function), "`cell` must be a `Cell`, got function"),
        (lambda k: k.update(inputs=[k["inputs"]["drive"]]), "`inputs` must be a dict"),
        (lambda k: k["inputs"].update(driver=k["inputs"].pop("drive")), "`inputs` has 'driver'.*drive"),
        (lambda k: k["parameters"].pop("leak"), "`parameters` lacks 'leak'"),
        (lambda k: k["parameters"].update(leak=None), "`parameters.leak` must be a tensor, got NoneType"),
        (lambda k: k["parameters"].update(leak=torch.ones(4)), r"`parameters.leak` must have shape \(3,\)"),
        (lambda k: k["inputs"].update(drive=torch.ones(2, 3)), "`drive` must be .batch, steps, state."),
        (lambda k: k.update(initial_state=torch.ones(2, 1, 3)), r"`initial_state` must have shape \(2, 3\)"),
        (lambda k: k.update(solver="fast"), "`solver` must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, message):
    arguments = {
        "cell": leaky,
        "inputs": {"drive": torch.ones(2, 4, 3)},
        "parameters": {"leak": torch.ones(3), "gain": torch.ones(3)},
    }
    change(arguments)
    with pytest.raises(ValueError, match=message):
        cell_scan(**arguments)


def test_two_states_want_two_initial_ones():
    inputs, parameters, _ = random_cell_problem(cells.LSTM, 2, 5, 3)
    with pytest.raises(ValueError, match=r"`initial_state` must have shape \(2, 2, 3\), got \(2, 3\)"):
        cell_scan(cells.LSTM, inputs, parameters, initial_state=torch.zeros(2, 3))


def test_an_input_that_is_left_out_is_its_default():
    inputs, parameters, _ = random_cell_problem(cells.LRC, 2, 5, 3)
    zeros = torch.zeros(2, 5, 3, dtype=torch.float64)
    expected = cell_scan(cells.LRC, {**inputs, "elastance_input": zeros}, parameters)[0]
    for given in (inputs, {**inputs, "elastance_input": None}):
        assert torch.equal(cell_scan(cells.LRC, given, parameters)[0], expected)


def test_two_cells_of_one_name_are_two():
    first, second = (Cell(eval(f"lambda x, u, *, w: u * w {sign} x")) for sign in "+-")
    inputs, parameters = {"u": torch.ones(1, 3, 1)}, {"w": torch.ones(1)}
    assert cell_scan(first, inputs, parameters)[0].flatten().tolist() == [1, 3, 7]
    assert cell_scan(second, inputs, parameters)[0].flatten().tolist() == [1, 1, 1]


# --- Kernels on disk ------------------------------------------------------------------------------------------------

CACHED = """
import torch
from lrcssm_hf import Cell, cell_scan

cell = Cell(lambda x, u, *, w: (u * w).tanh() - x)
states, _ = cell_scan(cell, {"u": torch.ones(1, 50, 2)}, {"w": torch.ones(2)})
assert torch.allclose(states, torch.ones(2).tanh()), states
"""


@needs_numba
def test_kernels_of_a_cell_are_kept_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    before = None
    for _ in range(2):
        subprocess.run([sys.executable, "-c", CACHED], check=True)
        written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        names = sorted(path.suffix for path in written)
        assert {".py", ".nbi", ".nbc"} <= set(names)
        assert before in (None, written), "the second process has compiled again"
        before = written


@needs_numba
def test_without_a_place_to_write_kernels_are_compiled_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    result = subprocess.run([sys.executable, "-c", CACHED], check=True, capture_output=True, text=True)
    assert "compiled anew in every process" in result.stderr


def test_leaves_are_all_differentiated():
    problem = problem_of(pendulum, 1, 4, 2, full=True)
    assert len(found_by(pendulum, problem)[1]) == len(cell_leaves(problem)) == 5
