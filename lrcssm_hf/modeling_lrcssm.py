# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""PyTorch LrcSSM model: liquid-resistance liquid-capacitance state-space model (arXiv 2505.21717).

Read from top to bottom: the neurons (`LrcSSMNeurons`, and `LrcSSMCellNeurons` of any other cell), the two blocks around
them, the model, the heads.
Shapes: B batch, T steps, H hidden_size, D state_size, K conv_kernel. Recurrent states are (B, D), or (B, n, D) for a
cell of n states a neuron.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .cells import REGISTERED
from .configuration_lrcssm import LrcSSMConfig
from .context_parallel import spread_labels, steps_before
from .forecasting import ForecastingMixin
from .host import (
    CACHE,
    CACHE_NAMES,
    LOSS_KEYWORDS,
    keywords,
    refuses_unknown,
    register_names,
    rename_cache,
    takes_cache,
)
from .recurrence import LrcParameters, cell_scan, load_cpu_kernels, lrc_scan, prefix_scan
from .recurrent_cache import read_state, repeat_rows, require_cache, write_state
from .saved_states import SavedStatesMixin
from .series import observed_values, require_features, require_finite, series_statistics
from .stability import confine
from .steps import LrcSSMSteps, as_mask, documents_of, may_look, require_times


class LrcSSMNeurons(nn.Module):
    """A layer of D liquid neurons with a diagonal recurrence, driven by an input of `input_size` channels.

    The input passes through the sensory activation and one projection into the currents c, d and, with
    `elastance_input`, q (paper, equations 7 to 10); `lrc_scan` solves the recurrence.
    """

    def __init__(self, config: LrcSSMConfig, input_size: int):
        super().__init__()
        self.config = config
        self.gated = config.block_type == "gated"
        size = config.state_size
        self.currents = nn.Linear(input_size, size * (3 if config.elastance_input else 2), bias=False)
        names = ["leak_conductance", "leak_potential", "elastance_bias"]
        if config.state_dependence == "full":
            names += ["activation_scale", "activation_shift", "forget_weight", "update_weight"]
            if config.jacobian_bound is None:
                names += ["elastance_weight"]
        if config.elastance == "symmetric":
            names += ["elastance_shift"]
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        if config.sensory_activation == "sigmoid":
            self.sensory_scale = nn.Parameter(torch.empty(input_size))
            self.sensory_shift = nn.Parameter(torch.empty(input_size))

    @torch.no_grad()
    def init_weights(self):
        """The authors' initialisation for the paper's block; for the gated block, spread time constants.

        At rest a neuron forgets by eps * sigmoid(0) = eps / 2 per step, so a time constant tau asks for an elastance
        of 2 / tau. The state's influence on the gates starts small.
        """
        config, size = self.config, self.config.state_size
        if config.sensory_activation == "sigmoid":
            bound = self.sensory_scale.numel() ** -0.5
            init.uniform_(self.sensory_scale, -bound, bound)
            init.uniform_(self.sensory_shift, -bound, bound)
        if config.initialization == "state_tracking":
            self._init_counters()
            return
        if not self.gated:
            for name, parameter in self.named_parameters(recurse=False):
                if not name.startswith("sensory"):
                    init.uniform_(parameter, -(size**-0.5), size**-0.5)
            init.uniform_(self.currents.weight, -(size**-0.5), size**-0.5)
            return
        low, high = math.log(config.time_constant_min), math.log(config.time_constant_max)
        elastance = 2 / torch.empty(size).uniform_(low, high).exp()
        init.zeros_(self.leak_conductance)
        init.ones_(self.leak_potential)
        if config.elastance == "symmetric":
            # sigmoid(s) - sigmoid(-s) = tanh(s / 2), and the shift is softplus of the parameter.
            shift = 2 * torch.atanh(elastance)
            init.zeros_(self.elastance_bias)
            init.copy_(self.elastance_shift, shift + torch.log(-torch.expm1(-shift)))
        else:
            init.copy_(self.elastance_bias, torch.logit(elastance))
        if config.state_dependence == "full":
            init.ones_(self.activation_scale)
            init.zeros_(self.activation_shift)
            init.normal_(self.forget_weight, std=0.1)
            init.normal_(self.update_weight, std=0.1)
            if config.jacobian_bound is None:
                init.zeros_(self.elastance_weight)

    def _init_counters(self):
        """Every neuron counts its inputs modulo a period, from 2 to 4, and q_t says which inputs count.

        With gates f and z that switch where the state crosses activation_shift, and a potential of -1, the state climbs
        at every step below the threshold (sigmoid(f) = 0, -tanh(z) = 1), by 1 if the elastance is, and the first step
        above it wipes the state and puts it to -1 (sigmoid(f) = 1, -tanh(z) = -1): an attracting cycle, so that errors
        do not grow with the length of the sequence.
        """
        size = self.leak_potential.numel()
        init.constant_(self.leak_potential, -1.0)
        # Of the levels -1, 0, 1, ... the threshold lets a period have so many.
        init.copy_(self.activation_shift, torch.randint(2, 5, (size,)) - 2.5)
        init.uniform_(self.activation_scale, 4.0, 6.0)
        init.uniform_(self.update_weight, 6.0, 10.0)
        init.copy_(self.forget_weight, self.update_weight)
        init.copy_(self.leak_conductance, -self.update_weight / 2)
        init.uniform_(self.elastance_weight, -0.5, 0.5)
        init.zeros_(self.elastance_bias)
        # Strong enough for an input to move the thresholds by a level, and the elastance close to 0 or 1.
        weights = [torch.empty_like(part) for part in self.currents.weight.chunk(3)]
        for weight, gain in zip(weights, (2.0, 2.0, 3.0)):
            weight.normal_(std=gain * weight.shape[1] ** -0.5)
        init.copy_(self.currents.weight, torch.cat(weights))

    def lrc_parameters(self) -> LrcParameters:
        """As `lrc_scan` takes them: 0 for a weight that the configuration leaves out, and with `jacobian_bound` no
        larger than that allows."""
        shift = getattr(self, "elastance_shift", None)
        if shift is not None and self.gated:
            # A negative shift makes the elastance negative and the state grow; the paper's block loads it as it is.
            shift = F.softplus(shift)
        nothing = torch.zeros_like(self.elastance_bias)
        values = [getattr(self, name, nothing) for name in LrcParameters._fields[:-1]]
        parameters = LrcParameters(*values, shift)
        return parameters if self.config.jacobian_bound is None else confine(parameters, self.config.jacobian_bound)

    def forward(self, inputs: Tensor, initial_state: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """(B, T, input_size), (B, D) -> states (B, T, D) and final state (B, D), float32 at least."""
        config, time_step, reset = self.config, steps.time_step, steps.reset
        if config.sensory_activation == "sigmoid":
            inputs = torch.sigmoid(self.sensory_scale * (inputs - self.sensory_shift))
        currents = self.currents(inputs).split(config.state_size, dim=-1)
        forget_input, update_input = currents[:2]
        elastance_input = currents[2] if config.elastance_input else None
        parameters = self.lrc_parameters()
        shift = parameters.elastance_shift

        if config.state_dependence == "input":
            dtype = torch.promote_types(self.elastance_bias.dtype, torch.float32)
            drive, conductance = self.elastance_bias.to(dtype), self.leak_conductance.to(dtype)
            if elastance_input is not None:
                drive = drive + elastance_input
            if shift is None:
                rate = torch.sigmoid(drive)
            else:
                rate = torch.sigmoid(drive + shift) - torch.sigmoid(drive - shift)
            if time_step is not None:
                rate = rate * time_step.unsqueeze(-1)
            decay = 1 - rate * torch.sigmoid(conductance + forget_input)
            if reset is not None:
                decay = decay.masked_fill(reset.unsqueeze(-1), 0)
            update = rate * self.leak_potential * torch.tanh(conductance + update_input)
            states = prefix_scan(decay.expand_as(update), update, initial_state, group=steps.group)
            return states, states[:, -1]

        return lrc_scan(
            forget_input,
            update_input,
            parameters,
            elastance_input=elastance_input,
            initial_state=initial_state,
            time_step=time_step,
            reset=reset,
            solver=config.solver,
            backend=config.backend,
            group=steps.group,
        )


class LrcSSMCellNeurons(nn.Module):
    """A layer of D neurons of the cell `config.cell`, driven by an input of `input_size` channels.

    One projection of the input is all of the cell's inputs, and the last state of every neuron is the layer's output.
    """

    def __init__(self, config: LrcSSMConfig, input_size: int):
        super().__init__()
        self.config = config
        self.cell = REGISTERED[config.cell]
        size = config.state_size
        self.currents = nn.Linear(input_size, size * len(self.cell.inputs))
        # Its own, not those of a dictionary: transformers takes a module without any to be initialised.
        for name in self.cell.parameters:
            self.register_parameter(f"cell_{name}", nn.Parameter(torch.empty(size)))
        if config.sensory_activation == "sigmoid":
            self.sensory_scale = nn.Parameter(torch.empty(input_size))
            self.sensory_shift = nn.Parameter(torch.empty(input_size))

    @torch.no_grad()
    def init_weights(self):
        """As the authors draw theirs; no bias."""
        bound = self.config.state_size**-0.5
        for parameter in (self.currents.weight, *self.cell_parameters().values()):
            init.uniform_(parameter, -bound, bound)
        init.zeros_(self.currents.bias)
        if self.config.sensory_activation == "sigmoid":
            bound = self.sensory_scale.numel() ** -0.5
            init.uniform_(self.sensory_scale, -bound, bound)
            init.uniform_(self.sensory_shift, -bound, bound)

    def cell_parameters(self) -> dict[str, Tensor]:
        """As `cell_scan` takes them, (D,) each."""
        return {name: getattr(self, f"cell_{name}") for name in self.cell.parameters}

    def forward(self, inputs: Tensor, initial_state: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """(B, T, input_size), (B, D) or (B, n, D) -> outputs (B, T, D) and final state, float32 at least."""
        config = self.config
        if config.sensory_activation == "sigmoid":
            inputs = torch.sigmoid(self.sensory_scale * (inputs - self.sensory_shift))
        currents = self.currents(inputs).split(config.state_size, dim=-1)
        states, final_state = cell_scan(
            self.cell,
            dict(zip(self.cell.inputs, currents)),
            self.cell_parameters(),
            initial_state=initial_state,
            time_step=steps.time_step,
            reset=steps.reset,
            solver=config.solver,
            backend=config.backend,
            group=steps.group,
        )
        return states if len(self.cell.states) == 1 else states[:, :, -1], final_state


def make_neurons(config: LrcSSMConfig, input_size: int) -> LrcSSMNeurons | LrcSSMCellNeurons:
    """The layer of neurons that the configuration asks for."""
    return (LrcSSMNeurons if config.cell == "lrc" else LrcSSMCellNeurons)(config, input_size)


class LrcSSMConvolution(nn.Module):
    """Causal depthwise convolution over the last K steps, as a sum over its taps: (B, T, D) -> (B, T, D).

    A document start hides the steps before it. On a CPU this is several times faster than `nn.Conv1d`, which has to
    move the channels first.
    """

    def __init__(self, size: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, kernel))
        self.bias = nn.Parameter(torch.empty(size))

    @torch.no_grad()
    def init_weights(self):
        """As `nn.Conv1d` draws its weights; no bias."""
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)

    def forward(self, inputs: Tensor, past: Tensor | None, steps: LrcSSMSteps) -> tuple[Tensor, Tensor]:
        """`past` holds the K - 1 inputs before the first, (B, D, K - 1); returns the outputs and the new `past`."""
        batch, length, size = inputs.shape
        kernel = self.weight.shape[1]
        document = None if steps.reset is None else F.pad(steps.reset.cumsum(1), (kernel - 1, 0))
        past = inputs.new_zeros(batch, kernel - 1, size) if past is None else past.transpose(1, 2).to(inputs.dtype)
        if steps.group is not None and kernel > 1:
            last = self._last(torch.cat([past, inputs], dim=1), steps, document)
            count = last.new_full((batch,), length, dtype=torch.long) if steps.lengths is None else steps.lengths
            if document is not None:
                count = torch.where(document[:, -1] > 0, kernel - 1, count)
            past = steps_before(last, count, steps.group)
        window = torch.cat([past, inputs], dim=1)
        if length == 1 and document is None:
            # Decoding: as few operations as can be.
            return (window * self.weight.t()).sum(1, keepdim=True) + self.bias, self._last(window, steps, document).mT
        outputs = inputs * self.weight[:, -1] + self.bias
        for tap in range(kernel - 1):
            tapped = window[:, tap : tap + length]
            if document is not None:
                tapped = tapped * (document[:, tap : tap + length] == document[:, kernel - 1 :]).unsqueeze(-1)
            outputs = outputs + tapped * self.weight[:, tap]
        return outputs, self._last(window, steps, document).transpose(1, 2)

    def _last(self, window: Tensor, steps: LrcSSMSteps, document: Tensor | None) -> Tensor:
        """The past of what comes after this call and continues its last document: the last K - 1 unmasked steps of that
        document, (B, K - 1 + T, D) -> (B, K - 1, D)."""
        batch, length, size = window.shape
        past = self.weight.shape[1] - 1
        if steps.lengths is None and document is None:
            # A copy, so that the whole window is not kept for its end.
            return window[:, length - past :].clone()
        if steps.lengths is None:
            last = torch.arange(length - past, length, device=window.device).expand(batch, -1)
        else:
            last = steps.lengths[:, None] + torch.arange(past, device=window.device)
        taken = window.gather(1, last.unsqueeze(-1).expand(-1, -1, size))
        if document is None:
            return taken
        return taken.masked_fill((document.gather(1, last) != document[:, -1:]).unsqueeze(-1), 0)


class LrcSSMMixer(nn.Module):
    """The gated block's sequence mixer: convolution and neurons on one branch, multiplied by the other."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.state_size, bias=False)
        self.convolution = LrcSSMConvolution(config.state_size, config.conv_kernel)
        self.act = ACT2FN[config.hidden_act]
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
        states, recurrent_state = self.neurons(self.act(branch), recurrent_state, steps)
        return self.out_proj(states.to(gate.dtype) * self.act(gate)), conv_state, recurrent_state


class LrcSSMMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.down_proj(self.act(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


# Blocks are functions of the states and no more: one that wrote to a cache would do it again when it is recomputed for
# the gradients.


class LrcSSMGatedBlock(GradientCheckpointingLayer):
    """RMSNorm, mixer, residual; RMSNorm, SwiGLU, residual."""

    def __init__(self, config: LrcSSMConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = LrcSSMMixer(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
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
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states))), *state


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


class LrcSSMPreTrainedModel(SavedStatesMixin, PreTrainedModel):
    """Weight initialisation, and what transformers needs to know of the architecture."""

    config: LrcSSMConfig
    config_class = LrcSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [block.__name__ for block in BLOCKS.values()]
    _skip_keys_device_placement = list(CACHE_NAMES)
    # A recurrent state cannot be rolled back.
    _is_stateful = True

    def __init__(self, config: LrcSSMConfig):
        # Fields may have been changed since the configuration was made.
        config.check_values()
        super().__init__(config)
        # Now, because numba cannot be imported while torch.export traces: that replaces functions of Python's.
        load_cpu_kernels()
        # FSDP refuses to wrap a class of which the model has no module.
        self._no_split_modules = [BLOCKS[config.block_type].__name__]
        if config.num_channels is not None:
            self.main_input_name = "input_values"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (LrcSSMNeurons, LrcSSMCellNeurons, LrcSSMConvolution)):
            module.init_weights()
        elif isinstance(module, LrcSSMPaperLinear):
            init.kaiming_uniform_(module.weight, nonlinearity="relu")


class LrcSSMModel(LrcSSMPreTrainedModel):
    """The bare model: tokens or series in, hidden states out.

    Blocks between an embedding (of tokens) or a projection (of `config.num_channels` channels) and a last norm. States
    are kept in transformers' `DynamicCache`, whose layers hold `recurrent_states[0]` (batch_size, state_size), float32
    at least, and `conv_states[0]` (batch_size, state_size, conv_kernel - 1); none grows with the sequence. A cell of n
    states a neuron has recurrent states of (batch_size, n, state_size).
    """

    def __init__(self, config: LrcSSMConfig):
        super().__init__(config)
        if config.num_channels is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        else:
            self._input_embed_layer = "encoder"  # Read by get_input_embeddings and set_input_embeddings.
            size = config.patch_length * (config.num_channels + config.num_time_features)
            if config.block_type == "paper":
                self.encoder = LrcSSMPaperMLP(size, config.hidden_size, config.hidden_size)
            else:
                self.encoder = nn.Linear(size, config.hidden_size)
            if config.num_static_real_features:
                self.static_encoder = nn.Linear(config.num_static_real_features, config.hidden_size, bias=False)
        block = BLOCKS[config.block_type]
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_hidden_groups or config.num_hidden_layers))
        # The paper's block ends in the residual stream that its classifier reads.
        gated = config.block_type == "gated"
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if gated else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def block(self, index: int) -> nn.Module:
        """The block that is the layer `index`; with `config.num_hidden_groups`, consecutive layers are one block."""
        return self.layers[index * len(self.layers) // self.config.num_hidden_layers]

    @takes_cache
    @refuses_unknown()
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        observed_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
        time_features: Tensor | None = None,
        static_real_features: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        context_parallel_group: "dist.ProcessGroup | None" = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for real steps, 0 for padding,
                which may lie anywhere and leaves no trace. With a cache, the mask may also cover the steps before; only
                its last `sequence_length` columns are read.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): where it is 0 and the step
                is not masked, a new document starts, and nothing before it is remembered. Needed only for several
                documents in one row.
            seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`), cu_seq_lens_q (`torch.Tensor` of shape
                `(documents + 1,)`, for a batch of one row): two other ways in which collators tell documents apart, by
                each step's document and by the steps where the documents begin and, last, where they end.
            cache (`Cache`): the state to continue from, as returned by an earlier call; this call updates it. Its name
                in transformers before 5.24, `past_key_values`, is taken too.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): in place of ids.
            input_values (`torch.Tensor` of shape `(batch_size, sequence_length, num_channels)`): a continuous series,
                for a model with `config.num_channels`.
            observed_mask (`torch.Tensor` of shape `(batch_size, sequence_length, num_channels)`): 0 where a value is
                missing, which may then be NaN; the model reads a zero there, with `scaling` the channel's mean.
            time_deltas (`torch.Tensor` of shape `(batch_size, sequence_length)`): time elapsed at each step, in units
                of the regular step; 1 by default.
            time_features (`torch.Tensor` of shape `(batch_size, sequence_length, num_time_features)`): what is known
                of each step beside its values, such as the hour.
            static_real_features (`torch.Tensor` of shape `(batch_size, num_static_real_features)`): what is known of
                the whole series.
            statistics (`tuple` of two `torch.Tensor` of shape `(batch_size, 1, num_channels)`): with `config.scaling`,
                mean and standard deviation to use instead of those of `input_values`; needed with a cache, which has
                read other values.
            context_parallel_group (`torch.distributed.ProcessGroup`): the ranks over which sequences are spread, in
                their order. What is passed are this rank's steps, one or more, and the result is theirs; documents are
                told apart by `position_ids`. All ranks have to pass the same arguments and, if any does, all have to
                go back, also one without a loss of its own (`0 * last_hidden_state.sum()`). A rank's gradients are its
                part: average them over the ranks, as DDP and FSDP do, for those of the mean of the ranks' losses.
            use_cache (`bool`): whether to return `cache`; by default `config.use_cache`, but not for a model in
                training mode with gradients on.
            output_hidden_states (`bool`): whether to return the input of every block and the last output.

        Returns:
            `last_hidden_state` (batch_size, sequence_length, hidden_size), in which a masked step repeats the last
            real one; `cache` with `use_cache`; `hidden_states` with `output_hidden_states`. With a
            `config.patch_length` above 1 they have sequence_length / patch_length tokens, rounded up, the real ones at
            the front, and only the first of the pieces that go through a cache may have an incomplete patch.

        Raises:
            ValueError: an input is missing, has the wrong shape or, on the CPU, a value out of range.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_spread = context_parallel_group is not None
        if use_cache is None:
            learns = self.training and torch.is_grad_enabled()
            use_cache = self.config.use_cache and not (learns or self.config.bidirectional or is_spread)
        if self.config.bidirectional and (use_cache or cache is not None):
            raise ValueError(
                "A model with `bidirectional` reads series from both ends and cannot continue from a cache; pass "
                "`use_cache=False` and the whole series."
            )
        if is_spread:
            asked = {"use_cache": use_cache, CACHE: cache is not None}
            asked |= {"seq_idx": seq_idx is not None, "cu_seq_lens_q": cu_seq_lens_q is not None}
            self._check_spread(**asked)
        name, values = self._one_input(input_ids=input_ids, inputs_embeds=inputs_embeds, input_values=input_values)
        batch_size, length = values.shape[:2]
        require_cache(cache, self.config, batch_size)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        mask = self._step_mask(attention_mask, batch_size, length, cache)
        if mask is not None and not is_spread and may_look(mask) and mask.all():
            # Nothing is padding. Ranks have to do the same, and would have to ask each other.
            mask = None
        of_series = {
            "observed_mask": observed_mask,
            "time_features": time_features,
            "static_real_features": static_real_features,
            "statistics": statistics,
        }
        for argument, value in of_series.items():
            if value is not None and name != "input_values":
                raise ValueError(f"`{argument}` goes with `input_values`, not with `{name}`; leave it out.")
        per_step = {"position_ids": position_ids, "time_deltas": time_deltas, "seq_idx": seq_idx}
        for argument, value in per_step.items():
            if value is not None and value.shape not in ((batch_size, length), (1, length)):
                raise ValueError(f"`{argument}` must have shape {(batch_size, length)}, got {tuple(value.shape)}.")
        if cu_seq_lens_q is not None:
            seq_idx = documents_of(cu_seq_lens_q, batch_size, length)
        reset = None if position_ids is None else (position_ids == 0).expand(batch_size, -1)
        seq_idx = None if seq_idx is None else seq_idx.expand(batch_size, -1)
        if time_deltas is not None:
            dtype = torch.promote_types(time_deltas.dtype, torch.float32)
            time_deltas = time_deltas.to(dtype).expand(batch_size, -1)
            require_times(time_deltas, mask)

        steps = LrcSSMSteps.of(mask, time_deltas, reset, seq_idx)._replace(group=context_parallel_group)
        if name == "input_values":
            continues = cache is not None and cache.has_previous_state()
            self._check_rows(steps, length, continues)
            values = self._prepare_series(values, mask, observed_mask, time_features, statistics, continues)
            tokens, steps = steps.patch(steps.pack(values), self.config.patch_length)
            hidden_states = self._add_static(self.encoder(tokens.to(self.dtype)), static_real_features)
        else:
            hidden_states = steps.pack(self._embed(name, values, mask))
        backwards = steps.reversed() if self.config.bidirectional else None
        all_hidden_states = ()
        for index in range(self.config.num_hidden_layers):
            if output_hidden_states:
                # What is returned is what the layer reads, so that a gradient can be asked of it.
                all_hidden_states += (steps.unpack(hidden_states),)
                hidden_states = steps.pack(all_hidden_states[-1])
            layer = self.block(index)
            if backwards is not None and index % 2:
                hidden_states = steps.reverse(layer(steps.reverse(hidden_states), backwards)[0])
                continue
            state = (None, None) if cache is None else read_state(cache, index)
            hidden_states, *state = layer(hidden_states, steps, *state)
            if cache is not None:
                write_state(cache, index, *state)
        hidden_states = steps.unpack(self.norm(hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )

    def _check_spread(self, **asked: bool) -> None:
        """Refuses what sequences spread over ranks do not go with: arguments, by name, and fields."""
        config = self.config
        for name, is_asked in asked.items():
            if is_asked:
                raise ValueError(
                    f"`{name}` does not go with `context_parallel_group`; leave it out, and tell documents apart by "
                    "`position_ids`."
                )
        fields = {"bidirectional": config.bidirectional, "patch_length": config.patch_length > 1}
        for name, is_set in (fields | {"scaling": config.scaling is not None}).items():
            if is_set:
                raise ValueError(
                    f"A model with `{name}` has to see whole sequences; leave out `context_parallel_group`, or make a "
                    f"model without `{name}`."
                )

    def _one_input(self, **inputs: Tensor | None) -> tuple[str, Tensor]:
        """Name and value of the one input that was given, its shape checked."""
        given = {name: value for name, value in inputs.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Pass exactly one of {', '.join(inputs)}; got {' and '.join(given) or 'none of them'}.")
        name, value = next(iter(given.items()))
        channels = self.config.num_channels
        if name == "input_ids" and channels is not None:
            raise ValueError(f"This model reads `input_values` of {channels} channels, not `input_ids`.")
        if name == "input_values" and channels is None:
            raise ValueError("This model reads `input_ids`; set `config.num_channels` for a model of series.")
        if name == "inputs_embeds" and self.config.patch_length > 1:
            raise ValueError(
                f"This model reads `input_values` in patches of {self.config.patch_length} steps (`patch_length`), not "
                "`inputs_embeds`."
            )
        width = {"input_ids": (), "inputs_embeds": (self.config.hidden_size,), "input_values": (channels,)}[name]
        if value.dim() != 2 + len(width) or value.shape[2:] != width or value.numel() == 0:
            shape = ", ".join(["batch", "steps", *map(str, width)])
            raise ValueError(f"`{name}` must have shape ({shape}) and not be empty, got {tuple(value.shape)}.")
        return name, value

    def _step_mask(
        self, attention_mask: Tensor | None, batch_size: int, length: int, cache: Cache | None
    ) -> Tensor | None:
        """The mask of this call's steps as bool (B, T)."""
        if attention_mask is None:
            return None
        shape = tuple(attention_mask.shape)
        continues = cache is not None and cache.has_previous_state()
        if len(shape) != 2 or shape[0] != batch_size or (shape[1] != length and not (continues and shape[1] > length)):
            raise ValueError(f"`attention_mask` must have shape {(batch_size, length)}, got {shape}.")
        return as_mask("attention_mask", attention_mask[:, -length:])

    def _embed(self, name: str, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, H)."""
        if name == "input_ids":
            if may_look(values):
                low, high = (bound.item() for bound in values.aminmax())
                if low < 0 or high >= self.config.vocab_size:
                    raise ValueError(
                        f"`input_ids` must be in [0, {self.config.vocab_size}), got {low} to {high}; "
                        "is this the model's tokenizer?"
                    )
            return self.embed_tokens(values)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(-1), 0)
        require_finite(name, values)
        return values

    def _check_rows(self, steps: LrcSSMSteps, length: int, continues: bool) -> None:
        """What patches, statistics and forecasts ask of the rows of `input_values`."""
        config = self.config
        patch_length = config.patch_length
        ask_for_one = {
            "patch_length": patch_length > 1,
            "scaling": config.scaling is not None,
            "prediction_length": config.prediction_length is not None,
        }
        fields = [field for field, asks in ask_for_one.items() if asks]
        if steps.reset is not None and fields:
            raise ValueError(
                f"`{fields[0]}` ({getattr(config, fields[0])}) is for one series in a row: give each series a row, "
                "without `position_ids`, `seq_idx` and `cu_seq_lens_q`."
            )
        if not continues or patch_length == 1:
            return
        lengths = torch.tensor(length) if steps.lengths is None else steps.lengths
        if may_look(lengths) and (lengths % patch_length).any():
            raise ValueError(
                f"`input_values` has {lengths.tolist()} unmasked steps, which must be multiples of `patch_length` "
                f"({patch_length}) when the cache has read others before."
            )

    def _prepare_series(
        self,
        values: Tensor,
        mask: Tensor | None,
        observed_mask: Tensor | None,
        time_features: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None,
        continues: bool,
    ) -> Tensor:
        """Scaled values with zeros for what is missing, and the time features: (B, T, num_channels + features)."""
        config = self.config
        values, observed = observed_values(values, mask, observed_mask)
        require_finite("input_values", values)
        shape = (values.shape[0], 1, values.shape[2])
        if statistics is not None:
            if config.scaling is None:
                raise ValueError("`statistics` are for a model with `scaling`; leave them out.")
            if len(statistics) != 2 or any(statistic.shape != shape for statistic in statistics):
                raise ValueError(
                    f"`statistics` must be a mean and a standard deviation of shape {shape} each, got shapes "
                    f"{[tuple(statistic.shape) for statistic in statistics]}."
                )
            mean, deviation = statistics
            if may_look(deviation) and not (mean.isfinite() & deviation.isfinite() & (deviation > 0)).all():
                raise ValueError(
                    "`statistics` must be finite, and deviations positive, as `series_statistics` returns them; got "
                    f"means {mean.flatten().tolist()} and deviations {deviation.flatten().tolist()}."
                )
        if config.scaling is not None:
            if statistics is None and continues:
                raise ValueError(
                    "`scaling` needs the mean and deviation of the whole series, and the cache has read other "
                    "values: pass `statistics`, as `series_statistics` returns them."
                )
            mean, deviation = series_statistics(values, observed) if statistics is None else statistics
            values = ((values - mean) / deviation).masked_fill(~observed, 0)
        expected = (*values.shape[:2], config.num_time_features)
        features = require_features("time_features", time_features, expected)
        if features is None:
            return values
        if mask is not None:
            features = features.masked_fill(~mask.unsqueeze(-1), 0)
        require_finite("time_features", features)
        return torch.cat([values, features.to(values.dtype)], dim=-1)

    def _add_static(self, hidden_states: Tensor, static_real_features: Tensor | None) -> Tensor:
        expected = (hidden_states.shape[0], self.config.num_static_real_features)
        features = require_features("static_real_features", static_real_features, expected)
        if features is None:
            return hidden_states
        require_finite("static_real_features", features)
        return hidden_states + self.static_encoder(features.to(hidden_states.dtype)).unsqueeze(1)


# What heads pass on to the trunk.
TRUNK_KEYWORDS = keywords(LrcSSMModel.forward)


class LrcSSMForCausalLM(LrcSSMPreTrainedModel, GenerationMixin):
    """The model with a language modelling head, and `generate`.

    `generate` takes batches padded on either side, and continues from a `cache` given the new tokens only. It goes
    on in the cache itself, as in transformers, but for several beams, samples or prompts of one row in copies of it.
    Greedy decoding, sampling and beams work; what would take back tokens (assisted and contrastive decoding) or page
    them (continuous batching) is refused.

    Example:

    ```python
    >>> import torch
    >>> from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM

    >>> model = LrcSSMForCausalLM(LrcSSMConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2))
    >>> ids = torch.randint(256, (2, 10))
    >>> loss = model(ids, labels=ids).loss
    >>> model.generate(ids, max_new_tokens=5).shape
    torch.Size([2, 15])

    ```"""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LrcSSMConfig):
        if config.num_channels is not None:
            raise ValueError("`num_channels` is set: a language model reads tokens; use LrcSSMForSequenceModeling.")
        if config.bidirectional:
            raise ValueError("`bidirectional` is set: a language model must not see what it predicts; leave it out.")
        super().__init__(config)
        self.model = LrcSSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @refuses_unknown((*TRUNK_KEYWORDS, *LOSS_KEYWORDS))
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        context_parallel_group: "dist.ProcessGroup | None" = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): token ids to predict, shifted inside,
                so that `labels=input_ids` is right; -100 is ignored. With a `context_parallel_group`, the mean of the
                ranks' losses is that of the whole sequences.
            logits_to_keep (`int` or `torch.Tensor`): compute the logits of the last so many steps (0: all), or of the
                steps with these indices.

        For the other arguments see [`LrcSSMModel.forward`].

        Returns:
            `logits` (batch_size, sequence_length, vocab_size), `loss` with `labels`, and what the model returns.
        """
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be at least 0 (all), got {logits_to_keep}.")
        of_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS if name in kwargs}
        if labels is None and of_loss.get("shift_labels") is not None:
            raise ValueError("`shift_labels` are `labels` that were shifted; pass both.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            context_parallel_group=context_parallel_group,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if context_parallel_group is not None:
                given = {name: value for name, value in of_loss.items() if value is not None}
                of_loss = spread_labels(labels, context_parallel_group, given.get("ignore_index", -100)) | given
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        return super().generate(*args, **rename_cache(kwargs, CACHE))

    def _get_deprecated_gen_repo(self, generation_mode, *args, **kwargs):
        # The first of transformers' hooks that knows the mode; later ones would send the user to remote code.
        if generation_mode in (GenerationMode.ASSISTED_GENERATION, GenerationMode.CONTRASTIVE_SEARCH):
            raise ValueError(
                f"{generation_mode.value.replace('_', ' ')} takes back tokens that were read, and a recurrent state "
                "cannot be rolled back; use greedy decoding, sampling or beam search."
            )
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Always raises a `ValueError`; so do `generate_batch` and `cache_implementation="paged"`, which start here."""
        raise ValueError(
            "Continuous batching pages keys and values, and a recurrent model has none; pad the prompts, on either "
            "side, and call `generate` on the batch."
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        # `generate` asks the cache for its length, to cut known tokens off the prompt. A recurrent state has no length:
        # with a cache, the prompt is the new tokens. The cache takes another way to `prepare_inputs_for_generation`.
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "`prefill_chunk_size` is not supported: memory is linear in the prompt; to read it in pieces, call the "
                f"model on each with `{CACHE}`, and `generate` on the last."
            )
        cache = model_kwargs.get(CACHE)
        require_cache(cache, self.config)
        if cache is not None and cache.has_previous_state():
            if not model_kwargs.get("use_cache", True):
                raise ValueError(f"`use_cache=False` would read the prompt again after `{CACHE}` has; leave it out.")
            known, rows = cache.layers[0].recurrent_states[0].shape[0], input_ids.shape[0]
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            require_cache(cache, self.config, rows // copies if known > 1 else 1)
            if known < rows:
                cache = repeat_rows(cache, self.config, rows // known)
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != CACHE}
        return super()._prefill(
            input_ids, generation_config, {**model_kwargs, "_recurrent_cache": cache}, *args, **kwargs
        )

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        _recurrent_cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As in transformers, except that a cache given to `generate` goes with the new tokens only: what it has read
        is not to be passed again."""
        # Generated tokens are never padding, and without a mask they need no packing.
        if use_cache and not is_first_iteration:
            attention_mask = None
            # They belong to the last document of the prompt.
            kwargs.pop("seq_idx", None)
            kwargs.pop("cu_seq_lens_q", None)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        cache = _recurrent_cache if cache is None else cache
        if cache is not None and cache.has_previous_state():
            # Positions counted from the start of the prompt would start a new document.
            model_inputs.pop("position_ids", None)
        model_inputs["cache"] = cache
        return model_inputs


class LrcSSMScoringModel(LrcSSMPreTrainedModel):
    """What the heads without a vocabulary share: the trunk, and scores that an MLP or a matrix reads from it."""

    # The losses are means over a batch; Trainer is to average them over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: LrcSSMConfig, num_scores: int):
        super().__init__(config)
        self.model = LrcSSMModel(config)
        if config.block_type == "paper":
            self.score = LrcSSMPaperMLP(config.hidden_size, config.hidden_size, num_scores)
        else:
            self.score = nn.Linear(config.hidden_size, num_scores)

    def _refuse_spread(self, what: str, arguments: dict) -> None:
        """For what would be of this rank's piece only."""
        if arguments.get("context_parallel_group") is not None:
            raise ValueError(
                f"{what} would be of one rank's piece with `context_parallel_group`: make it over all ranks, from the "
                "logits of LrcSSMForSequenceModeling or the hidden states of LrcSSMModel, and go back on all of them."
            )

    def _outputs(self, outputs: BaseModelOutputWithPast, loss: Tensor | None, logits: Tensor):
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )


class LrcSSMForSequenceClassification(LrcSSMScoringModel):
    """The model with one label (or value) for a whole sequence of tokens or of channels.

    The scores of the unmasked steps are pooled as `config.pooling` says into `logits` (batch_size, num_labels): their
    mean, the last, or a mean weighted by attention, the softmax over the steps of a learned projection of the hidden
    states.
    """

    def __init__(self, config: LrcSSMConfig):
        if config.prediction_length is not None:
            raise ValueError("`prediction_length` is set: forecasts are made by LrcSSMForSequenceModeling.")
        super().__init__(config, config.num_labels)
        if config.pooling == "attention":
            self.attention = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @takes_cache
    @refuses_unknown(TRUNK_KEYWORDS)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        observed_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
        time_features: Tensor | None = None,
        static_real_features: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            labels (`torch.Tensor`): classes (batch_size,), or values for regression or several labels (batch_size,
                num_labels), as `config.problem_type` says; left out, it follows from the labels.

        For the other arguments see [`LrcSSMModel.forward`].

        Returns:
            `logits` (batch_size, num_labels), `loss` with `labels`, and what the model returns.
        """
        self._refuse_spread("The pooled label", kwargs)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            observed_mask=observed_mask,
            time_deltas=time_deltas,
            time_features=time_features,
            static_real_features=static_real_features,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        mask = None
        if attention_mask is not None:
            length = hidden_states.shape[1] if input_values is None else input_values.shape[1]
            mask = self._token_mask(attention_mask[:, -length:].bool(), hidden_states.shape[1])
            mask = mask.to(hidden_states.device)
        logits = self._pool(hidden_states, mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return self._outputs(outputs, loss, logits)

    def _token_mask(self, mask: Tensor, tokens: int) -> Tensor:
        """(B, N) from the mask of the steps (B, T): where steps are patched, the real tokens are at the front."""
        if self.config.patch_length == 1:
            return mask
        real = -(-mask.sum(1) // self.config.patch_length)
        return torch.arange(tokens, device=mask.device) < real.unsqueeze(1)

    def _pool(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, H) -> (B, num_labels)."""
        if self.config.pooling == "last":
            return self.score(hidden_states[:, -1])  # A padded step repeats the last real one.
        scores = self.score(hidden_states)
        if self.config.pooling == "attention":
            weight = self.attention(hidden_states)
            if mask is not None:
                # Not minus infinity: a row may have no real step.
                weight = weight.masked_fill(~mask.unsqueeze(-1), torch.finfo(weight.dtype).min)
            return (scores * weight.softmax(1)).sum(1)
        if mask is None:
            return scores.mean(1)
        # The sum of many steps in float32 at least, beyond what float16 holds.
        total = scores.masked_fill(~mask.unsqueeze(-1), 0).sum(
            1, dtype=torch.promote_types(scores.dtype, torch.float32)
        )
        return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(scores.dtype)


class LrcSSMForSequenceModeling(ForecastingMixin, LrcSSMScoringModel):
    """The model with a value or a class for every step, or with forecasts.

    Without `config.prediction_length`, `logits` are (batch_size, sequence_length, num_labels), for tagging and
    filtering. `config.problem_type` is `"regression"` (mean squared error) or `"single_label_classification"`
    (cross-entropy); left out, it follows from the labels' dtype.

    With `config.prediction_length`, `logits` are forecasts of the `prediction_length` values that follow each token (a
    step, or a patch of steps), (batch_size, tokens, prediction_length, num_channels) and with `config.quantiles` a last
    dimension for them. A forecast is the channel's last observed value plus what the model adds to it. With
    `config.scaling`, whose statistics know the whole series, and with `config.bidirectional` there are forecasts after
    the last token only; while a model with `config.scaling` is trained, its statistics are those of the first half of
    the series, and the tokens after it learn.

    Example:

    ```python
    >>> import torch
    >>> from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceModeling

    >>> config = LrcSSMConfig(num_channels=2, prediction_length=24, hidden_size=32, num_hidden_layers=2)
    >>> model = LrcSSMForSequenceModeling(config)
    >>> past, future = torch.randn(4, 96, 2), torch.randn(4, 24, 2)
    >>> loss = model(input_values=past, future_values=future).loss
    >>> model.eval().forecast(past, horizon=60).shape
    torch.Size([4, 60, 2])

    ```"""

    def __init__(self, config: LrcSSMConfig):
        num_scores = config.num_labels * config.patch_length
        if config.prediction_length is not None:
            num_scores = config.prediction_length * config.num_channels * len(config.quantiles or [None])
        super().__init__(config, num_scores)
        self.post_init()

    @takes_cache
    @refuses_unknown(TRUNK_KEYWORDS)
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        input_values: Tensor | None = None,
        observed_mask: Tensor | None = None,
        time_deltas: Tensor | None = None,
        time_features: Tensor | None = None,
        static_real_features: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        future_values: Tensor | None = None,
        future_observed_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            labels (`torch.Tensor`): without `config.prediction_length`, values (batch_size, sequence_length,
                num_labels), or classes (batch_size, sequence_length) in which -100 is ignored, as are masked steps.
                Nothing is shifted.
            future_values (`torch.Tensor` of shape `(batch_size, prediction_length, num_channels)`): what follows
                `input_values`. The loss is the mean squared error, or with `config.quantiles` the pinball loss, of the
                forecasts in `logits`, of which all but the last have targets in `input_values` too. transformers'
                Trainer is to be told of it: `TrainingArguments(label_names=["future_values"])`.
            future_observed_mask (`torch.Tensor` of the shape of `future_values`): 0 where a value is missing.
            logits_to_keep (`int`): forecast from the last so many tokens only (0: from all).

        For the other arguments see [`LrcSSMModel.forward`].

        Returns:
            `logits` as described at the class, `loss` with `labels` or `future_values`, and what the model returns.
        """
        forecasts = self.config.prediction_length is not None
        if (labels if forecasts else future_values) is not None:
            given, wanted = ("labels", "future_values") if forecasts else ("future_values", "labels")
            raise ValueError(
                f"With a `prediction_length` of {self.config.prediction_length}, pass `{wanted}` instead of `{given}`."
            )
        if forecasts or labels is not None:
            self._refuse_spread("A forecast" if forecasts else "The loss of `labels`", kwargs)
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be at least 0 (all), got {logits_to_keep}.")
        if logits_to_keep and not forecasts:
            raise ValueError("`logits_to_keep` is for a model with `prediction_length`; leave it out.")
        if forecasts and input_values is None:
            raise ValueError("`input_values` is missing: forecasts continue the values of a series.")
        _, inputs = self.model._one_input(input_ids=input_ids, inputs_embeds=inputs_embeds, input_values=input_values)
        require_cache(cache, self.config, inputs.shape[0])
        mask = self.model._step_mask(attention_mask, *inputs.shape[:2], cache)
        if forecasts:
            config = self.config
            learns = self.training and future_values is not None and not config.bidirectional
            learns = learns and statistics is None and cache is None
            series = self._known_series(input_values, mask, observed_mask, statistics, learns)
            if learns:
                statistics = series.statistics
            elif config.scaling is not None or config.bidirectional:
                # The statistics of a series, and a layer that reads from the end, know what follows the other tokens.
                logits_to_keep = 1
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            input_values=input_values,
            observed_mask=observed_mask,
            time_deltas=time_deltas,
            time_features=time_features,
            static_real_features=static_real_features,
            statistics=statistics,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if forecasts:
            logits, ends = self._forecasts(hidden_states, series, logits_to_keep)
            loss = None
            if future_values is not None:
                loss = self._forecast_loss(logits, ends, series, future_values, future_observed_mask)
            return self._outputs(outputs, loss, logits)
        logits = self.score(hidden_states)
        if self.config.patch_length > 1:
            logits = LrcSSMSteps.of(mask).unpatch(logits, self.config.patch_length, inputs.shape[1])
        loss = None if labels is None else self._loss(logits, labels, mask)
        return self._outputs(outputs, loss, logits)

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            problem = "regression" if labels.is_floating_point() else "single_label_classification"
        expected = logits.shape if problem == "regression" else logits.shape[:2]
        if problem == "multi_label_classification" or labels.shape != expected:
            raise ValueError(
                f"`labels` of shape {tuple(labels.shape)} do not fit the problem type {problem!r}: "
                f"expected shape {tuple(expected)} and `regression` or `single_label_classification`."
            )
        if problem == "regression":
            if mask is not None:
                logits, labels = logits[mask], labels[mask]
            return F.mse_loss(logits.float(), labels.float())
        if mask is not None:
            labels = labels.masked_fill(~mask, -100)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


register_names(
    LrcSSMConfig.model_type,
    {
        "MODEL_MAPPING_NAMES": "LrcSSMModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "LrcSSMForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "LrcSSMForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "LrcSSMForSequenceModeling",
        "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES": "LrcSSMForSequenceModeling",
    },
)
# Has transformers save this code with every model.
LrcSSMModel.register_for_auto_class("AutoModel")
LrcSSMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LrcSSMForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LrcSSMForSequenceModeling.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "LrcSSMForCausalLM",
    "LrcSSMForSequenceClassification",
    "LrcSSMForSequenceModeling",
    "LrcSSMModel",
    "LrcSSMPreTrainedModel",
]
