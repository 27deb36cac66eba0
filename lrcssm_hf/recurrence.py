# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The scans that people call: `cell_scan` for any cell, `lrc_scan` for the LRC, and `prefix_scan` under them.

Their arguments are checked here, once, and torch's operators and their derivatives are made here. The equations are in
`cells.py`, what solves them in `solvers.py`; the kernels of `recurrence_cpu.py` and `recurrence_triton.py` do the same
faster. Shapes: B batch, T steps, D neurons, n states of a neuron.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import linear_scan
from .backends import by_kernels, require_kernels
from .cell_compiler import PROGRAMS
from .cells import LRC, LRC_SYMMETRIC, Cell
from .context_parallel import scan_over_ranks
from .operators import (
    SOLVERS,
    as_operand,
    in_forward_mode,
    is_transformed,
    require_broadcastable,
    require_options,
    require_sequence,
    require_spreadable,
    require_steps,
    require_tensor,
    rounding,
    unpack,
    working_dtype,
)
from .solvers import Problem, ScanInfo, solve, solve_backward, solve_sequential


# Operators are global, and transformers makes a copy of this file for every Hub model's code: each has its own. Torch
# takes ASCII only, in which two folders' names may look the same.
_NAMESPACE = f"{re.sub(r'[^a-zA-Z0-9_]', '_', __name__)}_{hashlib.sha256(__name__.encode()).hexdigest()[:8]}"


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


@torch.library.custom_op(f"{_NAMESPACE}::prefix_scan", mutates_args=())
def _prefix_scan_op(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    states = by_kernels("prefix_scan", "auto", initial_state, decay, inputs, initial_state, reverse)
    if states is None:
        dtype = initial_state.dtype
        operands = decay.to(dtype)[:, :, None, None], inputs.to(dtype).unsqueeze(2), initial_state.unsqueeze(1)
        states = linear_scan.scan(*operands, reverse).squeeze(2).contiguous()
    return states


@_prefix_scan_op.register_fake
def _(decay, inputs, initial_state, reverse):
    return initial_state.new_empty(inputs.shape)


def _prefix_scan_setup(ctx, inputs, output):
    decay, addends, initial_state, ctx.reverse = inputs
    ctx.save_for_backward(decay, initial_state, output)
    ctx.dtypes = decay.dtype, addends.dtype


@torch.library.custom_op(f"{_NAMESPACE}::prefix_scan_backward", mutates_args=())
def _prefix_scan_backward_op(
    grad_states: Tensor, decay: Tensor, states: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decay, inputs and initial state, in the dtype of the states."""
    arguments = grad_states, decay, states, initial_state, reverse
    gradients = by_kernels("prefix_scan_backward", "auto", states, *arguments)
    return _adjoint_of_prefix_scan(*arguments) if gradients is None else gradients


@_prefix_scan_backward_op.register_fake
def _(grad_states, decay, states, initial_state, reverse):
    return states.new_empty(states.shape), states.new_empty(states.shape), states.new_empty(initial_state.shape)


def _adjoint_of_prefix_scan(
    grad_states: Tensor, decay: Tensor, states: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of a scan is the scan the other way: lam_t = g_t + conj(decay_{t+1}) lam_{t+1}. Differentiable."""
    decay = _conjugate(decay.to(states.dtype))
    zeros = torch.zeros_like(initial_state)
    if reverse:
        previous, last = torch.cat([states[:, 1:], initial_state.unsqueeze(1)], dim=1), -1
    else:
        previous, last = linear_scan.shift(states, initial_state), 0
    if decay.stride(1) == 0:
        # One decay for all steps stays one: the step that has none after it multiplies a zero adjoint.
        following = decay
    elif reverse:
        following = torch.cat([zeros.unsqueeze(1), decay[:, :-1]], dim=1)
    else:
        following = torch.cat([decay[:, 1:], zeros.unsqueeze(1)], dim=1)
    adjoint = _prefix_scan(following, grad_states.contiguous(), zeros, not reverse)
    return adjoint * _conjugate(previous), adjoint, decay[:, last] * adjoint[:, last]


def _prefix_scan_backward(ctx, grad_states):
    decay, initial_state, states = ctx.saved_tensors
    # With `create_graph` and in forward mode, what is computed has to be differentiable itself.
    is_watched = torch.is_grad_enabled() or in_forward_mode()
    adjoint = _adjoint_of_prefix_scan if is_watched else _prefix_scan_backward_op
    by_decay, by_inputs, by_initial_state = adjoint(grad_states, decay, states, initial_state, ctx.reverse)
    decay_dtype, inputs_dtype = ctx.dtypes
    return by_decay.to(decay_dtype), by_inputs.to(inputs_dtype), by_initial_state, None


def _conjugate(tensor: Tensor) -> Tensor:
    """The complex conjugate, written out; what an expanded tensor repeats is written once and stays repeated."""
    if not tensor.is_complex():
        return tensor
    once = tensor[tuple(slice(1 if stride == 0 else None) for stride in tensor.stride())]
    return once.conj().resolve_conj().expand_as(tensor)


_prefix_scan_op.register_autograd(_prefix_scan_backward, setup_context=_prefix_scan_setup)


def _prefix_scan(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    if not is_transformed():
        return _prefix_scan_op(decay, inputs, initial_state, reverse)
    if reverse:
        return _prefix_scan(decay.flip(1), inputs.flip(1), initial_state, False).flip(1)
    dtype = initial_state.dtype
    operands = decay.to(dtype)[:, :, None, None], inputs.to(dtype).unsqueeze(2), initial_state.unsqueeze(1)
    return linear_scan.scan_loop(*operands).squeeze(2)


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
        group: the ranks over which a sequence is spread, as for [`cell_scan`]; forwards, and for real numbers.

    Returns:
        The states h_1 .. h_T, (B, T, D), in the widest of the arguments' dtypes and at least float32.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument and the fix.
    """
    require_sequence("inputs", inputs)
    require_tensor("decay", decay, inputs, inputs.shape)
    if initial_state is not None:
        require_tensor("initial_state", initial_state, inputs, (inputs.shape[0], inputs.shape[2]))
    dtype = working_dtype(decay, inputs, initial_state)
    if initial_state is None:
        initial_state = inputs.new_zeros(inputs.shape[0], inputs.shape[2], dtype=dtype)
    decay, inputs, initial_state = as_operand(decay, dtype), as_operand(inputs, dtype), as_operand(initial_state, dtype)
    if group is not None:
        require_spreadable("reverse", reverse, dtype)

        def scan(operands: dict[str, Tensor], _, start: Tensor) -> tuple[Tensor, Tensor]:
            states = prefix_scan(**operands, initial_state=start.squeeze(1)).unsqueeze(2)
            return states, states[:, -1] if states.shape[1] else start

        operands = {"decay": decay, "inputs": inputs}
        start = initial_state.to(dtype).unsqueeze(1)
        return scan_over_ranks(scan, group, operands, (), start, rounding(dtype))[0].squeeze(2)
    if inputs.shape[1] == 0:
        return inputs.to(dtype)
    return _prefix_scan(decay, inputs, initial_state.to(dtype), reverse)


# --- The nonlinear scan ---------------------------------------------------------------------------------------------
# The operators take a cell's program by its key, its inputs one by one or side by side in one tensor, and its states as
# (B, T, n, D) in the dtype in which they are solved, which the parameters have too.


@torch.library.custom_op(f"{_NAMESPACE}::cell_scan", mutates_args=())
def _cell_scan_op(
    program: str,
    inputs: Sequence[Tensor],
    time_step: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    solver: str,
    backend: str,
    tolerance: float,
    with_info: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(states, final_state, [iterations, residual, fell_back, index of the solver]); the last `with_info`, otherwise
    four numbers of no meaning."""
    operands = (PROGRAMS[program], unpack(inputs, PROGRAMS[program].inputs), time_step, reset, initial_state, weights)
    like = inputs[0].new_empty(0, dtype=dtype)
    results = by_kernels("cell_scan", backend, like, *operands, solver, tolerance, with_info)
    if results is None:
        problem, initial_state = Problem.of(*operands[:4], weights, dtype), _initial(operands, dtype)
        states, info = solve(problem, inputs[0].shape[1], initial_state, solver, tolerance)
        numbers = [info.iterations, info.residual, info.fell_back, SOLVERS.index(info.solver)]
        numbers = torch.tensor(numbers, dtype=torch.float32, device=states.device)
        results = states.contiguous(), states[:, -1].clone(), numbers
    return results


def _initial(operands: tuple, dtype: torch.dtype) -> Tensor:
    """The initial state, zero where there is none."""
    program, inputs, _, _, initial_state, _ = operands
    batch, _, size = inputs[0].shape
    return inputs[0].new_zeros(batch, program.states, size, dtype=dtype) if initial_state is None else initial_state


@_cell_scan_op.register_fake
def _(program, inputs, time_step, reset, initial_state, weights, dtype, *options):
    first, count = unpack(inputs, PROGRAMS[program].inputs)[0], PROGRAMS[program].states
    batch, length, size = first.shape
    states = inputs[0].new_empty(batch, length, count, size, dtype=dtype)
    return states, states.new_empty(batch, count, size), states.new_empty(4, dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::cell_scan_backward", mutates_args=())
def _cell_scan_backward_op(
    grad_states: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    program: str,
    inputs: Sequence[Tensor],
    time_step: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    weights: Sequence[Tensor],
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of inputs, time step, initial state, and weights (P, D); that of what is absent is an empty tensor."""
    operands = (PROGRAMS[program], inputs, time_step, reset, initial_state, weights)
    gradients = by_kernels("cell_scan_backward", backend, states, grad_states, grad_final_state, states, *operands)
    if gradients is None:
        operands = (operands[0], unpack(inputs, operands[0].inputs), *operands[2:])
        problem = Problem.of(*operands[:4], weights, states.dtype)
        gradients = solve_backward(problem, grad_states, grad_final_state, states, _initial(operands, states.dtype))
        if len(inputs) < len(gradients[0]):
            gradients = [torch.cat(gradients[0], dim=-1)], *gradients[1:]
    by_inputs, by_time_step, by_initial_state, by_weights = gradients
    by_inputs = [gradient.to(x.dtype) for gradient, x in zip(by_inputs, inputs)]
    by_time_step = states.new_empty(0) if time_step is None else by_time_step.to(time_step.dtype)
    by_initial_state = states.new_empty(0) if initial_state is None else by_initial_state
    return by_inputs, by_time_step, by_initial_state, by_weights.to(states.dtype)


@_cell_scan_backward_op.register_fake
def _(grad_states, grad_final_state, states, program, inputs, time_step, reset, initial_state, weights, backend):
    by_inputs = [x.new_empty(x.shape) for x in inputs]
    by_time_step = states.new_empty(0) if time_step is None else time_step.new_empty(time_step.shape)
    by_initial_state = states.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return by_inputs, by_time_step, by_initial_state, states.new_empty(len(weights), states.shape[-1])


def _cell_scan_setup(ctx, inputs, output):
    ctx.program, currents, *operands, weights, _, _, ctx.backend, _, _ = inputs
    ctx.count = len(currents)
    ctx.save_for_backward(output[0], *operands, *currents, *weights)
    ctx.set_materialize_grads(False)


def _cell_scan_autograd(ctx, grad_states, grad_final_state, grad_info):
    if in_forward_mode():
        raise NotImplementedError("Forward mode has to begin before a scan is called, not before going back only.")
    states, time_step, reset, initial_state, *tensors = ctx.saved_tensors
    inputs, weights = tensors[: ctx.count], tensors[ctx.count :]
    if grad_states is None:
        # One row of zeros for all steps.
        grad_states = states.new_zeros(states.shape[-1]).expand_as(states)
    by_inputs, by_time_step, by_initial_state, by_weights = _cell_scan_backward_op(
        grad_states,
        grad_final_state,
        states,
        ctx.program,
        inputs,
        time_step,
        reset,
        initial_state,
        weights,
        ctx.backend,
    )
    by_time_step = None if time_step is None else by_time_step
    by_initial_state = None if initial_state is None else by_initial_state
    by_weights = list(by_weights.unbind()) if weights else []
    return None, by_inputs, by_time_step, None, by_initial_state, by_weights, None, None, None, None, None


_cell_scan_op.register_autograd(_cell_scan_autograd, setup_context=_cell_scan_setup)


def cell_scan(
    cell: Cell,
    inputs: Mapping[str, Tensor | None] | Tensor,
    parameters: Mapping[str, Tensor],
    *,
    initial_state: Tensor | None = None,
    time_step: Tensor | None = None,
    reset: Tensor | None = None,
    solver: str = "auto",
    backend: str = "auto",
    tolerance: float | None = None,
    return_info: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ScanInfo]:
    """All states of a cell's recurrence, exactly; differentiable in every floating-point argument.

    In forward mode (`torch.autograd.forward_ad`) and inside the transforms of `torch.func`, the definition is evaluated
    step by step, whatever `solver` and `backend`: slowly, and with derivatives of every order.

    Args:
        cell: the recurrence, one of `lrcssm_hf.cells` or your own `Cell`.
        inputs: every input of the cell by its name, (B, T, D); one that has a default may be left out or None. Or one
            tensor that has them side by side in the cell's order, as one projection makes them, (B, T, k * D), so that
            its gradient need not be put together from theirs.
        parameters: every parameter of the cell by its name, (D,), real or complex.
        initial_state: x_0, (B, D), or (B, n, D) for a cell of n states, n > 1; zero by default.
        time_step: dt_t, (B, T), real, elapsed time in units of the training step; 1 by default. Where it is 0 the state
            is left bit for bit as it was. Its values are not looked at, which on a GPU would have to wait: the equation
            holds for a negative one too, and the state after one that is not a number is not a number either.
        reset: (B, T) bool; where it is set, the state before that step counts as zero.
        solver: `sequential` evaluates the definition; `newton` linearises all steps at once (DEER); `chunked` runs
            exact chunks in parallel and matches their boundaries; `auto` picks. All give the same states: a parallel
            solver that does not reach the tolerance is replaced by `sequential`.
        backend: `torch` runs anywhere; `cpu` is the compiled float32 kernel, which solves sequentially; `triton` are
            the kernels for GPUs, in float32 and float64; `auto` takes the kernels where they apply.
        tolerance: largest relative error accepted from a parallel solver, as `ScanInfo.residual` measures it, positive
            and finite; by default 16 units of rounding of the working dtype.
        return_info: also return a `ScanInfo`.
        group: the ranks over which a sequence is spread, in its order: what is passed are this rank's steps, of any
            number, and the same parameters and initial state on all ranks. States and gradients are those of the whole
            sequence, and the final state is that after this rank's steps. A gradient of the parameters is this rank's
            share, to be summed over the group; that of the initial state is on the first rank. All ranks have to call
            this, and go back through it, together.

    Returns:
        states (B, T, D) and final_state (B, D), or (B, T, n, D) and (B, n, D) for n > 1, in the widest dtype of inputs,
        parameters and initial state, at least float32. Whole numbers and booleans count as what they are worth. With
        `return_info`, the info as a third item. Second derivatives are not implemented and raise.

    Raises:
        ValueError: an argument is no tensor, or its name, shape, dtype, device or value does not fit; the message names
            it and the fix.
        RuntimeError: a kernel of the `backend` that was asked for does not compile or run. On `auto`, PyTorch takes
            over with a warning.
    """
    if not isinstance(cell, Cell):
        raise ValueError(f"`cell` must be a `Cell`, got {type(cell).__name__}; pass `Cell(function)`.")
    parameters = _in_order(cell, "parameters", parameters, cell.parameters, ())
    together = inputs if isinstance(inputs, Tensor) else None
    if together is None:
        inputs = _in_order(cell, "inputs", inputs, cell.inputs, cell.defaults)
    else:
        sizes = (parameter.shape[0] for parameter in parameters.values() if getattr(parameter, "ndim", 0) == 1)
        inputs = _named_chunks(cell, inputs, next(sizes, None))
    (first_name, first), *others = inputs.items()
    require_sequence(first_name, first)
    batch, length, size = first.shape
    for name, tensor in others:
        require_tensor(name, tensor, first, first.shape)
    for name, parameter in parameters.items():
        require_tensor(f"parameters.{name}", parameter, first, (size,))
    count = len(cell.states)
    if initial_state is not None:
        require_tensor("initial_state", initial_state, first, (batch, size) if count == 1 else (batch, count, size))
    require_steps(time_step, reset, first, (batch, length))
    require_options(solver, backend, tolerance)

    dtype = working_dtype(*inputs.values(), initial_state, *parameters.values())
    inputs = {name: as_operand(tensor, dtype) for name, tensor in inputs.items()}
    parameters = [as_operand(parameter, dtype) for parameter in parameters.values()]
    time_step, reset = as_operand(time_step, dtype), as_operand(reset, torch.bool)
    time_step = None if time_step is None else time_step.real
    if initial_state is not None:
        initial_state = as_operand(initial_state, dtype).to(dtype).view(batch, count, size)
    elif group is not None:
        initial_state = first.new_zeros(batch, count, size, dtype=dtype)
    tolerance = rounding(dtype) if tolerance is None else float(tolerance)
    key, options = cell.key(tuple(inputs), time_step is not None), (solver, backend, tolerance)

    if group is None:
        given = list(inputs.values()) if together is None else [as_operand(together, dtype)]
        steps = (given, time_step, reset)
        states, final_state, info = _scan(key, steps, parameters, initial_state, dtype, *options, return_info)
    else:
        require_spreadable("return_info", return_info, dtype)

        def scan(steps: dict[str, Tensor], parameters: list[Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
            *given, time_step, reset = steps.values()
            return _scan(key, (given, time_step, reset), parameters, start, dtype, *options)[:2]

        steps = {**inputs, "time_step": time_step, "reset": reset}
        states, final_state = scan_over_ranks(scan, group, steps, parameters, initial_state, tolerance)
    if count == 1:
        states, final_state = states.squeeze(2), final_state.squeeze(1)
    return (states, final_state, info) if return_info else (states, final_state)


def _scan(
    key: str,
    steps: tuple[list[Tensor], Tensor | None, Tensor | None],
    parameters: Sequence[Tensor],
    initial_state: Tensor | None,
    dtype: torch.dtype,
    solver: str,
    backend: str,
    tolerance: float,
    return_info: bool = False,
) -> tuple[Tensor, Tensor, ScanInfo | None]:
    """States (B, T, n, D) and final state (B, n, D); `steps` are the inputs, the time step and the reset."""
    inputs, time_step, reset = steps
    length, device = inputs[0].shape[1], inputs[0].device
    weights = [parameter.to(dtype) for parameter in parameters]
    operands = (PROGRAMS[key], unpack(inputs, PROGRAMS[key].inputs), time_step, reset, initial_state, weights)
    if solver not in ("auto", "sequential"):
        if backend == "cpu":
            raise ValueError(f"backend 'cpu' solves sequentially, not by {solver!r}: use solver or backend 'auto'.")
        if backend == "auto" and device.type == "cpu":
            backend = "torch"
    if backend not in ("auto", "torch"):
        require_kernels("cell_scan", backend, inputs[0].new_empty(0, dtype=dtype))

    if length == 0:
        state = _initial(operands, dtype)
        return state.unsqueeze(1)[:, :0], state, ScanInfo(solver, 0, 0.0, False)
    if is_transformed():
        problem = Problem.of(*operands[:4], weights, dtype)
        states = solve_sequential(problem, length, _initial(operands, dtype))
        return states, states[:, -1].clone(), ScanInfo("sequential", 1, 0.0, False)
    if length == 1 and not return_info and not torch.is_grad_enabled():
        # Decoding: one plain step, which compilers can fuse with its neighbours.
        problem = Problem.of(*operands[:4], weights, dtype)
        states = problem.advance(_initial(operands, dtype).unsqueeze(1))
        return states, states[:, -1].clone(), None
    states, final_state, log = _cell_scan_op(
        key,
        inputs,
        time_step,
        reset,
        initial_state,
        weights,
        dtype,
        solver,
        backend,
        tolerance,
        return_info,
    )
    info = None
    if return_info:
        iterations, residual, fell_back, used = log.tolist()
        info = ScanInfo(SOLVERS[int(used)], int(iterations), residual, bool(fell_back))
    return states, final_state, info


def _named_chunks(cell: Cell, inputs: Tensor, size: int | None) -> dict[str, Tensor]:
    """Of inputs side by side, for neurons of which there are `size`, or as many as make all inputs of the cell."""
    require_sequence("inputs", inputs)
    width, most = inputs.shape[2], len(cell.inputs)
    size = width // most if size is None else size
    count = width // size if size else most
    if count * size != width or not most - len(cell.defaults) <= count <= most:
        least = f"{most - len(cell.defaults)} to {most}" if cell.defaults else str(most)
        raise ValueError(
            f"`inputs` must have the {least} inputs of cell {cell.name!r} for {size} neurons side by side, got "
            f"{width} channels; pass them in the order {', '.join(cell.inputs)}."
        )
    return dict(zip(cell.inputs, inputs.chunk(count, dim=-1)))


def _in_order(cell: Cell, argument: str, given: Mapping, names: Sequence[str], optional) -> dict[str, Tensor]:
    """What is given by name, in the cell's order."""
    if not isinstance(given, Mapping):
        raise ValueError(f"`{argument}` must be a dict of tensors by name, got {type(given).__name__}.")
    for name in given:
        if name not in names:
            raise ValueError(f"`{argument}` has {name!r}, which cell {cell.name!r} does not take: {', '.join(names)}.")
    ordered = {name: given[name] for name in names if name in given and not (name in optional and given[name] is None)}
    for name in names:
        if name not in ordered and name not in optional:
            raise ValueError(f"`{argument}` lacks {name!r}, which cell {cell.name!r} takes.")
    return ordered


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
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, ScanInfo]:
    """All states of the LRC recurrence, exactly: `cell_scan` of `LRC`, or of `LRC_SYMMETRIC` where the parameters have
    an elastance shift.

    Args:
        forget_input, update_input: c_t and d_t, (B, T, D): the sensory currents into forget gate and update.
        parameters: the state's own dynamics, see `LrcParameters`.
        elastance_input: q_t, (B, T, D): lets the input decide whether a neuron holds its state or changes it.
        initial_state, time_step, reset, solver, backend, tolerance, return_info, group: as for [`cell_scan`], and so
            are what is returned and raised.
    """
    return cell_scan(
        _lrc_cell(parameters),
        {"forget_input": forget_input, "update_input": update_input, "elastance_input": elastance_input},
        _named(parameters),
        initial_state=initial_state,
        time_step=time_step,
        reset=reset,
        solver=solver,
        backend=backend,
        tolerance=tolerance,
        return_info=return_info,
        group=group,
    )


def lrc_step(
    state: Tensor,
    forget_input: Tensor,
    update_input: Tensor,
    parameters: LrcParameters,
    *,
    elastance_input: Tensor | None = None,
    time_step: Tensor | None = None,
) -> Tensor:
    """One step of the LRC recurrence, differentiable by autograd: the definition every solver and kernel is held to.

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
    require_tensor("state", state)
    inputs = {"forget_input": forget_input, "update_input": update_input, "elastance_input": elastance_input}
    named = _named(parameters)
    operands = inputs | {f"parameters.{name}": parameter for name, parameter in named.items()}
    for name, tensor in {**operands, "time_step": time_step}.items():
        if tensor is not None or name in ("forget_input", "update_input"):
            require_broadcastable(name, tensor, state)
    (following,) = _lrc_cell(parameters).advance([state], inputs, named, time_step)
    # `where`, because 0 * inf is NaN: a step of no time must leave the state alone.
    return following if time_step is None else torch.where(time_step == 0, state, following)


def _named(parameters: LrcParameters) -> dict[str, Tensor]:
    """The parameters that are there, by name; those of another copy of this file too."""
    if getattr(parameters, "_fields", None) != LrcParameters._fields:
        raise ValueError(f"`parameters` must be `LrcParameters`, got {type(parameters).__name__}.")
    named = dict(zip(LrcParameters._fields, parameters))
    if parameters.elastance_shift is None:
        named.popitem()
    return named


def _lrc_cell(parameters: LrcParameters) -> Cell:
    return LRC if getattr(parameters, "elastance_shift", None) is None else LRC_SYMMETRIC
