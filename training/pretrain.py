# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""Pretrain a causal language model, by default a byte-level LrcSSM on the Python standard library's source.

    accelerate launch training/pretrain.py

Flags have the names and meanings of transformers' run_clm_no_trainer.py. `--output_dir` receives the model folder
(weights, configuration, generation configuration, tokenizer), `metrics.jsonl` and `loss.png`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, default_data_collator, get_scheduler

import lrcssm_hf  # noqa: F401  registers the model
from cpu_processes import start_missing_processes
from evaluate import nats_per_token
from text_data import load_text, load_tokenizer, make_blocks


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# The model of a run without arguments: what reads Python best after five minutes on two CPU cores.
SMALL_MODEL = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 384}
SNIPPET = "def mean(values):\n    "


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Dataset on the Hub; by default the Python standard library's source.")
    data.add_argument("--dataset_config_name", help="Configuration of that dataset.")
    data.add_argument("--train_file", help="Text, JSON, CSV or Parquet file to train on instead.")
    data.add_argument("--validation_file", help="Held-out file; by default a share of the training texts.")
    data.add_argument("--validation_split_percentage", type=float, default=5, help="That share (default 5).")
    data.add_argument("--block_size", type=int, default=512, help="Tokens per training sequence (default 512).")
    data.add_argument("--max_eval_samples", type=int, default=64, help="Held-out blocks per point of the curve.")
    model = parser.add_argument_group("model")
    model.add_argument("--model_name_or_path", help="Continue from this model instead of starting from scratch.")
    model.add_argument("--model_type", default="lrcssm", help="Architecture of a new model (default lrcssm).")
    model.add_argument("--config_overrides", help='Of a new model, "hidden_size=256,num_hidden_layers=6".')
    model.add_argument("--tokenizer_name", help="Tokenizer; by default the model's own, or one token per byte.")
    train = parser.add_argument_group("training")
    train.add_argument("--per_device_train_batch_size", type=int, default=8)
    train.add_argument("--per_device_eval_batch_size", type=int, default=16)
    train.add_argument("--gradient_accumulation_steps", type=int, default=1)
    train.add_argument("--learning_rate", type=float, default=4e-3)
    train.add_argument("--weight_decay", type=float, default=0.1, help="Of matrices; vectors do not decay.")
    train.add_argument("--max_grad_norm", type=float, default=1.0)
    train.add_argument("--max_train_steps", type=int, help="Optimizer steps (default 600).")
    train.add_argument("--num_train_epochs", type=float, help="Passes over the data, instead of --max_train_steps.")
    train.add_argument("--lr_scheduler_type", default="cosine_with_min_lr")
    train.add_argument("--num_warmup_steps", type=int, help="By default 5% of the steps.")
    train.add_argument("--eval_steps", type=int, default=100, help="Steps between points of the validation curve.")
    train.add_argument("--gradient_checkpointing", action="store_true")
    train.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="runs/lrcssm-python", help="Default runs/lrcssm-python.")
    output.add_argument("--checkpointing_steps", type=int, help="Save the whole training state every so many steps.")
    output.add_argument("--resume_from_checkpoint", help="A checkpoint folder, or 'latest'.")
    output.add_argument("--with_tracking", action="store_true", help="Report to the trackers of --report_to.")
    output.add_argument("--report_to", default="all", help="all, tensorboard, wandb, trackio, ...")
    output.add_argument("--push_to_hub", action="store_true", help="Upload the finished model.")
    output.add_argument("--hub_model_id", help="Where to; by default the folder's name in your namespace.")
    args = parser.parse_args(arguments)
    counts = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_steps"]
    for name in [*counts, "max_eval_samples", "max_train_steps", "checkpointing_steps"]:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.block_size < 2:
        parser.error("--block_size must be at least 2: the first token of a block is not predicted.")
    if not 0 < args.validation_split_percentage < 100:
        parser.error(f"--validation_split_percentage must be in (0, 100), got {args.validation_split_percentage}.")
    if args.max_train_steps is not None and args.num_train_epochs is not None:
        parser.error("Give --max_train_steps or --num_train_epochs, not both.")
    if args.model_name_or_path and args.config_overrides:
        parser.error("--config_overrides is for a new model; --model_name_or_path has its configuration.")
    return args


def make_folder(name: str) -> Path:
    """The output folder, proven to be writable before any work is done."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {name!r} cannot be written: {error}") from error
    return folder


def make_config(model_type: str, overrides: str | None, tokenizer) -> transformers.PreTrainedConfig:
    values = {**SMALL_MODEL} if model_type == "lrcssm" else {}
    for item in filter(None, (overrides or "").split(",")):
        name, separator, text = item.partition("=")
        if not separator:
            raise ValueError(f"--config_overrides: {item!r} is not of the form name=value.")
        try:
            values[name.strip()] = ast.literal_eval(text.strip())
        except (SyntaxError, ValueError):
            values[name.strip()] = text.strip()
    known = AutoConfig.for_model(model_type)
    for name in values:
        if not hasattr(known, name):
            raise ValueError(f"--config_overrides: a {model_type} configuration has no {name!r}.")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **tokens, **values})


def make_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; the neurons' parameters, biases and norms are vectors and do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def find_checkpoint(folder: Path, name: str) -> Path:
    if name == "latest":
        checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
        if not checkpoints:
            raise ValueError(f"--resume_from_checkpoint latest: there is no checkpoint in {folder}.")
        return checkpoints[-1]
    path = Path(name)
    if not path.is_dir() or not path.name.split("-")[-1].isdigit():
        raise ValueError(f"--resume_from_checkpoint {name!r} is not a folder named checkpoint-STEP.")
    return path


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """The training state under a temporary name until it is whole."""
    partial, final = folder / f"partial-checkpoint-{step}", folder / f"checkpoint-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def save_model(accelerator: Accelerator, model, tokenizer, folder: Path) -> None:
    """The model folder's files, each moved into place when all of them are written."""
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            accelerator.unwrap_model(model).save_pretrained(partial, state_dict=state_dict)
            tokenizer.save_pretrained(partial)
            for path in Path(partial).iterdir():
                os.replace(path, folder / path.name)
    accelerator.wait_for_everyone()


class Metrics:
    """`metrics.jsonl`, a line per logged step, and its picture."""

    def __init__(self, folder: Path, resumed_step: int):
        self.path = folder / "metrics.jsonl"
        self.records = []
        if resumed_step and self.path.exists():
            records = map(json.loads, self.path.read_text().splitlines())
            self.records = [record for record in records if record["step"] <= resumed_step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

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


def prepare(args: argparse.Namespace):
    """Everything that can be refused before training: folder, tokenizer, configuration, data, repository."""
    folder = make_folder(args.output_dir)
    checkpoint = find_checkpoint(folder, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path)
    if args.model_name_or_path:
        try:
            model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model_name_or_path {args.model_name_or_path!r}: {error}") from error
        if model.config.vocab_size < len(tokenizer):
            raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}.")
    else:
        model = AutoModelForCausalLM.from_config(make_config(args.model_type, args.config_overrides, tokenizer))
    data = load_text(
        args.dataset_name,
        args.dataset_config_name,
        args.train_file,
        args.validation_file,
        args.validation_split_percentage,
    )
    blocks, tokens_per_byte = make_blocks(data, tokenizer, args.block_size)
    repository = None
    if args.push_to_hub:
        repository = HfApi().create_repo(args.hub_model_id or folder.name, exist_ok=True).repo_id
    return folder, checkpoint, tokenizer, model, blocks, tokens_per_byte, repository


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    set_seed(args.seed)
    try:
        # One process downloads and tokenizes, the others read its cache.
        with accelerator.main_process_first():
            folder, checkpoint, tokenizer, model, blocks, tokens_per_byte, repository = prepare(args)
    except ValueError as error:
        accelerator.print(f"error: {error}")
        raise SystemExit(2) from None
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    loader = DataLoader(
        blocks["train"],
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=len(blocks["train"]) >= args.per_device_train_batch_size * accelerator.num_processes,
        collate_fn=default_data_collator,
    )
    curve_blocks = blocks["validation"].select(range(min(args.max_eval_samples, len(blocks["validation"]))))
    curve_loader = DataLoader(curve_blocks, batch_size=args.per_device_eval_batch_size)
    validation_loader = DataLoader(blocks["validation"], batch_size=args.per_device_eval_batch_size)
    optimizer = make_optimizer(model, args.learning_rate, args.weight_decay)
    model, optimizer, loader, curve_loader, validation_loader = accelerator.prepare(
        model, optimizer, loader, curve_loader, validation_loader
    )
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or 600
    if args.num_train_epochs is not None:
        max_train_steps = max(1, math.ceil(args.num_train_epochs * steps_per_epoch))
    warmup = args.num_warmup_steps if args.num_warmup_steps is not None else max_train_steps // 20
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=max_train_steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.05} if args.lr_scheduler_type == "cosine_with_min_lr" else None,
    )
    accelerator.register_for_checkpointing(scheduler)
    if args.with_tracking:
        accelerator.init_trackers("lrcssm-pretrain", config=vars(args))

    step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        step = int(checkpoint.name.split("-")[-1])
    metrics = Metrics(folder, step) if accelerator.is_main_process else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    batch_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    tokens_per_step = batch_size * args.block_size
    accelerator.print(
        f"{parameters / 1e6:.2f} M parameters, {len(blocks['train']) * args.block_size / 1e6:.1f} M training tokens, "
        f"{max_train_steps} steps of {batch_size} x {args.block_size} tokens on {accelerator.num_processes} x "
        f"{accelerator.device.type}"
    )
    optimize(
        args,
        accelerator,
        model,
        optimizer,
        scheduler,
        loader,
        lambda: nats_per_token(model, curve_loader, accelerator),
        range(step, max_train_steps),
        tokens_per_step,
        metrics,
        folder,
    )

    loss = nats_per_token(model, validation_loader, accelerator, progress=True)
    if accelerator.is_main_process:
        metrics.add(
            step=max_train_steps,
            tokens=max_train_steps * tokens_per_step,
            validation_loss=loss,
            validation_nats_per_byte=loss * tokens_per_byte,
            validation_tokens=len(blocks["validation"]) * args.block_size,
        )
        metrics.plot(f"{parameters / 1e6:.2f} M parameters, held out {loss * tokens_per_byte:.3f} nats per byte")
    save_model(accelerator, model, tokenizer, folder)
    accelerator.end_training()
    if accelerator.is_main_process:
        if repository is not None:
            HfApi().upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["*checkpoint-*", ".cache*"])
        show(folder, loss * tokens_per_byte, default_data=args.dataset_name is None and args.train_file is None)


def optimize(
    args, accelerator, model, optimizer, scheduler, loader, held_out_loss, steps, tokens_per_step, metrics, folder
) -> None:
    """The optimizer steps of the range `steps`, with the curve, the progress bar and the checkpoints."""
    step, last = steps.start, steps.stop
    epoch, batches_done = divmod(step * args.gradient_accumulation_steps, len(loader))
    bar = tqdm(total=last, initial=step, desc="Training", disable=not accelerator.is_main_process)
    sums = torch.zeros(2, device=accelerator.device)  # of the losses since the last record, and their number
    start = time.perf_counter()
    model.train()
    while step < last:
        loader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, batches_done) if batches_done else loader
        epoch, batches_done = epoch + 1, 0
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            sums += torch.stack([loss.detach().float(), torch.ones_like(sums[0])])
            if not accelerator.sync_gradients:
                continue
            learning_rate = scheduler.get_last_lr()[0]
            scheduler.step()
            step += 1
            bar.update()
            evaluate = step % args.eval_steps == 0 and step < last
            if step % 10 == 0 or evaluate or step == last:
                total, count = accelerator.reduce(sums, reduction="sum").tolist()
                sums.zero_()
                if not math.isfinite(total):
                    raise SystemExit(f"error: the loss is {total} at step {step}; lower --learning_rate.")
                rate = (step - steps.start) * tokens_per_step / (time.perf_counter() - start)
                bar.set_postfix(loss=f"{total / count:.3f}", tokens_per_s=f"{rate:,.0f}")
                record = {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "train_loss": total / count,
                    "learning_rate": learning_rate,
                    "tokens_per_second": rate,
                }
                if evaluate:
                    record["validation_loss"] = held_out_loss()
                accelerator.log(record, step=step)
                if metrics is not None:
                    metrics.add(**record)
            if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, folder, step)
            if step == last:
                break
    bar.close()


def show(folder: Path, nats_per_byte: float, default_data: bool) -> None:
    """What the model writes, and how to load it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
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
