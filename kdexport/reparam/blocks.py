"""Modules that carry parallel branches while a student is trained."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kdexport.errors import ConfigError
from kdexport.reparam.spec import MAX_BRANCHES, BranchSpec
from kdexport.students.student import Student

__all__ = ["BranchSpec", "ParallelBranches", "PooledAdapters", "attach_branches", "branches_path"]


class ParallelBranches(nn.Module):
    """The uniform mean of m linear branches that share one input: (N,C,H,W) to (N,C',H',W').

    Only the mean goes on through the network, so that training runs exactly what is exported.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) to the mean of what the branches write, (N,C',H',W')."""
        return torch.stack([cast(Tensor, branch(x)) for branch in self.branches]).mean(0)


class PooledAdapters(ParallelBranches):
    """Branches that write what the classifier pools; they fold through the pooling into it (placement R2)."""


def branches_path(student: Student, spec: BranchSpec) -> str:
    """The path of the ``ParallelBranches`` that ``attach_branches`` puts into ``student``."""
    return student.last_host[0] if spec.placement == "R1" else "adapter"


def attach_branches(student: Student, spec: BranchSpec) -> None:
    """Put training branches into ``student``, in place, with fresh weights by the student's own law.

    Raises ``ConfigError`` for a branch count outside 1..16 and for an R2 adapter without its channel count.
    """
    if not 1 <= spec.num_branches <= MAX_BRANCHES:
        raise ConfigError(
            f"{spec.num_branches} branches were asked for; 1 to {MAX_BRANCHES} are possible.",
            remedy="Set num_branches in [distiller] of the recipe; the paper's relatives use 3 to 8.",
        )
    if spec.placement == "R1":
        _replace_last_host(student, spec.num_branches)
    else:
        _append_adapters(student, spec)


def _replace_last_host(student: Student, count: int) -> None:
    conv_path, bn_path = student.last_host
    conv = cast(nn.Conv2d, student.get_submodule(conv_path))
    branches = []
    for _ in range(count):
        twin = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            cast(tuple[int, int], conv.padding),
            cast(tuple[int, int], conv.dilation),
            conv.groups,
            bias=False,
            padding_mode=conv.padding_mode,
        )
        student.init_branch(twin)
        branches.append(nn.Sequential(twin, nn.BatchNorm2d(conv.out_channels)))
    student.set_submodule(conv_path, ParallelBranches(branches))
    student.set_submodule(bn_path, nn.Identity())


def _append_adapters(student: Student, spec: BranchSpec) -> None:
    if spec.adapter_channels is None:
        raise ConfigError(
            "Placement R2 needs the number of channels that its adapters write.",
            remedy="It is the channel count of the teacher's feature; set adapter_channels.",
        )
    channels = student.taps[-1].channels
    branches = []
    for _ in range(spec.num_branches):
        conv = nn.Conv2d(channels, spec.adapter_channels, 1, bias=False)
        student.init_branch(conv)
        branches.append(nn.Sequential(conv, nn.BatchNorm2d(spec.adapter_channels)))
    student.adapter = PooledAdapters(branches)
    # The linear layer is replaced inside its own container, so that dropout before it stays.
    fresh = nn.Linear(spec.adapter_channels, student.num_classes)
    nn.init.normal_(fresh.weight, std=0.01)
    nn.init.zeros_(fresh.bias)
    student.set_submodule(student.classifier_path, fresh)
