# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The solvers of a cell's recurrence over a whole sequence, and its adjoint, in plain PyTorch.

Kernels implement the same two functions, `solve` and `solve_backward`, faster, and are tested against these. A cell has
n states a neuron: states are (B, T, n, D), and the Jacobian of a step is an n x n block for every neuron.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_scan
from .cell_compiler import Program
from .linear_scan import SHORT_SEQUENCE, apply, identity, multiply, scan_loop, shift


# Newton either converges in a handful of iterations or does not converge in time to be worth waiting for.
_MAX_NEWTON_ITERATIONS = 30


class ScanInfo(NamedTuple):
    """How a scan was solved.

    `iterations`: Newton iterations or chunk sweeps. `residual`: what is left of the parallel solver's error, relative
    (0 where the recurrence was evaluated step by step): for `newton` the largest |x_t - F(x_{t-1})| / max(|x_t|,
    |x_{t-1}|); for `chunked` the most by which a chunk's start is off, in units of the neuron's largest state in the
    sequence, and by which it misses the end of the chunk before, in units of the largest state in either chunk, both
    over what the rounding of a chunk gathers to (`gathered_rounding`). `fell_back`: the parallel solver did not reach
    the tolerance and the returned states are those of `sequential`.
    """

    solver: str
    iterations: int
    residual: float
    fell_back: bool


class Problem(NamedTuple):
    """One scan's operands in the working dtype: inputs (B, T, D), `time_step` (B, T, 1) real, `reset` (B, T, 1) bool,
    weights (D,)."""

    program: Program
    inputs: tuple[Tensor, ...]
    time_step: Tensor | None
    reset: Tensor | None
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, program: Program, inputs, time_step, reset, weights, dtype: torch.dtype) -> Problem:
        """Of an operator's operands: `time_step` and `reset` (B, T), weights (D,) each, and the working dtype."""
        inputs = [x.to(dtype) for x in inputs]
        if time_step is not None:
            time_step = time_step.to(inputs[0].real.dtype).unsqueeze(-1)
            # What a step of no time would have read must not matter, not even to the gradients, where 0 * NaN is NaN.
            inputs = [torch.where((time_step == 0) & ~x.isfinite(), 0, x) for x in inputs]
        reset = None if reset is None else reset.unsqueeze(-1)
        return cls(program, tuple(inputs), time_step, reset, tuple(weights))

    def at(self, step: int) -> Problem:
        """The operands of one step, without the time axis (the last but one)."""
        return self.map(lambda x: x.select(-2, step))

    def map(self, function) -> Problem:
        """`function` applied to every operand that has a time axis."""
        time_step, reset = (None if x is None else function(x) for x in (self.time_step, self.reset))
        return self._replace(inputs=tuple(map(function, self.inputs)), time_step=time_step, reset=reset)

    def evaluate(self, code: str, previous: Tensor, *adjoint: Tensor) -> tuple[Tensor, ...]:
        """The results of the program's code, each (..., D), from the states before the step, with resets applied."""
        time = () if self.time_step is None else (self.time_step,)
        operands = (*previous.unbind(-2), *self.inputs, *self.weights, *time, *adjoint)
        results = self.program.on_tensors[code](*operands)
        like = previous[..., 0, :]
        return tuple(
            result.expand_as(like) if isinstance(result, Tensor) else torch.full_like(like, result)
            for result in results
        )

    def after_reset(self, previous: Tensor) -> Tensor:
        """The states before the step with resets applied."""
        return previous if self.reset is None else torch.where(self.reset.unsqueeze(-1), 0, previous)

    def advance(self, previous: Tensor) -> Tensor:
        """F(x_{t-1})."""
        previous = self.after_reset(previous)
        return self._held(previous, self.evaluate("advance", previous))

    def linearise(self, previous: Tensor) -> tuple[Tensor, Tensor]:
        """F(x_{t-1}) and dF/dx_{t-1}, (..., n, n, D)."""
        previous = self.after_reset(previous)
        states = self.program.states
        results = self.evaluate("linearise", previous)
        jacobian = _stack(results[states:]).unflatten(-2, (states, states))
        if self.reset is not None:
            jacobian = torch.where(self.reset.unsqueeze(-1).unsqueeze(-1), 0, jacobian)
        return self._held(previous, results[:states]), jacobian

    def _held(self, previous: Tensor, following: tuple[Tensor, ...]) -> Tensor:
        following = _stack(following)
        if self.time_step is None:
            return following
        # `where`, because 0 * inf is NaN: a step of no time must leave even an overflowing neighbour's state alone.
        return torch.where((self.time_step == 0).unsqueeze(-1), previous, following)


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    """(..., D) each -> (..., n, D)."""
    return tensors[0].unsqueeze(-2) if len(tensors) == 1 else torch.stack(tensors, dim=-2)


def _largest(errors: Tensor, scale: Tensor) -> float:
    """The largest error in units of the states themselves, which may be small everywhere."""
    relative = errors.abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny)
    # Anything that is not a number is no solution: it must not compare as small, nor must what it is compared with.
    relative = torch.where(scale.isfinite(), relative, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
    return relative.max().item() if relative.numel() else 0.0


def gathered_rounding(chunk: int) -> float:
    """What the rounding of so many steps can gather to, in units of what is always accepted: two runs of a chunk from
    almost the same start differ by the square root of its steps, the largest of many by some more."""
    return max(1.0, math.sqrt(chunk) / 16)


def last_changes(time_step: Tensor, reset: Tensor | None) -> Tensor:
    """(B, T): for every step the last one, counted from 1, that took time or was reset; 0 where there was none."""
    changed = time_step != 0 if reset is None else (time_step != 0) | reset
    steps = torch.arange(1, time_step.shape[1] + 1, device=time_step.device)
    return torch.where(changed, steps, 0).cummax(dim=1).values


def _hold(states: Tensor, initial_state: Tensor, problem: Problem) -> Tensor:
    """The states with those of steps of no time made bit for bit what they were before, not just to the tolerance."""
    if problem.time_step is None:
        return states
    reset = None if problem.reset is None else problem.reset.squeeze(-1)
    last_change = last_changes(problem.time_step.squeeze(-1), reset)[..., None, None]
    return torch.cat([initial_state.unsqueeze(1), states], dim=1).gather(1, last_change.expand_as(states))


def solve_sequential(problem: Problem, length: int, initial_state: Tensor) -> Tensor:
    """The states of `length` steps, one after the other: the definition."""
    state, states = initial_state, []
    for step in range(length):
        state = problem.at(step).advance(state)
        states.append(state)
    return torch.stack(states, dim=1)


def _solve_newton(problem: Problem, length: int, initial_state: Tensor, tolerance: float) -> tuple[Tensor, int, float]:
    """DEER: linearise every step around the current guess and solve all of them with one prefix scan.

    The scan runs on the correction, not on the state, so that its rounding errors vanish with it.
    """
    batch, *size = initial_state.shape
    states = initial_state.new_zeros(batch, length, *size)
    for iteration in range(_MAX_NEWTON_ITERATIONS + 1):
        previous = shift(states, initial_state)
        target, jacobian = problem.linearise(previous)
        residual = _largest(states - target, torch.maximum(states.abs(), previous.abs()))
        if residual <= tolerance or iteration == _MAX_NEWTON_ITERATIONS or not states.isfinite().all():
            break
        states = states + linear_scan.scan(jacobian, target - states, torch.zeros_like(initial_state))
    return states, iteration, residual


def _solve_chunked(problem: Problem, length: int, initial_state: Tensor, tolerance: float) -> tuple[Tensor, int, float]:
    """Multiple shooting: exact chunks from guessed starts, and Newton on the chunk boundaries only.

    A sweep runs the recurrence through all chunks at once and returns each chunk's end and the product of its
    Jacobians; a scan over the chunks then corrects the starts. After k sweeps the first k chunks are exact, so it ends
    after at most as many sweeps as there are chunks.

    Errors are measured against the size of the states around and of the neuron's in the whole sequence, not of the
    element itself, which may pass near zero: states are then as near to the exact ones as those of `sequential` are,
    within a factor of two, from time constants of 2.5 steps to 4,096.
    """
    batch, *size = initial_state.shape
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)
    padding = count * chunk - length
    chunks = problem.map(lambda x: F.pad(x, (0, 0, 0, padding)).unflatten(1, (count, chunk)))
    steps = [chunks.at(step) for step in range(chunk)]

    starts = torch.cat([initial_state.unsqueeze(1), initial_state.new_zeros(batch, count - 1, *size)], dim=1)
    for sweep in range(1, count + 1):
        state, product, trajectory = starts, identity(starts), []
        for step in steps:
            state, jacobian = step.linearise(state)
            product = multiply(jacobian, product)
            trajectory.append(state)
        trajectory = torch.stack(trajectory, dim=2)
        # Of the chunks but the last: what is past the end of that is cut off.
        ends = state[:, :-1]
        # The recurrence holds inside the chunks by construction; what is left is how far their starts are off.
        mismatch = torch.where(ends.isfinite(), ends - starts[:, 1:], 0)
        product = torch.where(product.isfinite(), product, 0)[:, :-1]
        zeros = torch.zeros_like(initial_state)
        errors = scan_loop(product, mismatch, zeros)
        amplitudes = trajectory.abs().amax(2)
        amplitudes[:, -1] = trajectory[:, -1, : chunk - padding].abs().amax(1)
        nearby = torch.minimum(amplitudes[:, :-1], amplitudes[:, 1:])
        residual = max(_largest(mismatch, nearby), _largest(errors, amplitudes.amax(1, keepdim=True)))
        residual = residual / gathered_rounding(chunk) if ends.isfinite().all() else math.inf
        if residual <= tolerance or sweep == count:
            break
        corrected = ends + apply(product, shift(errors, zeros))
        starts = torch.cat([starts[:, :1], torch.where(corrected.isfinite(), corrected, 0)], dim=1)
    return trajectory.flatten(1, 2)[:, :length], sweep, residual


def solve(
    problem: Problem, length: int, initial_state: Tensor, solver: str, tolerance: float
) -> tuple[Tensor, ScanInfo]:
    """The states (B, T, n, D) by `solver`, or by the definition where the solver does not get there."""
    if solver == "auto":
        solver = "sequential" if length <= SHORT_SEQUENCE else "chunked"
    if solver == "sequential":
        return solve_sequential(problem, length, initial_state), ScanInfo(solver, 1, 0.0, False)
    states, iterations, residual = {"newton": _solve_newton, "chunked": _solve_chunked}[solver](
        problem, length, initial_state, tolerance
    )
    if residual <= tolerance:
        return _hold(states, initial_state, problem), ScanInfo(solver, iterations, residual, False)
    return solve_sequential(problem, length, initial_state), ScanInfo(solver, iterations, residual, True)


def solve_backward(
    problem: Problem, grad_states: Tensor, grad_final_state: Tensor | None, states: Tensor, initial_state: Tensor
) -> tuple:
    """The gradients of inputs (B, T, D), time step (B, T) or None, initial state and weights (P, D), from those of the
    states and, beside them, of the last.

    The adjoint lam_t = g_t + J_{t+1}^T lam_{t+1} is linear: everything but one reverse scan is elementwise.
    """
    if initial_state.is_complex():
        # A cell is holomorphic: its conjugated derivatives are its derivatives at the conjugated arguments.
        states, initial_state = states.conj(), initial_state.conj().resolve_conj()
        inputs, weights = (tuple(x.conj() for x in operands) for operands in (problem.inputs, problem.weights))
        problem = problem._replace(inputs=inputs, weights=weights)
    count, inputs = problem.program.states, len(problem.inputs)
    previous = shift(states, initial_state)
    blocks = problem.linearise(previous)[1].transpose(-3, -2)
    # What comes to the last step from after it is not multiplied by any Jacobian.
    following = torch.cat([blocks[:, 1:], identity(initial_state).unsqueeze(1)], dim=1)
    later = torch.zeros_like(initial_state) if grad_final_state is None else grad_final_state
    adjoint = linear_scan.scan(following, grad_states, later, reverse=True)
    gradients = problem.evaluate("adjoint", problem.after_reset(previous), *adjoint.unbind(-2))
    by_inputs, by_rest = gradients[count:][:inputs], gradients[count + inputs :]
    by_weights = [gradient.sum((0, 1)) for gradient in by_rest[: len(problem.weights)]]
    by_time_step = None if problem.time_step is None else by_rest[-1].real.sum(-1)
    by_weights = torch.stack(by_weights) if by_weights else initial_state.new_empty(0, initial_state.shape[-1])
    return by_inputs, by_time_step, apply(blocks[:, 0], adjoint[:, 0]), by_weights
