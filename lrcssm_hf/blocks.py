# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What a layer is made of: neurons (`LrcSSMNeurons`, and `LrcSSMCellNeurons` of any other cell), the gated block's
convolution, mixer and MLP, and the two blocks.

Shapes: B batch, T steps, H hidden_size, D state_size, K conv_kernel. Recurrent states are (B, D), or (B, n, D) for a
cell of n states a neuron.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cells import LRC, LRC_SYMMETRIC, REGISTERED
from .configuration_lrcssm import LrcSSMConfig
from .context_parallel import steps_before
from .initialization import init_cell_neurons, init_lrc_neurons
from .mixing import convolution, decodes_by_kernels, gated_step, last_steps, rms_norm, silu_gate
from .recurrence import LrcParameters, cell_scan, prefix_scan
from .stability import confine
from .steps import LrcSSMSteps


def other_than_silu(config: LrcSSMConfig) -> nn.Module | None:
    """The activation, where it is not the one that `mixing.py` fuses."""
    return None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]


def gated(values: Tensor, gate: Tensor, act: nn.Module | None) -> Tensor:
    """values * act(gate), in the dtype of the gate; None is SiLU."""
    return silu_gate(values, gate) if act is None else values.to(gate.dtype) * act(gate)


class DrivenNeurons(nn.Module):
    """What every layer of D neurons has: one projection of its input, of `input_size` channels, into the cell's inputs,
    and a parameter of each neuron by each of the names.

    With `sensory_activation`, every channel of the input passes through a sigmoid of its own first.
    """

    def __init__(self, config: LrcSSMConfig, input_size: int, inputs: Sequence[str], names: Sequence[str], bias: bool):
        super().__init__()
        self.config, self.size, self.inputs = config, config.state_size, tuple(inputs)
        self.currents = nn.Linear(input_size, self.size * len(inputs), bias=bias)
        # Its own, not those of a dictionary: transformers takes a module without any to be initialised.
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(self.size)))
        self.senses = config.sensory_activation == "sigmoid"
        if self.senses:
            self.sensory_scale = nn.Parameter(torch.empty(input_size))
            self.sensory_shift = nn.Parameter(torch.empty(input_size))
        self.act = other_than_silu(config)
        # Whether `gated_step` is for it: the linear recurrence has another solver.
        is_linear = config.cell == "lrc" and config.state_dependence == "input"
        self.decodes = self.act is None and not is_linear

    def forward(
        self, inputs: Tensor, initial_state: Tensor | None, steps: LrcSSMSteps, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, input_size), and (B, D) or (B, n, D) -> outputs (B, T, D) and final state, float32 at least.

        The outputs are the last states of the neurons; with a `gate` (B, T, D), these times act(gate), in its dtype.
        """
        if self.senses:
            inputs = torch.sigmoid(self.sensory_scale * (inputs - self.sensory_shift))
        currents = self.currents(inputs)
        if gate is None:
            return self.solve(currents, initial_state, steps)
        if self.decodes and steps.are_alike and self.config.backend == "auto" and decodes_by_kernels(gate):
            currents = dict(zip(self.inputs, currents.chunk(len(self.inputs), dim=-1)))
            return gated_step(self.cell, currents, self.cell_parameters(), initial_state, gate)
        outputs, final_state = self.solve(currents, initial_state, steps)
        return gated(outputs, gate, self.act), final_state

    def solve(self, currents: Tensor, initial_state: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """Driven by the cell's inputs side by side: the neurons' last states (B, T, D), and the final state."""
        states, final_state = cell_scan(
            self.cell,
            currents,
            dict(zip(self.cell.parameters, self.cell_parameters())),
            initial_state=initial_state,
            time_step=steps.time_step,
            reset=steps.reset,
            solver=self.config.solver,
            backend=self.config.backend,
            group=steps.group,
        )
        return states if len(self.cell.states) == 1 else states[:, :, -1], final_state


class LrcSSMNeurons(DrivenNeurons):
    """A layer of liquid neurons with a diagonal recurrence, driven by the currents c, d and, with `elastance_input`, q
    (paper, equations 7 to 10)."""

    def __init__(self, config: LrcSSMConfig, input_size: int):
        names = ["leak_conductance", "leak_potential", "elastance_bias"]
        if config.state_dependence == "full":
            names += ["activation_scale", "activation_shift", "forget_weight", "update_weight"]
            if config.jacobian_bound is None:
                names += ["elastance_weight"]
        if config.elastance == "symmetric":
            names += ["elastance_shift"]
        inputs = LRC.inputs if config.elastance_input else LRC.inputs[:2]
        super().__init__(config, input_size, inputs, names, bias=False)
        self.gated = config.block_type == "gated"
        self.symmetric = config.elastance == "symmetric"
        self.cell = LRC_SYMMETRIC if self.symmetric else LRC
        self.bound = config.jacobian_bound

    def init_weights(self):
        """See `initialization.py`."""
        init_lrc_neurons(self)

    def lrc_parameters(self) -> LrcParameters:
        """As `lrc_scan` takes them: 0 for a weight that the configuration leaves out, and with `jacobian_bound` no
        larger than that allows."""
        shift = self.elastance_shift if self.symmetric else None
        if shift is not None and self.gated:
            # A negative shift makes the elastance negative and the state grow; the paper's block loads it as it is.
            shift = F.softplus(shift)
        values = [getattr(self, name, None) for name in LrcParameters._fields[:-1]]
        if any(value is None for value in values):
            nothing = torch.zeros_like(self.elastance_bias)
            values = [nothing if value is None else value for value in values]
        parameters = LrcParameters(*values, shift)
        return parameters if self.bound is None else confine(parameters, self.bound)

    def cell_parameters(self) -> Sequence[Tensor]:
        """(D,) each, in the order of the cell."""
        return self.lrc_parameters()[: len(self.cell.parameters)]

    def solve(self, currents: Tensor, initial_state: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """As for any cell; without the state in the gates, by the linear scan."""
        if self.config.state_dependence == "full":
            return super().solve(currents, initial_state, steps)
        forget_input, update_input, *elastance_input = currents.chunk(len(self.inputs), dim=-1)
        shift = self.lrc_parameters().elastance_shift
        dtype = torch.promote_types(self.elastance_bias.dtype, torch.float32)
        drive, conductance = self.elastance_bias.to(dtype), self.leak_conductance.to(dtype)
        if elastance_input:
            drive = drive + elastance_input[0]
        rate = torch.sigmoid(drive) if shift is None else torch.sigmoid(drive + shift) - torch.sigmoid(drive - shift)
        if steps.time_step is not None:
            rate = rate * steps.time_step.unsqueeze(-1)
        decay = 1 - rate * torch.sigmoid(conductance + forget_input)
        if steps.reset is not None:
            decay = decay.masked_fill(steps.reset.unsqueeze(-1), 0)
        update = rate * self.leak_potential * torch.tanh(conductance + update_input)
        states = prefix_scan(decay.expand_as(update), update, initial_state, group=steps.group)
        return states, states[:, -1]


class LrcSSMCellNeurons(DrivenNeurons):
    """A layer of neurons of the cell `config.cell`, of which the last state is the layer's output."""

    def __init__(self, config: LrcSSMConfig, input_size: int):
        cell = REGISTERED[config.cell]
        super().__init__(config, input_size, cell.inputs, [f"cell_{name}" for name in cell.parameters], bias=True)
        self.cell = cell

    def init_weights(self):
        """See `initialization.py`."""
        init_cell_neurons(self)

    def cell_parameters(self) -> Sequence[Tensor]:
        """(D,) each, in the order of the cell."""
        return [getattr(self, f"cell_{name}") for name in self.cell.parameters]


def make_neurons(config: LrcSSMConfig, input_size: int) -> LrcSSMNeurons | LrcSSMCellNeurons:
    """The layer of neurons that the configuration asks for."""
    return (LrcSSMNeurons if config.cell == "lrc" else LrcSSMCellNeurons)(config, input_size)


class LrcSSMRMSNorm(nn.RMSNorm):
    """The root mean square norm of torch, which on CPUs makes several passes, in one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return rms_norm(hidden_states, self.weight, self.eps)


class LrcSSMConvolution(nn.Module):
    """Causal depthwise convolution over the last K steps, and the activation: (B, T, D) -> (B, T, D).

    A document start hides the steps before it.
    """

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.state_size, config.conv_kernel))
        self.bias = nn.Parameter(torch.empty(config.state_size))
        self.act = other_than_silu(config)

    @torch.no_grad()
    def init_weights(self):
        """As `nn.Conv1d` draws its weights; no bias."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)

    def forward(self, inputs: Tensor, past: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """`past` holds the K - 1 inputs before the first, (B, D, K - 1); returns the outputs and the new `past`."""
        weight = self.weight
        before = weight.shape[1] - 1
        if steps.group is not None and before > 0:
            last = last_steps(inputs, past, steps.reset, steps.lengths, before).mT
            count = steps.lengths
            if count is None:
                count = last.new_full(last.shape[:1], inputs.shape[1], dtype=torch.long)
            if steps.reset is not None:
                count = torch.where(steps.reset.any(1), before, count)
            past = steps_before(last, count, steps.group).mT
        outputs, past = convolution(inputs, weight, self.bias, past, steps.reset, steps.lengths, silu=self.act is None)
        return outputs if self.act is None else self.act(outputs), past


class LrcSSMMixer(nn.Module):
    """The gated block's sequence mixer: convolution and neurons on one branch, multiplied by the other."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.state_size, bias=False)
        self.convolution = LrcSSMConvolution(config)
        self.neurons = make_neurons(config, config.state_size)
        self.out_proj = nn.Linear(config.state_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        steps: LrcSSMSteps,
        conv_state: Tensor | None = None,
        recurrent_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H), (B, D, K - 1), (B, D) -> the same, after the steps."""
        branch, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        branch, conv_state = self.convolution(branch, conv_state, steps)
        mixed, recurrent_state = self.neurons(branch, recurrent_state, steps, gate)
        return self.out_proj(mixed), conv_state, recurrent_state


class LrcSSMMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = other_than_silu(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.down_proj(gated(self.up_proj(hidden_states), self.gate_proj(hidden_states), self.act))


# Blocks are functions of the states and no more: one that wrote to a cache would do it again when it is recomputed for
# the gradients.


class LrcSSMGatedBlock(GradientCheckpointingLayer):
    """RMSNorm, mixer, residual; RMSNorm, SwiGLU, residual."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.mixer_norm = LrcSSMRMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = LrcSSMMixer(config)
        self.mlp_norm = LrcSSMRMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = LrcSSMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        steps: LrcSSMSteps,
        conv_state: Tensor | None = None,
        recurrent_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H), (B, D, K - 1), (B, D) -> the same, after the steps."""
        mixed, *state = self.mixer(self.mixer_norm(hidden_states), steps, conv_state, recurrent_state)
        hidden_states = hidden_states + self._drop(mixed)
        return hidden_states + self._drop(self.mlp(self.mlp_norm(hidden_states))), *state

    def _drop(self, outputs: Tensor) -> Tensor:
        # Decoding has no time for modules that do nothing.
        return self.dropout(outputs) if self.training else outputs


class LrcSSMPaperLinear(nn.Linear):
    """A linear layer of the authors' MLPs: He-uniform weights, no initial bias."""


class LrcSSMPaperMLP(nn.Sequential):
    """Linear, ReLU, Linear: the authors' encoder, block MLP and classifier."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int):
        super().__init__(
            LrcSSMPaperLinear(input_size, intermediate_size),
            nn.ReLU(),
            LrcSSMPaperLinear(intermediate_size, output_size),
        )


class LrcSSMPaperBlock(GradientCheckpointingLayer):
    """The authors' block: norm, neurons, residual and norm again, with the MLP after it (equal widths) or before."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.equal_widths = config.hidden_size == config.state_size
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, elementwise_affine=False)
        self.neurons = make_neurons(config, config.hidden_size)
        self.mlp = LrcSSMPaperMLP(config.state_size, config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        steps: LrcSSMSteps,
        conv_state: Tensor | None = None,
        recurrent_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H), (B, D, 0), (B, D) -> the same, after the steps."""
        inputs = self.norm(hidden_states)
        states, recurrent_state = self.neurons(inputs, recurrent_state, steps)
        conv_state = inputs.new_empty(inputs.shape[0], states.shape[-1], 0)
        states = states.to(inputs.dtype)
        if not self.equal_widths:
            return self.norm(self.dropout(self.mlp(states)) + inputs), conv_state, recurrent_state
        hidden_states = self.norm(states + inputs)
        return self.dropout(self.mlp(hidden_states)) + hidden_states, conv_state, recurrent_state


BLOCKS = {"gated": LrcSSMGatedBlock, "paper": LrcSSMPaperBlock}
