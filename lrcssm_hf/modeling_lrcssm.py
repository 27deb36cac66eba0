# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""PyTorch LrcSSM model: liquid-resistance liquid-capacitance state-space model (arXiv 2505.21717).

The model around the blocks of `blocks.py`, and its heads. Shapes: B batch, T steps, H hidden_size, D state_size,
K conv_kernel. Recurrent states are (B, D), or (B, n, D) for a cell of n states a neuron.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .backends import load_cpu_kernels
from .blocks import (
    BLOCKS,
    LrcSSMCellNeurons,
    LrcSSMConvolution,
    LrcSSMNeurons,
    LrcSSMPaperLinear,
    LrcSSMPaperMLP,
    LrcSSMRMSNorm,
)
from .configuration_lrcssm import LrcSSMConfig
from .context_parallel import spread_labels
from .forecasting import ForecastingMixin
from .generation import RecurrentGenerationMixin
from .host import (
    CACHE,
    CACHE_NAMES,
    LOSS_KEYWORDS,
    keywords,
    refuses_unknown,
    register_names,
    takes_cache,
)
from .inputs import InputsMixin
from .recurrent_cache import read_state, require_cache, write_state
from .saved_states import SavedStatesMixin
from .steps import LrcSSMSteps


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


class LrcSSMModel(InputsMixin, LrcSSMPreTrainedModel):
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
        self.norm = LrcSSMRMSNorm(config.hidden_size, eps=config.norm_eps) if gated else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def blocks(self) -> list[nn.Module]:
        """The block of every layer; with `config.num_hidden_groups`, consecutive layers are one block."""
        blocks, depth = list(self.layers), self.config.num_hidden_layers
        return [blocks[index * len(blocks) // depth] for index in range(depth)]

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
        require_cache(cache, self.config, values.shape[0])
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states, steps = self._encode(
            name,
            values,
            attention_mask,
            position_ids,
            cache,
            observed_mask=observed_mask,
            time_deltas=time_deltas,
            time_features=time_features,
            static_real_features=static_real_features,
            statistics=statistics,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            group=context_parallel_group,
        )
        backwards = steps.reversed() if self.config.bidirectional else None
        all_hidden_states = ()
        for index, block in enumerate(self.blocks()):
            if output_hidden_states:
                # What is returned is what the layer reads, so that a gradient can be asked of it.
                all_hidden_states += (steps.unpack(hidden_states),)
                hidden_states = steps.pack(all_hidden_states[-1])
            if backwards is not None and index % 2:
                hidden_states = steps.reverse(block(steps.reverse(hidden_states), backwards)[0])
                continue
            state = (None, None) if cache is None else read_state(cache, index)
            hidden_states, *state = block(hidden_states, steps, *state)
            if cache is not None:
                write_state(cache, index, *state)
        hidden_states = steps.unpack(self.norm(hidden_states))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            **{CACHE: cache if use_cache else None},
        )


# What heads pass on to the trunk.
TRUNK_KEYWORDS = keywords(LrcSSMModel.forward)


class LrcSSMForCausalLM(LrcSSMPreTrainedModel, RecurrentGenerationMixin):
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
