# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""The selective scan of transformers' Mamba, compiled for CPUs, so that the rival can be trained there.

Without its CUDA kernels, transformers' Mamba takes a Python loop over time. `compile_mamba_for_cpu` puts one compiled
pass in its place, forward and backward, with the same results.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.mamba import modeling_mamba

from lrcssm_hf.cpu_kernels import _exp, _inline, compiled, run


# States are kept at every so many steps, and those between them computed again on the way back.
_SEGMENT = 32


@_inline()
def _step(state, dt, drive, decay_rate, inputs):
    """One step of a batch row's states (N, D), in place."""
    for n in range(state.shape[0]):
        for d in range(state.shape[1]):
            state[n, d] = _exp(dt[d] * decay_rate[n, d]) * state[n, d] + drive[d] * inputs[n]


@njit(fastmath=True)
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled
def _forward(x, dt, decay_rate, inputs, outputs, y, kept, blocks, width, start, stop):
    """Batch rows `start` to `stop` of h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t; A is (N, D)."""
    steps, size = x.shape[1:]
    for b in range(start, stop):
        state = np.zeros(decay_rate.shape, np.float32)
        for t in range(steps):
            if t % _SEGMENT == 0:
                kept[b, t // _SEGMENT] = state
            _step(state, dt[b, t], dt[b, t] * x[b, t], decay_rate, inputs[b, t])
            for n in range(len(decay_rate)):
                for d in range(size):
                    y[b, t, d] += outputs[b, t, n] * state[n, d]


@compiled
def _backward(
    grad_y, x, dt, decay_rate, inputs, outputs, kept,
    grad_x, grad_dt, grad_rate, grad_inputs, grad_outputs, blocks, width, start, stop,
):  # fmt: skip
    steps, size = x.shape[1:]
    for b in range(start, stop):
        adjoint = np.zeros(decay_rate.shape, np.float32)  # of h_{t+1}, times its decay
        states = np.empty((_SEGMENT + 1, *decay_rate.shape), np.float32)
        grad_drive = np.empty(size, np.float32)
        for segment in range(kept.shape[1] - 1, -1, -1):
            first = segment * _SEGMENT
            count = min(_SEGMENT, steps - first)
            states[0] = kept[b, segment]
            for i in range(count):
                t = first + i
                states[i + 1] = states[i]
                _step(states[i + 1], dt[b, t], dt[b, t] * x[b, t], decay_rate, inputs[b, t])
            for i in range(count - 1, -1, -1):
                t = first + i
                drive = dt[b, t] * x[b, t]
                grad_drive[:] = 0
                for n in range(len(decay_rate)):
                    for d in range(size):
                        adjoint[n, d] += grad_y[b, t, d] * outputs[b, t, n]
                    grad_outputs[b, t, n] = _dot(grad_y[b, t], states[i + 1, n])
                    grad_inputs[b, t, n] = _dot(adjoint[n], drive)
                    for d in range(size):
                        grad_drive[d] += adjoint[n, d] * inputs[b, t, n]
                        adjoint[n, d] *= _exp(dt[b, t, d] * decay_rate[n, d])
                        grad_exponent = adjoint[n, d] * states[i, n, d]
                        grad_rate[b, n, d] += grad_exponent * dt[b, t, d]
                        grad_dt[b, t, d] += grad_exponent * decay_rate[n, d]
                for d in range(size):
                    grad_x[b, t, d] = grad_drive[d] * dt[b, t, d]
                    grad_dt[b, t, d] += grad_drive[d] * x[b, t, d]


def _share(kernel, *tensors: Tensor) -> None:
    """Calls the kernel on the first tensor's batch rows, shared among torch's threads."""
    batch, steps, size = tensors[0].shape
    run(kernel, tuple(tensor.numpy() for tensor in tensors), batch, steps, size, blocks=1, width=size)


class _SelectiveScan(torch.autograd.Function):
    """(B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), all float32 -> (B, T, D)."""

    @staticmethod
    def forward(ctx, x, dt, decay_rate, inputs, outputs):
        operands = [t.detach().contiguous() for t in (x, dt, decay_rate.T, inputs, outputs)]
        batch, steps, size = x.shape
        y = x.new_zeros(batch, steps, size)
        kept = x.new_empty(batch, -(-steps // _SEGMENT), *operands[2].shape)
        _share(_forward, *operands, y, kept)
        ctx.save_for_backward(*operands, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, _, decay_rate, inputs, *_ = ctx.saved_tensors
        grad_x, grad_dt = torch.empty_like(x), torch.zeros_like(x)
        grad_rate = x.new_zeros(x.shape[0], *decay_rate.shape)
        grad_inputs, grad_outputs = torch.empty_like(inputs), torch.empty_like(inputs)
        results = (grad_x, grad_dt, grad_rate, grad_inputs, grad_outputs)
        _share(_backward, grad_y.contiguous(), *ctx.saved_tensors, *results)
        return grad_x, grad_dt, grad_rate.sum(0).T, grad_inputs, grad_outputs


def compile_mamba_for_cpu() -> None:
    """Replaces, in this process, the selective scan that transformers' Mamba models run in training and evaluation.

    Calls that ask for the final state, as `generate` does, or are not for float32 on a CPU keep transformers' own.
    """
    original = modeling_mamba.mamba_selective_scan

    def selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        delta_bias: Tensor,
        return_last_state: bool = False,
        **options,
    ) -> Tensor:
        if return_last_state or hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32:
            return original(
                hidden_states, dt, A, B, C, D, z, delta_bias, return_last_state=return_last_state, **options
            )
        dt = F.softplus(dt + delta_bias[:, None])
        x, dt, B, C = (t.transpose(1, 2) for t in (hidden_states, dt, B, C))
        y = _SelectiveScan.apply(x, dt, A, B, C).transpose(1, 2)
        return (y + hidden_states * D[:, None]) * F.silu(z)

    modeling_mamba.mamba_selective_scan = selective_scan
