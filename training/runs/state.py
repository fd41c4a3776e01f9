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

#: The file of the state in the folder of a run.
STATE = "resume.safetensors"
#: Tensors of the state of an optimiser for each parameter, by their names in the file; files of SGD came first.
_OPTIMISER = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """The number of finished epochs, and the metrics of each."""

    epoch: int
    history: tuple[dict[str, float], ...]


def save_state(
    directory: Path,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: Resumed,
    extra: dict[str, Any],
    average: nn.Module | None = None,
) -> None:
    """Write weights, their mean if there is one, the state of the optimiser and the history atomically as one file."""
    tensors = {f"task.{name}": _plain(value) for name, value in task.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": _plain(value) for name, value in average.state_dict().items()}
    for name, parameter in task.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMISER.get(key, key)}.{name}"] = _plain(value)
    metadata = {"epoch": str(done.epoch), "history": json.dumps(done.history), "extra": json.dumps(extra)}
    # Written by Python, so that a full disk raises OSError as it does for all other files.
    write_bytes(directory / STATE, save(tensors, metadata=metadata))


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def load_state(
    directory: Path, task: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> tuple[Resumed, dict[str, Any]]:
    """Restore the state that ``save_state`` wrote; without one, the run starts at epoch 0.

    Raises ``CheckpointError`` for a file that is damaged, or is the state of another model.
    """
    path = directory / STATE
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
    load_strictly(task, _under("task.", tensors), str(path))
    if average is not None:
        load_strictly(average, _under("average.", tensors), str(path))
    for name, parameter in task.named_parameters():
        for key, stored in _OPTIMISER.items():
            buffer = tensors.get(f"{stored}.{name}")
            if buffer is not None:
                optimizer.state[parameter][key] = _like(parameter, buffer)
    return resumed, extra


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _like(parameter: Tensor, buffer: Tensor) -> Tensor:
    """``buffer`` where the parameter is, in its memory layout: sums in another order would give different weights."""
    if buffer.shape != parameter.shape:
        # The number of steps.
        return buffer.to(parameter.device)
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(buffer)
