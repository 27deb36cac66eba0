# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Memory of a training step when each sequence is spread over several processes.

    python scripts/measure_context_parallel.py

takes a step of a small language model, forward and backward, on one sequence of every length, in one process and spread
over 2 and 4, and writes what each process needs for it at its peak to scripts/results/context_parallel.{json,md}. On
GPUs where there are enough of them, else on CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import transformers
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

from lrcssm_hf import LrcSSMConfig, LrcSSMForCausalLM  # noqa: E402
from markdown_table import markdown_table  # noqa: E402
from whole_files import write_whole  # noqa: E402


RESULTS = ROOT / "scripts" / "results"
CONFIG = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
RANKS = (1, 2, 4)
LENGTHS = (16_384, 65_536, 262_144)


def measure(ranks: int, length: int, device: str) -> dict:
    """Bytes that each of the processes needs for a step beyond what it had before, and the loss."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_step, args=(ranks, length, device, folder), nprocs=ranks)
        found = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(ranks)]
    return {
        "ranks": ranks,
        "length": length,
        "bytes": [each["bytes"] for each in found],
        "loss": sum(each["loss"] for each in found) / ranks,
    }


def _step(rank: int, ranks: int, length: int, device: str, folder: str) -> None:
    torch.set_num_threads(1)
    # gloo would otherwise look up the machine's name, which need not resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{folder}/rendezvous", world_size=ranks, rank=rank)
    group = dist.group.WORLD if ranks > 1 else None
    torch.manual_seed(0)
    model = LrcSSMForCausalLM(LrcSSMConfig(**CONFIG)).to(device).train()
    ids = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(1)).to(device)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids, context_parallel_group=group).loss
        loss.backward()
        return loss.item()

    step(ids[:, :64])  # Loads and compiles what there is to.
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    piece = slice(rank * length // ranks, (rank + 1) * length // ranks)
    loss = step(ids[:, piece])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_rss()
    (Path(folder) / str(rank)).write_text(json.dumps({"bytes": peak - before, "loss": loss}))
    dist.destroy_process_group()


def _peak_rss() -> int:
    import resource  # Not on Windows.

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def table(results: dict) -> str:
    """Markdown: the process that needs most, by length and number of processes."""
    found = {(run["length"], run["ranks"]): max(run["bytes"]) / 1e6 for run in results["runs"]}
    rows = []
    for length in LENGTHS:
        one = found[length, 1]
        cells = [f"{found[length, ranks]:,.0f} ({found[length, ranks] / one:.2f})" for ranks in RANKS]
        rows.append([f"{length:,}", *cells])
    header = ["steps", *("1 process" if ranks == 1 else f"{ranks} processes" for ranks in RANKS)]
    return (
        "Memory in MB of a training step (forward and backward) of one sequence, in the process that needs most; "
        f"{results['model']}; {results['environment']}.\n\n{markdown_table(header, rows)}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = "cuda" if torch.cuda.device_count() >= max(RANKS) else "cpu"
    runs = []
    for length in tqdm(LENGTHS, desc="Lengths"):
        of_length = [measure(ranks, length, device) for ranks in RANKS]
        losses = [run["loss"] for run in of_length]
        if max(losses) - min(losses) > 1e-5 * max(losses):
            raise RuntimeError(f"The losses of {length} steps differ: {losses}.")
        runs += of_length
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    size = LrcSSMForCausalLM(LrcSSMConfig(**CONFIG)).num_parameters()
    model = f"{CONFIG['num_hidden_layers']} layers of {CONFIG['hidden_size']} neurons, {size:,} parameters, float32"
    results = {"environment": f"{hardware}, {versions}", "model": model, "runs": runs}
    write_whole(RESULTS / "context_parallel.json", json.dumps(results, indent=1) + "\n")
    write_whole(RESULTS / "context_parallel.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
