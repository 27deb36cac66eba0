# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a causal language model, by default a byte-level LrcSSM on the Python standard library's source.

    accelerate launch training/pretrain.py

Flags have the names and meanings of transformers' run_clm_no_trainer.py. `--output_dir` receives the model folder
(weights, configuration and, for an LrcSSM, its code; generation configuration, tokenizer), `metrics.jsonl`, `loss.png`
and `training.json`: the command, the data, what it ran on and how long.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import LoggerType, gather_object, set_seed
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    get_scheduler,
)

import lrcssm_hf
from arguments import integer, number, seed, text
from checkpoints import StopSignals, find_checkpoint, require_shared, save_checkpoint
from context_pieces import ContextPieces, add_context_argument
from cpu_processes import start_missing_processes
from evaluate import model_inputs, nats_per_token, use_compiled_mamba
from free_memory import keep_freed_memory
from lrcssm_hf.host import checkpoint_activations
from text_data import Blocks, add_data_arguments, load_blocks, load_pretrained, load_tokenizer
from token_blocks import check_vocabulary, vocabulary_size
from training_state import read_own, read_state, require_known_sharing, write_state
from whole_files import remove_partial, whole_files, write_whole


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# The model of a run without arguments: what reads Python best after five minutes on two CPU cores.
SMALL_MODEL = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 384}
DEFAULT_STEPS = 450
SNIPPET = "def mean(values):\n    if not values:\n        raise"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    # scaling_law.py looks for flags by their whole names.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    add_data_arguments(data)
    data.add_argument(
        "--max_eval_samples",
        type=integer(at_least=1),
        default=64,
        help="Held-out blocks per point of the curve; the last takes all.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_name_or_path", type=text, help="Continue from this model instead of starting from scratch."
    )
    model.add_argument("--model_type", type=known_model_type, help="Architecture of a new model (default lrcssm).")
    model.add_argument("--config_overrides", help='Of a new model, "hidden_size=256,num_hidden_layers=6".')
    model.add_argument(
        "--tokenizer_name", type=text, help="Tokenizer; by default the model's own, or one token per byte."
    )
    train = parser.add_argument_group("training")
    train.add_argument("--per_device_train_batch_size", type=integer(at_least=1), default=8)
    train.add_argument("--per_device_eval_batch_size", type=integer(at_least=1), default=16)
    train.add_argument("--gradient_accumulation_steps", type=integer(at_least=1), default=1)
    train.add_argument("--learning_rate", type=number(above=0), default=4e-3)
    train.add_argument(
        "--weight_decay", type=number(at_least=0), default=0.1, help="Of matrices; vectors do not decay."
    )
    train.add_argument("--max_grad_norm", type=number(above=0), default=1.0)
    length = train.add_mutually_exclusive_group()
    length.add_argument(
        "--max_train_steps", type=integer(at_least=1), help=f"Optimizer steps (default {DEFAULT_STEPS})."
    )
    length.add_argument("--num_train_epochs", type=number(above=0, below=1e9), help="Passes over the data.")
    # These want arguments of their own, or the loss.
    others = ("reduce_lr_on_plateau", "greedy", "cosine_warmup_with_min_lr")
    schedules = [schedule.value for schedule in SchedulerType if schedule.value not in others]
    train.add_argument("--lr_scheduler_type", default="cosine_with_min_lr", choices=schedules)
    train.add_argument("--num_warmup_steps", type=integer(at_least=0), help="By default 5% of the steps.")
    train.add_argument(
        "--eval_steps", type=integer(at_least=1), default=100, help="Steps between points of the validation curve."
    )
    train.add_argument("--gradient_checkpointing", action="store_true")
    add_context_argument(train)
    train.add_argument(
        "--peak_tflops", type=number(above=0), help="Of a device, to report the share of it that is used."
    )
    train.add_argument("--seed", type=seed, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=text, default="runs/lrcssm-python", help="Default runs/lrcssm-python.")
    output.add_argument(
        "--checkpointing_steps",
        type=steps_or_epoch,
        help="Save the training state every so many steps, or every 'epoch'.",
    )
    output.add_argument(
        "--save_total_limit", type=integer(at_least=1), default=3, help="Checkpoints to keep (default 3)."
    )
    output.add_argument(
        "--resume_from_checkpoint", type=text, help="A checkpoint folder, or 'latest', the last intact one."
    )
    output.add_argument("--with_tracking", action="store_true", help="Report to the trackers of --report_to.")
    output.add_argument("--report_to", choices=[str(kind) for kind in LoggerType], help="By default all.")
    output.add_argument("--push_to_hub", action="store_true", help="Upload the finished model.")
    output.add_argument("--hub_model_id", type=text, help="Where to; by default the folder's name in your namespace.")
    args = parser.parse_args(arguments)
    if args.num_train_epochs is None:
        args.max_train_steps = args.max_train_steps or DEFAULT_STEPS
        try:
            warmup_steps(args, args.max_train_steps)
        except ValueError as refused:
            parser.error(str(refused))
    if args.streaming and (args.num_train_epochs is not None or args.checkpointing_steps == "epoch"):
        parser.error("--streaming: a stream has no epochs; give --max_train_steps and --checkpointing_steps in steps.")
    for name in ("model_type", "config_overrides"):
        if args.model_name_or_path and getattr(args, name):
            parser.error(f"--{name} is for a new model; --model_name_or_path has its configuration.")
    if args.report_to and not args.with_tracking:
        parser.error("--report_to is for --with_tracking; give both or none.")
    if args.hub_model_id and not args.push_to_hub:
        parser.error("--hub_model_id is for --push_to_hub; give both or none.")
    args.model_type = args.model_type or "lrcssm"
    args.report_to = args.report_to or "all"
    return args


def known_model_type(name: str) -> str:
    if name not in CONFIG_MAPPING or CONFIG_MAPPING[name] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise argparse.ArgumentTypeError(f"must be a causal language model that transformers knows, got {name!r}")
    return name


def steps_or_epoch(word: str) -> int | str:
    if word == "epoch":
        return word
    if not word.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number or 'epoch', got {word!r}")
    return integer(at_least=1)(word)


def warmup_steps(args: argparse.Namespace, steps: int) -> int:
    """Of a run of so many steps; raises a `ValueError` if more are asked for."""
    if args.num_warmup_steps is None:
        return steps // 20
    if args.num_warmup_steps > steps:
        raise ValueError(
            f"--num_warmup_steps must be at most the number of steps, {steps}, got {args.num_warmup_steps}."
        )
    return args.num_warmup_steps


def make_folder(name: str) -> Path:
    """The output folder, proven to be writable before any work is done."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {name!r} cannot be written: {error}") from error
    return folder


def parse_overrides(model_type: str, overrides: str | None) -> dict:
    """The values of "hidden_size=256,num_hidden_layers=6", all of fields that this type of model declares.

    Raises:
        ValueError: something else stands there, or a field twice; the message names it.
    """
    configuration = type(AutoConfig.for_model(model_type))
    # Not those of every model, which say what transformers makes of it.
    every = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    known = {field.name: field.name for field in dataclasses.fields(configuration) if field.name not in every}
    known |= {alias: name for alias, name in configuration.attribute_map.items() if name in known}
    values = {}
    for item in overrides.split(",") if overrides else []:
        alias, _, value = (part.strip() for part in item.partition("="))
        if not alias or not value:
            raise ValueError(f"--config_overrides: {item!r} is not of the form name=value.")
        if alias not in known:
            nearest = "".join(f"; the nearest is {name!r}" for name in difflib.get_close_matches(alias, known, n=1))
            raise ValueError(f"--config_overrides: a {model_type} configuration has no {alias!r}{nearest}.")
        name = known[alias]
        if name in values:
            raise ValueError(f"--config_overrides: {alias!r} is given twice.")
        try:
            values[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            values[name] = value
    return values


def make_config(model_type: str, overrides: str | None, tokenizer) -> PreTrainedConfig:
    values = {**SMALL_MODEL} if model_type == "lrcssm" else {}
    values |= parse_overrides(model_type, overrides)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(model_type, **{"vocab_size": vocabulary_size(tokenizer), **tokens, **values})


def model_configuration(model: PreTrainedModel) -> dict:
    """What JSON can hold of a model's configuration but for what may differ between runs of the same model."""
    names = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
    fields = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in names}


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, adam_beta2: float = 0.95
) -> torch.optim.AdamW:
    """AdamW; the neurons' parameters, biases and norms are vectors and do not decay, nor do Mamba's rates, as its
    authors train it."""
    decaying, constant = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and not name.endswith("A_log")
            (decaying if decays else constant).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": constant, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, adam_beta2), fused=True)


def save_model(accelerator: Accelerator, model, tokenizer, description: dict, folder: Path) -> list[str]:
    """The model folder's files, each moved into place when all of them are written; returns their names, in the main
    process."""
    state_dict, names = accelerator.get_state_dict(model), []
    if accelerator.is_main_process:
        with whole_files(folder) as partial:
            accelerator.unwrap_model(model).save_pretrained(partial, state_dict=state_dict)
            tokenizer.save_pretrained(partial)
            (partial / "training.json").write_text(json.dumps(description, indent=2) + "\n")
            names = [path.name for path in partial.iterdir()]
    accelerator.wait_for_everyone()
    return names


class Metrics:
    """`metrics.jsonl`, a line per logged step, and its picture."""

    def __init__(self, folder: Path, resumed_step: int):
        self.path = folder / "metrics.jsonl"
        self.records = []
        if resumed_step and self.path.exists():
            for line in self.path.read_text().splitlines():
                # The interrupted run may have gone on after its checkpoint, and died while it wrote a line.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    record = json.loads(line)
                    if record["step"] <= resumed_step and "validation_nats_per_byte" not in record:
                        self.records.append(record)
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, **record) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def plot(self, title: str) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.2))
        for name, label, style in (("train_loss", "training", "-"), ("validation_loss", "held out", "o-")):
            points = [(r["tokens"] / 1e6, r[name]) for r in self.records if name in r]
            if points:
                axes.plot(*zip(*points), style, label=label, markersize=4)
        axes.set(xlabel="million training tokens", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=150, bbox_inches="tight")
        plt.close(figure)


class Inputs(NamedTuple):
    """What a run is made of, once everything that can be refused before training has been checked."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    blocks: Blocks
    repository: str | None


def prepare(args: argparse.Namespace, pieces: ContextPieces) -> Inputs:
    """Raises a `ValueError` (or what the libraries raise in its place) for anything that cannot be used."""
    folder = make_folder(args.output_dir)
    if args.model_name_or_path:
        source = "--model_name_or_path", args.model_name_or_path
        model = load_pretrained(*source, AutoModelForCausalLM)
        if args.tokenizer_name:
            tokenizer = load_tokenizer(args.tokenizer_name)
        else:
            tokenizer = load_pretrained(*source, AutoTokenizer)
        check_vocabulary(tokenizer, model.config.vocab_size)
    else:
        tokenizer = load_tokenizer(args.tokenizer_name)
        model = AutoModelForCausalLM.from_config(make_config(args.model_type, args.config_overrides, tokenizer))
    pieces.check(model, args.block_size)
    blocks = load_blocks(args, tokenizer, args.seed)
    repository = None
    if args.push_to_hub:
        repository = HfApi().create_repo(args.hub_model_id or folder.name, exist_ok=True).repo_id
    return Inputs(folder, tokenizer, model, blocks, repository)


class Training:
    """A run: model, optimizer, schedule and data under Accelerate, and how far it has come.

    What a checkpoint remembers beside tensors and random numbers are the attributes of `PROGRESS`, the place in a
    stream, and the settings and the model with which it can be used.
    """

    PROGRESS = ("step", "tokens", "seconds", "epoch", "batches", "skipped_steps", "loss_spikes", "usual_loss")
    # A loss stands out that is so many standard deviations above its running mean, when that is of enough steps.
    SPIKE, SETTLED, DECAY = 6, 100, 0.98
    SKIPPED_IN_A_ROW = 20  # and no further.

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pieces: ContextPieces,
        inputs: Inputs,
        checkpoint: Path | None,
    ):
        self.args, self.accelerator, self.pieces, self.folder = args, accelerator, pieces, inputs.folder
        blocks, batch_size = inputs.blocks, args.per_device_train_batch_size
        self.tokens_per_byte = blocks.tokens_per_byte
        self.stream = blocks.train if args.streaming else None
        loader = DataLoader(
            blocks.train,
            batch_size=batch_size,
            shuffle=not args.streaming,
            drop_last=not args.streaming and len(blocks.train) >= batch_size * pieces.num_readers,
            generator=torch.Generator().manual_seed(args.seed),
        )
        held_out = blocks.validation
        curve = Subset(held_out, range(min(args.max_eval_samples, len(held_out))))
        held_out_loader = DataLoader(held_out, batch_size=args.per_device_eval_batch_size)
        curve_loader = DataLoader(curve, batch_size=args.per_device_eval_batch_size)
        optimizer = make_optimizer(inputs.model, args.learning_rate, args.weight_decay)
        self.model, self.optimizer = accelerator.prepare(inputs.model, optimizer)
        self.loader, self.held_out, self.curve = map(pieces.prepare, (loader, held_out_loader, curve_loader))
        self.steps_per_epoch = None
        if not args.streaming:
            self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.last_step = args.max_train_steps or math.ceil(args.num_train_epochs * self.steps_per_epoch)
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=warmup_steps(args, self.last_step),
            num_training_steps=self.last_step,
            scheduler_specific_kwargs={
                "cosine_with_min_lr": {"min_lr_rate": 0.05},
                "warmup_stable_decay": {"num_decay_steps": self.last_step // 5},
            }.get(args.lr_scheduler_type),
        )
        self.sequences_per_batch = batch_size * pieces.num_readers
        self.tokens_per_step = self.sequences_per_batch * args.gradient_accumulation_steps * args.block_size
        # On which the data, their order and the count of their batches depend.
        names = ("block_size", "streaming", "seed", "gradient_accumulation_steps")
        self.settings = {
            **{name: getattr(args, name) for name in names},
            "sequences_per_batch": self.sequences_per_batch,
            "training_blocks": None if args.streaming else len(blocks.train),
            "data_digest": blocks.digest,
        }
        self.configuration = model_configuration(inputs.model)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.epoch, self.batches = 0, 0  # How many batches of this epoch, or of the stream, have been read.
        self.skipped_steps, self.loss_spikes, self.usual_loss = 0, 0, (0.0, 0.0)
        if checkpoint is not None:
            self.set_progress(checkpoint)
            read_state(checkpoint, accelerator, self.model, self.optimizer)
            accelerator.print(f"Going on from {checkpoint}.")
        self.metrics = None
        if accelerator.is_main_process:
            remove_partial(self.folder)
            self.metrics = Metrics(self.folder, self.step)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        size = "a stream of"
        if not args.streaming:
            size = f"{len(blocks.train) * args.block_size / 1e6:.1f} M"
        accelerator.print(
            f"{self.parameters / 1e6:.2f} M parameters, {size} training tokens, {self.last_step} steps of "
            f"{self.tokens_per_step:,} tokens on {accelerator.num_processes} x {accelerator.device.type} "
            f"({torch.get_num_threads()} threads)"
        )

    def write(self, folder: Path) -> None:
        """Fills a checkpoint."""
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        place = None if self.stream is None else self.stream.place(self.batches * self.sequences_per_batch)
        own = {"settings": self.settings, "configuration": self.configuration, "progress": progress, "place": place}
        write_state(folder, self.accelerator, self.model, self.optimizer, own)

    def set_progress(self, checkpoint: Path) -> None:
        """Goes to where the checkpoint was written; raises a `ValueError` unless that is of this model and data."""
        own = read_own(checkpoint)
        try:
            settings, configuration = own["settings"], own["configuration"]
            for name, value in self.settings.items():
                if settings.get(name) != value:
                    why = "its place in the data would be another"
                    if name == "data_digest":
                        why = "other text, tokenizer or revision; give the same, or start anew without "
                        why += "--resume_from_checkpoint"
                    raise ValueError(f"{checkpoint} is of a run with {name}={settings.get(name)}, not {value}: {why}.")
            # A later release of transformers may have fields that the checkpoint's had not.
            for name in self.configuration.keys() & configuration.keys():
                if configuration[name] != self.configuration[name]:
                    raise ValueError(
                        f"{checkpoint} is of a model with {name}={configuration[name]!r}, not "
                        f"{self.configuration[name]!r}."
                    )
            for name in self.PROGRESS:
                value, start = own["progress"][name], getattr(self, name)
                if not _is_like(value, start):
                    raise TypeError(f"{name} cannot be {value!r}")
                setattr(self, name, tuple(value) if isinstance(start, tuple) else value)
            if self.stream is not None:
                self.stream.go_to(own["place"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{checkpoint} is not what a run wrote: {error!r}") from error
        # The rates are this command's, and the schedule's at this step.
        self.scheduler.load_state_dict({"last_epoch": self.step - 1, "_step_count": self.step + 1, "lr_lambdas": []})
        self.scheduler.step()

    def run(self, stop: StopSignals) -> signal.Signals | None:
        """The steps that are left, with the curve, the progress bar and the checkpoints. SIGTERM and Ctrl-C end it
        after the step at hand, with a checkpoint; returns which it was.

        Raises:
            ValueError: the loss is not finite.
            OSError: a file could not be written.
        """
        args, accelerator = self.args, self.accelerator
        losses = []  # of the steps since the last look at them
        start = time.perf_counter() - self.seconds
        self.model.train()
        bar = tqdm(total=self.last_step, initial=self.step, desc="Training", disable=not accelerator.is_main_process)
        with bar:
            for loss in self.steps():
                learning_rate = self.scheduler.get_last_lr()[0]
                self.scheduler.step()
                self.step += 1
                bar.update()
                loss, stops = self.agree(loss, stop.received is not None)
                if not math.isfinite(loss):
                    raise ValueError(f"The loss is {loss} at step {self.step}; lower --learning_rate.")
                self.watch(loss)
                losses.append(loss)
                is_last = self.step == self.last_step
                # Who stops a run does not wait for long.
                evaluate = self.step % args.eval_steps == 0 and not is_last and not stops
                save = stops or is_multiple(self.step, args.checkpointing_steps, self.steps_per_epoch)
                if self.step % 10 == 0 or evaluate or save or is_last:
                    self.seconds = time.perf_counter() - start
                    self.log(bar, statistics.fmean(losses), learning_rate, evaluate)
                    losses.clear()
                if save:
                    save_checkpoint(accelerator, self.folder, self.step, args.save_total_limit, self.write)
                if stops:
                    return stop.received or signal.SIGTERM
                if is_last:
                    return None
        return None

    def steps(self) -> Iterator[Tensor]:
        """Optimizer steps, as many as are asked for; the mean loss of each in this process. One whose gradients are not
        finite is left out, and counted."""
        if self.step >= self.last_step:
            return
        args, accelerator = self.args, self.accelerator
        losses, in_a_row = [], 0
        for batch in self.read_batches():
            inputs = model_inputs(accelerator.unwrap_model(self.model), batch, self.pieces)
            with accelerator.accumulate(self.model):
                loss = self.model(**inputs, labels=inputs["input_ids"]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
                    is_finite = norm is None or bool(norm.isfinite())
                    # In float16 the scaler leaves such a step out by itself, and lowers its scale.
                    if is_finite or accelerator.scaler is not None:
                        self.optimizer.step()
                    in_a_row = 0 if is_finite else in_a_row + 1
                    self.skipped_steps += not is_finite
                self.optimizer.zero_grad()
            losses.append(loss.detach().float())
            self.tokens += batch["input_ids"].numel() * self.pieces.num_readers
            if accelerator.sync_gradients:
                yield torch.stack(losses).mean()
                losses.clear()
            if in_a_row == self.SKIPPED_IN_A_ROW:
                raise ValueError(
                    f"The gradients of {in_a_row} steps up to {self.step} were not finite; lower --learning_rate."
                )

    def read_batches(self) -> Iterator[dict[str, Tensor]]:
        """Batches from where the run is, epoch after epoch."""
        loader = self.loader
        if self.batches and self.stream is None:
            loader = self.accelerator.skip_first_batches(self.loader, self.batches)
        while True:
            loader.set_epoch(self.epoch)
            batches = iter(loader)
            # An iterator draws a seed when it begins, which a run that was not interrupted does at another time.
            with torch.random.fork_rng(devices=[]):
                first = next(batches, None)
            for batch in itertools.chain([] if first is None else [first], batches):
                self.batches += 1
                if self.stream is not None:
                    self.stream.place(self.batches * self.sequences_per_batch)  # It may forget what was before.
                yield batch
            self.epoch, self.batches, loader = self.epoch + 1, 0, self.loader

    def agree(self, loss: Tensor, stops: bool) -> tuple[float, bool]:
        """The mean loss over all processes, and whether any of them is to stop."""
        told = torch.stack([loss, torch.full_like(loss, stops)])
        loss, stops = self.accelerator.reduce(told, reduction="mean").tolist()
        return loss, stops > 0

    def watch(self, loss: float) -> None:
        """Counts a loss that stands out from those before it."""
        mean, variance = self.usual_loss
        if self.step > self.SETTLED and loss > mean + self.SPIKE * math.sqrt(variance):
            self.loss_spikes += 1
        rest = max(1 - self.DECAY, 1 / self.step)
        self.usual_loss = mean + rest * (loss - mean), (1 - rest) * (variance + rest * (loss - mean) ** 2)

    def log(self, bar: tqdm, loss: float, learning_rate: float, evaluate: bool) -> None:
        """A record of metrics, to the file, the trackers and the progress bar."""
        rate = self.tokens / self.seconds
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": loss,
            "learning_rate": learning_rate,
            "tokens_per_second": rate,
            "loss_spikes": self.loss_spikes,
            "skipped_steps": self.skipped_steps,
        }
        shown = {"loss": f"{loss:.3f}", "tokens_per_s": f"{rate:,.0f}"}
        if self.args.peak_tflops is not None:
            # 6 operations for every parameter and token, forward and backward (arXiv 2001.08361).
            used = 6 * self.parameters * rate / self.accelerator.num_processes
            record["model_flop_utilisation"] = used / (self.args.peak_tflops * 1e12)
            shown["mfu"] = f"{record['model_flop_utilisation']:.1%}"
        shown |= {name: getattr(self, name) for name in ("loss_spikes", "skipped_steps") if getattr(self, name)}
        bar.set_postfix(shown)
        if evaluate:
            record["validation_loss"] = nats_per_token(self.model, self.curve, self.accelerator, self.pieces)
        self.accelerator.log(record, step=self.step)
        if self.metrics is not None:
            self.metrics.add(**record)

    def finish(self) -> float:
        """Measures the whole held-out text, writes the last record and the picture; returns nats per byte."""
        loss = nats_per_token(self.model, self.held_out, self.accelerator, self.pieces, progress=True)
        nats_per_byte = loss * self.tokens_per_byte
        if self.metrics is not None:
            self.metrics.add(
                step=self.step,
                tokens=self.tokens,
                validation_loss=loss,
                validation_nats_per_byte=nats_per_byte,
            )
            self.metrics.plot(f"{self.parameters / 1e6:.2f} M parameters, held out {nats_per_byte:.3f} nats per byte")
        return nats_per_byte

    def describe(self, arguments: list[str], blocks: Blocks) -> dict:
        """`training.json`: what a reader needs to judge the run and to repeat it."""
        args, accelerator = self.args, self.accelerator
        launch = ["accelerate", "launch"]
        if accelerator.num_processes > 1:
            launch += ["--num_processes", str(accelerator.num_processes)]
            launch += ["--cpu"] if accelerator.device.type == "cpu" else []
        if accelerator.mixed_precision != "no":
            launch += ["--mixed_precision", accelerator.mixed_precision]
        dataset = None
        if uses_default_data(args):
            source = f"the standard library of Python {platform.python_version()}"
        elif args.dataset_name is not None:
            # A local folder is nobody else's, and its path nobody's business.
            is_local = Path(args.dataset_name).exists()
            name = Path(args.dataset_name).name if is_local else args.dataset_name
            dataset, source = None if is_local else name, " ".join(filter(None, [name, args.dataset_config_name]))
        else:
            source = Path(args.train_file).name
        return {
            "command": shlex.join([*launch, "training/pretrain.py", *arguments]),
            "data": {
                "source": source,
                "dataset": dataset,
                "digest": blocks.digest,
                "language": "code" if uses_default_data(args) else None,
                "training_tokens": None if args.streaming else len(blocks.train) * args.block_size,
                "held_out_tokens": len(blocks.validation) * args.block_size,
                "block_size": args.block_size,
            },
            "parameters": self.parameters,
            "steps": self.step,
            "tokens_per_step": self.tokens_per_step,
            "seconds": round(self.seconds, 1),
            **describe_environment(accelerator),
        }


def _is_like(value: object, example: int | float | tuple) -> bool:
    """Whether what JSON holds is of the example's kind, finite and not negative; a list is for a tuple."""
    if isinstance(example, tuple):
        return type(value) is list and len(value) == len(example) and all(map(_is_like, value, example))
    return type(value) is type(example) and 0 <= value < 2**63


def describe_environment(accelerator: Accelerator) -> dict:
    """What a run was computed with: its `hardware` and the `versions` of the libraries."""
    is_gpu = accelerator.device.type == "cuda"
    return {
        "hardware": {
            "device": torch.cuda.get_device_name() if is_gpu else accelerator.device.type.upper(),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "precision": accelerator.mixed_precision,
        },
        "versions": {
            "lrcssm_hf": lrcssm_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
    }


def uses_default_data(args: argparse.Namespace) -> bool:
    return args.dataset_name is None and args.train_file is None


def is_multiple(step: int, every: int | str | None, steps_per_epoch: int) -> bool:
    """Whether a checkpoint is due: every so many steps, or at the end of every "epoch"."""
    every = steps_per_epoch if every == "epoch" else every
    return every is not None and step % every == 0


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_all_cores() -> None:
    """`accelerate launch` and `torchrun` allow a CPU process a single thread unless they are told otherwise; share out
    all cores. Without them, OMP_NUM_THREADS is the user's word."""
    threads = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if torch.get_num_threads() == 1 and threads > 1 and (is_launched or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> None:
    keep_freed_memory()
    args = parse_args(arguments)
    error = None
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to if args.with_tracking else None,
            project_dir=args.output_dir,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
    except ValueError as refused:
        print(f"error: {refused}", file=sys.stderr)
        raise SystemExit(2) from None
    set_seed(args.seed)
    if accelerator.device.type == "cpu":
        use_all_cores()
    checkpoint = None
    try:
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > accelerator.num_processes:
            # Each would train on its own, into the same folder.
            raise ValueError(
                f"This is one of {started} processes, which do not find each other without a GPU for each; on CPUs, "
                "add --cpu to `accelerate launch`, or set ACCELERATE_USE_CPU=true."
            )
        if args.with_tracking and not accelerator.log_with:
            raise ValueError(
                f"--with_tracking: no tracker of --report_to {args.report_to} is installed; trackio and tensorboard "
                "come with `pip install -e '.[train]'`."
            )
        require_known_sharing(accelerator)
        pieces = ContextPieces(accelerator, args.context_parallel_size)
        if args.resume_from_checkpoint:
            checkpoint = find_checkpoint(accelerator, Path(args.output_dir), args.resume_from_checkpoint)
    except ValueError as refused:
        error = refused
    # One process downloads, the others read its cache. All of them leave together, also when there is nothing to do.
    with accelerator.main_process_first():
        try:
            inputs = None if error else prepare(args, pieces)
        except (ValueError, OSError, StrictDataclassError) as refused:
            error = refused
    error = next((each for each in gather_object([None if error is None else str(error)]) if each), None)
    if error is None:
        try:
            require_shared(accelerator, inputs.folder)
        except (ValueError, OSError) as refused:
            error = refused
    if error is not None:
        accelerator.print(f"error: {error}")
        accelerator.end_training()
        raise SystemExit(2)
    # Processes drop out other neurons; their models are the same already.
    set_seed(args.seed, device_specific=True)
    use_compiled_mamba(inputs.model, accelerator)
    if args.gradient_checkpointing:
        checkpoint_activations(inputs.model)
    if args.with_tracking:
        accelerator.init_trackers("lrcssm-pretrain", config=vars(args))

    training = None
    try:
        training = Training(args, accelerator, pieces, inputs, checkpoint)
        # One that comes after the last step waits until the model is saved, too.
        with StopSignals() as stop:
            stopped = training.run(stop)
            if stopped is None:
                nats_per_byte = training.finish()
                description = training.describe(sys.argv[1:] if arguments is None else arguments, inputs.blocks)
                written = save_model(accelerator, training.model, inputs.tokenizer, description, inputs.folder)
    except (ValueError, OSError, SafetensorError) as failed:
        # In every process: it may have happened in one only.
        who = "" if accelerator.num_processes == 1 else f"process {accelerator.process_index}: "
        print(f"error: {who}{failed}\nCheckpoints in {inputs.folder} are as they were.", flush=True)
        accelerator.end_training()
        raise SystemExit(2 if training is None else 1) from None
    if stopped is not None:
        accelerator.print(
            f"Stopped by {stopped.name} after step {training.step}, which checkpoint-{training.step} holds: the same "
            "command with --resume_from_checkpoint latest goes on from there."
        )
        accelerator.end_training()
        raise SystemExit(128 + stopped)
    accelerator.end_training()
    if accelerator.is_main_process:
        if inputs.repository is not None:
            # What else lies in the folder is the user's.
            HfApi().upload_folder(
                repo_id=inputs.repository,
                folder_path=inputs.folder,
                allow_patterns=[*written, "metrics.jsonl", "loss.png"],
            )
        show(inputs.folder, nats_per_byte, default_data=uses_default_data(args))


def show(folder: Path, nats_per_byte: float, default_data: bool) -> None:
    """What the model writes, and how to load it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = SNIPPET if default_data else (tokenizer.bos_token or "")
    print(f"\nHeld out: {nats_per_byte:.3f} nats per byte. Model and {folder / 'loss.png'} written.")
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    if inputs.input_ids.shape[1]:
        ids = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=0.6, top_k=40)
        print(f"A continuation of {prompt!r}:\n\n{tokenizer.decode(ids[0], skip_special_tokens=True)}\n")
    print(
        "Load it with\n\n"
        "    import lrcssm_hf\n"
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"    model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"
    )


if __name__ == "__main__":
    start_missing_processes()
    main()
