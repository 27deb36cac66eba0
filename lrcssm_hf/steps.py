# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The order in which a model reads the steps of a batch: padding, documents, patches of several steps, both directions.

Shapes: B batch, T steps, N tokens (as many as steps, or fewer where each holds a patch of steps).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .context_parallel import steps_before


class LrcSSMSteps(NamedTuple):
    """What happens at each step of a batch beside its values, in the order the recurrences see it.

    The unmasked steps of every row are moved to its front (`pack`) and its outputs back (`unpack`), so that neither
    the convolution nor the state ever meets a padded step between two real ones, on whichever side the padding is.

    Attributes:
        time_step: (B, T), 0 where a step is padding, otherwise the elapsed time; None when every step is 1.
        reset: (B, T) bool, a new document starts here; None when none does.
        order: (B, T), where each packed step comes from; None where they are in the user's order.
        count: (B, T), the number of unmasked steps up to each step, in the user's order; None without a mask.
        lengths: (B,), the number of unmasked steps; None without a mask.
        group: the ranks over which the sequences are spread, of which these are this rank's steps; None for whole ones.
    """

    time_step: Tensor | None
    reset: Tensor | None = None
    order: Tensor | None = None
    count: Tensor | None = None
    lengths: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @property
    def are_alike(self) -> bool:
        """Whether they are unmasked steps of time 1 of one document on one rank, as decoding has them."""
        return self.time_step is None and self.reset is None and self.group is None

    @classmethod
    def of(
        cls,
        mask: Tensor | None,
        time_deltas: Tensor | None = None,
        reset: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> LrcSSMSteps:
        """From a bool mask, elapsed times, document starts and each step's document, each (B, T) in the user's order or
        None."""
        if mask is None:
            return cls(time_deltas, _document_starts(reset, documents))
        count = mask.cumsum(1)
        order = torch.argsort(~mask, dim=1, stable=True)
        mask, time_deltas, reset, documents = (
            None if steps is None else steps.gather(1, order) for steps in (mask, time_deltas, reset, documents)
        )
        time_step = mask.float() if time_deltas is None else time_deltas
        starts = _document_starts(reset, documents)
        starts = None if starts is None else starts & mask
        return cls(time_step.masked_fill(~mask, 0), starts, order, count, count[:, -1])

    def pack(self, inputs: Tensor) -> Tensor:
        """(B, T, ...) in the user's order -> the unmasked steps at the front of each row."""
        return inputs if self.order is None else take(inputs, self.order)

    def unpack(self, outputs: Tensor) -> Tensor:
        """Outputs in the order given by the user. A padded step repeats the output of the last real step before it, as
        if it had not been taken; before the first real step the output is zero."""
        if self.count is None:
            return outputs
        empty = (self.count == 0).view(*self.count.shape, *[1] * (outputs.dim() - 2)).to(outputs.device)
        unpacked = take(outputs, (self.count - 1).clamp(min=0)).masked_fill(empty, 0)
        if self.group is None:
            return unpacked
        # What the masked steps repeat with which this rank's piece begins, the ranks before know.
        return torch.where(empty, steps_before(unpacked[:, -1:], self.lengths, self.group), unpacked)

    # --- Patches ---

    def patch(self, values: Tensor, patch_length: int) -> tuple[Tensor, LrcSSMSteps]:
        """Packed values (B, T, C), `patch_length` steps of them as one token, and the tokens' steps.

        The last patch ends with the last real step, so that a forecast continues from there; what is missing in the
        first is zero and takes no time. A token's time is the mean of its steps'.

        Returns:
            (B, N, patch_length * C), N = T / patch_length rounded up, and the tokens' `LrcSSMSteps`, in packed order.
        """
        if patch_length == 1:
            return values, self
        index, real = self._patch_index(values, patch_length)
        # The sizes are written out for torch.export, which keeps the length open.
        batch, length, channels = values.shape
        shape = (batch, -(-length // patch_length), patch_length)
        tokens = take(values, index).masked_fill(~real.unsqueeze(-1), 0).reshape(*shape[:2], patch_length * channels)
        time_step = torch.ones_like(values[..., 0]) if self.time_step is None else self.time_step
        time_step = time_step.gather(1, index).masked_fill(~real, 0).reshape(shape).mean(-1)
        if self.lengths is None:
            return tokens, LrcSSMSteps(time_step)
        lengths = -(-self.lengths // patch_length)
        count = torch.arange(1, tokens.shape[1] + 1, device=lengths.device).minimum(lengths[:, None])
        return tokens, LrcSSMSteps(time_step, count=count, lengths=lengths)

    def unpatch(self, outputs: Tensor, patch_length: int, length: int) -> Tensor:
        """Per-step outputs of tokens, (B, N, patch_length * C), as (B, T, C) in the user's order."""
        outputs = outputs.unflatten(2, (patch_length, -1)).flatten(1, 2)
        device = outputs.device if self.lengths is None else self.lengths.device
        step = torch.arange(length, device=device).unsqueeze(0) + self._missing(length, patch_length)
        step = step.clamp(max=outputs.shape[1] - 1).expand(outputs.shape[0], -1)
        return self.unpack(take(outputs, step))

    def ends(self, patch_length: int, length: int, device: torch.device) -> Tensor:
        """The number of real steps up to and including each token, (B or 1, N), in the order of the model's outputs."""
        if patch_length == 1:
            steps = torch.arange(1, length + 1, device=device)
            return steps.unsqueeze(0) if self.count is None else self.count
        tokens = torch.arange(1, -(-length // patch_length) + 1, device=device).unsqueeze(0)
        ends = tokens * patch_length - self._missing(length, patch_length)
        return ends if self.lengths is None else ends.minimum(self.lengths[:, None])

    def _missing(self, length: int, patch_length: int) -> Tensor | int:
        """The number of steps that the first patch lacks, (B, 1)."""
        return -length % patch_length if self.lengths is None else -self.lengths[:, None] % patch_length

    def _patch_index(self, values: Tensor, patch_length: int) -> tuple[Tensor, Tensor]:
        """For every place in the patches the step that stands there, and whether it is a real one."""
        batch, length = values.shape[:2]
        places = torch.arange(-(-length // patch_length) * patch_length, device=values.device).expand(batch, -1)
        index = places - self._missing(length, patch_length)
        real = (index >= 0) & (index < (length if self.lengths is None else self.lengths[:, None]))
        return index.clamp(0, length - 1), real

    # --- From the end ---

    def reverse(self, inputs: Tensor) -> Tensor:
        """Packed (B, T, ...) with the real steps of every row the other way round; its own inverse."""
        if self.lengths is None:
            return inputs.flip(1)
        step = torch.arange(inputs.shape[1], device=self.lengths.device)
        lengths = self.lengths[:, None]
        return take(inputs, torch.where(step < lengths, lengths - 1 - step, step))

    def reversed(self) -> LrcSSMSteps:
        """The steps of a batch read from its end, where the time between two steps belongs to the earlier one, and a
        document starts at what was its last step."""

        known = self.reset if self.time_step is None else self.time_step
        if known is None:
            return self
        step = torch.arange(known.shape[1], device=known.device).expand_as(known)
        first, is_last = torch.zeros_like(step), step == known.shape[1] - 1
        if self.lengths is not None:
            is_last = step == self.lengths[:, None] - 1
        if self.reset is not None:
            first = torch.where(self.reset, step, 0).cummax(1).values
            is_last = is_last | F.pad(self.reset[:, 1:], (0, 1))
        # A document's first time, before which there is nothing, stands where there is nothing after it.
        following = torch.where(is_last, first, (step + 1).clamp(max=known.shape[1] - 1))
        time_step = None if self.time_step is None else self.reverse(self.time_step.gather(1, following))
        return self._replace(time_step=time_step, reset=None if self.reset is None else self.reverse(is_last))


def may_look(tensor: Tensor) -> bool:
    """Whether values may be checked: elsewhere than on the CPU that would stall the device's queue, and what is being
    traced or transformed has none."""
    is_traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return tensor.device.type == "cpu" and not is_traced


def as_mask(name: str, mask: Tensor) -> Tensor:
    """The mask as bool; raises a `ValueError` if it holds anything but 0 and 1, as one to be added to scores does."""
    if mask.dtype != torch.bool and may_look(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"`{name}` must hold 1 for what is there and 0 for what is not, got values from {mask.min()} to "
            f"{mask.max()}."
        )
    return mask.bool()


def require_times(time_deltas: Tensor, mask: Tensor | None) -> None:
    """Raises a `ValueError` for a time (B, T) of an unmasked step that is negative or not finite."""
    if not may_look(time_deltas):
        return
    wrong = ~(time_deltas.isfinite() & (time_deltas >= 0))
    if mask is not None:
        wrong = wrong & mask
    if wrong.any():
        raise ValueError(
            "`time_deltas` must be the time elapsed at each step, in units of the regular step, finite and not "
            f"negative; got {time_deltas[wrong][0]}."
        )


def documents_of(cu_seq_lens_q: Tensor, batch_size: int, length: int) -> Tensor:
    """The document of every step, (1, T), from the steps where documents begin and, last, where they end.

    Raises:
        ValueError: these are not ascending from 0 to the length of the one row.
    """
    if cu_seq_lens_q.dim() != 1 or batch_size != 1:
        raise ValueError(
            "`cu_seq_lens_q` must have shape (documents + 1,) and go with one row, got shape "
            f"{tuple(cu_seq_lens_q.shape)} and {batch_size} rows; for more, pass `position_ids` that restart at 0."
        )
    if may_look(cu_seq_lens_q):
        ends = cu_seq_lens_q.tolist()
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
            raise ValueError(
                f"`cu_seq_lens_q` must ascend from 0 to the {length} steps of the row: where documents begin and, "
                f"last, where they end; got {ends}."
            )
    steps = torch.arange(length, dtype=cu_seq_lens_q.dtype, device=cu_seq_lens_q.device)
    return torch.bucketize(steps, cu_seq_lens_q, right=True).unsqueeze(0)


def take(inputs: Tensor, index: Tensor) -> Tensor:
    """The steps `index` (B, M) of (B, T, ...), as (B, M, ...)."""
    index = index.to(inputs.device).view(*index.shape, *[1] * (inputs.dim() - 2))
    return inputs.gather(1, index.expand(-1, -1, *inputs.shape[2:]))


def _document_starts(reset: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """Where `reset` says so or the document changes. Whether the first step continues what a cache holds, `documents`
    does not say: it does."""
    if documents is None:
        return reset
    changes = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return changes if reset is None else reset | changes
