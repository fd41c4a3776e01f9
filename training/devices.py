"""How training uses its devices: several processes that train one network, and compiled steps."""

import importlib
import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedDataParallelKwargs
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kdexport.errors import BackendUnavailableError, ConfigError

#: Compiled forms of one function in a process; a table of all recipes with three seeds has fewer cells.
_COMPILED_FORMS = 512


class LocalBuffers(DistributedDataParallelKwargs):  # type: ignore[misc]
    """Settings of DistributedDataParallel that exchange gradients at each step, but not buffers.

    Memories are too large to be sent at each step, and already equal in all processes, which all get the same
    updates. Batch norm statistics differ between them; those of the main process are evaluated, saved and exported.
    """

    def to_kwargs(self) -> dict[str, Any]:
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        # Later versions of torch renamed the argument and warn about the old name.
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return {**super().to_kwargs(), name: False}


def check_batch_size(batch_size: int, processes: int) -> None:
    """Raise ``ConfigError`` unless ``processes`` get equally many images of a batch.

    Otherwise the mean over processes would not be the mean over images.
    """
    if batch_size % processes:
        fitting = max(batch_size - batch_size % processes, processes)
        raise ConfigError(
            f"train.batch_size = {batch_size} cannot be divided evenly among {processes} processes.",
            remedy=f"Set train.batch_size={fitting}, or start a number of processes that divides {batch_size}.",
        )


def gathered(rows: Tensor) -> Tensor:
    """Concatenate (B,...) of each of W processes to (W*B,...), in the order of their ranks.

    B must be the same in all processes. A single process gets ``rows`` back. There is no gradient.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    collected = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(collected, rows.contiguous())
    return collected


def gathered_rows(columns: list[NDArray[Any]] | None) -> list[NDArray[Any]]:
    """Concatenate columns (n,) of all processes, which may have different lengths; None is a process without rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        if columns is None:
            raise ValueError("there are no rows")
        return columns
    collected: list[list[NDArray[Any]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(collected, columns)
    parts = [part for part in collected if part is not None]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


@contextmanager
def buffers_of_first_process(network: nn.Module) -> Iterator[None]:
    """Within the block all processes have the buffers of the first one: its batch norm statistics are exported."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    own = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(own[name])


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block a GPU multiplies float32 in float32; by default its convolutions are computed in TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def choose_kernels(device: torch.device, *, deterministic: bool) -> None:
    """On CUDA let cuDNN time its kernels and take the fastest, or take only kernels that give the same bits each time.

    On a CPU the kernels of torch give the same bits with the same number of threads, and nothing is set.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # cuBLAS reads it when a process multiplies for the first time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def nondeterminism_named() -> Iterator[None]:
    """Within the block an operation that has no deterministic kernel ends with a ``ConfigError`` that names it."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise ConfigError(
            f"train.deterministic = true, but {operation} has no deterministic kernel on CUDA.",
            remedy="Set train.deterministic to false, or choose a method or a student without this operation.",
        ) from error


def compiled(module: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """``module``, compiled if ``mode`` is "yes", or "auto" on CUDA; both forms share weights and state.

    Raises ``BackendUnavailableError`` if compiling for the CPU lacks a C++ compiler.
    """
    if mode == "no" or (mode == "auto" and device.type != "cuda"):
        return module
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise BackendUnavailableError(
            "train.compile = 'yes' needs a C++ compiler on the CPU, but neither g++ nor clang++ is installed.",
            remedy="Install g++, or set train.compile to 'auto'.",
        )
    # A process compiles 8 forms of one function by default and then runs it as it is: each cell of a table may be one.
    limits: Any = importlib.import_module("torch._dynamo.config")
    limits.recompile_limit = max(limits.recompile_limit, _COMPILED_FORMS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _COMPILED_FORMS)
    # Shapes never change within a run.
    return cast(nn.Module, torch.compile(module, dynamic=False))
