# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""LrcSSM configuration."""

import math

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .cells import REGISTERED
from .host import CACHE_NAMES
from .operators import BACKENDS, SOLVERS


_CHOICES = {
    "block_type": ("gated", "paper"),
    "sensory_activation": ("none", "sigmoid"),
    "elastance": ("asymmetric", "symmetric"),
    "state_dependence": ("full", "input"),
    "initialization": ("default", "state_tracking"),
    "pooling": ("mean", "last", "attention"),
    "scaling": (None, "std"),
    "solver": SOLVERS,
    "backend": BACKENDS,
}
_NUMBERS = (
    "jacobian_bound",
    "time_constant_min",
    "time_constant_max",
    "hidden_dropout",
    "norm_eps",
    "initializer_range",
)
# Fields that are of the LRC alone, and their values where it plays no part.
_FOR_LRC = {
    "elastance": "asymmetric",
    "elastance_input": False,
    "state_dependence": "full",
    "jacobian_bound": None,
    "initialization": "default",
    "time_constant_min": 2.5,
    "time_constant_max": 16.0,
}
# Fields of models that read series, and their values where they play no part.
_FOR_SERIES = {
    "scaling": None,
    "patch_length": 1,
    "num_time_features": 0,
    "num_static_real_features": 0,
    "prediction_length": None,
}
# What an Auto class loads, with `trust_remote_code`, from the code saved beside the weights where there is no package.
_AUTO_MAP = {
    "AutoConfig": "configuration_lrcssm.LrcSSMConfig",
    "AutoModel": "modeling_lrcssm.LrcSSMModel",
    "AutoModelForCausalLM": "modeling_lrcssm.LrcSSMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_lrcssm.LrcSSMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_lrcssm.LrcSSMForSequenceModeling",
    "AutoModelForTimeSeriesPrediction": "modeling_lrcssm.LrcSSMForSequenceModeling",
}


@strict
class LrcSSMConfig(PreTrainedConfig):
    r"""
    The configuration of an LrcSSM model (arXiv 2505.21717). The defaults give a language model of 0.1 billion
    parameters with the gated block.

    Args:
        vocab_size (`int`, defaults to 32000): number of token ids; unused when `num_channels` is set.
        num_channels (`int`, *optional*): number of channels of a continuous input (`input_values`). When set, the model
            reads series instead of tokens.
        hidden_size (`int`, defaults to 768): width H of the residual stream.
        state_size (`int`, *optional*, defaults to `hidden_size`): number of neurons D per layer, which is also the
            number of values of recurrent state a layer keeps while generating.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        intermediate_size (`int`, *optional*): width of the MLP; by default 8/3 of `hidden_size` rounded up to a
            multiple of 64 for the gated block (SwiGLU), `hidden_size` for the paper's.
        block_type (`"gated"` or `"paper"`, defaults to `"gated"`): `"gated"` is RMSNorm, short convolution, gated
            recurrence and SwiGLU; `"paper"` is the block of the authors' code, numerically equal to it.
        cell (`str`, defaults to `"lrc"`): the recurrence of the neurons, `"lrc"`, `"gru"`, `"mgu"`, `"lstm"` or a name
            given to [`register_cell`]. The fields from `elastance` to `time_constant_max` are of the LRC alone.
        sensory_activation (`"none"` or `"sigmoid"`, *optional*): what is applied to the input before it drives the
            neurons; by default the paper's sigmoid for the LRC in the paper's block, and else none.
        elastance (`"asymmetric"` or `"symmetric"`, defaults to `"asymmetric"`): sigmoid(e), or
            sigmoid(e + shift) - sigmoid(e - shift).
        elastance_input (`bool`, *optional*): whether the input also drives the elastance, which lets a neuron hold its
            state on one input and change it on another; by default only in the gated block, for the LRC.
        state_dependence (`"full"` or `"input"`, defaults to `"full"`): `"input"` drops the state from gates and
            elastance: the recurrence is then linear with every Jacobian in (0, 1).
        jacobian_bound (`float`, *optional*): keeps every |dx_t/dx_{t-1}| at this at most, whatever the input (for time
            steps up to 1): the elastance then does not depend on the state, and the weights of the state in the gates
            are confined, see `stability.confine`. With 1 no gradient can grow over time.
        initialization (`"default"` or `"state_tracking"`, defaults to `"default"`): `"state_tracking"` starts every
            neuron as a counter with a period of its own. These learn to count modulo a number and to follow an
            automaton's state far beyond the lengths they were trained at; neurons that start as integrators do not.
        time_constant_min, time_constant_max (`float`, defaults to 2.5 and 16): range, in steps, in which the gated
            block's time constants are initialised, log-uniformly. Above 2, the fastest the cell can forget.
        conv_kernel (`int`, defaults to 4): taps of the gated block's causal convolution.
        hidden_act (`str`, defaults to `"silu"`): activation of the gated block.
        hidden_dropout (`float`, defaults to 0.0): dropout on what each block adds to the residual stream.
        norm_eps (`float`, defaults to 1e-5): epsilon of the norms.
        initializer_range (`float`, defaults to 0.02): standard deviation of the matrices' initialisation.
        num_hidden_groups (`int`, *optional*): number of different blocks; consecutive layers share one, and 1 is one
            block iterated `num_hidden_layers` times (arXiv 2605.16048). By default every layer has its own.
        bidirectional (`bool`, defaults to `False`): every second layer reads the sequence from its end, for tasks that
            have the whole of it; there is no cache then.
        pooling (`"mean"`, `"last"` or `"attention"`, defaults to `"mean"`): how `LrcSSMForSequenceClassification` turns
            the unmasked steps' logits into one.
        scaling (`"std"`, *optional*): normalise every channel of every series by its mean and standard deviation over
            the observed steps.
        patch_length (`int`, defaults to 1): number of consecutive steps of a series read as one token.
        num_time_features, num_static_real_features (`int`, defaults to 0): sizes of `time_features`, known of every
            step of a series, and of `static_real_features`, known of the whole.
        prediction_length (`int`, *optional*): makes `LrcSSMForSequenceModeling` forecast so many values of every
            channel, from every token.
        quantiles (`list[float]`, *optional*): levels in (0, 1), ascending, to forecast in place of the mean.
        solver (`str`, defaults to `"auto"`): see [`lrc_scan`]; all solvers give the same result.
        backend (`str`, defaults to `"auto"`): see [`lrc_scan`].
        layer_types (`list[str]`, *optional*): accepted if it names `"linear_attention"`, transformers' word for a layer
            with a recurrent state, once per layer.
        use_cache (`bool`, defaults to `True`): whether to return the recurrent state.
        tie_word_embeddings (`bool`, defaults to `True`): whether the output layer is the input embedding.

    Raises:
        ValueError: a value is out of range or unknown; the message names the field.

    Example:

    ```python
    >>> from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM

    >>> config = LrcSSMConfig(vocab_size=256, hidden_size=192, num_hidden_layers=4)
    >>> model = LrcSSMForCausalLM(config)

    ```"""

    model_type = "lrcssm"
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = 32000
    num_channels: int | None = None
    hidden_size: int = 768
    state_size: int | None = None
    num_hidden_layers: int = 12
    intermediate_size: int | None = None
    block_type: str = "gated"
    cell: str = "lrc"
    sensory_activation: str | None = None
    elastance: str = "asymmetric"
    elastance_input: bool | None = None
    state_dependence: str = "full"
    jacobian_bound: float | int | None = None
    initialization: str = "default"
    time_constant_min: float | int = 2.5
    time_constant_max: float | int = 16.0
    conv_kernel: int = 4
    hidden_act: str = "silu"
    hidden_dropout: float | int = 0.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    num_hidden_groups: int | None = None
    bidirectional: bool = False
    pooling: str = "mean"
    scaling: str | None = None
    patch_length: int = 1
    num_time_features: int = 0
    num_static_real_features: int = 0
    prediction_length: int | None = None
    quantiles: list[float] | None = None
    solver: str = "auto"
    backend: str = "auto"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        gated = self.block_type == "gated"
        if self.state_size is None:
            self.state_size = self.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 64) * 64 if gated else self.hidden_size
        if self.sensory_activation is None:
            self.sensory_activation = "none" if gated or self.cell != "lrc" else "sigmoid"
        if self.elastance_input is None:
            self.elastance_input = gated and self.cell == "lrc"
        self.check_values()
        layer_types = kwargs.pop("layer_types", None)
        if layer_types not in (None, self.layer_types):
            raise ValueError(
                f"`layer_types` must be 'linear_attention' once for each of the {self.num_hidden_layers} layers "
                f"(`num_hidden_layers`), got {layer_types}."
            )
        super().__post_init__(**kwargs)
        # Not what a loaded file says: transformers puts the repository's name there, and a copy would refer to it.
        self.auto_map = dict(_AUTO_MAP)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches read to make one recurrent state per layer."""
        return ["linear_attention"] * self.num_hidden_layers

    def check_values(self):
        """Raises a `ValueError` that names the field whose value is out of range or unknown."""
        sizes = ["vocab_size", "hidden_size", "state_size", "num_hidden_layers", "intermediate_size", "conv_kernel"]
        sizes += ["patch_length", "num_channels", "num_hidden_groups", "prediction_length"]
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("num_time_features", "num_static_real_features"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}."
                )
        if self.cell not in REGISTERED:
            raise ValueError(
                f"`cell` must be one of {', '.join(REGISTERED)}, got {self.cell!r}; make one of your own known by "
                "`register_cell`."
            )
        for name, unused in _FOR_LRC.items():
            if self.cell != "lrc" and getattr(self, name) != unused:
                raise ValueError(f"`{name}` is for the `cell` 'lrc', got {self.cell!r}; leave it out.")
        if self.num_hidden_groups is not None and self.num_hidden_groups > self.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_groups` can be {self.num_hidden_layers} at most (`num_hidden_layers`), got "
                f"{self.num_hidden_groups}."
            )
        for name, unused in _FOR_SERIES.items():
            if self.num_channels is None and getattr(self, name) != unused:
                raise ValueError(f"`{name}` is for series; set `num_channels` too, or leave it out.")
        if self.initialization == "state_tracking":
            needed = {"elastance": "asymmetric", "elastance_input": True, "state_dependence": "full"}
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`initialization` 'state_tracking' needs `{name}`={value!r}, got {getattr(self, name)!r}."
                    )
        if self.jacobian_bound is not None:
            if not self.jacobian_bound >= 1:
                raise ValueError(f"`jacobian_bound` must be at least 1, got {self.jacobian_bound}.")
            needed = {"elastance": "asymmetric", "state_dependence": "full", "initialization": "default"}
            for name, value in needed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"`jacobian_bound` needs `{name}`={value!r}, got {getattr(self, name)!r}.")
        levels = self.quantiles
        if levels is not None and not (levels == sorted(set(levels)) and levels and 0 < levels[0] <= levels[-1] < 1):
            raise ValueError(f"`quantiles` must be ascending levels in (0, 1), got {levels}.")
        if levels is not None and self.prediction_length is None:
            raise ValueError(f"`quantiles` {levels} are of forecasts; set `prediction_length` too, or leave them out.")
        if self.bidirectional and self.num_hidden_layers == 1:
            raise ValueError("`bidirectional` needs 2 layers (`num_hidden_layers`), one for each direction; got 1.")
        if not 2 < self.time_constant_min <= self.time_constant_max:
            raise ValueError(
                "`time_constant_min` must be above 2 and at most `time_constant_max`, got "
                f"{self.time_constant_min} and {self.time_constant_max}."
            )
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"`hidden_dropout` must be in [0, 1), got {self.hidden_dropout}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {', '.join(ACT2FN)}, got {self.hidden_act!r}.")
        for name in ("norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


# Has transformers save this code with every configuration.
LrcSSMConfig.register_for_auto_class()

__all__ = ["LrcSSMConfig"]
