"""The state of a run on disk: written whole or not at all, so that a kill at any moment loses one epoch at most."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdexport.checkpoint import load_strictly
from kdexport.core.files import write_bytes

_FILE = "resume.safetensors"
_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """``epoch`` epochs are done; ``history`` has one entry of metrics for each."""

    epoch: int
    history: tuple[dict[str, float], ...]


def save_state(
    directory: Path, task: nn.Module, optimizer: torch.optim.Optimizer, done: Resumed, extra: dict[str, Any]
) -> None:
    """Write weights, momentum and history as one safetensors file that appears by rename."""
    tensors = {f"task.{name}": value.detach().cpu().contiguous() for name, value in task.state_dict().items()}
    for name, parameter in task.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get(_MOMENTUM)
        if isinstance(buffer, Tensor):
            tensors[f"momentum.{name}"] = buffer.detach().cpu().contiguous()
    metadata = {"epoch": str(done.epoch), "history": json.dumps(done.history), "extra": json.dumps(extra)}
    # Written by Python, so that a full disk is an OSError like everywhere else.
    write_bytes(directory / _FILE, save(tensors, metadata=metadata))


def load_state(directory: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Resumed, dict[str, Any]]:
    """Restore what ``save_state`` wrote; nothing there means epoch 0."""
    path = directory / _FILE
    if not path.is_file():
        return Resumed(epoch=0, history=()), {}
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
    weights = {name.removeprefix("task."): value for name, value in tensors.items() if name.startswith("task.")}
    load_strictly(task, weights, str(path))
    for name, parameter in task.named_parameters():
        buffer = tensors.get(f"momentum.{name}")
        if buffer is not None:
            # Same memory layout as the parameter: sums in another order would end in other weights.
            like = torch.empty_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter][_MOMENTUM] = like.copy_(buffer)
    history = tuple(json.loads(metadata["history"]))
    return Resumed(epoch=int(metadata["epoch"]), history=history), json.loads(metadata["extra"])
