"""Which stage of a student learns from which stage of a teacher."""

from dataclasses import dataclass
from typing import cast

from torch import nn

from kdexport.students import Classifier, Student


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two taps; ``student_channels`` are those of the student's host convolution, which may write a part of its tap."""

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    student_stride: int
    teacher_stride: int


def paired_stages(student: Student, teacher: Classifier, layers: str) -> tuple[Pair, ...]:
    """Pairs from shallow to deep; ``single`` is the deepest one, ``multi`` as many as the shallower network has stages.

    Stages are counted from the deep end, where both networks end in what their classifiers pool. A convolution between
    the student's last stage and its pooling stands for that stage.
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
