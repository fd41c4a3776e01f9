"""The state of a run on disk, written atomically: a run that is killed loses at most one epoch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdexport.checkpoint import load_strictly
from kdexport.core.files import write_bytes
from kdexport.errors import CheckpointError

_FILE = "resume.safetensors"
_MOMENTUM = "momentum_buffer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """The number of finished epochs, and the metrics of each."""

    epoch: int
    history: tuple[dict[str, float], ...]


def save_state(
    directory: Path, task: nn.Module, optimizer: torch.optim.Optimizer, done: Resumed, extra: dict[str, Any]
) -> None:
    """Write weights, momentum and history as one safetensors file, atomically."""
    tensors = {f"task.{name}": value.detach().cpu().contiguous() for name, value in task.state_dict().items()}
    for name, parameter in task.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get(_MOMENTUM)
        if isinstance(buffer, Tensor):
            tensors[f"momentum.{name}"] = buffer.detach().cpu().contiguous()
    metadata = {"epoch": str(done.epoch), "history": json.dumps(done.history), "extra": json.dumps(extra)}
    # Written by Python, so that a full disk raises OSError as it does for all other files.
    write_bytes(directory / _FILE, save(tensors, metadata=metadata))


def load_state(directory: Path, task: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Resumed, dict[str, Any]]:
    """Restore the state that ``save_state`` wrote; without one, the run starts at epoch 0.

    Raises ``CheckpointError`` for a file that is damaged, or is the state of another model.
    """
    path = directory / _FILE
    if not path.is_file():
        return Resumed(epoch=0, history=()), {}
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118, not a mapping
        resumed = Resumed(epoch=int(metadata["epoch"]), history=tuple(json.loads(metadata["history"])))
        extra = dict(json.loads(metadata["extra"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({type(error).__name__}): the run cannot continue from it.",
            remedy=f"Copy the run folder from its source again, or remove {path} to train from the first epoch.",
        ) from error
    weights = {name.removeprefix("task."): value for name, value in tensors.items() if name.startswith("task.")}
    load_strictly(task, weights, str(path))
    for name, parameter in task.named_parameters():
        buffer = tensors.get(f"momentum.{name}")
        if buffer is not None:
            # The memory layout of the parameter: sums in another order would give different weights.
            like = torch.empty_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter][_MOMENTUM] = like.copy_(buffer)
    return resumed, extra
