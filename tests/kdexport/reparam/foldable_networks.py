"""Modules to be folded: students with branches, and architectures that kdexport does not know."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.branches import Adapters, ParallelBranches
from kdexport.reparam.spec import BranchSpec, Placement
from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import randomize


def student(
    image_size: int = 32,
    *,
    placement: Placement | None = None,
    num_branches: int = 1,
    num_classes: int = 7,
    dtype: torch.dtype = torch.float64,
) -> Student:
    """A MobileNetV2 in evaluation mode, with branches where asked, and hostile batch norms."""
    net = STUDENTS.build("mobilenetv2", num_classes=num_classes, image_size=image_size)
    if placement is not None:
        channels = 24 if placement == "R2" else None
        attach_branches(net, BranchSpec(placement=placement, num_branches=num_branches, adapter_channels=channels))
    return cast(Student, randomize(net, seed=5).to(dtype).eval())


class Net(nn.Module):
    """A module of named parts whose forward pass is a function of the module and its input."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def hostile(net: nn.Module) -> nn.Module:
    return randomize(net.double().eval(), seed=9)


def pair(conv: nn.Module | None = None, batch_norm: nn.Module | None = None) -> Net:
    """A convolution and its batch norm, called ``conv`` and ``bn``."""
    return Net(
        lambda m, x: m.bn(m.conv(x)),
        conv=conv or nn.Conv2d(3, 5, 3, bias=False),
        bn=batch_norm or nn.BatchNorm2d(5),
    )


def branched(branches: Sequence[nn.Module]) -> Net:
    """A stem and parallel branches on its five channels, called ``parallel``."""
    return Net(
        lambda m, x: m.parallel(functional.relu(m.stem(x))),
        stem=nn.Conv2d(3, 5, 3),
        parallel=ParallelBranches(branches),
    )


def pool_to_one(x: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(x, 1)


def adapted(
    make_branch: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6)),
    head: Callable[[Net, Tensor], Tensor] = lambda m, x: m.classifier(torch.flatten(pool_to_one(x), 1)),
    **parts: nn.Module,
) -> Net:
    """A stem, two pooled adapters to six channels called ``adapter``, and a head that ends in ``classifier``."""
    return Net(
        lambda m, x: head(m, m.adapter(functional.relu(m.stem(x)))),
        stem=nn.Conv2d(3, 5, 3),
        adapter=Adapters([make_branch(), make_branch()]),
        classifier=nn.Linear(6, 4),
        **parts,
    )


class Residual(nn.Module):
    """A grouped, dilated residual network with a strided shortcut and a batch-normed linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2, padding_mode="reflect"), nn.BatchNorm2d(12, eps=1e-3))
        self.conv1 = nn.Conv2d(12, 24, 3, 2, 2, dilation=2, groups=4, bias=False)
        self.bn1 = nn.BatchNorm2d(24, eps=1e-2)
        self.conv2 = nn.Conv2d(24, 24, 3, 1, 1, groups=24, padding_mode="circular")
        self.bn2 = nn.BatchNorm2d(24, affine=False)
        self.shortcut = nn.Sequential(nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
        self.hidden, self.hidden_bn = nn.Linear(24, 10, bias=False), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        deep = self.bn2(self.conv2(functional.hardswish(self.bn1(self.conv1(x)))))
        x = functional.relu(deep + self.shortcut(x)).mean((2, 3))
        return cast(Tensor, self.head(functional.gelu(self.hidden_bn(self.hidden(x)))))
