# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The liquid-resistance liquid-capacitance recurrence and the linear scan under it, in plain PyTorch.

This file is the definition (`lrc_step`), the solvers that apply it to a whole sequence, and the adjoint. Other backends
implement the same two operators faster and are tested against this one.

    x_t = x_{t-1} + dt_t * eps(x_{t-1}) * v(x_{t-1})            arXiv 2505.21717, section 3

Notation, as in the paper: `f` is the forget conductance, `z` the update drive, `eps` the elastance (the inverse of a
capacitance), `v` the membrane velocity. Every product is elementwise, so the Jacobian dx_t/dx_{t-1} is diagonal and a
sequence is solved by prefix scans. Shapes: B batch, T steps, D state.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import numbers
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .context_parallel import scan_over_ranks


logger = logging.getLogger(__name__)

SOLVERS = ("auto", "sequential", "newton", "chunked")
BACKENDS = ("auto", "torch", "cpu", "triton")

# Operators are global, and transformers makes a copy of this file for every Hub model's code: each has its own. Torch
# takes ASCII only, in which two folders' names may look the same.
_NAMESPACE = f"{re.sub(r'[^a-zA-Z0-9_]', '_', __name__)}_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"
# Newton either converges in a handful of iterations or does not converge in time to be worth waiting for.
_MAX_NEWTON_ITERATIONS = 30
# Below this many steps a Python loop costs no more than the parallel solvers' bookkeeping.
_SHORT_SEQUENCE = 32


class LrcParameters(NamedTuple):
    """The parameters of the state's own dynamics, each of shape (D,), real or complex.

    `elastance_shift` set selects the symmetric elastance sigmoid(e + shift) - sigmoid(e - shift); None selects the
    asymmetric elastance sigmoid(e).
    """

    activation_scale: Tensor
    activation_shift: Tensor
    forget_weight: Tensor
    update_weight: Tensor
    leak_conductance: Tensor
    leak_potential: Tensor
    elastance_weight: Tensor
    elastance_bias: Tensor
    elastance_shift: Tensor | None = None


class LrcScanInfo(NamedTuple):
    """How a scan was solved.

    `iterations`: Newton iterations or chunk sweeps. `residual`: the largest |x_t - F(x_{t-1})| / max(|x_t|, |x_{t-1}|)
    of the parallel solver's last iterate (0 where the recurrence was evaluated step by step). `fell_back`: the parallel
    solver did not reach the tolerance and the returned states are those of `sequential`.
    """

    solver: str
    iterations: int
    residual: float
    fell_back: bool


# --- The cell -------------------------------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """What one evaluation of the cell computes, kept for its derivatives."""

    activation: Tensor  # n(x)
    forget_gate: Tensor  # sigmoid(f)
    update: Tensor  # tanh(z)
    elastance: Tensor  # eps
    elastance_slope: Tensor  # d eps / d e
    elastance_shift_slope: Tensor | None  # d eps / d shift
    velocity: Tensor  # v


def _cell(state, forget_input, update_input, elastance_input, p: LrcParameters) -> _Cell:
    activation = torch.sigmoid(p.activation_scale * (state - p.activation_shift))
    forget_gate = torch.sigmoid(p.leak_conductance + forget_input + p.forget_weight * activation)
    update = torch.tanh(p.leak_conductance + update_input + p.update_weight * activation)
    drive = p.elastance_weight * state + p.elastance_bias
    if elastance_input is not None:
        drive = drive + elastance_input
    if p.elastance_shift is None:
        elastance = torch.sigmoid(drive)
        slope, shift_slope = elastance * (1 - elastance), None
    else:
        upper, lower = torch.sigmoid(drive + p.elastance_shift), torch.sigmoid(drive - p.elastance_shift)
        elastance = upper - lower
        upper_slope, lower_slope = upper * (1 - upper), lower * (1 - lower)
        slope, shift_slope = upper_slope - lower_slope, upper_slope + lower_slope
    velocity = p.leak_potential * update - forget_gate * state
    return _Cell(activation, forget_gate, update, elastance, slope, shift_slope, velocity)


def _advance(state, cell: _Cell, time_step):
    if time_step is None:
        return state + cell.elastance * cell.velocity
    # `where`, because 0 * inf is NaN: a step of no time must leave even an overflowing neighbour's state alone.
    return torch.where(time_step == 0, state, state + time_step * cell.elastance * cell.velocity)


def _jacobian(state, cell: _Cell, time_step, p: LrcParameters):
    """dx_t/dx_{t-1}, elementwise."""
    n, gate, update = cell.activation, cell.forget_gate, cell.update
    through_activation = (
        p.leak_potential * (1 - update * update) * p.update_weight - state * gate * (1 - gate) * p.forget_weight
    )
    velocity_slope = through_activation * p.activation_scale * n * (1 - n) - gate
    slope = cell.elastance * velocity_slope + cell.elastance_slope * p.elastance_weight * cell.velocity
    return 1 + slope if time_step is None else 1 + time_step * slope


def lrc_step(
    state: Tensor,
    forget_input: Tensor,
    update_input: Tensor,
    parameters: LrcParameters,
    *,
    elastance_input: Tensor | None = None,
    time_step: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence, differentiable by autograd: the definition every solver and kernel is held to.

    Args:
        state: x_{t-1}, (..., D).
        forget_input, update_input, elastance_input: c_t, d_t and q_t, broadcastable to the state.
        parameters: see `LrcParameters`.
        time_step: dt_t, broadcastable to the state; None means 1.

    Returns:
        x_t, (..., D).

    Raises:
        ValueError: an argument is no tensor, or of a shape that would make the state another; the message names it.
    """
    _require_tensor("state", state)
    operands = {"forget_input": forget_input, "update_input": update_input, **_named(parameters)}
    optional = {"elastance_input": elastance_input, "time_step": time_step}
    operands |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, tensor in operands.items():
        _require_tensor(name, tensor, state)
        sizes = zip(reversed(tensor.shape), reversed(state.shape))
        if tensor.dim() > state.dim() or not all(size in (1, wanted) for size, wanted in sizes):
            raise ValueError(
                f"`{name}` must be broadcastable to the state's shape {tuple(state.shape)}, got {tuple(tensor.shape)}."
            )
    return _advance(state, _cell(state, forget_input, update_input, elastance_input, parameters), time_step)


class _Problem(NamedTuple):
    """One scan's operands in the working dtype; `time_step` (B, T, 1) real, `reset` (B, T, 1) bool."""

    forget_input: Tensor
    update_input: Tensor
    elastance_input: Tensor | None
    time_step: Tensor | None
    reset: Tensor | None
    parameters: LrcParameters

    def at(self, step: int) -> _Problem:
        """The operands of one step, without the time axis (the last but one)."""
        return self.map(lambda x: x.select(-2, step))

    def map(self, function) -> _Problem:
        """`function` applied to every operand that has a time axis."""
        return _Problem(*(None if x is None else function(x) for x in self[:-1]), self.parameters)

    def evaluate(self, previous: Tensor) -> tuple[Tensor, _Cell]:
        """The states before the step with resets applied, and the cell there."""
        if self.reset is not None:
            previous = torch.where(self.reset, 0, previous)
        return previous, _cell(previous, self.forget_input, self.update_input, self.elastance_input, self.parameters)

    def advance(self, previous: Tensor) -> Tensor:
        """F(x_{t-1})."""
        previous, cell = self.evaluate(previous)
        return _advance(previous, cell, self.time_step)

    def linearise(self, previous: Tensor) -> tuple[Tensor, Tensor]:
        """F(x_{t-1}) and dF/dx_{t-1}."""
        previous, cell = self.evaluate(previous)
        return _advance(previous, cell, self.time_step), self.jacobian(previous, cell)

    def jacobian(self, previous: Tensor, cell: _Cell) -> Tensor:
        jacobian = _jacobian(previous, cell, self.time_step, self.parameters)
        return jacobian if self.reset is None else torch.where(self.reset, 0, jacobian)


def _shift(states: Tensor, initial_state: Tensor) -> Tensor:
    """x_0 .. x_{T-1} from x_1 .. x_T and x_0."""
    return torch.cat([initial_state.unsqueeze(1), states[:, :-1]], dim=1)


def _residual(states: Tensor, previous: Tensor, target: Tensor) -> float:
    """The largest |x_t - F(x_{t-1})| in units of the states themselves, which may be small everywhere."""
    scale = torch.maximum(states.abs(), previous.abs()).clamp(min=torch.finfo(states.dtype).tiny)
    error = (states - target).abs() / scale
    # Anything that is not a number is no solution: it must not compare as small.
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if error.numel() else 0.0


def last_changes(time_step: Tensor, reset: Tensor | None) -> Tensor:
    """(B, T): for every step the last one, counted from 1, that took time or was reset; 0 where there was none."""
    changed = time_step != 0 if reset is None else (time_step != 0) | reset
    steps = torch.arange(1, time_step.shape[1] + 1, device=time_step.device)
    return torch.where(changed, steps, 0).cummax(dim=1).values


def _hold(states: Tensor, initial_state: Tensor, problem: _Problem) -> Tensor:
    """The states with those of steps of no time made bit for bit what they were before, not just to the tolerance."""
    if problem.time_step is None:
        return states
    reset = None if problem.reset is None else problem.reset.squeeze(-1)
    last_change = last_changes(problem.time_step.squeeze(-1), reset).unsqueeze(-1)
    return torch.cat([initial_state.unsqueeze(1), states], dim=1).gather(1, last_change.expand_as(states))


# --- Solvers --------------------------------------------------------------------------------------------------------


def _solve_sequential(problem: _Problem, initial_state: Tensor) -> Tensor:
    state, states = initial_state, []
    for step in range(problem.forget_input.shape[1]):
        state = problem.at(step).advance(state)
        states.append(state)
    return torch.stack(states, dim=1)


def _solve_newton(problem: _Problem, initial_state: Tensor, tolerance: float) -> tuple[Tensor, int, float]:
    """DEER: linearise every step around the current guess and solve all of them with one prefix scan.

    The scan runs on the correction, not on the state, so that its rounding errors vanish with it.
    """
    states = torch.zeros_like(problem.forget_input)
    for iteration in range(_MAX_NEWTON_ITERATIONS + 1):
        previous = _shift(states, initial_state)
        target, jacobian = problem.linearise(previous)
        residual = _residual(states, previous, target)
        if residual <= tolerance or iteration == _MAX_NEWTON_ITERATIONS or not states.isfinite().all():
            break
        states = states + _scan_torch(jacobian, target - states, torch.zeros_like(initial_state))
    return states, iteration, residual


def _solve_chunked(problem: _Problem, initial_state: Tensor, tolerance: float) -> tuple[Tensor, int, float]:
    """Multiple shooting: exact chunks from guessed starts, and Newton on the chunk boundaries only.

    A sweep runs the recurrence through all chunks at once and returns each chunk's end and the product of its
    Jacobians; a scan over the chunks then corrects the starts. After k sweeps the first k chunks are exact, so it ends
    after at most as many sweeps as there are chunks.
    """
    batch, length, size = problem.forget_input.shape
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)
    padding = count * chunk - length
    if padding and problem.time_step is None:
        problem = problem._replace(time_step=initial_state.real.new_ones(batch, length, 1))
    # Padded steps take no time and leave the state as it is.
    chunks = problem.map(lambda x: F.pad(x, (0, 0, 0, padding)).unflatten(1, (count, chunk)))
    steps = [chunks.at(step) for step in range(chunk)]

    starts = torch.cat([initial_state.unsqueeze(1), initial_state.new_zeros(batch, count - 1, size)], dim=1)
    for sweep in range(1, count + 1):
        state, product, trajectory = starts, torch.ones_like(starts), []
        for step in steps:
            state, jacobian = step.linearise(state)
            product = product * jacobian
            trajectory.append(state)
        ends = state[:, :-1]
        # The recurrence holds inside the chunks by construction; what is left to check is the step into each chunk.
        residual = _residual(trajectory[0][:, 1:], ends, steps[0].map(lambda x: x[:, 1:]).advance(ends))
        if residual <= tolerance or sweep == count:
            break
        mismatch = torch.where(ends.isfinite(), ends - starts[:, 1:], 0)
        product = torch.where(product.isfinite(), product, 0)[:, :-1]
        zeros = torch.zeros_like(initial_state)
        corrections = _shift(_scan_loop(product, mismatch, zeros), zeros)
        corrected = ends + product * corrections
        starts = torch.cat([starts[:, :1], torch.where(corrected.isfinite(), corrected, 0)], dim=1)
    states = torch.stack(trajectory, dim=2).flatten(1, 2)[:, :length]
    return states, sweep, residual


def _solve(problem: _Problem, initial_state: Tensor, solver: str, tolerance: float) -> tuple[Tensor, LrcScanInfo]:
    """The states by `solver`, or by the definition where the solver does not get there."""
    if solver == "auto":
        solver = "sequential" if problem.forget_input.shape[1] <= _SHORT_SEQUENCE else "chunked"
    if solver == "sequential":
        return _solve_sequential(problem, initial_state), LrcScanInfo(solver, 1, 0.0, False)
    states, iterations, residual = {"newton": _solve_newton, "chunked": _solve_chunked}[solver](
        problem, initial_state, tolerance
    )
    if residual <= tolerance:
        return _hold(states, initial_state, problem), LrcScanInfo(solver, iterations, residual, False)
    return _solve_sequential(problem, initial_state), LrcScanInfo(solver, iterations, residual, True)


# --- The linear scan ------------------------------------------------------------------------------------------------


def _scan_loop(decay: Tensor, inputs: Tensor, initial_state: Tensor) -> Tensor:
    """h_t = decay_t * h_{t-1} + inputs_t along axis 1: the definition."""
    state, states = initial_state, []
    for decay_t, input_t in zip(decay.unbind(1), inputs.unbind(1)):
        state = decay_t * state + input_t
        states.append(state)
    return torch.stack(states, dim=1) if states else torch.empty_like(inputs)


def _scan_torch(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool = False) -> Tensor:
    """The same in O(sqrt(T)) vectorised steps: all chunks at once, then their carries, then all chunks again."""
    if reverse:
        return _scan_torch(decay.flip(1), inputs.flip(1), initial_state).flip(1)
    length = inputs.shape[1]
    if length <= _SHORT_SEQUENCE:
        return _scan_loop(decay, inputs, initial_state)
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)
    padding = (0, 0, 0, count * chunk - length)
    # Chunks become rows of the batch for `_scan_loop`: (B, count, chunk, D) -> (B * count, chunk, D), and back.
    decay_chunks = F.pad(decay, padding).unflatten(1, (count, chunk)).flatten(0, 1)
    input_chunks = F.pad(inputs, padding).unflatten(1, (count, chunk)).flatten(0, 1)
    products = decay_chunks.prod(dim=1)
    if not products.isfinite().all():
        # The carries of an expanding recurrence can be finite where the products of its factors are not.
        return _scan_loop(decay, inputs, initial_state)
    ends = _scan_loop(decay_chunks, input_chunks, torch.zeros_like(products))[:, -1]
    carries = _scan_loop(products.unflatten(0, (-1, count)), ends.unflatten(0, (-1, count)), initial_state)
    states = _scan_loop(decay_chunks, input_chunks, _shift(carries, initial_state).flatten(0, 1))
    return states.unflatten(0, (-1, count)).flatten(1, 2)[:, :length]


@torch.library.custom_op(f"{_NAMESPACE}::prefix_scan", mutates_args=())
def _prefix_scan_op(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    states = _by_kernels("prefix_scan", "auto", initial_state, decay, inputs, initial_state, reverse)
    if states is None:
        dtype = initial_state.dtype
        states = _scan_torch(decay.to(dtype), inputs.to(dtype), initial_state, reverse).contiguous()
    return states


@_prefix_scan_op.register_fake
def _(decay, inputs, initial_state, reverse):
    return initial_state.new_empty(inputs.shape)


def _prefix_scan_setup(ctx, inputs, output):
    decay, addends, initial_state, ctx.reverse = inputs
    ctx.save_for_backward(decay, initial_state, output)
    ctx.dtypes = decay.dtype, addends.dtype


def _prefix_scan_backward(ctx, grad_states):
    """The adjoint of a scan is the scan the other way: lam_t = g_t + conj(decay_{t+1}) lam_{t+1}."""
    decay, initial_state, states = ctx.saved_tensors
    decay = _conjugate(decay.to(states.dtype))
    zeros = torch.zeros_like(initial_state)
    if ctx.reverse:
        previous, last = torch.cat([states[:, 1:], initial_state.unsqueeze(1)], dim=1), -1
    else:
        previous, last = _shift(states, initial_state), 0
    if decay.stride(1) == 0:
        # One decay for all steps stays one: the step that has none after it multiplies a zero adjoint.
        following = decay
    elif ctx.reverse:
        following = torch.cat([zeros.unsqueeze(1), decay[:, :-1]], dim=1)
    else:
        following = torch.cat([decay[:, 1:], zeros.unsqueeze(1)], dim=1)
    adjoint = _prefix_scan(following, grad_states.contiguous(), zeros, not ctx.reverse)
    decay_dtype, inputs_dtype = ctx.dtypes
    grad_decay = (adjoint * _conjugate(previous)).to(decay_dtype)
    return grad_decay, adjoint.to(inputs_dtype), decay[:, last] * adjoint[:, last], None


def _conjugate(tensor: Tensor) -> Tensor:
    """The complex conjugate, written out; what an expanded tensor repeats is written once and stays repeated."""
    if not tensor.is_complex():
        return tensor
    once = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
    return once.conj().resolve_conj().expand_as(tensor)


_prefix_scan_op.register_autograd(_prefix_scan_backward, setup_context=_prefix_scan_setup)


def _prefix_scan(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    if not _is_transformed():
        return _prefix_scan_op(decay, inputs, initial_state, reverse)
    if reverse:
        return _prefix_scan(decay.flip(1), inputs.flip(1), initial_state, False).flip(1)
    return _scan_loop(decay.to(initial_state.dtype), inputs.to(initial_state.dtype), initial_state)


def prefix_scan(
    decay: Tensor,
    inputs: Tensor,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The linear recurrence h_t = decay_t * h_{t-1} + inputs_t for all t, differentiable in every tensor argument.

    Args:
        decay, inputs: (B, T, D), real or complex.
        initial_state: h_0 (for `reverse`, h_{T+1}), (B, D); zero by default. Whole numbers and booleans count as what
            they are worth, here as everywhere.
        reverse: run from the last step to the first, h_t = decay_t * h_{t+1} + inputs_t.
        group: the ranks over which a sequence is spread, as for [`lrc_scan`]; forwards, and for real numbers.

    Returns:
        The states h_1 .. h_T, (B, T, D), in the widest of the arguments' dtypes and at least float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument and the fix.
    """
    _require_sequence("inputs", inputs)
    _require_tensor("decay", decay, inputs, inputs.shape)
    if initial_state is not None:
        _require_tensor("initial_state", initial_state, inputs, (inputs.shape[0], inputs.shape[2]))
    dtype = _working_dtype(decay, inputs, initial_state)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], inputs.shape[2], dtype=dtype)
    decay, inputs, initial_state = _operand(decay, dtype), _operand(inputs, dtype), _operand(initial_state, dtype)
    if group is not None:
        _check_spread("reverse", reverse, dtype)

        def scan(operands: dict[str, Tensor], _, start: Tensor) -> tuple[Tensor, Tensor]:
            states = prefix_scan(**operands, initial_state=start)
            return states, states[:, -1] if states.shape[1] else start

        operands = {"decay": decay, "inputs": inputs}
        return scan_over_ranks(scan, group, operands, (), initial_state.to(dtype), _rounding(dtype))[0]
    if inputs.shape[1] == 0:
        return inputs.to(dtype)
    return _prefix_scan(decay, inputs, initial_state.to(dtype), reverse)


# --- The nonlinear scan ---------------------------------------------------------------------------------------------
# The operators take the parameters as one (8 or 9, D) tensor, so that autograd sees a fixed number of arguments.


def _make_problem(forget_input, update_input, elastance_input, time_step, reset, weights) -> _Problem:
    inputs = [None if x is None else x.to(weights.dtype) for x in (forget_input, update_input, elastance_input)]
    if time_step is not None:
        time_step = time_step.to(weights.real.dtype).unsqueeze(-1)
        # What a step of no time would have read must not matter, not even to the gradients, where 0 * NaN is NaN.
        inputs = [None if x is None else torch.where((time_step == 0) & ~x.isfinite(), 0, x) for x in inputs]
    reset = None if reset is None else reset.unsqueeze(-1)
    return _Problem(*inputs, time_step, reset, LrcParameters(*weights.unbind()))


@torch.library.custom_op(f"{_NAMESPACE}::lrc_scan", mutates_args=())
def _lrc_scan_op(
    forget_input: Tensor,
    update_input: Tensor,
    elastance_input: Tensor | None,
    time_step: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor,
    weights: Tensor,
    solver: str,
    backend: str,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(states, final_state, [iterations, residual, fell_back, index of the solver])."""
    operands = (forget_input, update_input, elastance_input, time_step, reset)
    results = _by_kernels("lrc_scan", backend, weights, *operands, initial_state, weights, solver, tolerance)
    if results is None:
        states, info = _solve(_make_problem(*operands, weights), initial_state, solver, tolerance)
        numbers = [info.iterations, info.residual, info.fell_back, SOLVERS.index(info.solver)]
        results = states, torch.tensor(numbers, dtype=torch.float32, device=weights.device)
    states, numbers = results
    return states.contiguous(), states[:, -1].clone(), numbers


@_lrc_scan_op.register_fake
def _(forget_input, update_input, elastance_input, time_step, reset, initial_state, weights, *options):
    states = forget_input.new_empty(forget_input.shape, dtype=weights.dtype)
    numbers = torch.empty(4, dtype=torch.float32, device=weights.device)
    return states, initial_state.new_empty(initial_state.shape), numbers


@torch.library.custom_op(f"{_NAMESPACE}::lrc_scan_backward", mutates_args=())
def _lrc_scan_backward_op(
    grad_states: Tensor,
    states: Tensor,
    forget_input: Tensor,
    update_input: Tensor,
    elastance_input: Tensor | None,
    time_step: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor,
    weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (forget_input, update_input, elastance_input, time_step, initial_state, weights).

    The adjoint lam_t = g_t + J_{t+1} lam_{t+1} is linear: everything but one reverse scan is elementwise. Gradients of
    absent arguments are empty tensors.
    """
    operands = (forget_input, update_input, elastance_input, time_step, reset)
    gradients = _by_kernels(
        "lrc_scan_backward", backend, weights, grad_states, states, *operands, initial_state, weights
    )
    if gradients is not None:
        return gradients
    if weights.is_complex():
        # The cell is holomorphic: its conjugated derivatives are its derivatives at the conjugated arguments.
        states, forget_input, update_input = states.conj(), forget_input.conj(), update_input.conj()
        elastance_input = None if elastance_input is None else elastance_input.conj()
        initial_state, weights = initial_state.conj().resolve_conj(), weights.conj()
    problem = _make_problem(forget_input, update_input, elastance_input, time_step, reset, weights)
    p, step = problem.parameters, problem.time_step
    previous, cell = problem.evaluate(_shift(states, initial_state))
    jacobian = problem.jacobian(previous, cell)
    following = torch.cat([jacobian[:, 1:], torch.zeros_like(jacobian[:, :1])], dim=1)
    adjoint = _scan_torch(following, grad_states, torch.zeros_like(initial_state), reverse=True)

    grad_increment = adjoint if step is None else adjoint * step
    grad_elastance = grad_increment * cell.velocity
    grad_velocity = grad_increment * cell.elastance
    grad_drive = grad_elastance * cell.elastance_slope
    grad_f = -grad_velocity * previous * cell.forget_gate * (1 - cell.forget_gate)
    grad_z = grad_velocity * p.leak_potential * (1 - cell.update * cell.update)
    grad_activation = grad_f * p.forget_weight + grad_z * p.update_weight
    grad_synapse = grad_activation * cell.activation * (1 - cell.activation)
    grad_parameters = LrcParameters(
        activation_scale=grad_synapse * (previous - p.activation_shift),
        activation_shift=-grad_synapse * p.activation_scale,
        forget_weight=grad_f * cell.activation,
        update_weight=grad_z * cell.activation,
        leak_conductance=grad_f + grad_z,
        leak_potential=grad_velocity * cell.update,
        elastance_weight=grad_drive * previous,
        elastance_bias=grad_drive,
        elastance_shift=None if p.elastance_shift is None else grad_elastance * cell.elastance_shift_slope,
    )
    if time_step is None:
        grad_time_step = grad_states.new_empty(0)
    else:
        grad_time_step = (adjoint * cell.elastance * cell.velocity).real.sum(-1).to(time_step.dtype)
    return (
        grad_f.to(forget_input.dtype),
        grad_z.to(update_input.dtype),
        grad_states.new_empty(0) if elastance_input is None else grad_drive.to(elastance_input.dtype),
        grad_time_step,
        jacobian[:, 0] * adjoint[:, 0],
        torch.stack([grad.sum((0, 1)) for grad in grad_parameters if grad is not None]),
    )


@_lrc_scan_backward_op.register_fake
def _(grad_states, states, forget_input, update_input, elastance_input, time_step, reset, initial_state, weights, _):
    arguments = (forget_input, update_input, elastance_input, time_step, initial_state, weights)
    return tuple(grad_states.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments)


def _lrc_scan_setup(ctx, inputs, output):
    *operands, _, ctx.backend, _ = inputs
    ctx.save_for_backward(output[0], *operands)
    ctx.set_materialize_grads(False)


def _lrc_scan_autograd(ctx, grad_states, grad_final_state, grad_info):
    if _in_forward_mode():
        raise NotImplementedError("Forward mode has to begin before `lrc_scan` is called, not before going back only.")
    states, *operands = ctx.saved_tensors
    grad_states = torch.zeros_like(states) if grad_states is None else grad_states
    if grad_final_state is not None:
        grad_states = torch.cat([grad_states[:, :-1], (grad_states[:, -1] + grad_final_state).unsqueeze(1)], dim=1)
    forget, update, elastance, time_step, initial_state, weights = _lrc_scan_backward_op(
        grad_states, states, *operands, ctx.backend
    )
    elastance = None if operands[2] is None else elastance
    time_step = None if operands[3] is None else time_step
    return forget, update, elastance, time_step, None, initial_state, weights, None, None, None


_lrc_scan_op.register_autograd(_lrc_scan_autograd, setup_context=_lrc_scan_setup)


def lrc_scan(
    forget_input: Tensor,
    update_input: Tensor,
    parameters: LrcParameters,
    *,
    elastance_input: Tensor | None = None,
    initial_state: Tensor | None = None,
    time_step: Tensor | None = None,
    reset: Tensor | None = None,
    solver: str = "auto",
    backend: str = "auto",
    tolerance: float | None = None,
    return_info: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LrcScanInfo]:
    """All states of the LRC recurrence, exactly; differentiable in every floating-point argument.

    In forward mode (`torch.autograd.forward_ad`) and inside the transforms of `torch.func`, the definition is evaluated
    step by step, whatever `solver` and `backend`: slowly, and with derivatives of every order.

    Args:
        forget_input, update_input: c_t and d_t, (B, T, D): the sensory currents into forget gate and update.
        parameters: the state's own dynamics, see `LrcParameters`.
        elastance_input: q_t, (B, T, D): lets the input decide whether a neuron holds its state or changes it.
        initial_state: x_0, (B, D); zero by default.
        time_step: dt_t, (B, T), real, elapsed time in units of the training step; 1 by default. Where it is 0 the state
            is left bit for bit as it was. Its values are not looked at, which on a GPU would have to wait: the equation
            holds for a negative one too, and the state after one that is not a number is not a number either.
        reset: (B, T) bool; where it is set, the state before that step counts as zero.
        solver: `sequential` evaluates the definition; `newton` linearises all steps at once (DEER); `chunked` runs
            exact chunks in parallel and matches their boundaries; `auto` picks. All give the same states: a parallel
            solver that does not reach the tolerance is replaced by `sequential`.
        backend: `torch` runs anywhere; `cpu` is the compiled float32 kernel, which solves sequentially; `triton` are
            the kernels for GPUs, in float32 and float64; `auto` takes the kernels where they apply.
        tolerance: largest |x_t - F(x_{t-1})| / max(|x_t|, |x_{t-1}|) accepted from a parallel solver, positive and
            finite; by default 16 units of rounding of the working dtype.
        return_info: also return an `LrcScanInfo`.
        group: the ranks over which a sequence is spread, in its order: what is passed are this rank's steps, of any
            number, and the same parameters and initial state on all ranks. States and gradients are those of the whole
            sequence, and the final state is that after this rank's steps. A gradient of the parameters is this rank's
            share, to be summed over the group; that of the initial state is on the first rank. All ranks have to call
            this, and go back through it, together.

    Returns:
        states (B, T, D) and final_state (B, D), in the widest dtype of inputs, parameters and initial state, at least
        float32. Whole numbers and booleans count as what they are worth. With `return_info`, the info as a third item.
        Second derivatives are not implemented and raise.

    Raises:
        ValueError: an argument is no tensor, or its shape, dtype, device or value does not fit; the message names it
            and the fix.
        RuntimeError: a kernel of the `backend` that was asked for does not compile or run. On `auto`, PyTorch takes
            over with a warning.
    """
    _require_sequence("forget_input", forget_input)
    batch, length, size = forget_input.shape
    _require_tensor("update_input", update_input, forget_input, (batch, length, size))
    for name, parameter in _named(parameters).items():
        _require_tensor(name, parameter, forget_input, (size,))
    optional = {
        "elastance_input": (elastance_input, (batch, length, size)),
        "initial_state": (initial_state, (batch, size)),
        "time_step": (time_step, (batch, length)),
        "reset": (reset, (batch, length)),
    }
    for name, (tensor, shape) in optional.items():
        if tensor is not None:
            _require_tensor(name, tensor, forget_input, shape)
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"`reset` must be bool, got {reset.dtype}; pass `reset.bool()`.")
    if time_step is not None and time_step.is_complex():
        raise ValueError(f"`time_step` must be real, got {time_step.dtype}; pass `time_step.real`.")
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if tolerance is not None and not (isinstance(tolerance, numbers.Real) and 0 < tolerance < math.inf):
        raise ValueError(f"`tolerance` must be a positive finite number, got {tolerance!r}; None is a good one.")

    dtype = _working_dtype(forget_input, update_input, elastance_input, initial_state, *parameters)
    forget_input, update_input = _operand(forget_input, dtype), _operand(update_input, dtype)
    elastance_input, initial_state = _operand(elastance_input, dtype), _operand(initial_state, dtype)
    time_step, reset = _operand(time_step, dtype), _operand(reset, torch.bool)
    time_step = None if time_step is None else time_step.real
    if group is not None:
        _check_spread("return_info", return_info, dtype)
        if initial_state is None:
            initial_state = torch.zeros(batch, size, dtype=dtype, device=forget_input.device)
        inputs = {"forget_input": forget_input, "update_input": update_input, "elastance_input": elastance_input}
        inputs |= {"time_step": time_step, "reset": reset}
        parameters = [_operand(parameter, dtype) for parameter in parameters]

        def scan(inputs: dict[str, Tensor], parameters: list[Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
            options = {"solver": solver, "backend": backend, "tolerance": tolerance}
            return lrc_scan(**inputs, parameters=LrcParameters(*parameters), initial_state=start, **options)

        accepted = _rounding(dtype) if tolerance is None else tolerance
        return scan_over_ranks(scan, group, inputs, parameters, initial_state.to(dtype), accepted)
    weights = torch.stack([parameter.to(dtype) for parameter in parameters if parameter is not None])
    initial_state = weights.new_zeros(batch, size) if initial_state is None else initial_state.to(dtype)
    operands = (forget_input, update_input, elastance_input, time_step, reset)

    if solver not in ("auto", "sequential"):
        if backend == "cpu":
            raise ValueError(f"backend 'cpu' solves sequentially, not by {solver!r}: use solver or backend 'auto'.")
        if backend == "auto" and weights.device.type == "cpu":
            backend = "torch"
    if backend not in ("auto", "torch"):
        _require_kernels("lrc_scan", backend, weights)

    if length == 0:
        states, final_state = weights.new_empty(batch, 0, size), initial_state
        info = LrcScanInfo(solver, 0, 0.0, False)
    elif _is_transformed():
        states = _solve_sequential(_make_problem(*operands, weights), initial_state)
        final_state, info = states[:, -1].clone(), LrcScanInfo("sequential", 1, 0.0, False)
    elif length == 1 and not return_info and not torch.is_grad_enabled():
        # Decoding: one plain step, which compilers can fuse with its neighbours.
        states = _make_problem(*operands, weights).advance(initial_state.unsqueeze(1))
        final_state = states[:, -1].clone()
    else:
        tolerance = _rounding(dtype) if tolerance is None else float(tolerance)
        states, final_state, log = _lrc_scan_op(*operands, initial_state, weights, solver, backend, tolerance)
        if return_info:
            iterations, residual, fell_back, used = log.tolist()
            info = LrcScanInfo(SOLVERS[int(used)], int(iterations), residual, bool(fell_back))
    return (states, final_state, info) if return_info else (states, final_state)


# --- Arguments ------------------------------------------------------------------------------------------------------


def _require_tensor(name: str, tensor: Tensor, like: Tensor | None = None, shape: tuple[int, ...] | None = None):
    """Refuses what is no tensor of numbers, of this shape, where the first argument is."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(tensor).__name__}.")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        raise ValueError(f"`{name}` is {tensor.dtype}, with which torch does not calculate; pass `{name}.float()`.")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"`{name}` is on {tensor.device}, but the others are on {like.device}: move it there.")


def _require_sequence(name: str, tensor: Tensor) -> None:
    _require_tensor(name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"`{name}` must be (batch, steps, state), got shape {tuple(tensor.shape)}.")


def _named(parameters: LrcParameters) -> dict[str, Tensor]:
    """The parameters that are there, by the name that messages give them; those of another copy of this file too."""
    if getattr(parameters, "_fields", None) != LrcParameters._fields:
        raise ValueError(f"`parameters` must be `LrcParameters`, got {type(parameters).__name__}.")
    named = {f"parameters.{name}": parameter for name, parameter in zip(LrcParameters._fields, parameters)}
    if parameters.elastance_shift is None:
        named.popitem()
    return named


def _check_spread(name: str, is_asked: bool, dtype: torch.dtype) -> None:
    """Refuses what does not go with a `group`."""
    if is_asked:
        raise ValueError(f"`{name}` does not go with a `group`; leave it out.")
    if dtype.is_complex:
        raise ValueError(f"A `group` is for real numbers, got {dtype}.")
    if _is_transformed():
        raise ValueError("Forward mode and the transforms of `torch.func` do not go with a `group`; leave it out.")


def _working_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autograd can keep and kernels can read: floating-point numbers, or complex ones if all have to be."""
    if tensor is None:
        return None
    if dtype.is_complex or not tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # Compilers cannot ask, and say themselves what is wrong.
    is_refused = torch.is_grad_enabled() and not torch.compiler.is_compiling() and tensor.is_inference()
    return tensor.clone() if is_refused else tensor


def _rounding(dtype: torch.dtype) -> float:
    """The relative error that is accepted by default."""
    return 16 * torch.finfo(dtype).eps


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _is_transformed() -> bool:
    """Whether this is forward mode or inside a transform of `torch.func`, which have no derivatives of operators."""
    return _in_forward_mode() or torch._C._are_functorch_transforms_active()


# --- Backends -------------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """A backend's implementation of the operators above, for those of them and the tensors that it serves."""

    lrc_scan: Callable
    lrc_scan_backward: Callable
    prefix_scan: Callable
    serves: Callable[[str, Tensor], bool]


_BACKEND_OF_DEVICE = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}
# What was imported, by backend, or why it cannot be used. Not functools.cache: torch.compile would warn of it.
_loaded: dict[str, Kernels | str] = {}
_giving_up = threading.Lock()


def _kernels(backend: str) -> Kernels | str:
    """The kernels of `cpu` or `triton`, or why there are none."""
    if backend not in _loaded:
        try:
            if backend == "cpu":
                from .recurrence_cpu import KERNELS
            else:
                from .recurrence_triton import KERNELS
            _loaded[backend] = KERNELS
        except Exception as error:  # A package that does not fit its surroundings can raise anything.
            _give_up(backend, error)
    return _loaded[backend]


def _give_up(backend: str, error: Exception) -> None:
    """Does without the backend's kernels from now on, and says so once."""
    with _giving_up:
        if isinstance(_loaded.get(backend), str):
            return
        _loaded[backend] = f"{type(error).__name__}: {error}"
    device = "CPU" if backend == "cpu" else "GPU"
    logger.warning(f"The recurrence runs in plain PyTorch on the {device}, which is slower. {_loaded[backend]}")


def load_cpu_kernels() -> None:
    """Imports them where their package is there."""
    try:
        is_there = importlib.util.find_spec("numba") is not None
    except Exception:  # An importer may say so itself, and a package half imported has no spec.
        is_there = False
    if is_there:
        _kernels("cpu")


def _require_kernels(operator: str, backend: str, tensor: Tensor) -> Kernels:
    """The kernels of a backend, or a ValueError where there are none for such tensors."""
    kernels = _kernels(backend)
    if isinstance(kernels, str):
        raise ValueError(f"backend {backend!r} cannot be used, try 'auto': {kernels}")
    if not kernels.serves(operator, tensor):
        needs = {
            "cpu": "float32 tensors on the CPU",
            "triton": "float32 or float64 tensors on a GPU (or TRITON_INTERPRET=1)",
        }[backend]
        raise ValueError(
            f"backend {backend!r} needs {needs}, got {tensor.dtype} on {tensor.device}; use backend 'auto'."
        )
    return kernels


def _by_kernels(operator: str, backend: str, tensor: Tensor, *arguments):
    """What the operator's kernel returns for the arguments, tensors like `tensor`; None where PyTorch has to do it.

    Kernels write nothing but what they return, so that PyTorch can begin anew after any of their failures.
    """
    is_choice = backend == "auto"
    if is_choice:
        backend = _BACKEND_OF_DEVICE.get(tensor.device.type, "torch")
    if backend == "torch":
        return None
    try:
        kernels = _require_kernels(operator, backend, tensor)
    except ValueError:
        if is_choice:
            return None
        raise
    try:
        return getattr(kernels, operator)(*arguments)
    except (MemoryError, torch.OutOfMemoryError):  # PyTorch needs more still.
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # PyTorch's word for it on CPUs.
            raise
        if not is_choice:
            reason = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"backend {backend!r} has failed, try 'auto': {reason}") from error
        _give_up(backend, error)
        return None
