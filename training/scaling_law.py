# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""How the loss falls with compute: a ladder of sizes and token counts for LrcSSM, Mamba and Llama, and fits to it.

    pip install -e '.[train]'
    python training/scaling_law.py                          # the small ladder, 1.5 hours on 2 CPU cores
    python training/scaling_law.py --min_operations 1e15 --max_operations 1e18 --dataset_name roneneldan/TinyStories \\
        --block_size 1024 --per_device_train_batch_size 32  # a larger one, for a GPU

Between two amounts of compute there is a budget for every half decade. Each budget is spent on several sizes, the small
ones with many tokens and the large ones with few, by pretrain.py, to which all other flags are passed on; the best of
them is the budget's loss. The learning rate of every size is doubled and halved until that helps no more, with every
budget up to a third of the largest; the largest takes what was found before. Finished runs are not made again, so that
an interrupted ladder goes on where it was.

`--output_dir` receives the runs, `scaling_law.json`, its tables and its plot.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from scipy.optimize import least_squares
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

import pretrain as pretraining
from arguments import integer, number, text
from free_memory import keep_freed_memory
from markdown_table import markdown_table
from pretraining_runs import ROOT, PretrainingRun, pretrain
from text_data import load_tokenizer
from whole_files import whole_files


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullFormatter


FAMILIES = {"lrcssm": "LrcSSM", "mamba": "Mamba", "llama": "Llama"}
COLORS = {"lrcssm": "tab:blue", "mamba": "tab:orange", "llama": "tab:green"}
# Width and depth; a layer has about 12 width² weights.
SIZES = (
    (12, 2),
    (16, 2),
    (24, 2),
    (32, 2),
    (48, 2),
    (64, 3),
    (96, 3),
    (128, 4),
    (192, 4),
    (256, 6),
    (384, 6),
    (512, 8),
)
SIZES += ((768, 12), (1024, 16))
# A budget is spent on the sizes to which it gives so many tokens per parameter.
TOKENS_PER_PARAMETER = (1, 400)
DEFAULTS = "--block_size 256 --per_device_train_batch_size 4 --validation_split_percentage 2 --eval_steps 1000000000"
FIRST_RATE = 8e-3
# What a run of a ladder cannot be told, because the ladder says it.
SET_HERE = (
    "model_type",
    "model_name_or_path",
    "config_overrides",
    "max_train_steps",
    "num_train_epochs",
    "learning_rate",
)
RESAMPLES = 500


class Cell(NamedTuple):
    """One budget spent on one size of one model."""

    family: str
    size: tuple[int, int]
    budget: float
    operations_per_token: int
    steps: int


def overrides(family: str, size: tuple[int, int]) -> str:
    """The configuration of a size. A layer of LrcSSM and Llama has about 12 width² weights; Mamba has twice as many
    layers, of a bit more than half of them."""
    width, depth = size
    common = f"hidden_size={width},num_hidden_layers={depth * (2 if family == 'mamba' else 1)}"
    heads = max(1, width // 32)
    own = {
        "lrcssm": f"intermediate_size={2 * width}",
        "llama": f"intermediate_size={8 * width // 3},num_attention_heads={heads},num_key_value_heads={heads}",
        "mamba": "state_size=16",
    }[family]
    return f"{common},{own},tie_word_embeddings=True"


def operations_per_token(config: PreTrainedConfig, block_size: int) -> int:
    """Operations of a training step per token: 2 for every weight of a matrix or convolution going forward, those of
    the sequence mixer, and twice as many going back.

    The LRC cell has 4 sigmoids of 4 operations and 16 others per neuron, Mamba's scan 9 per state (arXiv 2312.00752),
    and causal attention reads half of the block on average.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Mamba's rates are a matrix that multiplies no vector.
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and not name.endswith("A_log"))
    mixer = {
        "lrcssm": lambda: 32 * config.state_size,
        "mamba": lambda: 9 * config.intermediate_size * config.state_size,
        "llama": lambda: 2 * config.hidden_size * block_size,
    }[config.model_type]()
    return 3 * (2 * weights + config.num_hidden_layers * mixer)


def plan(args: argparse.Namespace, passed: list[str]) -> list[Cell]:
    """The cells of the ladder, by family, size and budget.

    Raises:
        ValueError: there are too few, or a passed flag is one that the ladder sets.
    """
    flags = pretraining.parse_args(passed)
    for name in SET_HERE:
        if any(word.split("=")[0] == f"--{name}" for word in passed):
            raise ValueError(f"--{name} is set for every run of the ladder; leave it out.")
    if args.min_operations >= args.max_operations:
        raise ValueError(
            f"--min_operations {args.min_operations:g} must be less than --max_operations {args.max_operations:g}."
        )
    tokenizer = load_tokenizer(flags.tokenizer_name)
    tokens_per_step = flags.block_size * flags.per_device_train_batch_size * flags.gradient_accumulation_steps
    halves = round(2 * math.log10(args.max_operations / args.min_operations))
    budgets = [args.min_operations * 10 ** (half / 2) for half in range(halves + 1)]
    fewest, most = TOKENS_PER_PARAMETER
    cells = []
    for family in FAMILIES:
        for size in SIZES:
            config = pretraining.make_config(family, overrides(family, size), tokenizer)
            operations = operations_per_token(config, flags.block_size)
            for budget in budgets:
                tokens = budget / operations
                if fewest <= tokens / (operations / 6) <= most:
                    steps = max(1, round(tokens / tokens_per_step))
                    cells.append(Cell(family, size, budget, operations, steps))
    if len(budgets) < 3 or any(
        sum(c.budget == b and c.family == f for c in cells) < 2 for b in budgets for f in FAMILIES
    ):
        raise ValueError(
            f"--min_operations {args.min_operations:g} and --max_operations {args.max_operations:g} must be at least a "
            "decade apart, with two of the sizes at every budget."
        )
    return cells


class Ladder:
    """Makes the runs of a ladder, several at a time."""

    def __init__(self, cells: list[Cell], folder: Path, passed: list[str], workers: int):
        self.cells, self.folder, self.passed, self.workers = cells, folder, passed, workers
        self.threads = None if torch.cuda.is_available() else max(1, pretraining.available_cores() // workers)
        self.stopped = Event()
        self.data = {}  # The digest of the runs' data, which is the same for all.
        # The largest budget is not searched with: that would cost as much as the rest of the ladder.
        self.searched = max(cell.budget for cell in cells) / 3

    def run(self) -> list[dict]:
        """A record of every cell."""
        sizes = {}
        for cell in self.cells:
            sizes.setdefault((cell.size, cell.family), []).append(cell)
        rates: dict[str, Future] = {}
        futures = []
        with tqdm(total=len(self.cells), desc="Budgets spent") as bar, ThreadPoolExecutor(self.workers) as workers:
            # The small sizes first: one that has the largest budgets only takes the rate of the one before it.
            for size, family in sorted(sizes):
                rates[family] = workers.submit(self._size, sizes[size, family], rates.get(family), bar.update)
                futures.append(rates[family])
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopped.set()
                workers.shutdown(cancel_futures=True)
                raise
        records = [record for future in futures for record in future.result()["records"]]
        return sorted(records, key=lambda record: (list(FAMILIES).index(record["family"]), record["operations"]))

    def _size(self, cells: list[Cell], smaller: Future | None, done: Callable) -> dict:
        """The cells of one size of one family, the smallest budget first, and its learning rate."""
        rate, records = None, []
        for cell in cells:
            if cell.budget > self.searched:
                rate = smaller.result()["rate"] if rate is None else rate
                tried = {rate: self._train(cell, rate)}
            else:
                tried = self._search(cell, FIRST_RATE if rate is None else rate)
            rate = best_rate(tried)
            records.append(self._record(cell, rate, tried))
            done()
        return {"rate": rate, "records": records}

    def _search(self, cell: Cell, rate: float) -> dict[float, PretrainingRun | None]:
        """Runs with this learning rate, and with half and twice the best until they are no better."""
        tried = {rate: self._train(cell, rate)}
        while True:
            best = best_rate(tried)
            missing = [rate for rate in (best / 2, best * 2) if rate not in tried]
            if not missing:
                return tried
            for rate in missing:
                tried[rate] = self._train(cell, rate)

    def _train(self, cell: Cell, rate: float) -> PretrainingRun | None:
        """None for a rate that is too high to end well."""
        if self.stopped.is_set():
            raise RuntimeError("another run has failed.")
        width, depth = cell.size
        folder = self.folder / "runs" / f"{cell.family}-{width}x{depth}-{cell.steps}-{rate:g}"
        arguments = ["--model_type", cell.family, "--config_overrides", overrides(cell.family, cell.size)]
        arguments += ["--max_train_steps", str(cell.steps), "--learning_rate", f"{rate:g}", *self.passed]
        try:
            run = pretrain(folder, arguments, self.threads)
        except RuntimeError as error:
            if "lower --learning_rate" in str(error):
                return None
            raise
        digest = run.training["data"].get("digest")  # None of a run of version 0.1.
        if digest is not None and self.data.setdefault("digest", digest) != digest:
            raise ValueError(f"{folder} holds a run with other data; move it away, or name another --output_dir.")
        return run

    def _record(self, cell: Cell, rate: float, tried: dict[float, PretrainingRun | None]) -> dict:
        run = tried[rate]
        tokens = run.training["steps"] * run.training["tokens_per_step"]
        epoch = run.training["data"]["training_tokens"]  # None of a stream.
        return {
            "family": cell.family,
            "hidden_size": cell.size[0],
            "num_hidden_layers": cell.size[1],
            "parameters": run.training["parameters"],
            "budget": cell.budget,
            "operations": cell.operations_per_token * tokens,
            "operations_per_token": cell.operations_per_token,
            "tokens": tokens,
            "learning_rate": rate,
            "nats_per_byte": run.nats_per_byte,
            "nats_per_byte_by_learning_rate": {
                f"{other:g}": tried[other] and tried[other].nats_per_byte for other in sorted(tried)
            },
            "epochs": tokens / epoch if epoch else None,
            "environment": run.environment(),
            "command": run.training["command"],
        }


def best_rate(tried: dict[float, PretrainingRun | None]) -> float:
    return min(tried, key=lambda rate: math.inf if tried[rate] is None else tried[rate].nats_per_byte)


# --- Fits -----------------------------------------------------------------------------------------------------------


def frontier(records: list[dict]) -> list[dict]:
    """The best run of every budget; `at_edge` where it is of the smallest or the largest size that was tried."""
    best = []
    for budget in sorted({record["budget"] for record in records}):
        runs = sorted((r for r in records if r["budget"] == budget), key=lambda record: record["operations_per_token"])
        chosen = min(runs, key=lambda record: record["nats_per_byte"])
        best.append(chosen | {"at_edge": chosen is runs[0] or chosen is runs[-1]})
    return best


def fit_power_law(records: list[dict]) -> dict:
    """loss = (scale / operations) ^ exponent, through the best run of every budget, by least squares of logarithms.

    The interval is that of 95% of the fits when the points' distances from the line are drawn anew.
    """
    operations, losses = np.log([[point["operations"], point["nats_per_byte"]] for point in frontier(records)]).T
    slope, offset = np.polyfit(operations, losses, 1)
    line = slope * operations + offset
    # As large as the errors are: a line of two parameters lies closer to its points than the truth does.
    errors = (losses - line) * math.sqrt(len(losses) / (len(losses) - 2))
    generator = np.random.default_rng(0)
    slopes = [np.polyfit(operations, line + generator.choice(errors, len(errors)), 1)[0] for _ in range(RESAMPLES)]
    interval = np.percentile(np.negative(slopes), [2.5, 97.5]).tolist()
    return {"exponent": -slope, "log_scale": offset / -slope, "interval": {"exponent": interval}}


def fit_parametric(records: list[dict], start: dict | None = None) -> dict:
    """loss = E + A / N^a + B / D^b over all runs, with N = operations per token / 6 and D tokens, as of arXiv
    2203.15556, approach 3: Huber's loss, of 1e-3, of the loss's logarithm.

    With operations = 6 N D best shared, what is above E falls as operations^-(a b / (a + b)) and N grows as
    operations^(b / (a + b)).
    """
    sizes = np.log([record["operations_per_token"] / 6 for record in records])
    tokens = np.log([record["tokens"] for record in records])
    losses = np.log([record["nats_per_byte"] for record in records])

    def residuals(values):
        log_e, log_a, a, log_b, b = values
        terms = np.stack([np.full_like(sizes, log_e), log_a - a * sizes, log_b - b * tokens])
        return np.logaddexp.reduce(terms) - losses

    starts = (
        [start["values"]]
        if start
        else [(e, x * 10, x, y * 10, y) for e in (-1, 0) for x in (0.2, 0.5) for y in (0.2, 0.5)]
    )
    bounds = [(-10, -10, 0.01, -10, 0.01), (2, 50, 3, 50, 3)]
    found = [least_squares(residuals, s, bounds=bounds, loss="huber", f_scale=1e-3, max_nfev=2000) for s in starts]
    best = min(found, key=lambda result: result.cost)
    log_e, _, a, _, b = best.x
    return {
        "exponent": a * b / (a + b),
        "size_exponent": b / (a + b),
        "irreducible": math.exp(log_e),
        "values": [float(value) for value in best.x],
    }


def fit(records: list[dict]) -> dict:
    """Both laws of one family.

    The parametric one has intervals of 95% of its fits when the runs are drawn anew, those of each budget among
    themselves. Every run has one seed: no interval knows of the noise of seeds.
    """
    parametric = fit_parametric(records)
    generator = np.random.default_rng(0)
    budgets = [[r for r in records if r["budget"] == budget] for budget in sorted({r["budget"] for r in records})]
    samples = []
    for _ in range(RESAMPLES):
        drawn = [runs[index] for runs in budgets for index in generator.integers(len(runs), size=len(runs))]
        samples.append(fit_parametric(drawn, parametric))
    parametric["interval"] = {
        name: np.percentile([sample[name] for sample in samples], [2.5, 97.5]).tolist()
        for name in ("exponent", "size_exponent", "irreducible")
    }
    return {"power_law": fit_power_law(records), "parametric": parametric}


# --- Results --------------------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """Markdown: the loss of every budget, and the fits."""
    frontiers = [frontier([run for run in results["runs"] if run["family"] == name]) for name in FAMILIES]
    losses = []
    for points in zip(*frontiers):
        best = min(point["nats_per_byte"] for point in points)
        row = [f"{points[0]['budget']:.1e}"]
        for point in points:
            bold = "**" if point["nats_per_byte"] == best else ""
            size = point["operations_per_token"] / 6
            edge = "\\*" if point["at_edge"] else ""
            loss = f"{bold}{point['nats_per_byte']:.3f}{bold}{edge}"
            row.append(f"{loss} ({size / 1e3:,.0f}, {point['tokens'] / size:.0f})")
        losses.append(row)
    figures = {
        "exponent of the loss": ("power_law", "exponent"),
        "exponent of the loss above the irreducible": ("parametric", "exponent"),
        "irreducible loss, nats per byte": ("parametric", "irreducible"),
        "exponent of the best size": ("parametric", "size_exponent"),
    }
    fits = []
    for title, (law, key) in figures.items():
        row = [title]
        for name in FAMILIES:
            found = results["fits"][name][law]
            low, high = found["interval"][key]
            row.append(f"{found[key]:.3f} ({low:.3f} to {high:.3f})")
        fits.append(row)
    epochs = [record["epochs"] for record in results["runs"] if record["epochs"] is not None]
    passes = f"The training text is read {max(epochs):.1f} times at most. " if epochs else ""
    return (
        "Held-out nats per byte of the best size at every amount of compute, with that size (a sixth of the operations "
        "per token, in thousands, about the number of its weights, and the tokens for each). An asterisk marks the "
        f"smallest or largest size that was tried: a better one may lie beyond. {passes}{results['environment']}.\n\n"
        f"{markdown_table(['operations', *FAMILIES.values()], losses)}\n"
        f"Fits, with 95% intervals of {RESAMPLES} bootstrap samples:\n\n"
        f"{markdown_table(['', *FAMILIES.values()], fits)}"
    )


def plot(results: dict, path: Path) -> None:
    """Loss against compute with the fits, and for each family the loss against size at every budget."""
    figure, axes = plt.subplot_mosaic(
        [["all", name] for name in FAMILIES], figsize=(11, 7), width_ratios=(2, 1), sharey=True
    )
    for name, title in FAMILIES.items():
        runs, color = [r for r in results["runs"] if r["family"] == name], COLORS[name]
        law = results["fits"][name]["power_law"]
        best = frontier(runs)
        operations = np.array([point["operations"] for point in best], dtype=float)
        losses = [point["nats_per_byte"] for point in best]
        axes["all"].scatter(
            [r["operations"] for r in runs], [r["nats_per_byte"] for r in runs], s=8, alpha=0.3, color=color
        )
        low, high = law["interval"]["exponent"]
        label = f"{title}: {law['exponent']:.3f} ({low:.3f} to {high:.3f})"
        axes["all"].plot(operations, losses, "o", color=color, label=label)
        wider = np.geomspace(operations[0] / 1.5, operations[-1] * 1.5)
        axes["all"].plot(wider, np.exp(law["exponent"] * (law["log_scale"] - np.log(wider))), "--", color=color)
        for budget in sorted({run["budget"] for run in runs}):
            curve = sorted((r["operations_per_token"] / 6, r["nats_per_byte"]) for r in runs if r["budget"] == budget)
            axes[name].plot(*zip(*curve), "o-", markersize=3, label=f"{budget:.0e}")
        axes[name].set(title=title, xscale="log")
        axes[name].xaxis.set_minor_formatter(NullFormatter())
        axes[name].grid(alpha=0.3)
    last = axes[list(FAMILIES)[-1]]
    last.set_xlabel("operations per token / 6")
    last.legend(title="operations", fontsize="x-small", title_fontsize="x-small", loc="lower left", ncols=3)
    axes["all"].set(xscale="log", yscale="log", xlabel="operations of training", ylabel="held-out nats per byte")
    axes["all"].set_title("Best size at every budget, and the power law's exponent")
    axes["all"].grid(alpha=0.3, which="both")
    axes["all"].legend()
    axes["all"].yaxis.set_minor_formatter(NullFormatter())
    axes["all"].yaxis.set_major_formatter(FormatStrFormatter("%.1f"))
    axes["all"].yaxis.set_major_locator(MaxNLocator(10))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    keep_freed_memory()
    # An abbreviated flag would be this script's or a passed one by what others there are.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    budget = number(above=0, below=1e30)
    parser.add_argument("--min_operations", type=budget, default=1e10, help="The smallest budget (default 1e10).")
    parser.add_argument("--max_operations", type=budget, default=3e12, help="The largest, about (default 3e12).")
    parser.add_argument("--output_dir", type=text, default="runs/scaling_law", help="Below the repository's root.")
    workers = 1 if torch.cuda.is_available() else pretraining.available_cores()
    parser.add_argument(
        "--workers",
        type=integer(at_least=1),
        default=workers,
        help="Runs at a time (default one per core; on a GPU, 1).",
    )
    args, passed = parser.parse_known_args()
    passed = [*DEFAULTS.split(), *passed]
    folder = ROOT / args.output_dir
    try:
        cells = plan(args, passed)
        records = Ladder(cells, Path(args.output_dir), passed, args.workers).run()
    except (ValueError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    fits = {name: fit([record for record in records if record["family"] == name]) for name in FAMILIES}
    environments = "; ".join(sorted({record["environment"] for record in records}))
    results = {"environment": environments, "runs": records, "fits": fits}
    with whole_files(folder) as partial:
        (partial / "scaling_law.json").write_text(json.dumps(results, indent=1) + "\n")
        (partial / "scaling_law.md").write_text(tables(results))
        plot(results, partial / "scaling_law.png")
    print(tables(results))


if __name__ == "__main__":
    main()
