"""The overhaul of feature distillation, computed again in numpy from the text of the paper."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Stage, Tap
from tests.kdexport.hostile_values import noise
from tests.training.distillers.numpy_layers import array, averaged, bridged, parameter
from tests.training.distillers.stage_networks import (
    CLASSES,
    COUNT,
    SIZE,
    build,
    context,
    loss_of,
    random_outputs,
    random_teacher,
    shapes_of,
    small,
)
from tests.training.small_distillation import hostile, random_tapped, settings_of
from training.distillers import DISTILLERS
from training.distillers.ofd import channel_moments, measured_margin, writing_batch_norms
from training.teachers import Teacher

Array = NDArray[np.float64]


def gaussian_margin(norm: nn.Module) -> Array:
    """E[x | x < 0] of x ~ N(bias, weight^2), by the trapezoidal rule on a fine grid."""
    scale, shift = np.abs(parameter(norm, "weight")), parameter(norm, "bias")
    x = np.linspace(np.minimum(shift - 12 * scale, -1e-9), 0, 4001)
    density = np.exp(-(((x - shift) / scale) ** 2) / 2)
    # The trapezoidal rule counts both ends by half.
    density[[0, -1]] /= 2
    return cast(Array, (x * density).sum(0) / density.sum(0))


@pytest.mark.parametrize(
    ("student", "teacher", "norms"),
    [
        ("mobilenetv2", "resnet8", ("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2")),
        ("shufflenetv2", "vgg8", ("block2.1", "block3.1", "block4.1")),
    ],
)
def test_ofd_is_the_partial_distance_of_preactivations(student: str, teacher: str, norms: tuple[str, ...]) -> None:
    ours, theirs = small(student, teacher)
    real = random_teacher(theirs)
    distiller = build("ofd", ours, real, weight=0.02)
    student_out, teacher_out = random_outputs(ours, theirs)
    expected = 0.0
    for depth, norm in enumerate(reversed(norms)):
        a, b = ours.stages[-1 - depth].name, theirs.stages[-1 - depth].name
        s = bridged(array(student_out.preactivations[a]), distiller, f"matches.{a}.connector")
        t = averaged(array(teacher_out.preactivations[b]), *s.shape[2:])
        margin = gaussian_margin(real.get_submodule(norm))
        stage = 0.0
        for n, c, i, j in np.ndindex(*s.shape):
            goal = max(float(t[n, c, i, j]), float(margin[c]))
            if s[n, c, i, j] > goal or t[n, c, i, j] > 0:
                stage += (float(s[n, c, i, j]) - goal) ** 2
        expected += stage / COUNT / 2**depth
    # The margins are the teacher's, in single precision.
    assert loss_of(distiller, student_out, teacher_out) == pytest.approx(0.02 * expected, rel=1e-5)


def test_ofd_starts_its_connectors_as_the_paper_says() -> None:
    student, teacher = small("shufflenetv2", "resnet8")
    settings = settings_of("ofd")
    distiller = DISTILLERS.build("ofd", settings=settings, student=student, teacher=random_teacher(teacher))
    conv = cast(nn.Conv2d, distiller.get_submodule("matches.stage3.connector.0"))
    assert tuple(conv.weight.shape) == (64, 464, 1, 1)
    assert conv.bias is None
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.03)
    assert len(cast(nn.Sequential, distiller.get_submodule("matches.stage3.connector"))) == 2


WRITERS = {
    ("resnet8", 32): ("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"),
    ("resnet56", 32): ("layer1.8.bn2", "layer2.8.bn2", "layer3.8.bn2"),
    ("resnet32x4", 32): ("layer1.4.bn2", "layer2.4.bn2", "layer3.4.bn2"),
    ("wrn40_2", 32): ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"),
    ("vgg8", 32): ("block1.1", "block2.1", "block3.1", "block4.1"),
    ("vgg13", 32): ("block1.4", "block2.4", "block3.4", "block4.4"),
    ("vgg13", 224): ("features.11", "features.18", "features.25", "features.32"),
    ("resnet50", 32): ("layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"),
    ("resnet50", 224): ("layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"),
    ("swin_t", 224): (),
}


@pytest.mark.parametrize(("teacher", "size"), WRITERS)
def test_the_batch_norm_that_writes_a_stage_is_found_in_every_family(teacher: str, size: int) -> None:
    network = shapes_of("teacher", teacher, size)
    assert writing_batch_norms(network) == {
        tap.name: path for tap, path in zip(network.stages, WRITERS[teacher, size], strict=False)
    }


class _Layered(Teacher):
    """Two stages, the first without any batch norm, the second with a residual sum whose shortcut has the only one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.classifier_path = CLASSES, SIZE, "head"
        self.first, self.second = nn.Conv2d(3, 6, 3, 4, 1), nn.Conv2d(6, 9, 3, 2, 1)
        self.shortcut, self.norm = nn.Conv2d(6, 9, 1, 2), nn.BatchNorm2d(9)
        self.head = nn.Linear(9, CLASSES)
        self.taps = (
            Tap(name="stage1", channels=6, stride=4),
            Tap(name="stage2", channels=9, stride=8),
        )

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.rectified(functional.gelu(self.first(x)) * 3)
        return Stage.rectified(self.norm(self.shortcut(x)) + self.second(x))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.head(pooled))


def test_only_a_margin_without_a_batch_norm_is_measured() -> None:
    torch.manual_seed(1)
    student, teacher = small()[0], _Layered().eval()
    hostile(teacher, 4)
    assert writing_batch_norms(teacher) == {"stage2": "norm"}
    distiller = DISTILLERS.build("ofd", settings=settings_of("ofd"), student=student, teacher=teacher)
    first, second = (distiller.get_buffer(f"matches.{name}.margin") for name in ("stage3", "stage4"))
    assert first.isnan().all()
    known = second.clone()
    np.testing.assert_allclose(array(known), gaussian_margin(teacher.norm), rtol=1e-4)
    teacher_out = [teacher.tapped(noise(count, 3, SIZE, SIZE, seed=count).float()) for count in (3, 1, 5)]
    student_out = random_tapped(student, 3, 1)
    (value,) = distiller.double()(student_out, {}, teacher_out[0], context(count=3)).values()
    assert value.isnan(), "a margin that was never measured must not pass for one"
    distiller.float().calibrate(iter(teacher_out))
    values = np.concatenate([array(taps.preactivations["stage1"]) for taps in teacher_out])
    expected = [values[:, c][values[:, c] < 0].mean() for c in range(6)]
    np.testing.assert_allclose(array(distiller.get_buffer("matches.stage3.margin")), expected, rtol=1e-5)
    assert torch.equal(distiller.get_buffer("matches.stage4.margin"), known)


def test_a_channel_that_is_hardly_ever_negative_has_a_margin_of_three_deviations() -> None:
    values = noise(40, 4, 6, 5) * torch.tensor([0.01, 2, 3, 0]).reshape(1, 4, 1, 1)
    values += torch.tensor([9.0, 0.3, 9.5, 7.25], dtype=torch.float64).reshape(1, 4, 1, 1)
    # One of 1,200.
    values[:, 2] = values[:, 2].abs()
    values[23, 2, 4, 1] = -5.5
    moments = torch.stack([channel_moments(part) for part in (values[:11], values[11:12], values[12:])]).sum(0)
    flat = array(values).transpose(1, 0, 2, 3).reshape(4, -1)
    assert 0 < (flat[2] < 0).mean() <= 1e-3
    expected = [-3 * flat[0].std(), flat[1][flat[1] < 0].mean(), -3 * flat[2].std(), 0.0]
    np.testing.assert_allclose(array(measured_margin(moments)), expected, rtol=1e-9, atol=1e-12)
