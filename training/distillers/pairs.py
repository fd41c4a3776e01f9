"""Pairs of stages: which stage of a student learns from which stage of a teacher."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Classifier, Student, Tap


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two taps; ``student_channels`` are those of the host convolution, which may write only a part of its tap."""

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    student_stride: int
    teacher_stride: int


def paired_stages(student: Student, teacher: Classifier, layers: str) -> tuple[Pair, ...]:
    """Pairs from shallow to deep; "single" is the deepest pair, "multi" one for each stage of the shallower network.

    Stages are counted from the deep end, where both networks have the feature that is pooled. A convolution between the
    student's last stage and its pooling takes the place of that stage.
    """
    hosts = list(student.hosts)
    if hosts[-1].tap == "last" and len(hosts) > 1:
        del hosts[-2]
    teachers = teacher.stages
    count = 1 if layers == "single" else min(len(hosts), len(teachers))
    taps = {tap.name: tap for tap in student.taps}
    return tuple(
        Pair(
            student=host.tap,
            teacher=theirs.name,
            student_channels=cast(nn.Conv2d, student.get_submodule(host.conv)).out_channels,
            teacher_channels=theirs.channels,
            student_stride=taps[host.tap].stride,
            teacher_stride=theirs.stride,
        )
        for host, theirs in zip(hosts[-count:], teachers[-count:], strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePair:
    """The tap at the end of a stage of each network."""

    student: Tap
    teacher: Tap


def stage_pairs(student: Classifier, teacher: Classifier) -> tuple[StagePair, ...]:
    """Pairs from shallow to deep, one for each stage of the shallower network, counted from the deep end.

    The literature writes them as [1:]: without the stem, and without a convolution after the last stage.
    """
    count = min(len(student.stages), len(teacher.stages))
    taps = zip(student.stages[-count:], teacher.stages[-count:], strict=True)
    return tuple(StagePair(student=ours, teacher=theirs) for ours, theirs in taps)


def average_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average two maps (N,C,H,W), of any C, to one size: the smaller of both in each dimension."""
    side = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return functional.adaptive_avg_pool2d(a, side), functional.adaptive_avg_pool2d(b, side)


def pooled_width(network: Classifier) -> int:
    """The length D of the vector (N,D) that the classifier of ``network`` reads."""
    return cast(nn.Linear, network.get_submodule(network.classifier_path)).in_features
