# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The operators of `recurrence.py` on the CPU, step by step, by the float32 kernels that `cpu_kernels.py` compiles.

A cell's kernels are templates with its program put in. `prefix_scan` is compiled for complex64 too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .cell_compiler import ARITHMETIC, PROGRAMS, Code, Program, Spelling, fill, operands
from .cpu_kernels import ARRAYS, define, empty, optional_rows, partition, place, rows_of, run, with_rows
from .operators import SOLVERS, unpack


_LINEAR_SCAN = '''
def linear_scan(decay, inputs, initial, states, pairs, reverse, blocks, width, start, stop):
    """h_t = decay_t * h_{t-1} + inputs_t, or from the end for `reverse`; operands are (flat array, batch stride,
    time stride), and work items batch * blocks.

    `pairs` None (or True) makes two compilations: real channels, or complex ones, of which a row holds the real and the
    imaginary parts in turn. The states in hand have them in two rows of one scratch buffer.
    """
    (a, a_b, a_t), (u, u_b, u_t) = decay, inputs
    parts = 1 if pairs is None else 2
    steps, size = states.shape[1], states.shape[2] // parts
    s = np.empty(parts * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, _ = _block(item, blocks, width, size)
        first, floats = parts * first, parts * count
        for j in range(floats):
            s[j % parts * _WIDTH + j // parts] = initial[b, first + j]
        for k in range(steps):
            t = steps - 1 - k if reverse else k
            a_row = a[b * a_b + t * a_t + first :][:floats]
            u_row = u[b * u_b + t * u_t + first :][:floats]
            row = states[b, t, first : first + floats]
            if pairs is None:
                for j in range(count):
                    s[j] = _widen(a_row[j]) * s[j] + _widen(u_row[j])
                    row[j] = s[j]
            else:
                for j in range(count):
                    re, im, a_re, a_im = s[j], s[_WIDTH + j], a_row[2 * j], a_row[2 * j + 1]
                    s[j] = a_re * re - a_im * im + u_row[2 * j]
                    s[_WIDTH + j] = a_re * im + a_im * re + u_row[2 * j + 1]
                    row[2 * j] = s[j]
                    row[2 * j + 1] = s[_WIDTH + j]
'''

_LINEAR_SCAN_BACKWARD = '''
def linear_scan_backward(
    grads, decay, states, initial, grad_decay, grad_inputs, grad_initial, pairs, reverse, blocks, width, start, stop
):
    """lam_t = grad_t + conj(decay_{t+1}) * lam_{t+1}, and lam_t * conj(h_{t-1}); as above. What is carried from step to
    step is conj(decay_t) * lam_t, so that every step reads its own decay."""
    (g, g_b, g_t), (a, a_b, a_t) = grads, decay
    parts = 1 if pairs is None else 2
    steps, size = states.shape[1], states.shape[2] // parts
    s = np.empty(parts * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, _ = _block(item, blocks, width, size)
        first, floats = parts * first, parts * count
        s[:] = 0
        for k in range(steps - 1, -1, -1):
            t, before = (steps - 1 - k, steps - k) if reverse else (k, k - 1)
            g_row = g[b * g_b + t * g_t + first :][:floats]
            a_row = a[b * a_b + t * a_t + first :][:floats]
            h_row = initial[b, first : first + floats] if k == 0 else states[b, before, first : first + floats]
            by_decay, by_input = grad_decay[b, t, first : first + floats], grad_inputs[b, t, first : first + floats]
            if pairs is None:
                for j in range(count):
                    adjoint = s[j] + _widen(g_row[j])
                    by_input[j] = adjoint
                    by_decay[j] = adjoint * h_row[j]
                    s[j] = _widen(a_row[j]) * adjoint
            else:
                for j in range(count):
                    a_re, a_im, h_re, h_im = a_row[2 * j], a_row[2 * j + 1], h_row[2 * j], h_row[2 * j + 1]
                    re, im = s[j] + g_row[2 * j], s[_WIDTH + j] + g_row[2 * j + 1]
                    by_input[2 * j] = re
                    by_input[2 * j + 1] = im
                    by_decay[2 * j] = re * h_re + im * h_im
                    by_decay[2 * j + 1] = im * h_re - re * h_im
                    s[j] = a_re * re + a_im * im
                    s[_WIDTH + j] = a_re * im - a_im * re
        for j in range(floats):
            grad_initial[b, first + j] = s[j % parts * _WIDTH + j // parts]
'''


# --- A cell's kernels -----------------------------------------------------------------------------------------------
# In the templates an operand of the program has its row of the scratch buffer: first the weights, then the states, then
# the inputs; for the adjoint, then what it carries, the gradients that are stored at every step, and the sums of those
# of the weights. Operands of a kernel are (flat array, batch stride, time stride).

_SPELLING = Spelling(
    ARITHMETIC
    | {"sigmoid": "_sigmoid({})", "tanh": "_tanh({})", "exp": "_exp({})", "sin": "math.sin({})", "cos": "math.cos({})"},
    number="np.float32({!r})",
)

_FORWARD = """
def forward(inputs, time_steps, resets, initial, weights, states, blocks, width, start, stop):
    $unpack_inputs
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t) = time_steps, resets
    steps, size = states.shape[1], states.shape[3]
    s = np.zeros($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for k in range(weights.shape[0]):
            _load(s, k * _WIDTH, weights[k], first, count)
        s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
        for i in range($states):
            _load(s, ($first_state + i) * _WIDTH, initial[b, i], first, count)
        for t in range(steps):
            if fresh[b * fresh_b + t * fresh_t]:
                s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
            time_step = _widen(dt[b * dt_b + t * dt_t])
            if time_step != 0:
                $load_inputs
                for j in range(padded):
                    $read
                    $advance
                    $write
            for i in range($states):
                _store(s, ($first_state + i) * _WIDTH, states[b, t, i], first, count)
"""

# One step of all neurons and the gate on their last state. Operands are (address, batch stride, _), or the address of
# what is contiguous.
_STEP = """
def step(inputs, gates, initial, weights, outputs, states, size, blocks, width, start, stop):
    $unpack_inputs
    g, g_b, _ = gates
    s = np.empty($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for k in range($weights):
            _load(s, k * _WIDTH, _floats(weights[k]), first, count)
        for i in range($states):
            _load(s, ($first_state + i) * _WIDTH, _floats(initial), (b * $states + i) * size + first, count)
        $load_inputs
        _load(s, $gate * _WIDTH, $array(g), b * g_b + first, count)
        for j in range(padded):
            $read
            $advance
            $write
            gate = s[$gate * _WIDTH + j]
            s[$gate * _WIDTH + j] = gate * _sigmoid(gate) * $output
        _store(s, $gate * _WIDTH, $array(outputs), b * size + first, count)
        for i in range($states):
            _store(s, ($first_state + i) * _WIDTH, _floats(states), (b * $states + i) * size + first, count)
"""

# The adjoint sweep, from the last step to the first; gradients shared by the batch are summed per batch row, in float32
# for a number of steps and then in float64.
_BACKWARD = """
def backward(
    grads, grad_final, trajectory, inputs, time_steps, resets, initial, weights,
    grad_inputs, grad_time_steps, grad_initial, grad_weights, blocks, width, start, stop,
):
    $unpack_inputs
    $unpack_gradients
    (dt, dt_b, dt_t), (fresh, fresh_b, fresh_t) = time_steps, resets
    steps, size = trajectory.shape[1], trajectory.shape[3]
    s = np.zeros($rows * _WIDTH, np.float32)
    for item in range(start, stop):
        b, first, count, padded = _block(item, blocks, width, size)
        for k in range(weights.shape[0]):
            _load(s, k * _WIDTH, weights[k], first, count)
            grad_weights[b, k, first : first + count] = 0
        s[$first_adjoint * _WIDTH : $first_gradient * _WIDTH] = 0
        for i in range($states):
            _load(s, ($first_adjoint + i) * _WIDTH, grad_final[b, i], first, count)
        for t in range(steps - 1, -1, -1):
            is_reset = fresh[b * fresh_b + t * fresh_t]
            if is_reset:
                s[$first_state * _WIDTH : $first_input * _WIDTH] = 0
            else:
                for i in range($states):
                    before = initial[b, i] if t == 0 else trajectory[b, t - 1, i]
                    _load(s, ($first_state + i) * _WIDTH, before, first, count)
            time_step = _widen(dt[b * dt_b + t * dt_t])
            $load_inputs
            for i in range($states):
                g = grads[i]
                _load_sum(
                    s, ($first_adjoint + i) * _WIDTH, g[0], b * g[1] + t * g[2] + first, count, -_STEPS_AHEAD * g[2]
                )
            for j in range(padded):
                $read
                $adjoint
                $write
            $store_gradients
            if is_reset:
                s[$first_adjoint * _WIDTH : $first_gradient * _WIDTH] = 0
            if t % _FLUSH_STEPS == 0:
                for k in range(weights.shape[0]):
                    for j in range(count):
                        grad_weights[b, k, first + j] += s[($first_sum + k) * _WIDTH + j]
                s[$first_sum * _WIDTH :] = 0
        for i in range($states):
            _store(s, ($first_adjoint + i) * _WIDTH, grad_initial[b, i], first, count)
"""


def _forward_source(program: Program) -> str:
    rows = _rows_of(program)
    results = map(_SPELLING.argument, program.advance.results)
    return fill(
        _FORWARD,
        **_common_parts(program, rows),
        load_inputs=_load_inputs(program, rows, "_STEPS_AHEAD", "False"),
        read=_read(program.advance, rows),
        advance=_SPELLING.lines(program.advance),
        write=[f"{_entry(rows[f'state{i}'])} = {result}" for i, result in enumerate(results)],
    )


def _step_source(program: Program, array: str) -> str:
    rows = _rows_of(program)
    results = list(map(_SPELLING.argument, program.advance.results))
    return fill(
        _STEP,
        **_common_parts(program, rows) | {"rows": str(len(rows) + 1)},
        array=array,
        weights=str(program.weights),
        gate=str(len(rows)),
        load_inputs=[
            f"_load(s, {rows[f'input{i}']} * _WIDTH, {array}(in{i}), b * in{i}_b + first, count)"
            for i in range(program.inputs)
        ],
        read=_read(program.advance, rows),
        advance=_SPELLING.lines(program.advance),
        write=[f"{_entry(rows[f'state{i}'])} = {result}" for i, result in enumerate(results)],
        output=results[-1],
    )


def _backward_source(program: Program) -> str:
    rows, names = _rows_of(program), operands(program)
    # The adjoint of every state, the gradients that are stored at every step, and the sums.
    adjoints = [f"adjoint{i}" for i in range(program.states)]
    stored = [f"grad_{name}" for name in names if name.startswith("input") or name == "time_step"]
    sums = [f"grad_weight{k}" for k in range(program.weights)]
    rows |= {name: len(rows) + i for i, name in enumerate([*adjoints, *stored, *sums])}
    write = []
    for name, result in zip(names, map(_SPELLING.argument, program.adjoint.results), strict=True):
        target = name.replace("state", "adjoint") if name.startswith("state") else f"grad_{name}"
        write.append(f"{_entry(rows[target])} {'+=' if name.startswith('weight') else '='} {result}")
    of_inputs = [name for name in stored if name != "grad_time_step"]
    place = "b * {0}_b + t * {0}_t + first"
    store = [f"_store(s, {rows[name]} * _WIDTH, {name}, {place.format(name)}, count)" for name in of_inputs]
    if program.has_time_step:
        row = rows["grad_time_step"]
        store.append(f"grad_time_steps[item % blocks, b, t] = _sum(s[{row} * _WIDTH : {row} * _WIDTH + count])")
    return fill(
        _BACKWARD,
        **_common_parts(program, rows),
        first_adjoint=str(rows[adjoints[0]]),
        first_gradient=str(rows[stored[0]]),
        first_sum=str(len(rows) - len(sums)),
        unpack_gradients=[f"({', '.join(f'({name}, {name}_b, {name}_t)' for name in of_inputs)},) = grad_inputs"],
        load_inputs=_load_inputs(program, rows, "-_STEPS_AHEAD", "time_step == 0"),
        read=_read(program.adjoint, rows),
        adjoint=_SPELLING.lines(program.adjoint),
        write=write,
        store_gradients=store,
    )


def _rows_of(program: Program) -> dict[str, int]:
    kinds = {"weight": program.weights, "state": program.states, "input": program.inputs}
    return {name: row for row, name in enumerate(f"{kind}{i}" for kind, count in kinds.items() for i in range(count))}


def _common_parts(program: Program, rows: dict[str, int]) -> dict[str, str | list[str]]:
    operands = [f"(in{i}, in{i}_b, in{i}_t)" for i in range(program.inputs)]
    return {
        "rows": str(len(rows)),
        "states": str(program.states),
        "first_state": str(rows["state0"]),
        "first_input": str(rows["input0"]),
        "unpack_inputs": [f"({', '.join(operands)},) = inputs"],
    }


def _entry(row: int) -> str:
    return f"s[{row} * _WIDTH + j]"


def _load_inputs(program: Program, rows: dict[str, int], ahead: str, finite: str) -> list[str]:
    return [
        f"_load_input(s, {rows[f'input{i}']} * _WIDTH, in{i}, b * in{i}_b + t * in{i}_t + first, count, "
        f"{ahead} * in{i}_t, {finite})"
        for i in range(program.inputs)
    ]


def _read(code: Code, rows: dict[str, int]) -> list[str]:
    used = {argument for line in code.lines for argument in line.arguments} | set(code.results)
    return [f"{name} = {_entry(row)}" for name, row in rows.items() if name in used]


class _CellKernels:
    """The two passes of a program, to be compiled at their first call."""

    def __init__(self, program: Program):
        self.forward = define("forward", program.key, _forward_source(program))
        self.backward = define("backward", program.key, _backward_source(program))


@functools.cache
def _kernels_of(key: str) -> _CellKernels:
    return _CellKernels(PROGRAMS[key])


@functools.cache
def _step_kernel(key: str, array: str) -> Callable:
    return define("step", f"{key}{array}", _step_source(PROGRAMS[key], array))


# --- Tensors in, tensors out ----------------------------------------------------------------------------------------


def _operands(program: Program, inputs, time_step, reset, initial_state, weights) -> tuple:
    batch, steps, _ = inputs[0].shape
    return (
        tuple(map(rows_of, inputs)),
        optional_rows(time_step, 1.0, batch, steps),
        optional_rows(reset, False, batch, steps),
        *_shared(program, inputs, initial_state, weights),
    )


def _shared(program: Program, inputs, initial_state, weights) -> tuple:
    """The initial state, zero where there is none, and the weights (P, D), as arrays."""
    batch, _, size = inputs[0].shape
    initial = torch.zeros(batch, program.states, size) if initial_state is None else initial_state.detach()
    stacked = torch.stack(tuple(weights)).detach() if weights else torch.empty(0, size)
    return initial.contiguous().numpy(), stacked.numpy()


def serves_cpu(operator: str, tensor: Tensor) -> bool:
    if operator.startswith("prefix_scan"):
        dtypes = torch.float32, torch.complex64
    elif operator in ("cell_scan", "cell_scan_backward"):
        dtypes = (torch.float32,)
    else:
        dtypes = torch.float32, torch.bfloat16
    return tensor.device.type == "cpu" and tensor.dtype in dtypes


def cell_scan_cpu(
    program: Program, inputs, time_step, reset, initial_state, weights, solver, tolerance, with_info
) -> tuple[Tensor, Tensor, Tensor]:
    """The states (B, T, n, D), solved sequentially, the last of them, and the operator's numbers; arguments as in
    `recurrence._cell_scan_op`."""
    batch, steps, size = inputs[0].shape
    states = empty(batch, steps, program.states, size)
    arguments = (*_operands(program, inputs, time_step, reset, initial_state, weights), states.numpy())
    blocks, width = partition(batch, size)
    run(_kernels_of(program.key).forward, arguments, batch, steps, size, blocks, width)
    return states, states[:, -1].clone(), torch.tensor([1.0, 0.0, 0.0, SOLVERS.index("sequential")])


def cell_scan_backward_cpu(
    grad_states, grad_final_state, states, program: Program, inputs, time_step, reset, initial_state, weights
) -> tuple[list[Tensor], Tensor | None, Tensor, Tensor]:
    """The gradients; arguments and results as in `recurrence._cell_scan_backward_op`."""
    gradients = [empty(*x.shape) for x in inputs]
    inputs, grad_inputs = (unpack(tensors, program.inputs) for tensors in (inputs, gradients))
    batch, steps, size = inputs[0].shape
    blocks, width = partition(batch, size)
    grad_time_step = None if time_step is None else states.new_empty(blocks, batch, steps)
    grad_initial = states.new_empty(batch, program.states, size)
    grad_weights = states.new_empty(batch, len(weights), size, dtype=torch.float64)
    arguments = (
        tuple(rows_of(grad) for grad in grad_states.unbind(2)),
        torch.zeros_like(grad_initial).numpy() if grad_final_state is None else grad_final_state.contiguous().numpy(),
        states.numpy(),
        *_operands(program, inputs, time_step, reset, initial_state, weights),
        tuple(map(rows_of, grad_inputs)),
        None if grad_time_step is None else grad_time_step.numpy(),
        grad_initial.numpy(),
        grad_weights.numpy(),
    )
    run(_kernels_of(program.key).backward, arguments, batch, steps, size, blocks, width)
    return gradients, None if grad_time_step is None else grad_time_step.sum(0), grad_initial, grad_weights.sum(0)


@functools.cache
def _linear_kernel(name: str) -> Callable:
    return define(name, "", {"linear_scan": _LINEAR_SCAN, "linear_scan_backward": _LINEAR_SCAN_BACKWARD}[name])


def gated_step_cpu(program: Program, inputs, parameters, state, gate) -> tuple[Tensor, Tensor]:
    """The output and the next state; arguments as in `mixing.gated_step_definition`."""
    batch, _, size = gate.shape
    inputs, rows = [with_rows(x if x.dtype is gate.dtype else x.to(gate.dtype)) for x in inputs], with_rows(gate)
    parameters = [p if p.dtype is torch.float32 and p.is_contiguous() else p.float().contiguous() for p in parameters]
    state = state.contiguous()
    outputs, states = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.empty_like(state)
    arguments = (
        tuple(map(place, inputs)),
        place(rows),
        state.data_ptr(),
        tuple(parameter.data_ptr() for parameter in parameters),
        outputs.data_ptr(),
        states.data_ptr(),
        size,
    )
    run(_step_kernel(program.key, ARRAYS[gate.dtype]), arguments, batch, 1, size, *partition(batch, size))
    return outputs, states


def _pairs(tensor: Tensor) -> Tensor:
    """A complex (..., D) tensor as a real one (..., 2 D), real and imaginary parts in turn; a view where it can be."""
    return torch.view_as_real(tensor.detach().resolve_conj()).flatten(-2)


def prefix_scan_cpu(decay: Tensor, inputs: Tensor, initial_state: Tensor, reverse: bool) -> Tensor:
    """The states (B, T, D) of the linear recurrence, real or complex; arguments as in `recurrence.prefix_scan`."""
    batch, steps, size = inputs.shape
    pairs = True if initial_state.is_complex() else None
    if pairs:
        decay, inputs, initial_state = _pairs(decay), _pairs(inputs), _pairs(initial_state)
    states = empty(batch, steps, inputs.shape[2])
    blocks, width = partition(batch, size)
    initial = initial_state.detach().contiguous().numpy()
    arguments = (rows_of(decay), rows_of(inputs), initial, states.numpy(), pairs, reverse)
    run(_linear_kernel("linear_scan"), arguments, batch, steps, size, blocks, width)
    return torch.view_as_complex(states.unflatten(2, (size, 2))) if pairs else states


def prefix_scan_backward_cpu(
    grad_states: Tensor, decay: Tensor, states: Tensor, initial_state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of decay, inputs and initial state; arguments as in `recurrence._prefix_scan_backward_op`."""
    batch, steps, size = states.shape
    pairs = True if states.is_complex() else None
    if pairs:
        grad_states, decay, states, initial_state = map(_pairs, (grad_states, decay, states, initial_state))
    gradients = empty(*states.shape), empty(*states.shape), torch.empty(initial_state.shape)
    arguments = (
        rows_of(grad_states),
        rows_of(decay),
        states.numpy(),
        initial_state.detach().contiguous().numpy(),
        *(gradient.numpy() for gradient in gradients),
        pairs,
        reverse,
    )
    run(_linear_kernel("linear_scan_backward"), arguments, batch, steps, size, *partition(batch, size))
    return tuple(torch.view_as_complex(x.unflatten(-1, (size, 2))) if pairs else x for x in gradients)
