# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How a model's gradients travel through time: bound and measurement.

    python scripts/stability_report.py MODEL

MODEL is a folder or a name on the Hub. A language model reads text of the Python standard library (or --text_file), a
model of series noise. Prints per layer the bound of |dx_t/dx_{t-1}| that its weights prove, what is measured of it, and
the neurons' time constants; and the gradient of the last step with respect to the inputs at growing distances, in
float32 and bfloat16. Writes that to --output_dir as `stability.json` and `.md`, with plots.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lrcssm_hf import LrcSSMModel, lrc_step
from lrcssm_hf.modeling_lrcssm import LrcSSMNeurons
from lrcssm_hf.stability import jacobian_bound


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

from arguments import integer, text  # noqa: E402
from free_memory import keep_freed_memory  # noqa: E402
from text_data import standard_library  # noqa: E402
from whole_files import whole_files, write_whole  # noqa: E402


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


QUANTILES = (0.01, 0.5, 0.99)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_inputs(model: LrcSSMModel, name: str, text_file: str | None, length: int) -> dict[str, Tensor]:
    """One row of so many steps."""
    config = model.config
    if config.num_channels is not None:
        noise = torch.randn(1, length, config.num_channels, generator=torch.Generator().manual_seed(0))
        return {"input_values": noise}
    if text_file is not None:
        text = Path(text_file).read_text(encoding="utf-8")
    else:
        text = "\n".join(standard_library(5)["validation"]["text"])
    ids = AutoTokenizer.from_pretrained(name)(text[: 16 * length], add_special_tokens=False, verbose=False).input_ids
    if len(ids) < length:
        raise ValueError(f"The text has {len(ids)} tokens, fewer than --length {length}; give a longer --text_file.")
    return {"input_ids": torch.tensor(ids[:length]).unsqueeze(0)}


def layers(model: LrcSSMModel, inputs: dict[str, Tensor]) -> list[dict]:
    """Per layer what its weights prove, and quantiles over neurons and steps of what is measured."""
    seen = []

    def remember(neurons: LrcSSMNeurons, arguments: tuple, outputs: tuple) -> None:
        seen.append((neurons, arguments[0], outputs[0]))

    hooks = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, LrcSSMNeurons)]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [measure(*call) for call in seen]


def measure(neurons: LrcSSMNeurons, inputs: Tensor, states: Tensor) -> dict:
    parameters = neurons.lrc_parameters()
    with torch.no_grad():
        if neurons.config.sensory_activation == "sigmoid":
            inputs = torch.sigmoid(neurons.sensory_scale * (inputs - neurons.sensory_shift))
        currents = neurons.currents(inputs).split(neurons.config.state_size, dim=-1)
    previous = torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0)).requires_grad_()
    elastance_input = currents[2] if len(currents) == 3 else None
    following = lrc_step(previous, *currents[:2], parameters, elastance_input=elastance_input)
    (jacobians,) = torch.autograd.grad(following.sum(), previous)
    bounds = jacobian_bound(parameters, states.detach().abs().amax((0, 1)))
    # The time in which a disturbance fades to 1/e, from the mean logarithm over the steps.
    rates = -jacobians.abs().clamp(min=1e-30).log().mean((0, 1))
    constants = torch.where(rates > 0, 1 / rates, math.inf)
    return {
        "bound": bounds.max().item(),
        "largest": jacobians.abs().max().item(),
        "jacobians": jacobians.flatten()[:: max(1, jacobians.numel() // 2**20)]
        .quantile(torch.tensor(QUANTILES))
        .tolist(),
        "time_constants": constants.quantile(torch.tensor(QUANTILES), interpolation="nearest").tolist(),
    }


def gradient_by_distance(model: LrcSSMModel, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[int, float]:
    """Norm of the gradient of a random sum of the last step's outputs with respect to the inputs of a step, the root
    mean square over the steps from a power of two back to the next."""
    model = model.to(dtype)
    if "input_ids" in inputs:
        read = {"inputs_embeds": model.embed_tokens(inputs["input_ids"]).detach().requires_grad_()}
    else:
        read = {"input_values": inputs["input_values"].to(dtype).requires_grad_()}
    last = model(**read, use_cache=False).last_hidden_state[0, -1].float()
    direction = torch.randn(last.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(last @ direction, list(read.values()))
    squares = gradient[0].double().square().sum(-1).flip(0)
    edges = [0, *(2**i for i in range(math.ceil(math.log2(len(squares))))), len(squares)]
    return {start: squares[start:end].mean().sqrt().item() for start, end in zip(edges, edges[1:])}


def table(results: dict) -> str:
    lines = [
        f"# Gradient stability of {results['model']}",
        "",
        f"{results['length']:,} steps. J is dx_t/dx_{{t-1}} of a neuron; quantiles are 1%, 50%, 99% over steps and "
        "neurons. The bound holds for every input; for neurons whose elastance depends on the state, up to the largest "
        "state seen. A time constant is the time in which a disturbance fades to 1/e.",
        "",
        "| layer | bound of \\|J\\| | largest \\|J\\| | J | time constants |",
        "|---|---|---|---|---|",
    ]
    for index, layer in enumerate(results["layers"]):
        jacobians = ", ".join(f"{value:.3f}" for value in layer["jacobians"])
        constants = ", ".join(f"{value:.3g}" for value in layer["time_constants"])
        lines.append(f"| {index} | {layer['bound']:.4f} | {layer['largest']:.4f} | {jacobians} | {constants} |")
    lines += ["", "Gradient of the last step with respect to a step's inputs, by the distance:", ""]
    lines += ["| distance | " + " | ".join(results["gradients"]) + " |", "|---|" + "---|" * len(results["gradients"])]
    for distance in next(iter(results["gradients"].values())):
        cells = [f"{by_distance[distance]:.2e}" for by_distance in results["gradients"].values()]
        lines.append(f"| {int(distance):,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n![Gradient by distance](stability.png)\n"


def plot(results: dict, path: Path) -> None:
    figure, (gradients, jacobians) = plt.subplots(1, 2, figsize=(11, 4))
    for name, by_distance in results["gradients"].items():
        gradients.plot([max(int(d), 0.5) for d in by_distance], list(by_distance.values()), "o-", ms=3, label=name)
    gradients.set(xscale="log", yscale="log", xlabel="distance (steps)", ylabel="norm of the gradient")
    gradients.legend()
    index = range(len(results["layers"]))
    low, middle, high = zip(*(layer["jacobians"] for layer in results["layers"]))
    jacobians.vlines(index, low, high, lw=6, alpha=0.4, label="1% to 99% of J")
    jacobians.plot(index, middle, "o", label="median")
    jacobians.plot(index, [layer["largest"] for layer in results["layers"]], "x", label="largest |J|")
    jacobians.plot(index, [layer["bound"] for layer in results["layers"]], "_", ms=20, label="bound of |J|")
    jacobians.set(xlabel="layer", ylabel="dx_t / dx_{t-1}", xticks=index)
    jacobians.legend()
    for axes in (gradients, jacobians):
        axes.grid(alpha=0.3)
    figure.suptitle(results["model"])
    with whole_files(path.parent) as partial:
        figure.savefig(partial / path.name, dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(name: str, length: int, text_file: str | None) -> dict:
    """Raises a `ValueError` for a model that is no LrcSSM, or a text that is too short."""
    try:
        if AutoConfig.from_pretrained(name).model_type != "lrcssm":
            raise ValueError(f"{name!r} is no LrcSSM.")
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except OSError as error:
        raise ValueError(f"{name!r} could not be loaded: {error}") from error
    if model.config.cell != "lrc":
        raise ValueError(f"{name!r} has the cell {model.config.cell!r}; the bounds are those of the LRC.")
    if not isinstance(model, LrcSSMModel) or model.config.bidirectional:
        raise ValueError(f"{name!r} reads its input from both ends: there is no last step to go back from.")
    inputs = read_inputs(model, name, text_file, length)
    results = {"model": Path(name).name, "length": length, "layers": layers(model, inputs)}
    results["gradients"] = {
        label: {str(distance): norm for distance, norm in gradient_by_distance(model, inputs, dtype).items()}
        for label, dtype in DTYPES.items()
    }
    return results


def main(arguments: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=text)
    parser.add_argument("--length", type=integer(at_least=2), default=65536, help="Steps to read (default 65536).")
    parser.add_argument("--text_file", type=text, help="What a language model reads instead of the standard library.")
    parser.add_argument("--output_dir", type=text, help="Default runs/stability-MODEL.")
    args = parser.parse_args(arguments)
    try:
        results = report(args.model, args.length, args.text_file)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    folder = Path(args.output_dir or f"runs/stability-{results['model']}")
    write_whole(folder / "stability.json", json.dumps(results, indent=1) + "\n")
    plot(results, folder / "stability.png")
    write_whole(folder / "stability.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
