# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How neurons start: the authors' draws, spread time constants, counters."""

import math

import torch
from torch import nn
from transformers import initialization as init


@torch.no_grad()
def init_lrc_neurons(neurons: nn.Module) -> None:
    """The authors' initialisation for the paper's block; for the gated block, spread time constants.

    At rest a neuron forgets by eps * sigmoid(0) = eps / 2 per step, so a time constant tau asks for an elastance
    of 2 / tau. The state's influence on the gates starts small.
    """
    config, size = neurons.config, neurons.config.state_size
    _init_sensory(neurons)
    if config.initialization == "state_tracking":
        _init_counters(neurons)
        return
    if not neurons.gated:
        for name, parameter in neurons.named_parameters(recurse=False):
            if not name.startswith("sensory"):
                init.uniform_(parameter, -(size**-0.5), size**-0.5)
        init.uniform_(neurons.currents.weight, -(size**-0.5), size**-0.5)
        return
    low, high = math.log(config.time_constant_min), math.log(config.time_constant_max)
    elastance = 2 / torch.empty(size).uniform_(low, high).exp()
    init.zeros_(neurons.leak_conductance)
    init.ones_(neurons.leak_potential)
    if config.elastance == "symmetric":
        # sigmoid(s) - sigmoid(-s) = tanh(s / 2), and the shift is softplus of the parameter.
        shift = 2 * torch.atanh(elastance)
        init.zeros_(neurons.elastance_bias)
        init.copy_(neurons.elastance_shift, shift + torch.log(-torch.expm1(-shift)))
    else:
        init.copy_(neurons.elastance_bias, torch.logit(elastance))
    if config.state_dependence == "full":
        init.ones_(neurons.activation_scale)
        init.zeros_(neurons.activation_shift)
        init.normal_(neurons.forget_weight, std=0.1)
        init.normal_(neurons.update_weight, std=0.1)
        if config.jacobian_bound is None:
            init.zeros_(neurons.elastance_weight)


@torch.no_grad()
def init_cell_neurons(neurons: nn.Module) -> None:
    """As the authors draw theirs; no bias."""
    bound = neurons.config.state_size**-0.5
    for parameter in (neurons.currents.weight, *neurons.cell_parameters()):
        init.uniform_(parameter, -bound, bound)
    init.zeros_(neurons.currents.bias)
    _init_sensory(neurons)


def _init_sensory(neurons: nn.Module) -> None:
    if neurons.config.sensory_activation == "sigmoid":
        bound = neurons.sensory_scale.numel() ** -0.5
        init.uniform_(neurons.sensory_scale, -bound, bound)
        init.uniform_(neurons.sensory_shift, -bound, bound)


def _init_counters(neurons: nn.Module) -> None:
    """Every neuron counts its inputs modulo a period, from 2 to 4, and q_t says which inputs count.

    With gates f and z that switch where the state crosses activation_shift, and a potential of -1, the state climbs
    at every step below the threshold (sigmoid(f) = 0, -tanh(z) = 1), by 1 if the elastance is, and the first step
    above it wipes the state and puts it to -1 (sigmoid(f) = 1, -tanh(z) = -1): an attracting cycle, so that errors
    do not grow with the length of the sequence.
    """
    size = neurons.leak_potential.numel()
    init.constant_(neurons.leak_potential, -1.0)
    # Of the levels -1, 0, 1, ... the threshold lets a period have so many.
    init.copy_(neurons.activation_shift, torch.randint(2, 5, (size,)) - 2.5)
    init.uniform_(neurons.activation_scale, 4.0, 6.0)
    init.uniform_(neurons.update_weight, 6.0, 10.0)
    init.copy_(neurons.forget_weight, neurons.update_weight)
    init.copy_(neurons.leak_conductance, -neurons.update_weight / 2)
    init.uniform_(neurons.elastance_weight, -0.5, 0.5)
    init.zeros_(neurons.elastance_bias)
    # Strong enough for an input to move the thresholds by a level, and the elastance close to 0 or 1.
    weights = [torch.empty_like(part) for part in neurons.currents.weight.chunk(3)]
    for weight, gain in zip(weights, (2.0, 2.0, 3.0)):
        weight.normal_(std=gain * weight.shape[1] ** -0.5)
    init.copy_(neurons.currents.weight, torch.cat(weights))
