# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""LrcSSM's rivals: our own model with another sequence mixer in every block, of as many parameters.

Encoder, norms, MLPs, residual stream, pooling and heads stay, so that a comparison is one of mixers. Every mixer has
one inner size (states, units or width of the heads), which `build` chooses by the parameters of the whole model. What
a mixer makes of the time between irregular steps is said in its docstring; one that says nothing does not see it.

Shapes: B batch, T steps, H hidden_size, N states.
"""

from __future__ import annotations

import bisect
import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, MambaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.mamba.modeling_mamba import MambaMixer

from lrcssm_hf import LrcSSMConfig, LrcSSMForSequenceClassification, LrcSSMPreTrainedModel, prefix_scan
from lrcssm_hf.steps import LrcSSMSteps


# How far the parameters of a whole model may be from those of the LrcSSM.
TOLERANCE = 0.1
_MAX_INNER_SIZE = 1 << 16


class RivalMixer(nn.Module):
    """What the model calls in place of its own mixer, for whole series, one in a row; subclasses have `mix`."""

    def forward(self, hidden_states: Tensor, steps: LrcSSMSteps, *_) -> tuple[Tensor, None, None]:
        """(B, T, H) -> (B, T, H), and no state to go on from; the real steps of every row are at its front, as
        `LrcSSMMixer` has them."""
        if steps.reset is not None:
            raise ValueError("A rival reads one series in a row; leave out `position_ids`, `seq_idx`, `cu_seq_lens_q`.")
        return self.mix(hidden_states, steps), None, None


def elapsed_time(steps: LrcSSMSteps) -> Tensor | None:
    """The time taken by each step, (B, T), or None where every real step after the first takes 1.

    Padding, which no real step comes after, is given a time of 1 too: a batch that is merely padded is regular. So is
    one whose series do not fill their first patch: nothing comes before it.
    """
    if steps.time_step is None:
        return None
    time = steps.time_step
    if steps.lengths is not None:
        time = time.masked_fill(torch.arange(time.shape[1], device=time.device) >= steps.lengths[:, None], 1)
    return None if (time[:, 1:] == 1).all() else time


# --- Linear recurrences ---------------------------------------------------------------------------------------------


def to_complex(pairs: Tensor) -> Tensor:
    """Real (..., 2 N), real and imaginary parts in turn -> complex (..., N)."""
    pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


def to_pairs(numbers: Tensor) -> Tensor:
    """The inverse of `to_complex`."""
    return torch.view_as_real(numbers).flatten(-2)


def scale_by_time(amount: Tensor, elapsed: Tensor | None) -> Tensor:
    """What a regular step does, (N,), for the time that each takes: (B, T, N), or as it is."""
    return amount if elapsed is None else amount * elapsed.unsqueeze(-1)


def scan(decay: Tensor, inputs: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + inputs_t for inputs (B, T, N) and a decay (N,) of all steps, or (B, T, N)."""
    return prefix_scan(decay.expand_as(inputs), inputs)


def zero_order_hold(rate: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """dh/dt = rate h + u with u constant for the time `step`: the factors of h, exp(rate step), and of u."""
    exponent = rate * step
    return exponent.exp(), torch.expm1(exponent) / rate


def log_uniform(low: float, high: float, size: int) -> Tensor:
    """Logarithms of numbers in [low, high]."""
    return torch.empty(size).uniform_(math.log(low), math.log(high))


class LinearMixer(RivalMixer):
    """A linear recurrence's response plus D u, then GELU and GLU, as the papers below have it."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.skip = nn.Parameter(torch.randn(hidden_size))
        self.glu = nn.Linear(hidden_size, 2 * hidden_size)

    def mix(self, hidden_states: Tensor, steps: LrcSSMSteps) -> Tensor:
        outputs = self.respond(hidden_states, elapsed_time(steps)) + self.skip * hidden_states
        return F.glu(self.glu(F.gelu(outputs)))


class LRU(LinearMixer):
    """The linear recurrent unit (Orvieto et al., arXiv 2303.06349, section 3 and appendix A).

    h_t = lambda h_{t-1} + gamma B u_t with lambda = exp(-exp(nu) + i exp(theta)), drawn uniformly from the ring of
    radii 0.9 to 0.999 and all phases, and gamma = sqrt(1 - |lambda|^2) at the start. It has no step size: over a time
    dt the state decays by lambda^dt.
    """

    MIN_RADIUS, MAX_RADIUS = 0.9, 0.999

    def __init__(self, hidden_size: int, states: int):
        super().__init__(hidden_size)
        square = torch.empty(states).uniform_(self.MIN_RADIUS**2, self.MAX_RADIUS**2)
        self.log_decay = nn.Parameter((-0.5 * square.log()).log())
        # Away from 0, of which there is no logarithm.
        self.log_phase = nn.Parameter((2 * math.pi * torch.rand(states).clamp(min=1e-4)).log())
        self.log_gain = nn.Parameter(0.5 * (1 - square).log())
        self.drive = nn.Linear(hidden_size, 2 * states, bias=False)
        self.readout = nn.Linear(2 * states, hidden_size, bias=False)
        nn.init.normal_(self.drive.weight, std=(2 * hidden_size) ** -0.5)
        nn.init.normal_(self.readout.weight, std=states**-0.5)

    def respond(self, inputs: Tensor, elapsed: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        decay = torch.complex(-self.log_decay.exp(), self.log_phase.exp()).exp()
        if elapsed is not None:
            decay = decay ** elapsed.unsqueeze(-1)
        driven = self.log_gain.exp() * to_complex(self.drive(inputs))
        return self.readout(to_pairs(scan(decay, driven)))


def hippo_normal(states: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N,) and eigenvectors (2 N, N) of HiPPO-N, the normal part of HiPPO-LegS, of size 2 N.

    Those with positive frequency; the others are their conjugates (arXiv 2206.11893; 2208.04933, appendix B.1).
    """
    scale = (torch.arange(2 * states, dtype=torch.float64) + 0.5).sqrt()
    products = scale[:, None] * scale
    skew = torch.triu(products, 1) - torch.tril(products, -1)
    # A skew-symmetric matrix is i times a Hermitian one, whose eigenvalues ascend.
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies)[states:], vectors[:, states:]


class S5(LinearMixer):
    """S5 (Smith et al., arXiv 2208.04933): one system for all channels, dh/dt = Lambda h + B u.

    Lambda starts with the eigenvalues of HiPPO-N, B and C are drawn and then taken to its eigenbasis, one of each pair
    of conjugate states is kept (section 3.2), and each has its own step size, drawn from 0.001 to 0.1, for a zero-order
    hold. Elapsed time multiplies the step.
    """

    def __init__(self, hidden_size: int, states: int):
        super().__init__(hidden_size)
        eigenvalues, vectors = hippo_normal(states)
        self.log_decay = nn.Parameter((-eigenvalues.real).log().float())
        self.frequency = nn.Parameter(eigenvalues.imag.float())
        self.log_step = nn.Parameter(log_uniform(0.001, 0.1, states))
        self.drive = nn.Linear(hidden_size, 2 * states, bias=False)
        self.readout = nn.Linear(2 * states, hidden_size, bias=False)
        drive = torch.randn(2 * states, hidden_size, dtype=torch.float64) * hidden_size**-0.5
        readout = torch.randn(hidden_size, 2 * states, dtype=torch.float64) * (2 * states) ** -0.5
        with torch.no_grad():
            self.drive.weight.copy_(to_pairs((vectors.mH @ drive.to(vectors.dtype)).mT).mT)
            # Of the pairs, to the real part of C h; and twice, for the conjugate states.
            self.readout.weight.copy_(to_pairs(2 * readout.to(vectors.dtype) @ vectors.conj()))

    def respond(self, inputs: Tensor, elapsed: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        rate = torch.complex(-self.log_decay.exp(), self.frequency)
        decay, gain = zero_order_hold(rate, scale_by_time(self.log_step.exp(), elapsed))
        return self.readout(to_pairs(scan(decay, gain * to_complex(self.drive(inputs)))))


class S4D(LinearMixer):
    """S4D-Lin (Gu et al., arXiv 2206.11893): for every channel a system of its own, with N conjugate pairs of states.

    The eigenvalues start as -1/2 + i pi n, an approximation of HiPPO's (section 4), B is 1, and each channel has its
    own step size, drawn from 0.001 to 0.1, for a zero-order hold. Elapsed time multiplies the step; where all steps are
    regular, what is scanned is an impulse, and its response is convolved with the inputs.
    """

    def __init__(self, hidden_size: int, states: int):
        super().__init__(hidden_size)
        self.states = states
        # Vectors of H N, as the scan takes them.
        self.log_decay = nn.Parameter(torch.full((hidden_size * states,), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).repeat(hidden_size))
        self.log_step = nn.Parameter(log_uniform(0.001, 0.1, hidden_size))
        # Of complex normal numbers, twice for the conjugate states.
        self.readout = nn.Parameter(2**0.5 * torch.randn(hidden_size, 2 * states))

    def respond(self, inputs: Tensor, elapsed: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        if elapsed is not None:
            return self.run(inputs, elapsed)
        length = inputs.shape[1]
        impulse = F.pad(torch.ones_like(inputs[:1, :1]), (0, 0, 0, length - 1))
        return causal_convolution(inputs, self.run(impulse, None))

    def run(self, inputs: Tensor, elapsed: Tensor | None) -> Tensor:
        rate = torch.complex(-self.log_decay.exp(), self.frequency)
        step = self.log_step.exp().repeat_interleave(self.states)
        decay, gain = zero_order_hold(rate, scale_by_time(step, elapsed))
        states = scan(decay, gain * inputs.repeat_interleave(self.states, dim=-1))
        return torch.einsum("bthn,hn->bth", to_pairs(states.unflatten(-1, (-1, self.states))), self.readout)


def causal_convolution(inputs: Tensor, response: Tensor) -> Tensor:
    """y_t = sum over s of response_s inputs_{t-s}, per channel: (B, T, H), (1, T, H) -> (B, T, H)."""
    length = inputs.shape[1]
    # A power of two, and long enough for nothing to come round to the beginning.
    size = 1 << (2 * length - 1).bit_length()
    spectrum = torch.fft.rfft(inputs, size, dim=1) * torch.fft.rfft(response, size, dim=1)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :length]


class LinOSS(LinearMixer):
    """LinOSS-IM (Rusch and Rus, arXiv 2410.03943, section 2): forced oscillators y'' = -A y + B u, z = y'.

    The implicit scheme z_t = z_{t-1} + dt (B u_t - A y_t), y_t = y_{t-1} + dt z_t is, for c = z + i w y with
    w = sqrt(A), c_t = (c_{t-1} + dt B u_t) / (1 - i w dt): the same recurrence, diagonal. That needs A > 0, so that A
    is an exponential here and not a ReLU. A starts in (0, 1) and dt as the sigmoid of (0, 1), as the authors have it,
    uniformly. Elapsed time multiplies dt.
    """

    def __init__(self, hidden_size: int, states: int):
        super().__init__(hidden_size)
        # Away from 0, where y = Im(c) / w would be lost.
        self.log_frequency = nn.Parameter(0.5 * torch.rand(states).clamp(min=1e-3).log())
        self.step = nn.Parameter(torch.rand(states))
        self.drive = nn.Linear(hidden_size, states, bias=False)
        self.readout = nn.Linear(states, hidden_size, bias=False)
        for linear in (self.drive, self.readout):
            nn.init.uniform_(linear.weight, -(linear.in_features**-0.5), linear.in_features**-0.5)

    def respond(self, inputs: Tensor, elapsed: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        frequency, step = self.log_frequency.exp(), scale_by_time(self.step.sigmoid(), elapsed)
        decay = 1 / torch.complex(torch.ones_like(step), -frequency * step)
        states = scan(decay, decay * step * self.drive(inputs))
        return self.readout(states.imag / frequency)


# --- Others ---------------------------------------------------------------------------------------------------------


class Mamba(RivalMixer):
    """transformers' Mamba (Gu and Dao, arXiv 2312.00752) with `size` inner channels of 16 states; on CPUs compiled."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        config = MambaConfig(hidden_size=hidden_size, intermediate_size=size, num_hidden_layers=1)
        self.mamba = MambaMixer(config, layer_idx=0)
        _compile_mamba()

    def mix(self, hidden_states: Tensor, steps: LrcSSMSteps) -> Tensor:
        return self.mamba(hidden_states)


@functools.cache
def _compile_mamba() -> None:
    try:
        from mamba_scan import compile_mamba_for_cpu
    except ImportError:  # Without numba, transformers' own loop over time runs.
        return
    compile_mamba_for_cpu()


class Attention(RivalMixer):
    """Softmax attention with 4 heads of width 2 `size` and rotary positions (arXiv 1706.03762, 2104.09864).

    Its positions are the time elapsed since the first step. Unless `causal`, a step reads those after it too.
    """

    HEADS = 4

    def __init__(self, hidden_size: int, size: int, causal: bool):
        super().__init__()
        self.causal = causal
        width = 2 * size * self.HEADS
        self.qkv = nn.Linear(hidden_size, 3 * width, bias=False)
        self.out = nn.Linear(width, hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=2 * size))

    def mix(self, hidden_states: Tensor, steps: LrcSSMSteps) -> Tensor:
        length = hidden_states.shape[1]
        queries, keys, values = self.qkv(hidden_states).unflatten(-1, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
        places = torch.arange(length, device=hidden_states.device)
        elapsed = elapsed_time(steps)
        positions = places.unsqueeze(0) if elapsed is None else elapsed.cumsum(1)
        queries, keys = apply_rotary_pos_emb(queries, keys, *self.rotary(hidden_states, positions))
        mask = None
        if not self.causal and steps.lengths is not None:
            # An empty row reads its first step: the softmax of nothing is not a number.
            mask = places < steps.lengths.clamp(min=1)[:, None, None, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class GRU(RivalMixer):
    """PyTorch's gated recurrent unit (arXiv 1406.1078) with `size` units, and a projection back."""

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        self.gru = nn.GRU(hidden_size, size, batch_first=True)
        self.out = nn.Linear(size, hidden_size, bias=False)

    def mix(self, hidden_states: Tensor, steps: LrcSSMSteps) -> Tensor:
        return self.out(self.gru(hidden_states)[0])


class CfC(RivalMixer):
    """The closed-form continuous-time network of `ncps` (arXiv 2106.13898), `size` units and as many in its backbone.

    A Python loop over time. The elapsed time is the cell's own time.
    """

    def __init__(self, hidden_size: int, size: int):
        super().__init__()
        try:
            from ncps.torch import CfC
        except ImportError as error:
            raise ValueError(f"The mixer 'cfc' needs ncps: `pip install ncps` ({error}).") from error
        self.cfc = CfC(hidden_size, size, proj_size=hidden_size, backbone_units=size)

    def mix(self, hidden_states: Tensor, steps: LrcSSMSteps) -> Tensor:
        elapsed = elapsed_time(steps)
        if elapsed is not None:
            # One for every unit: ncps would take those of the batch for those of the units.
            elapsed = elapsed.unsqueeze(-1).expand(-1, -1, self.cfc.state_size)
        return self.cfc(hidden_states, timespans=elapsed)[0]


# --- Models ---------------------------------------------------------------------------------------------------------

_RIVALS = {
    "lru": LRU,
    "s5": S5,
    "s4d": S4D,
    "linoss": LinOSS,
    "mamba": Mamba,
    "transformer": Attention,
    "gru": GRU,
    "cfc": CfC,
}
MIXERS = ("lrcssm", *_RIVALS)


def build(head: type[LrcSSMPreTrainedModel], config: LrcSSMConfig, mixer: str) -> LrcSSMPreTrainedModel:
    """A model of the class `head` with this mixer; `model.num_parameters()` counts its parameters.

    Args:
        head: LrcSSMForSequenceClassification, LrcSSMForSequenceModeling, ...; attention is causal in all but the first.
        config: of the LrcSSM whose parameters are to be matched, with the gated block.
        mixer: one of `MIXERS`; `lrcssm` is the LrcSSM itself.

    Raises:
        ValueError: the mixer or the block is another, ncps is missing, or no inner size comes within 10% of the
            LrcSSM's parameters.
    """
    if mixer not in MIXERS:
        raise ValueError(f"`mixer` must be one of {', '.join(MIXERS)}, got {mixer!r}.")
    if mixer == "lrcssm":
        return head(config)
    if config.block_type != "gated":
        raise ValueError(f"A rival takes the place of the gated block's mixer; `block_type` is {config.block_type!r}.")
    config = copy.deepcopy(config)
    config.use_cache = False
    make = functools.partial(_RIVALS[mixer], config.hidden_size)
    if mixer == "transformer":
        make = functools.partial(make, causal=not issubclass(head, LrcSSMForSequenceClassification))
    model = head(config)
    blocks, wanted = model.base_model.layers, model.num_parameters()
    size = matching_size(make, _count(blocks[0].mixer))
    for block in blocks:
        block.mixer = make(size)
    if abs(model.num_parameters() - wanted) > TOLERANCE * wanted:
        raise ValueError(
            f"No {mixer!r} is within {TOLERANCE:.0%} of the LrcSSM's {wanted} parameters; the nearest has "
            f"{model.num_parameters()}. Make `state_size` ({config.state_size}) larger."
        )
    return model


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def matching_size(make: Callable[[int], nn.Module], parameters: int) -> int:
    """The inner size with which the parameters of `make(size)` are nearest to these."""

    def count(size: int) -> int:
        with torch.device("meta"):
            return _count(make(size))

    above = bisect.bisect_left(range(_MAX_INNER_SIZE), parameters, lo=1, key=count)
    return min((size for size in (above - 1, above) if size), key=lambda size: abs(count(size) - parameters))
