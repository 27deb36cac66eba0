# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint holds: tensors in safetensors and all else in JSON, so that reading one runs no code.

Accelerate's own states are pickles. Some are read so that any code in them runs, among them all that is registered with
it and the index of sharded tensors.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter


SUFFIXES = (".json", ".safetensors")
STATE = "state.json"
# What AdamW remembers of a parameter; its count of steps is a scalar, the others are as large as the parameter.
OPTIMIZER_TENSORS = ("step", "exp_avg", "exp_avg_sq")


def require_known_sharing(accelerator: Accelerator) -> None:
    """Raises a `ValueError` where tensors are shared among processes in a way that is not written here."""
    kind = accelerator.distributed_type
    others = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if kind in others or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(
            f"Accelerate is configured for {kind.value}; share work by DDP or by FSDP with fsdp_version 2."
        )


def write_state(
    folder: Path,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    own: dict,
) -> None:
    """To be called by all processes, each of which writes its part; `own` is what JSON can hold, of the first one."""
    tensors = _model_tensors(accelerator, model) | _optimizer_tensors(accelerator, model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # to say that this is one process
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if accelerator.is_main_process:
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        (folder / STATE).write_text(json.dumps({"own": own, "scaler": scaler}))
    _random_file(folder, accelerator).write_text(json.dumps(_random_states(accelerator)))


def read_own(folder: Path) -> dict:
    """What was given as `own`.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return _read(folder / STATE)["own"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE} cannot be read: {error}") from error


def read_state(
    folder: Path, accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Sets what `write_state` has written, also by another number of processes; random numbers then begin anew.

    Raises:
        ValueError: it is of another model, or not as it was written.
    """
    try:
        _read_tensors(folder, accelerator, model, optimizer)
        scaler = _read(folder / STATE)["scaler"]
        if accelerator.scaler is not None and scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
        if _random_file(folder, accelerator).exists():
            _set_random_states(accelerator, _read(_random_file(folder, accelerator)))
    # Whatever it is that the libraries raise for what they cannot read; distributed checkpoints, no `Exception`.
    except (Exception, CheckpointException) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{folder} cannot be used: {reason[-1]}") from error


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- Tensors --------------------------------------------------------------------------------------------------------


def _model_tensors(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that layers share by the first of their names."""
    tensors = accelerator.unwrap_model(model).state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {f"model.{name}": tensors[name] for name in names.values()}


def _optimizer_tensors(accelerator: Accelerator, model, optimizer) -> dict[str, Tensor]:
    """Of the parameters that have been trained."""
    tensors = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        for key, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = tensor
    return tensors


def _read_tensors(folder: Path, accelerator: Accelerator, model, optimizer) -> None:
    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors, states = _model_tensors(accelerator, model), {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad and f"optimizer.{name}.step" in saved:
            # Sharded as the parameter is.
            like = torch.zeros((), device=parameter.device), torch.zeros_like(parameter), torch.zeros_like(parameter)
            states[parameter] = dict(zip(OPTIMIZER_TENSORS, like))
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in states[parameter].items()}
    if different := sorted(tensors.keys() ^ saved.keys()):
        raise ValueError(f"it is of another model, which differs in {different[0]}")
    for name, tensor in tensors.items():
        found = saved[name]
        if found.size != tensor.shape or found.properties.dtype != tensor.dtype:
            raise ValueError(
                f"it is of another model, in which {name} is {found.properties.dtype} of {tuple(found.size)}, not "
                f"{tensor.dtype} of {tuple(tensor.shape)}"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    optimizer.state.update(states)


# --- Random numbers -------------------------------------------------------------------------------------------------


def _random_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"random-{accelerator.process_index}-of-{accelerator.num_processes}.json"


def _random_states(accelerator: Accelerator) -> dict:
    _, keys, position, *gauss = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [keys.tolist(), position, *gauss]}
    states["torch"] = torch.get_rng_state().numpy().tobytes().hex()
    if accelerator.device.type != "cpu":
        states["device"] = torch.get_device_module(accelerator.device).get_rng_state().numpy().tobytes().hex()
    return states


def _set_random_states(accelerator: Accelerator, states: dict) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, *gauss = states["numpy"]
    if not 0 <= position <= len(keys):  # numpy would read beyond them.
        raise ValueError(f"numpy's random numbers have no place {position}")
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, *gauss))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if "device" in states and accelerator.device.type != "cpu":
        state = torch.frombuffer(bytearray.fromhex(states["device"]), dtype=torch.uint8)
        torch.get_device_module(accelerator.device).set_rng_state(state)
