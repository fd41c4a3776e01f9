"""The page of every student and teacher with numbers measured on the networks: ``python -m training architectures``."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from kdexport.core.tables import Table, markdown_table
from kdexport.errors import ConfigError, ReparamError
from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.spec import BranchSpec
from kdexport.students import STUDENTS, Classifier, Student
from training.teachers import TEACHERS

SIZES = (32, 224)
_CLASSES = 100
_ADAPTER_CHANNELS = 64
_HEADER = ("name", "input", "parameters", "MB fp32", "MACs", "conv / BN", "entries", "taps (channels@side)", "pooled")
_PAGE = """\
# Architectures

Written by `python -m training architectures --out docs/architectures.md`; every number is measured on the network,
with 100 classes. MACs are the multiply-accumulates of convolutions, linear layers and attention; entries are those of
the state_dict. Taps are ordered from shallow to deep: `stem`, `stage1`, ..., and `last` if there is a convolution
between the last stage and the pooling. Below 128 pixels a side the form for small images is built, otherwise that for
ImageNet. `network.tapped(images)` returns each tap after and before its activation, the pooled vector and the logits.

## Students

{students}

R1: stages whose last convolution and batch norm can be replaced by branches; any other convolution before a batch norm
can be given by its path. R2: taps after which adapters fold exactly into the plain student; at other taps they are
refused with the reason. A folded student has the operators and MACs of the plain one, without its batch norms.

## Teachers

{teachers}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network at one input size, with 100 classes; ``macs`` of convolutions, linear layers and attention."""

    name: str
    size: int
    parameters: int
    convolutions: int
    batch_norms: int
    entries: int
    macs: int
    taps: str
    pooled: int
    hosts: str = ""
    adapters: str = ""


def describe(network: Classifier, name: str) -> Row:
    """Measure ``network``, which may be on the meta device, at its image size."""
    size, device = network.image_size, next(network.parameters()).device
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tapped = network.tapped(torch.zeros(1, 3, size, size, device=device))
    features = ", ".join(f"{tap.channels}@{tapped.features[tap.name].shape[-1]}" for tap in network.taps)
    row = {
        "name": name,
        "size": size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "convolutions": sum(isinstance(m, nn.Conv2d) for m in network.modules()),
        "batch_norms": sum(isinstance(m, _BatchNorm) for m in network.modules()),
        "entries": len(network.state_dict()),
        "macs": counter.get_total_flops() // 2,
        "taps": features,
        "pooled": tapped.pooled.shape[1],
    }
    if isinstance(network, Student):
        row["hosts"] = ", ".join(host.tap for host in network.hosts)
        row["adapters"] = ", ".join(tap.name for tap in network.taps if takes_adapters(network, tap.name))
    return Row(**row)


def takes_adapters(student: Student, tap: str) -> bool:
    """Whether adapters after ``tap`` fold exactly into the plain student (placement R2)."""
    spec = BranchSpec(placement="R2", num_branches=2, layers=(tap,), adapter_channels=_ADAPTER_CHANNELS)
    try:
        attach_branches(copy.deepcopy(student), spec)
    except ReparamError:
        return False
    return True


def student_rows() -> list[Row]:
    """Every student at both sizes."""
    return [row for name in STUDENTS.names() for row in _at_sizes(STUDENTS.build, name)]


def teacher_rows() -> list[Row]:
    """Every teacher at the sizes that it accepts."""
    return [row for name in TEACHERS.names() for row in _at_sizes(TEACHERS.build, name)]


def _at_sizes(build: Callable[..., Classifier], name: str) -> Iterator[Row]:
    for size in SIZES:
        # Tensors of the meta device have shapes but no values: nothing is initialised or computed.
        with torch.device("meta"):
            try:
                network = build(name, num_classes=_CLASSES, image_size=size)
            except ConfigError:
                continue
            yield describe(network, name)


def markdown() -> str:
    """The page docs/architectures.md."""
    students = tuple((*_cells(row), row.hosts, row.adapters) for row in student_rows())
    teachers = tuple(map(_cells, teacher_rows()))
    return _PAGE.format(
        students="\n".join(markdown_table(Table(header=(*_HEADER, "R1", "R2"), rows=students))),
        teachers="\n".join(markdown_table(Table(header=_HEADER, rows=teachers))),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.size),
        f"{row.parameters:,}",
        f"{row.parameters * 4 / 1e6:.2f}",
        f"{row.macs / 1e6:,.2f}M",
        f"{row.convolutions} / {row.batch_norms}",
        str(row.entries),
        row.taps,
        str(row.pooled),
    )
