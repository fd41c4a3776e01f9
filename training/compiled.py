"""When a step is compiled, and how."""

import shutil
from typing import cast

import torch
from torch import nn

from kdexport.errors import BackendUnavailableError


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
