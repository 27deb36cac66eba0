# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How fast the recurrence and its models are, next to what they have to be held against.

    python scripts/bench_recurrence.py

has five parts, any of which `--parts` selects:

    layer      the recurrence against moving its data, and against other recurrences and solvers
    cells      every cell by `cell_scan`, and GRUs of several packages
    prefix     the linear scan against moving its data
    solvers    every solver against sequence length, at several widths
    training   tokens per second of a training step, against Mamba and Llama of the same size
    decoding   tokens per second of `generate`, against the same; time per token after long contexts

All contenders of a table's column are measured in one run, in turns. The raw medians go to recurrence_<device>.json in
scripts/results, from which recurrence_<device>.md and the plots are made; a part that is measured again replaces its
own entry, and what it has measured is kept where it does not come to its end. With `--quick` everything is tiny and
goes to a temporary folder: that the script works, not how fast things are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from lrcssm_hf import (
    Cell,
    LrcParameters,
    LrcSSMConfig,
    LrcSSMForCausalLM,
    cell_scan,
    cells,
    lrc_scan,
    prefix_scan,
)
from lrcssm_hf.host import CACHE


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from free_memory import keep_freed_memory


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PARTS = ("layer", "cells", "prefix", "solvers", "training", "decoding")
PACKAGES = (
    "torch",
    "triton",
    "numba",
    "transformers",
    "ncps",
    "jax",
    "flash-linear-attention",
    "accelerated-scan",
    "pararnn-torch",
)
# What Mamba takes, where it is installed, in place of its loop in Python.
PACKAGES += ("mamba-ssm", "causal-conv1d", "kernels")

# By device, and "quick" for the smoke test. Shapes are (batch, steps, state).
LAYER_SHAPES = {
    "cpu": [(4, 17920, 64), (8, 2048, 512), (1, 16384, 256)],
    "cuda": [(8, 4096, 2048), (2, 32768, 1024), (1, 262144, 256)],
    "quick": [(2, 96, 16), (1, 256, 8)],
}
CELL_SHAPES = {
    "cpu": [(4, 4096, 64), (8, 2048, 512)],
    "cuda": [(8, 4096, 2048), (2, 32768, 1024)],
    "quick": [(2, 96, 16)],
}
# A GRU with its projection of the input, and one whose own weights are of order 3.
GRU_SHAPE = {"cpu": (4, 4096, 64), "cuda": (8, 4096, 1024), "quick": (2, 96, 16)}
PREFIX_SHAPES = {**LAYER_SHAPES, "cuda": [(8, 65536, 192), (8, 4096, 1536)]}
SOLVER_WIDTHS = [(1, 64), (4, 256), (16, 1024), (32, 2048)]  # batch, state
SOLVER_ELEMENTS = {"cpu": 2**24, "cuda": 2**28, "quick": 2**18}
EAGER_STEPS = 2**14  # the longest sequence for a loop in Python
TRAINING = {  # model, tokens per optimizer step, and the lengths they are cut into
    "cpu": ("2 M", 8192, [512, 2048, 8192]),
    "cuda": ("100 M", 32768, [512, 2048, 8192, 32768]),
    "quick": ("tiny", 128, [32, 64]),
}
STEP_LIMIT = 60  # seconds
PIECE = 8192  # tokens of a context that are read at once

# Vocabulary, width, layers, width of the MLP; and the layers that give Mamba as many parameters.
MODELS = {
    "tiny": (64, 64, 4, 128, 6),
    "2 M": (512, 192, 4, 384, 7),
    "10 M": (512, 384, 5, 1024, 11),
    "100 M": (32000, 768, 9, 2048, 20),
}


# --- Measuring ------------------------------------------------------------------------------------------------------


class Deadline(TorchDispatchMode):
    """Stops what runs under it, a backward pass too, at the first operator after `seconds`."""

    def __init__(self, seconds: float):
        super().__init__()
        self.end = time.perf_counter() + seconds

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if time.perf_counter() > self.end:
            raise TimeoutError
        return function(*args, **(kwargs or {}))


class Bench(NamedTuple):
    device: str
    quick: bool

    @property
    def scale(self) -> str:
        return "quick" if self.quick else self.device

    def measure(self, contenders: dict[str, Callable | str], limit: float = math.inf) -> dict[str, dict]:
        """The median time of each contender's call in ms, or a note why there is none (given as a string, or found).

        Contenders take turns in blocks of calls: a drift of the machine hits all, and each runs in its own steady
        state. What takes over 2 s is called once per block, over 20 s once altogether. `limit` is the longest first
        call in seconds, which is not counted unless it is the only one.
        """
        results = {name: {"note": call} if isinstance(call, str) else {} for name, call in contenders.items()}
        seconds, times = {}, {}
        for name, call in contenders.items():
            if isinstance(call, str):
                continue
            try:
                with Deadline(limit) if limit < math.inf else contextlib.nullcontext():
                    seconds[name] = self._times(call, 1)[0] / 1e3
                # A GPU's first call compiles, and the watch that a limit needs takes time itself.
                if seconds[name] < 20 or self.device == "cuda" or limit < math.inf:
                    seconds[name] = self._times(call, 1)[0] / 1e3
                times[name] = []
            except TimeoutError:
                results[name]["note"] = f"over {limit:g} s"
            except RuntimeError as error:
                # The driver, which has no memory left for a kernel's code, raises nothing more special.
                if "out of memory" not in str(error):
                    raise
                results[name]["note"] = "out of memory"
        for _, name in itertools.product(range(1 if self.quick else 3), times):
            if seconds[name] >= 20 and self.device == "cpu":
                times[name] = [1e3 * seconds[name]]
            else:
                calls = 1 if seconds[name] > 2 else min(max(5, math.ceil(0.2 / seconds[name])), 500)
                times[name] += self._times(contenders[name], 2 if self.quick else calls)
        for name, values in times.items():
            results[name] = {"ms": statistics.median(values), "calls": len(values)}
        return results

    def _times(self, call: Callable, calls: int) -> list[float]:
        """Milliseconds of each call."""
        if self.device == "cpu":
            ticks = [time.perf_counter()]
            for _ in range(calls):
                call()
                ticks.append(time.perf_counter())
            return [1e3 * (end - start) for start, end in zip(ticks, ticks[1:])]
        ticks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        ticks[0].record()
        for tick in ticks[1:]:
            call()
            tick.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(ticks, ticks[1:])]


def optional(module: str, name: str, make: Callable[[Callable], Callable]) -> Callable | str:
    """The contender that `make` makes of another package's function; or why there is none."""
    try:
        contender = make(getattr(importlib.import_module(module), name))
        if torch.cuda.is_available() and callable(
            contender
        ):  # Compiled packages fail in ways of their own, and must not end the run.
            contender()
        return contender
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        return f"fails ({type(error).__name__})"


def timed(function: Callable[[], Tensor], leaves: list[Tensor], cotangent: Tensor, backward: bool) -> Callable:
    """The forward pass alone, or with the gradients of all `leaves`."""
    if not backward:
        return torch.no_grad()(function)
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(function(), leaves, cotangent)


def copies(shape: tuple, count: int, device: str) -> Callable:
    """Copying `count` different float32 tensors."""
    pairs = [(torch.empty(shape, device=device), torch.randn(shape, device=device)) for _ in range(count)]
    return lambda: [target.copy_(source) for target, source in pairs]


def gated_parameters(size: int) -> LrcParameters:
    """As the gated block initialises them: at rest, 1 / time constant = elastance / 2."""
    elastance = 2 / torch.empty(size).uniform_(math.log(2.5), math.log(16)).exp()
    zeros, ones, weights = torch.zeros(4, size), torch.ones(2, size), 0.1 * torch.randn(2, size)
    return LrcParameters(ones[0], zeros[0], *weights, zeros[1], ones[1], zeros[2], torch.logit(elastance))


# --- The parts: each measures one column of a table -----------------------------------------------------------------


def points(part: str, scale: str) -> list[dict]:
    """What a part's function is called with."""
    quick = scale == "quick"
    if part in ("layer", "prefix"):
        shapes, inputs = (LAYER_SHAPES, ({}, {"elastance_input": True})) if part == "layer" else (PREFIX_SHAPES, ({},))
        choices = itertools.product((False, True), shapes[scale], inputs)
        return [{"shape": shape, "backward": backward, **extra} for backward, shape, extra in choices]
    if part == "cells":
        choices = itertools.product((False, True), CELL_SHAPES[scale])
        every = [{"shape": shape, "backward": backward} for backward, shape in choices]
        return [*every, *({"shape": GRU_SHAPE[scale], "gru": kind} for kind in ("times", "errors"))]
    if part == "solvers":
        choices = itertools.product(SOLVER_WIDTHS, range(8, 11 if quick else 19, 2))
        shapes = [(batch, 2**power, size) for (batch, size), power in choices]
        return [{"shape": shape} for shape in shapes if math.prod(shape) <= SOLVER_ELEMENTS[scale]]
    if part == "training":
        model, tokens, lengths = TRAINING[scale]
        return [{"model": model, "tokens": tokens, "steps": steps} for steps in lengths]
    if quick:
        return [{"model": "tiny", "new_tokens": 8}, {"model": "tiny", "contexts": [1, 100, 10_000]}]
    generated = [{"model": name, "new_tokens": new} for name, new in (("2 M", 256), ("10 M", 256), ("100 M", 64))]
    return [*generated, {"model": "2 M", "contexts": [1, 8_192, 100_000, 1_000_000]}]


def compared(shape: tuple, backward: bool, results: dict[str, dict], suffix: str = "") -> dict:
    """A record whose times are also given in units of the first contender's."""
    first = next(iter(results.values()))["ms"]
    results = {name: x | {"ratio": x["ms"] / first} if "ms" in x else x for name, x in results.items()}
    title = "Forward and backward" if backward else "Forward"
    return {"table": title, "column": " x ".join(map(str, shape)) + suffix, "results": results}


def layer(bench: Bench, shape: tuple, backward: bool, elastance_input: bool = False) -> dict:
    cuda, size, suffix = bench.device == "cuda", shape[-1], " + q" if elastance_input else ""
    with torch.device(bench.device):
        dtype = torch.bfloat16 if cuda else torch.float32
        inputs = [torch.randn(shape, dtype=dtype) for _ in range(3 if elastance_input else 2)]
        parameters, cotangent = gated_parameters(size), torch.randn(shape)

    def ours(**options: str) -> Callable:
        options["elastance_input"] = inputs[2] if elastance_input else None
        leaves = [*inputs, *(parameter for parameter in parameters if parameter is not None)]
        return timed(lambda: lrc_scan(*inputs[:2], parameters, **options)[0], leaves, cotangent, backward)

    def module(rnn: torch.nn.Module) -> Callable:
        return timed(lambda: rnn(inputs[0])[0], [inputs[0], *rnn.parameters()], cotangent, backward)

    def hgrn(function: Callable) -> Callable:
        leaves = [inputs[0], torch.nn.functional.logsigmoid(inputs[1].detach())]
        return timed(lambda: function(*leaves)[0], leaves, cotangent.to(dtype), backward)

    if not cuda:
        # Forward moves inputs and states; backward inputs, states and their cotangent, and the inputs' gradients.
        moved = (len(inputs) + 1) * (3 if backward else 1)
        contenders = {
            "copy limit": copies(shape, moved, bench.device),
            "lrc_scan": ours(),
            "lrc_scan, PyTorch, chunked": ours(solver="chunked", backend="torch"),
            "lrc_scan, PyTorch, a loop": "see without q",
            "torch.nn.GRU": "see without q",
            "ncps.torch.CfC": "see without q",
            "jax.lax.scan of the same cell": "see without q",
        }
        if not elastance_input:  # which only lrc_scan has, and these are slow
            contenders |= {
                "lrc_scan, PyTorch, a loop": ours(solver="sequential", backend="torch"),
                "torch.nn.GRU": module(torch.nn.GRU(size, size, batch_first=True)),
                "ncps.torch.CfC": optional("ncps.torch", "CfC", lambda cfc: module(cfc(size, size))),
                "jax.lax.scan of the same cell": optional(
                    "jax", "jit", lambda jit: jax_scan(jit, inputs, parameters, cotangent, backward)
                ),
            }
        return compared(shape, backward, bench.measure(contenders), suffix)

    contenders = {"large copy": copies((2**28,), 1, bench.device), "lrc_scan": ours()}
    contenders |= {name: optional("fla.ops.hgrn", name, hgrn) for name in ("chunk_hgrn", "fused_recurrent_hgrn")}
    results = bench.measure(contenders)
    # The same, in bytes: inputs and their gradients have two, states and their cotangent four.
    input_bytes, state_bytes = 2 * len(inputs) * math.prod(shape), 4 * math.prod(shape)
    moved = input_bytes + state_bytes + (2 * (input_bytes + state_bytes) if backward else 0)
    bytes_per_ms = 2 * 4 * 2**28 / results.pop("large copy")["ms"]
    record = compared(shape, backward, {"traffic floor": {"ms": moved / bytes_per_ms}, **results}, suffix)
    record["copy_gigabytes_per_second"] = bytes_per_ms / 1e6
    if backward:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contenders["lrc_scan"]()
        record["peak_bytes"] = torch.cuda.max_memory_allocated() - before + input_bytes
        record["floor_bytes"] = 2 * input_bytes + state_bytes
    return record


def jax_scan(
    jit: Callable, inputs: list[Tensor], parameters: LrcParameters, cotangent: Tensor, backward: bool
) -> Callable:
    """The cell as its authors have it, in JAX: a compiled loop over time."""
    import jax

    sigmoid = jax.nn.sigmoid
    tensors = [tensor.detach().transpose(0, 1) for tensor in (*inputs, cotangent)]
    *arrays, weight = (jax.numpy.asarray(tensor.contiguous().numpy()) for tensor in tensors)
    names = [name for name, value in parameters._asdict().items() if value is not None]
    values = {name: jax.numpy.asarray(getattr(parameters, name).detach().numpy()) for name in names}

    def states(forget_input, update_input, p):
        def step(x, currents):
            n = sigmoid(p["activation_scale"] * (x - p["activation_shift"]))
            f = sigmoid(p["leak_conductance"] + currents[0] + p["forget_weight"] * n)
            z = jax.numpy.tanh(p["leak_conductance"] + currents[1] + p["update_weight"] * n)
            elastance = sigmoid(p["elastance_weight"] * x + p["elastance_bias"])
            x = x + elastance * (p["leak_potential"] * z - f * x)
            return x, x

        return jax.lax.scan(step, jax.numpy.zeros_like(forget_input[0]), (forget_input, update_input))[1]

    run = jit(states)
    if backward:
        run = jit(jax.grad(lambda *leaves: (states(*leaves) * weight).sum(), argnums=(0, 1, 2)))
    return lambda: jax.block_until_ready(run(*arrays, values))


def every_cell(bench: Bench, shape: tuple, backward: bool = True, gru: str | None = None) -> dict:
    """Cells beside each other in multiples of copying what each has to move; or GRUs of several packages."""
    if gru is not None:
        return {"times": gru_times, "errors": gru_errors}[gru](bench, shape)
    contenders, moved = {"copying a tensor": copies(shape, 1, bench.device)}, {"copying a tensor": 1}
    for recurrence in (value for value in vars(cells).values() if isinstance(value, Cell)):
        name, count = recurrence.name, len(recurrence.states)
        with torch.device(bench.device):
            inputs = {each: torch.randn(shape) for each in recurrence.inputs if each not in recurrence.defaults}
            parameters = {each: 0.3 * torch.randn(shape[-1]) for each in recurrence.parameters}
            cotangent = torch.randn(*shape[:2], *[count] * (count > 1), shape[-1])
        scan = functools.partial(cell_scan, recurrence, inputs, parameters)
        leaves = [*inputs.values(), *parameters.values()]
        contenders[name] = timed(lambda scan=scan: scan()[0], leaves, cotangent, backward)
        # Forward inputs and states; backward these, the states' cotangent, and the inputs' gradients.
        moved[name] = (len(inputs) + count) * (3 if backward else 1)
    results = bench.measure(contenders)
    once = results["copying a tensor"]["ms"]
    for name, result in results.items():
        result["ratio"] = result["ms"] / once / moved[name]
    title = "All cells, forward and backward" if backward else "All cells, forward"
    return {"table": title, "column": " x ".join(map(str, shape)), "results": results}


def diagonal_gru(weight: float, size: int, device: str) -> tuple[torch.nn.Linear, dict[str, Tensor]]:
    """The projection to a GRU's inputs, and its own weights, of order `weight`."""
    projection = torch.nn.Linear(size, 3 * size, device=device)
    names = cells.GRU.parameters
    return projection, {name: (weight * torch.randn(size, device=device)).requires_grad_() for name in names}


def scan_gru(x: Tensor, projection: torch.nn.Linear, parameters: dict[str, Tensor], **options) -> Tensor:
    return cell_scan(cells.GRU, projection(x), parameters, **options)[0]


def para_gru(package: Callable, projection: torch.nn.Linear, parameters: dict[str, Tensor]) -> torch.nn.Module:
    """pararnn-torch's layer of the same weights; its order is update, reset, candidate."""
    size, names = projection.in_features, tuple(parameters)
    gru = importlib.import_module("pararnn").ParaGRU(size, size, max_recurrent_norm=None)
    layer = package(gru).to(projection.weight.device).train()
    own, (reset, update, candidate) = layer.layers[0], names
    with torch.no_grad():
        for target, source in ((own.W_x.weight, projection.weight), (own.W_x.bias, projection.bias)):
            of_reset, of_update, of_candidate = source.chunk(3)
            target.copy_(torch.cat([of_update, of_reset, of_candidate]))
        for target, name in ((own.a_z, update), (own.a_r, reset), (own.a_n, candidate)):
            target.copy_(parameters[name])
    return layer


def gru_times(bench: Bench, shape: tuple) -> dict:
    size = shape[-1]
    x, cotangent = torch.randn(shape, device=bench.device), torch.randn(shape, device=bench.device)
    projection, parameters = diagonal_gru(0.3, size, bench.device)
    leaves = [x, *projection.parameters(), *parameters.values()]

    def layer(rnn: torch.nn.Module) -> Callable:
        def states() -> Tensor:
            outputs = rnn(x)
            return outputs[0] if isinstance(outputs, tuple) else outputs

        return timed(states, [x, *rnn.parameters()], cotangent, True)

    contenders = {
        "cell_scan": timed(lambda: scan_gru(x, projection, parameters), leaves, cotangent, True),
        "pararnn-torch": optional("pararnn", "ParaRNN", lambda para: layer(para_gru(para, projection, parameters))),
        "torch.nn.GRU": layer(torch.nn.GRU(size, size, batch_first=True, device=bench.device)),
    }
    record = compared(shape, True, bench.measure(contenders))
    return record | {"table": "GRU with its projections, forward and backward"}


@torch.no_grad()
def gru_errors(bench: Bench, shape: tuple) -> dict:
    """The largest difference to the definition in float64, of float32 states, at weights of order 3."""
    x = torch.randn(shape, device=bench.device)
    projection, parameters = diagonal_gru(3.0, shape[-1], bench.device)
    wide = copy.deepcopy(projection).double(), {name: weight.double() for name, weight in parameters.items()}
    exact = scan_gru(x.double(), *wide, solver="sequential", backend="torch")

    def error(rnn: Callable) -> str:
        return f"{(rnn(x) - exact).abs().max().item():.1e}"

    results = {
        "cell_scan": {"note": error(lambda x: scan_gru(x, projection, parameters))},
        "pararnn-torch": {
            "note": optional("pararnn", "ParaRNN", lambda para: error(para_gru(para, projection, parameters)))
        },
    }
    title = "GRU with weights of order 3: largest error"
    return {"table": title, "column": " x ".join(map(str, shape)), "results": results}


def prefix(bench: Bench, shape: tuple, backward: bool) -> dict:
    with torch.device(bench.device):
        operands, cotangent = [torch.rand(shape), torch.randn(shape)], torch.randn(shape)
    # Three tensors forward; backward reads decay, states and cotangent, and writes two gradients.
    contenders = {
        "copy limit": copies(shape, 8 if backward else 3, bench.device),
        "prefix_scan": timed(lambda: prefix_scan(*operands), operands, cotangent, backward),
    }
    if bench.device == "cuda":
        *leaves, flipped = (x.detach().transpose(1, 2).contiguous() for x in (*operands, cotangent))
        contenders["accelerated_scan"] = optional(
            "accelerated_scan.warp", "scan", lambda scan: timed(lambda: scan(*leaves), leaves, flipped, backward)
        )
    return compared(shape, backward, bench.measure(contenders))


@torch.no_grad()
def solvers(bench: Bench, shape: tuple) -> dict:
    batch, length, size = shape
    with torch.device(bench.device):
        currents, parameters = torch.randn(2, *shape), gated_parameters(size)
    cuda = bench.device == "cuda"
    backends = dict.fromkeys(("newton", "chunked", "sequential"), "triton" if cuda else "torch")
    backends["auto"] = "auto" if cuda else "cpu"
    contenders, infos = {}, {}
    for solver, backend in backends.items():
        name = "compiled" if backend == "cpu" else solver
        if backend == "torch" and solver == "sequential" and length > EAGER_STEPS:
            contenders[name] = "skipped"
            continue
        options = {"solver": solver, "backend": backend}
        infos[name] = lrc_scan(*currents, parameters, **options, return_info=True)[2]
        contenders[name] = lambda options=options: lrc_scan(*currents, parameters, **options)
    results = bench.measure(contenders)
    for name, info in infos.items():
        results[name] |= {"solver": info.solver, "iterations": info.iterations, "fell_back": info.fell_back}
    return {"table": f"B·D = {batch} x {size}", "column": f"T = {length}", "results": results}


def make_models(name: str) -> dict[str, PreTrainedModel]:
    """LrcSSM, and Mamba and Llama of its width and, to a few percent, its number of parameters."""
    vocabulary, width, layers, mlp, mamba_layers = MODELS[name]
    shared = {"vocab_size": vocabulary, "hidden_size": width, "tie_word_embeddings": True}
    shared |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    lrcssm = LrcSSMConfig(num_hidden_layers=layers, intermediate_size=mlp, **shared)
    mamba = MambaConfig(num_hidden_layers=mamba_layers, **shared)
    # Llama's attention has four square matrices to the mixer's six; its MLP gets the difference.
    llama = {"num_hidden_layers": layers, "intermediate_size": mlp + 2 * width // 3, "num_attention_heads": width // 64}
    return {
        "LrcSSM": LrcSSMForCausalLM(lrcssm),
        "Mamba": MambaForCausalLM(mamba),
        "Llama": LlamaForCausalLM(LlamaConfig(**llama, **shared)),
    }


def with_rates(results: dict[str, dict], tokens: int, models: dict[str, PreTrainedModel]) -> dict[str, dict]:
    for name, result in results.items():
        result["parameters"] = models[name].num_parameters()
        if "ms" in result:
            result["tokens_per_second"] = 1e3 * tokens / result["ms"]
    return results


def training(bench: Bench, model: str, tokens: int, steps: int) -> dict:
    models = {name: model.to(bench.device).train() for name, model in make_models(model).items()}
    ids = torch.randint(MODELS[model][0], (tokens // steps, steps), device=bench.device)

    def step_of(model: PreTrainedModel) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            with torch.autocast(bench.device, torch.bfloat16, enabled=bench.device == "cuda"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    results = bench.measure({name: step_of(model) for name, model in models.items()}, limit=STEP_LIMIT)
    results = with_rates(results, tokens, models)
    return {"table": f"A step of {tokens:,} tokens", "column": f"T = {steps}", "results": results}


@torch.no_grad()
def decoding(bench: Bench, model: str, new_tokens: int = 0, contexts: list[int] | None = None) -> dict:
    """Greedy `generate` of one sequence, or LrcSSM's steps after `contexts`."""
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    models = {name: model.to(bench.device, dtype).eval() for name, model in make_models(model).items()}
    ids = torch.randint(MODELS[model][0], (1, PIECE), device=bench.device)
    if contexts is None:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        calls = {name: lambda model=model: model.generate(ids[:, :16], **options) for name, model in models.items()}
        results = with_rates(bench.measure(calls), new_tokens, models)
        return {"table": "Batch 1", "column": f"{model}, {new_tokens} new tokens", "results": results}

    caches, calls = {}, {}
    # Llama's cache is as long as the context.
    read = [("LrcSSM", context) for context in contexts] + [("Llama", context) for context in contexts[:2]]
    for name, context in read:
        reader, cache = models[name], None
        for start in tqdm(range(0, context, PIECE), desc=f"Reading {context:,} tokens", leave=False):
            piece = ids[:, : context - start]
            cache = reader(piece, **{CACHE: cache}, use_cache=True, logits_to_keep=1)[CACHE]
        title = row_after(name, context)
        caches[title] = cache
        calls[title] = lambda reader=reader, cache=cache: reader(ids[:, :1], **{CACHE: cache}, use_cache=True)
    sizes = {title: bytes_of(cache) for title, cache in caches.items()}
    results = bench.measure(calls)
    for title, size in sizes.items():
        results[title]["cache_bytes"] = size
    return {"table": "Time per token and size of the state", "column": f"LrcSSM, {model}", "results": results}


def row_after(model: str, context: int) -> str:
    """The name of a row of the last table."""
    return f"after {context:,} tokens" if model == "LrcSSM" else f"{model} after {context:,} tokens"


def bytes_of(cache: Cache) -> int:
    """Of a model's cache: states, or keys and values."""
    tensors = []
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            tensors += [layer.conv_states[0], layer.recurrent_states[0]]
        else:
            tensors += [layer.keys, layer.values]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- Tables and plots -----------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grouped(records: list[dict]) -> dict[str, list[dict]]:
    """The records of each table."""
    return {title: [r for r in records if r["table"] == title] for title in dict.fromkeys(r["table"] for r in records)}


def cell(record: dict, name: str) -> str:
    result = record["results"][name]
    if "note" in result:
        return result["note"]
    if "tokens_per_second" in result:
        return f"{number(result['tokens_per_second'])} tokens/s ({result['parameters'] / 1e6:.2f} M)"
    text = f"{number(result['ms'])} ms"
    if "cache_bytes" in result:
        return f"{text}, {result['cache_bytes']:,} bytes"
    if "solver" in result:
        return f"{text} ({result['solver']}, {result['iterations']}{', fell back' * result['fell_back']})"
    return f"{text} ({result['ratio']:.2f} x)"


def table(records: list[dict]) -> str:
    """A column per record, a row per contender."""
    lines = ["| | " + " | ".join(r["column"] for r in records) + " |", "|---" * (len(records) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(r, name) for r in records) + " |" for name in records[0]["results"]]
    return "\n".join(lines) + "\n"


def remarks(title: str, records: list[dict]) -> list[str]:
    """What follows from a table: targets met or missed, memory, and how constant the time per token is."""
    lines, results = [], [record["results"] for record in records]

    def judge(ratios: list[float], of: str, target: float) -> None:
        verdict = "met" if max(ratios) <= target else "missed"
        lines.append(f"- lrc_scan takes at most {max(ratios):.2f} times {of}; target {target}: {verdict}.")

    if "lrc_scan" in results[0] and "copy limit" in results[0]:
        judge([r["lrc_scan"]["ratio"] for r in results], "the copy limit", 3 if title == "Forward" else 4)
    if "traffic floor" in results[0]:
        if title == "Forward":
            judge([r["lrc_scan"]["ratio"] for r in results], "the traffic floor", 2)
        hgrn = [[x["ms"] for name, x in r.items() if "hgrn" in name and "ms" in x] for r in results]
        if all(hgrn):
            judge([r["lrc_scan"]["ms"] / min(times) for r, times in zip(results, hgrn)], "the faster HGRN", 1)
    for record in records:
        if "peak_bytes" in record:
            times = record["peak_bytes"] / record["floor_bytes"]
            lines.append(f"- Peak memory at {record['column']}: {times:.2f} times inputs, states and gradients.")
        if "contexts" in record:
            first, *others = (x["ms"] for name, x in record["results"].items() if name.startswith("after"))
            lines.append(f"- Largest deviation from the first: {max(abs(x / first - 1) for x in others):.1%}.")
    return lines


class Panel(NamedTuple):
    """One of the results' numbers: lines over `x` or, without it, bars per column."""

    title: str
    records: list[dict]
    value: str
    x: list[int] | None = None


def pictures(records: dict[str, list[dict]]) -> dict[str, list[Panel]]:
    """The panels of every picture, from the parts that are there."""
    layers, solved = grouped(records.get("layer", [])), grouped(records.get("solvers", []))
    models = []
    if trained := records.get("training"):
        models.append(Panel("Training step", trained, "tokens_per_second", [r["steps"] for r in trained]))
    if decoded := records.get("decoding"):
        *generated, last = decoded
        after = [
            {"results": {name: last["results"].get(row_after(name, context), {}) for name in ("LrcSSM", "Llama")}}
            for context in last["contexts"]
        ]
        models.append(Panel("Decoding", generated, "tokens_per_second"))
        models.append(Panel("A token after a context", after, "ms", last["contexts"]))
    return {
        "layer": [Panel(title, group, "ratio") for title, group in layers.items()],
        "solvers": [Panel(title, group, "ms", [r["shape"][1] for r in group]) for title, group in solved.items()],
        "models": models,
    }


def plot(panels: list[Panel], path: Path) -> None:
    # Many bars with their numbers need the width.
    rows, columns, size = (len(panels), 1, (11, 4)) if panels[0].value == "ratio" else (1, len(panels), (4.5, 4.2))
    size = (columns * size[0], rows * size[1])
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        names, seen = list(panel.records[0]["results"]), []
        for index, name in enumerate(names):
            values = [record["results"][name].get(panel.value, math.nan) for record in panel.records]
            seen += [value for value in values if not math.isnan(value)]
            if panel.x is None:
                places = [x + 0.8 * ((index + 0.5) / len(names) - 0.5) for x in range(len(values))]
                axis.bar_label(axis.bar(places, values, 0.8 / len(names), label=name), fmt=number, fontsize=6)
                axis.set_xticks(range(len(values)), [record["column"].replace(", ", "\n") for record in panel.records])
            else:
                axis.plot(panel.x, values, "o-", label=name, markersize=4)
                axis.set(xscale="log", xlabel="steps")
                axis.set_xticks(panel.x, [f"{x:,}" for x in panel.x], fontsize=7)
                axis.set_xticks([], minor=True)
        ylabel = f"time / {names[0]}" if panel.value == "ratio" else panel.value.replace("_", " ")
        # Wide enough for noise to look like noise.
        axis.set(title=panel.title, ylabel=ylabel, yscale="log", ylim=(min(seen) / 2, max(seen) * 2))
        axis.yaxis.set_major_formatter(lambda value, _: number(value))
        axis.yaxis.set_minor_formatter(lambda value, _: number(value) if f"{value:.0e}"[0] in "25" else "")
        axis.grid(alpha=0.3, axis="y")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- The run --------------------------------------------------------------------------------------------------------


def environment(device: str) -> str:
    hardware, cpu_info = platform.processor(), Path("/proc/cpuinfo")
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    elif cpu_info.exists():
        models = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        hardware = models[0] if models else hardware
    facts = [hardware, f"{os.cpu_count()} CPU cores", f"{torch.get_num_threads()} threads", platform.system()]
    facts += [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            facts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*facts, datetime.date.today().isoformat()])


def write(results: dict[str, dict], folder: Path, stem: str) -> None:
    """The JSON, which a crash leaves as it was or as it is to be; then the tables and plots made of it."""
    partial = folder / f"{stem}.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, folder / f"{stem}.json")
    records = {name: results[name]["records"] for name in PARTS if name in results}
    lines = ["Median times, by scripts/bench_recurrence.py. Shapes: batch x steps x state, `+ q` with elastance input."]
    lines += [
        "Multiples are of a table's first row, with all cells of copying the tensors that a cell moves; a solver is"
    ]
    lines += ["followed by its iterations.\n"]
    for name, panels in pictures(records).items():
        if panels:
            plot(panels, folder / f"{stem}_{name}.png")
            lines.append(f"![{name}]({stem}_{name}.png)")
    for name, part in records.items():
        lines += [f"\n## {name.capitalize()}\n", f"{results[name]['environment']}."]
        for title, group in grouped(part).items():
            lines += [f"\n### {title}\n", table(group), *remarks(title, group)]
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    # Contenders that allocate their results would otherwise be measured by how fast the system finds fresh pages.
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="By default cuda where PyTorch finds a GPU.")
    parser.add_argument("--quick", action="store_true", help="A smoke test, with results in a temporary folder.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"Default {','.join(PARTS)}.")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}, only {', '.join(PARTS)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU.")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)

    bench = Bench(args.device or ("cuda" if torch.cuda.is_available() else "cpu"), args.quick)
    folder = Path(__file__).resolve().parent / "results"
    folder = Path(tempfile.mkdtemp(prefix="bench_recurrence_")) if args.quick else folder
    stem = f"recurrence_{bench.device}"
    path = folder / f"{stem}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    measures = {
        "layer": layer,
        "cells": every_cell,
        "prefix": prefix,
        "solvers": solvers,
        "training": training,
        "decoding": decoding,
    }
    for part in parts:
        results[part] = {"environment": environment(bench.device), "records": (records := [])}
        for point in tqdm(points(part, bench.scale), desc=part, unit="point"):
            records.append(point | measures[part](bench, **point))
            write(results, folder, stem)
    print((folder / f"{stem}.md").read_text())
    print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
