"""Overhaul of feature distillation (Heo et al., 2019, OFD): features before their activation, above a margin.

The margin of each stage of the teacher is E[x | x < 0] of the input of its activation. It follows from the batch norm
that writes the pre-activation, which is found in the graph of the teacher. If a stage ends with a residual sum, that is
the last batch norm of the last block, as in the authors' code, although it writes only one summand. If no batch norm
writes the stage, as in a transformer, the margin is measured.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.students import Classifier, Student, Tapped
from training.devices import gathered
from training.distillers import DISTILLERS
from training.distillers.distiller import BranchFeatures, Distiller, StepContext
from training.distillers.pairs import StagePair, stage_pairs
from training.distillers.settings import OFDSettings
from training.losses import MIN_NEGATIVE_SHARE, RARE_MARGIN, overhaul_loss, overhaul_margin
from training.teachers import Teacher


class MarginMatch(nn.Module):
    """One pair of stages: a 1x1 convolution and a batch norm to the teacher's channels, and the teacher's margin (Ct,).

    The margin is NaN until it is known, so that the loss shows a missing calibration.
    """

    margin: Tensor

    def __init__(self, pair: StagePair) -> None:
        super().__init__()
        channels = pair.teacher.channels
        conv = nn.Conv2d(pair.student.channels, channels, 1, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2.0 / channels))
        self.connector = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.register_buffer("margin", torch.full((channels,), math.nan))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """The scalar loss of this stage from pre-activations (N,Cs,h,w) and (N,Ct,H,W)."""
        return overhaul_loss(self.connector(student_feature), teacher_feature, self.margin)


@DISTILLERS.register("ofd")
class OFD(Distiller):
    """Partial squared distance of pre-activations; each stage has half the weight of the next deeper one.

    Margins follow from the teacher's batch norms (``overhaul_margin``); ``calibrate`` measures those of other stages.
    The teacher stays in evaluation mode; the authors' code runs it in training mode, where its statistics drift.
    """

    settings: OFDSettings
    reads = frozenset(("preactivations",))
    reads_of_student = frozenset(("preactivations",))
    calibrates_by_share = True

    def __init__(self, *, settings: OFDSettings, student: Student, teacher: Teacher) -> None:
        super().__init__(settings=settings, student=student, teacher=teacher)
        self._pairs = stage_pairs(student, teacher)
        self.matches = nn.ModuleDict({pair.student.name: MarginMatch(pair) for pair in self._pairs})
        writers = writing_batch_norms(teacher)
        self._measured = tuple(pair for pair in self._pairs if pair.teacher.name not in writers)
        for pair in self._pairs:
            if pair.teacher.name in writers:
                batch_norm = cast(_BatchNorm, teacher.get_submodule(writers[pair.teacher.name]))
                self._match(pair).margin.copy_(overhaul_margin(batch_norm))

    def calibrate(self, teacher_taps: Iterable[Tapped]) -> None:
        if not self._measured:
            return
        totals: dict[StagePair, Tensor] = {}
        for taps in teacher_taps:
            for pair in self._measured:
                moments = channel_moments(taps.preactivations[pair.teacher.name])
                totals[pair] = totals[pair] + moments if pair in totals else moments
            # The features of this batch, before those of the next one are computed.
            del taps
        for pair, total in totals.items():
            self._match(pair).margin.copy_(measured_margin(gathered(total[None]).sum(0)))

    def forward(
        self,
        student: Tapped,
        branches: BranchFeatures,  # noqa: ARG002
        teacher: Tapped,
        step: StepContext,
    ) -> dict[str, Tensor]:
        losses = []
        for depth, pair in enumerate(reversed(self._pairs)):
            ours, theirs = student.preactivations[pair.student.name], teacher.preactivations[pair.teacher.name]
            losses.append(self._match(pair)(ours, theirs) / 2**depth)
        return {"ofd": self.scale(step) * torch.stack(losses).sum()}

    def _match(self, pair: StagePair) -> MarginMatch:
        return cast(MarginMatch, self.matches[pair.student.name])


def writing_batch_norms(network: Classifier) -> dict[str, str]:
    """The path of the batch norm that writes the pre-activation of each stage, by tap; stages without one are omitted.

    If a stage is a sum, it is the batch norm with the most operations before it: the end of the residual branch, not
    that of the shortcut. Only a copy of ``network`` on the meta device runs.
    """
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        return {}
    twin = copy.deepcopy(network).to("meta").eval().requires_grad_(True)
    written: dict[Node, str] = {}
    for path, module in twin.named_modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_hook(partial(_note, written, path))
    size = network.image_size
    with torch.enable_grad():
        tapped = twin.tapped(torch.zeros(1, 3, size, size, device="meta"))
    found = {}
    for tap in network.stages:
        summands = [node for node in _summands(tapped.preactivations[tap.name].grad_fn, written) if node in written]
        if summands:
            found[tap.name] = written[max(summands, key=_count_before)]
    return found


def _note(written: dict[Node, str], path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    # Read here: after an activation in place, the tensor belongs to another node.
    assert output.grad_fn is not None
    written[output.grad_fn] = path


def _summands(node: Node | None, ends: dict[Node, str]) -> Iterator[Node]:
    """The summands of ``node``; the node itself if it is not an addition."""
    pending = [node]
    while pending:
        node = pending.pop()
        if node is not None and node not in ends and node.name() == "AddBackward0":
            pending += [source for source, _ in node.next_functions]
        elif node is not None:
            yield node


def _count_before(node: Node) -> int:
    """The number of operations that ``node`` depends on."""
    seen, pending = {node}, [node]
    while pending:
        sources = {source for source, _ in pending.pop().next_functions if source is not None}
        pending += sources - seen
        seen |= sources
    return len(seen)


def channel_moments(batch: Tensor) -> Tensor:
    """Moments (5,C) of features (N,C,H,W), float64; their sum over batches is the input of ``measured_margin``.

    Rows are the count, the sum and the sum of squares of all values, and the count and the sum of the negative values.
    """
    values = batch.double().transpose(0, 1).flatten(1)
    counts = torch.full((len(values),), values.shape[1], dtype=torch.float64, device=values.device)
    negative = values.clamp(max=0)
    return torch.stack(
        [counts, values.sum(1), values.square().sum(1), (values < 0).sum(1, dtype=torch.float64), negative.sum(1)]
    )


def measured_margin(moments: Tensor) -> Tensor:
    """The mean of the negative values of each channel (C,), float64, from ``channel_moments`` (5,C).

    -3 standard deviations if at most a thousandth of the values is negative, as in ``overhaul_margin``.
    """
    count, plain, square, negative_count, negative = moments
    deviation = (square / count - (plain / count).square()).clamp(min=0).sqrt()
    return torch.where(negative_count > MIN_NEGATIVE_SHARE * count, negative / negative_count, -RARE_MARGIN * deviation)
