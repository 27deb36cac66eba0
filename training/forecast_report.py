# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Tables and plots of forecasting runs, made from their `run.json` (forecast_series.py) alone."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib
import numpy as np

from run_records import read_record
from whole_files import whole_files, write_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RECORD = {
    "model": str, "settings": dict, "series": dict, "parameters": int, "validation_mse": float, "test": dict,
    "examples": list, "hardware": dict, "versions": dict, "command": str, "learning_rate": float | None,
    "seed": int | None, "period": int | None, "best_epoch": int, "seconds_per_epoch": float,
    "quantiles": list | None,
}  # fmt: skip


def read_run(folder: Path) -> dict | None:
    """A finished run; None where there is none. Raises a `ValueError` if its record is broken."""
    path = folder / "run.json"
    return read_record(path, RECORD) if path.is_file() else None


def best_rate(runs: list[dict]) -> float | None:
    """The learning rate of the best validation error among one seed's runs."""
    return min(runs, key=lambda run: run["validation_mse"])["learning_rate"]


def middle(quantiles: list[float]) -> int:
    """Which of the levels is nearest to the median's."""
    return min(range(len(quantiles)), key=lambda i: abs(quantiles[i] - 0.5))


class Results:
    """Runs by series, horizon and model; of every model those with its best learning rate, a run per seed."""

    def __init__(self, runs: list[dict]):
        self.runs: dict[tuple[str, int], dict[str, list[dict]]] = {}
        tried: dict[tuple, list[dict]] = {}
        for run in runs:
            key = run["series"]["name"], run["settings"]["prediction_length"], run["model"]
            tried.setdefault(key, []).append(run)
        for (name, horizon, model), group in sorted(tried.items()):
            by_seed: dict = {}
            for run in group:
                by_seed.setdefault(run["seed"], []).append(run)
            # The seed of which all rates were tried.
            rate = best_rate(max(by_seed.values(), key=len))
            chosen = [run for run in group if run["learning_rate"] == rate]
            self.runs.setdefault((name, horizon), {})[model] = sorted(chosen, key=lambda run: run["seed"] or 0)

    @classmethod
    def read(cls, folder: Path) -> Results:
        return cls([read_run(path.parent) for path in sorted(folder.glob("*/run.json"))])

    @property
    def models(self) -> list[str]:
        """In the order of their mean rank by squared error, the best first."""
        ranks: dict[str, list[int]] = {}
        for models in self.runs.values():
            for rank, model in enumerate(sorted(models, key=lambda model: mean_error(models[model], "mse"))):
                ranks.setdefault(model, []).append(rank)
        return sorted(ranks, key=lambda model: statistics.mean(ranks[model]))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.runs))

    def summary(self) -> list[dict]:
        """The numbers of the tables: an entry per series, horizon and model."""
        return [
            {
                "series": name,
                "horizon": horizon,
                "model": model,
                "mse": [run["test"]["mse"] for run in runs],
                "mae": [run["test"]["mae"] for run in runs],
                "validation_mse": [run["validation_mse"] for run in runs],
                "seeds": [run["seed"] for run in runs],
                "learning_rate": runs[0]["learning_rate"],
                "period": runs[0]["period"],
                "parameters": runs[0]["parameters"],
                "best_epoch": [run["best_epoch"] for run in runs],
                "seconds_per_epoch": statistics.median(run["seconds_per_epoch"] for run in runs),
                "command": runs[0]["command"],
            }
            for (name, horizon), models in self.runs.items()
            for model, runs in models.items()
        ]

    def tables(self) -> str:
        """Squared and absolute error, then sizes and times, as markdown."""
        first = next(iter(next(iter(self.runs.values())).values()))[0]
        versions = ", ".join(f"{library} {version}" for library, version in first["versions"].items())
        hardware = f"{first['hardware']['device']} ({first['hardware']['threads']} threads), {versions}"
        lines = []
        for error, title in (("mse", "Mean squared error"), ("mae", "Mean absolute error")):
            lines += [
                f"{title} of all forecasts of the test part, in standard deviations of the training part"
                f"{'' if error == 'mae' else ', squared'}; mean ± standard deviation over seeds, the best in bold.",
                "",
                *self._table(lambda models, model, error=error: _error_cell(models, model, error)),
                "",
            ]
        lines += [
            f"Parameters in thousands / seconds per epoch (median); {hardware}.",
            "",
            *self._table(lambda models, model: _cost_cell(models[model])),
        ]
        return "\n".join(lines) + "\n"

    def _table(self, cell) -> list[str]:
        models = self.models
        lines = [f"| series | horizon | {' | '.join(models)} |", "|---|---|" + "---|" * len(models)]
        for (name, horizon), known in self.runs.items():
            cells = [cell(known, model) if model in known else "" for model in models]
            lines.append(f"| {name} | {horizon} | {' | '.join(cells)} |")
        return lines

    def plot_forecasts(self, name: str, path: Path) -> None:
        """A row per horizon, a column per example: the first channel, in its unit, and the first seed's forecasts of
        LrcSSM and the two other models of the best rank."""
        rows = {horizon: models for (series, horizon), models in self.runs.items() if series == name}
        columns = max(len(runs[0]["examples"]) for models in rows.values() for runs in models.values())
        figure, axes = plt.subplots(
            len(rows), columns, figsize=(6 * columns, 3 * len(rows)), squeeze=False, layout="constrained"
        )
        for row, (horizon, models) in zip(axes, rows.items()):
            run = next(iter(models.values()))[0]
            for panel in row[len(run["examples"]) :]:
                panel.remove()
            for index, panel in enumerate(row[: len(run["examples"])]):
                for model in self._shown(models):
                    _plot_forecast(panel, models[model][0], index, self._style(model))
                _plot_truth(panel, run, index)
                panel.set_title(f"{horizon} steps ahead", fontsize="medium")
        figure.supylabel(run["series"]["channels"][0], fontsize="medium")
        figure.supxlabel(f"time ({run['series']['step']})", fontsize="medium")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8, title=name)
        _save(figure, path)

    def plot_errors(self, path: Path) -> None:
        """Squared error against the number of steps ahead: a row per series, a column per horizon."""
        rows = {name: [key for key in self.runs if key[0] == name] for name in self.names}
        columns = max(map(len, rows.values()))
        figure, axes = plt.subplots(
            len(rows), columns, figsize=(5.5 * columns, 3 * len(rows)), squeeze=False, layout="constrained"
        )
        for row, keys in zip(axes, rows.values()):
            for panel in row[len(keys) :]:
                panel.remove()
            for panel, (name, horizon) in zip(row, keys):
                models = self.runs[name, horizon]
                for model in [model for model in self.models if model in models]:
                    by_step = np.mean([run["test"]["mse_by_step"] for run in models[model]], axis=0)
                    panel.plot(np.arange(1, horizon + 1), by_step, label=model, **self._style(model))
                panel.set(yscale="log", title=f"{name}, {horizon} steps ahead")
                panel.grid(alpha=0.3)
        figure.supxlabel("steps ahead", fontsize="medium")
        figure.supylabel("mean squared error", fontsize="medium")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4 * columns)
        _save(figure, path)

    def _shown(self, models: dict[str, list[dict]]) -> list[str]:
        """What is drawn, the last on top."""
        others = [model for model in self.models if model in models and model != "lrcssm"][:2]
        return others[::-1] + [model for model in ("lrcssm",) if model in models]

    def _style(self, model: str) -> dict:
        """The same colour for a model in every plot; ours stands out."""
        if model == "lrcssm":
            return {"color": "C3", "linewidth": 2}
        if model == "seasonal-naive":
            return {"color": "0.6", "linewidth": 1, "linestyle": "--"}
        others = sorted(set(self.models) - {"lrcssm", "seasonal-naive"})
        colors = [f"C{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
        return {"color": colors[others.index(model) % len(colors)], "linewidth": 1}


def mean_error(runs: list[dict], error: str) -> float:
    return statistics.mean(run["test"][error] for run in runs)


def _error_cell(models: dict[str, list[dict]], model: str, error: str) -> str:
    values = [run["test"][error] for run in models[model]]
    shown, best = (f"{x:.4f}" for x in (statistics.mean(values), min(mean_error(r, error) for r in models.values())))
    if shown == best:
        shown = f"**{shown}**"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.4f}"


def _cost_cell(runs: list[dict]) -> str:
    if not runs[0]["parameters"]:
        return "0"
    seconds = statistics.median(run["seconds_per_epoch"] for run in runs)
    return f"{runs[0]['parameters'] / 1e3:.0f} / {seconds:.2f}"


def _plot_forecast(panel, run: dict, index: int, style: dict) -> None:
    """A line, or with quantiles a fan around their middle."""
    values = _in_units(run, run["examples"][index]["forecast"])
    steps = run["examples"][index]["start"] + np.arange(len(values))
    if run["quantiles"] is None:
        panel.plot(steps, values, label=run["model"], **style)
        return
    for low in range(len(run["quantiles"]) // 2):
        share = run["quantiles"][-1 - low] - run["quantiles"][low]
        label = f"{run['model']}, {share:.0%}"
        panel.fill_between(
            steps, values[:, low], values[:, -1 - low], color=style["color"], alpha=0.2, lw=0, label=label
        )
    panel.plot(steps, values[:, middle(run["quantiles"])], label=run["model"], **style)


def _plot_truth(panel, run: dict, index: int) -> None:
    example = run["examples"][index]
    truth, context = _in_units(run, example["truth"]), _in_units(run, example["context"])
    values = np.concatenate([context[-len(truth) :], truth])
    steps = example["start"] + len(truth) - len(values) + np.arange(len(values))
    panel.plot(steps, values, color="black", linewidth=1, label="truth")
    panel.axvline(example["start"], color="0.7", linewidth=0.8)
    panel.margins(x=0)


def _in_units(run: dict, values: list) -> np.ndarray:
    """The first channel of standardised values (T, C) or (T, C, Q), in the unit of the series."""
    return run["series"]["mean"][0] + run["series"]["std"][0] * np.asarray(values)[:, 0]


def _save(figure, path: Path) -> None:
    with whole_files(path.parent) as partial:
        figure.savefig(partial / path.name, dpi=130)
    plt.close(figure)


def write_report(folder: Path) -> str:
    """Of all runs in a folder `results.md`, `errors.png` and per series a plot of forecasts; returns the tables."""
    results = Results.read(folder)
    results.plot_errors(folder / "errors.png")
    for name in results.names:
        results.plot_forecasts(name, folder / f"forecast_{name}.png")
    tables = results.tables()
    write_whole(folder / "results.md", tables)
    return tables
