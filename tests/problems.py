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
