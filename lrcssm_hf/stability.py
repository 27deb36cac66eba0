# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How much a step of the recurrence can magnify: a bound of its Jacobian, and weights that keep to a given one.

Write x for the state before the step, n = sigmoid(a (x - m)), F = sigmoid(g + c + w_f n), u = tanh(g + d + w_z n) and
eps = sigmoid(w_e x + b + q), with c, d, q from the input and p the leak potential. The step (arXiv 2505.21717,
equations 7 to 10) is x + dt eps (p u - F x), and its Jacobian for dt = 1

    J = 1 - eps F + eps (p (1 - u^2) w_z - x F (1 - F) w_f) a n (1 - n) + eps (1 - eps) w_e (p u - F x).

Of its terms, whatever the input and the state:

- |p (1 - u^2) w_z a n (1 - n)| <= |p w_z a| / 4 =: r, because n (1 - n) <= 1/4.
- a x = y + a m for y = a (x - m), and |y| sigmoid'(y) <= K = 0.22388, so that |x w_f a n (1 - n)| <=
  |w_f| (K + |a m| / 4) =: k. Hence -F + k F (1 - F) <= s, and F + k F (1 - F) <= 1 + s, for s = (k - 1)^2 / (4 k) if
  k > 1, and else s = 0.
- |eps (1 - eps) w_e (p u - F x)| <= |w_e| (|p| + |x|) / 4.

As eps is in (0, 1), J is at most 1 + B and at least -B, with B = r + s + |w_e| (|p| + |x|) / 4. For dt in [0, 1],
1 + dt (J - 1) lies between 1 and J, so that the bound |J| <= 1 + B holds for it too. So it does for the symmetric
elastance, which has a slope of at most 1/4 too and is in (0, 1); where its shift is negative, as it may be in the
authors' block, it is in (-1, 0), and |J| <= 2 + B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .recurrence import LrcParameters


# The maximum of y sigmoid'(y), rounded up.
_MOST = 0.22388


def _state_gain(parameters: LrcParameters) -> Tensor:
    """k / |w_f|."""
    return _MOST + (parameters.activation_scale * parameters.activation_shift).abs() / 4


def jacobian_bound(parameters: LrcParameters, largest_state: float | Tensor) -> Tensor:
    """A bound (D,) of |dx_t/dx_{t-1}| for all inputs, time steps in [0, 1] and states of at most `largest_state`, which
    only matters to neurons whose elastance depends on the state: a number or a tensor that broadcasts to (D,), not
    negative, else a ValueError."""
    if not (torch.as_tensor(largest_state) >= 0).all():
        raise ValueError(f"`largest_state` must be an absolute value, not negative nor NaN, got {largest_state}.")
    p = parameters
    update = (p.leak_potential * p.update_weight * p.activation_scale).abs() / 4
    k = (p.forget_weight.abs() * _state_gain(p)).clamp(min=1)
    elastance = torch.where(
        p.elastance_weight == 0, 0, p.elastance_weight.abs() * (p.leak_potential.abs() + largest_state) / 4
    )
    bound = 1 + update + (k - 1).square() / (4 * k) + elastance
    return bound if p.elastance_shift is None else bound + (p.elastance_shift < 0)


def confine(parameters: LrcParameters, bound: float) -> LrcParameters:
    """The parameters, float32 at least, with the weights of the state so that |dx_t/dx_{t-1}| <= bound for all inputs,
    states and time steps in [0, 1].

    The elastance is made independent of the state, the forget gate keeps k <= 1, and the update r <= bound - 1: with a
    bound of 1 all Jacobians are in [0, 1], and no gradient grows on its way back, however far. A weight w that may be
    as large as l is l tanh(w / l): one that is small is as it was, and one that is large still learns. An elastance
    shift has to be positive, and is left to the caller. A bound below 1 is a ValueError.
    """
    if not bound >= 1:
        raise ValueError(f"`bound` must be at least 1, got {bound}.")
    # In half precision the limits would be rounded, and a product of many Jacobians grow.
    p = LrcParameters(*(None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in parameters))
    forget = 1 / _state_gain(p)
    reach = (p.leak_potential * p.activation_scale).abs()
    # Between numbers that can be divided by each other: 0 is allowed, and so is anything where the reach is 0.
    update = (4 * (bound - 1) / reach.clamp(min=1e-30)).clamp(min=1e-30, max=1e6)
    return p._replace(
        forget_weight=forget * torch.tanh(p.forget_weight / forget),
        update_weight=update * torch.tanh(p.update_weight / update),
        elastance_weight=torch.zeros_like(p.elastance_weight),
    )
