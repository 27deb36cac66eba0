# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Random recurrences, and the definition written out again, for the solvers and kernels to be held to."""

import torch

from lrcssm_hf import LrcParameters


def definition(forget_input, update_input, p, elastance_input=None, initial_state=None, time_step=None, reset=None):
    """The paper's equations in a loop, differentiated by autograd; written independently of `lrc_step`."""
    state = torch.zeros_like(forget_input[:, 0]) if initial_state is None else initial_state
    states = []
    for t in range(forget_input.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None], torch.zeros_like(state), state)
        n = torch.sigmoid(p.activation_scale * (state - p.activation_shift))
        f = p.leak_conductance + forget_input[:, t] + p.forget_weight * n
        z = p.leak_conductance + update_input[:, t] + p.update_weight * n
        e = p.elastance_weight * state + p.elastance_bias
        if elastance_input is not None:
            e = e + elastance_input[:, t]
        if p.elastance_shift is None:
            eps = torch.sigmoid(e)
        else:
            eps = torch.sigmoid(e + p.elastance_shift) - torch.sigmoid(e - p.elastance_shift)
        dt = 1 if time_step is None else time_step[:, t, None]
        state = state + dt * eps * (p.leak_potential * torch.tanh(z) - torch.sigmoid(f) * state)
        states.append(state)
    return torch.stack(states, 1)


def random_problem(batch, steps, size, *, symmetric=False, full=False, scale=1.0, seed=0):
    """(forget_input, update_input, parameters, options) in float64, every tensor a leaf that requires a gradient.

    `full` adds elastance input, initial state, time steps (a fifth of them zero) and resets.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parameters = LrcParameters(*[(scale * normal(size)).requires_grad_() for _ in range(9 if symmetric else 8)])
    options = {}
    if full:
        time_step = torch.rand(batch, steps, generator=generator, dtype=torch.float64) + 0.25
        time_step[torch.rand(batch, steps, generator=generator) < 0.2] = 0
        options = {
            "elastance_input": normal(batch, steps, size).requires_grad_(),
            "initial_state": normal(batch, size).requires_grad_(),
            "time_step": time_step.requires_grad_(),
            "reset": torch.rand(batch, steps, generator=generator) < 0.1,
        }
    inputs = [normal(batch, steps, size).requires_grad_() for _ in range(2)]
    return *inputs, parameters, options


def leaves(forget_input, update_input, parameters, options):
    tensors = [forget_input, update_input, *parameters, *options.values()]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def cast(problem, dtype):
    """The same problem in another precision, with fresh leaves."""

    def convert(tensor):
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype).requires_grad_()

    forget_input, update_input, parameters, options = problem
    return (
        convert(forget_input),
        convert(update_input),
        LrcParameters(*map(convert, parameters)),
        {name: convert(value) for name, value in options.items()},
    )


def outputs_and_gradients(scan, problem, cotangent):
    """States, and the gradients of sum(states * cotangent) + sum(final_state ** 2) by every leaf, in float64."""
    forget_input, update_input, parameters, options = problem
    result = scan(forget_input, update_input, parameters, **options)
    states, final_state = result if isinstance(result, tuple) else (result, result[:, -1])
    loss = (states * cotangent.to(states.dtype)).sum() + final_state.square().sum()
    gradients = torch.autograd.grad(loss, leaves(*problem))
    return states.detach().double(), [gradient.double() for gradient in gradients]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / (1 + expected.abs().max())).item()


def cell_definition(cell, inputs, parameters, initial_state=None, time_step=None, reset=None):
    """A cell's equation in a loop over its function, differentiated by autograd."""
    first, count = next(iter(inputs.values())), len(cell.states)
    if initial_state is None:
        initial_state = first.new_zeros(first.shape[0], count, first.shape[2])
    states, trajectory = initial_state.view(first.shape[0], count, first.shape[2]).unbind(1), []
    for t in range(first.shape[1]):
        if reset is not None:
            states = [torch.where(reset[:, t, None], 0, state) for state in states]
        at_t = {name: tensor[:, t] for name, tensor in inputs.items()}
        states = cell.advance(states, at_t, parameters, None if time_step is None else time_step[:, t, None])
        trajectory.append(torch.stack(states, 1))
    trajectory = torch.stack(trajectory, 1)
    return trajectory.squeeze(2) if count == 1 else trajectory


def random_cell_problem(cell, batch, steps, size, *, full=False, scale=1.0, seed=0, dtype=torch.float64):
    """(inputs, parameters, options) of a scan of the cell, every tensor a leaf that requires a gradient.

    `full` adds the inputs that can be left out, an initial state, time steps (a fifth of them zero) and resets.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    names = [name for name in cell.inputs if full or name not in cell.defaults]
    inputs = {name: normal(batch, steps, size).requires_grad_() for name in names}
    parameters = {name: (scale * normal(size)).requires_grad_() for name in cell.parameters}
    options = {}
    if full:
        time_step = torch.rand(batch, steps, generator=generator, dtype=torch.float64) + 0.25
        time_step[torch.rand(batch, steps, generator=generator) < 0.2] = 0
        count = len(cell.states)
        options = {
            "initial_state": normal(batch, *([count] if count > 1 else []), size).requires_grad_(),
            "time_step": time_step.requires_grad_(),
            "reset": torch.rand(batch, steps, generator=generator) < 0.1,
        }
    return inputs, parameters, options


def map_tensors(convert, problem):
    """A cell's problem with another tensor for each."""
    return tuple({name: convert(tensor) for name, tensor in part.items()} for part in problem)


def cast_cell_problem(problem, dtype):
    """The same problem in another precision, with fresh leaves."""
    return map_tensors(lambda x: x if x.dtype == torch.bool else x.detach().to(dtype).requires_grad_(), problem)


def cell_leaves(problem):
    return [tensor for part in problem for tensor in part.values() if tensor.requires_grad]


def cell_outputs_and_gradients(scan, problem):
    """States, and the gradients of a sum of the states and of the final state's squares by every leaf; `scan` takes
    inputs, parameters and options."""
    inputs, parameters, options = problem
    result = scan(inputs, parameters, **options)
    states, final_state = result if isinstance(result, tuple) else (result, result[:, -1])
    cotangent = torch.randn(states.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (states * cotangent.to(states)).sum() + final_state.square().sum()
    return states.detach(), torch.autograd.grad(loss.abs() if loss.is_complex() else loss, cell_leaves(problem))
