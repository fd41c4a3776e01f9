"""What several processes that train one network owe each other.

When a step is compiled, and how.
"""

import inspect
import shutil
from typing import Any, cast

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kdexport.errors import BackendUnavailableError, ConfigError


class BuffersStay(DistributedDataParallelKwargs):  # type: ignore[misc]
    """How a task is wrapped: gradients are exchanged at each step, buffers are not.

    Memories are equal in all processes by what they take in, and too large to be sent at each step. The statistics of a
    batch norm are each process's own; those that are evaluated, kept and exported are the first one's.
    """

    def to_kwargs(self) -> dict[str, Any]:
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        # The name in later versions of torch, which warn of the other one.
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return {**super().to_kwargs(), name: False}


def check_share(batch_size: int, processes: int) -> None:
    """Raise ``ConfigError`` where ``processes`` cannot share a batch evenly: their mean would not be that of images."""
    if batch_size % processes:
        fitting = max(batch_size - batch_size % processes, processes)
        raise ConfigError(
            f"train.batch_size = {batch_size} is not a multiple of the {processes} processes that share a batch.",
            remedy=f"Set train.batch_size={fitting}, or start another number of processes.",
        )


def gathered(rows: Tensor) -> Tensor:
    """(B,...) of each process to (W*B,...) of all, in the order of their ranks; itself where there is one process.

    B is the same everywhere. No gradient passes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    everyone = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.contiguous())
    return everyone


def compiled(module: nn.Module, asked: str, device: torch.device) -> nn.Module:
    """``module``, or its compiled form where ``asked`` is "yes", or "auto" on CUDA; weights and state are shared.

    Raises ``BackendUnavailableError`` where the CPU's code would need a C++ compiler that is not there.
    """
    if asked == "no" or (asked == "auto" and device.type != "cuda"):
        return module
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise BackendUnavailableError(
            "train.compile = 'yes' needs a C++ compiler on the CPU, and there is none.",
            remedy="Install g++, or set train.compile to 'auto'.",
        )
    # Shapes never change within a run.
    return cast(nn.Module, torch.compile(module, dynamic=False))
