import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import Stage, Tap, Tapped
from tests.training.small_distillation import hostile
from training.runs.task import FrozenTeacher
from training.teachers import TEACHERS, Teacher
from training.teachers.folding import folded

#: Name, side, batch norms that stay: those that read a sum or a tap, beside none at all.
FORMS = [("resnet20", 16, 0), ("resnet8x4", 12, 0), ("wrn40_2", 12, 19), ("vgg8", 16, 0), ("resnet50", 8, 0)]
CPU = torch.device("cpu")


def teacher_of(name: str, size: int) -> Teacher:
    torch.manual_seed(7)
    teacher = TEACHERS.build(name, num_classes=6, image_size=size)
    hostile(teacher, 3)
    return teacher.eval()


def everything(tapped: Tapped) -> dict[str, Tensor]:
    named = {f"feature {name}": value for name, value in tapped.features.items()}
    named |= {f"before {name}": value for name, value in tapped.preactivations.items()}
    return named | {"pooled": tapped.pooled, "logits": tapped.logits}


def images(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 1.7 - 0.4


@pytest.mark.parametrize(("name", "size", "left"), FORMS)
def test_a_folded_teacher_writes_the_same_at_every_tap_in_float64(name: str, size: int, left: int) -> None:
    teacher, x = teacher_of(name, size).double(), images(size).double()
    with torch.no_grad():
        expected, given = everything(teacher.tapped(x)), everything(folded(teacher).tapped(x))
    assert given.keys() == expected.keys()
    for key, value in given.items():
        assert value.dtype == torch.float64
        assert (value - expected[key]).abs().max() <= 1e-12 * expected[key].abs().max()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded(teacher).modules()) == left


@pytest.mark.parametrize(("name", "size"), [*((name, size) for name, size, _ in FORMS), ("swin_t", 128)])
def test_a_frozen_teacher_says_the_same_of_an_image_in_any_batch_and_draws_nothing(name: str, size: int) -> None:
    frozen = FrozenTeacher(teacher_of(name, size).double(), CPU, None)
    x = torch.cat([images(size), images(size).flip(0) * 2 + 1]).double()
    state = torch.get_rng_state()
    together, parts = everything(frozen(x)), [everything(frozen(part)) for part in torch.split(x, [1, 3, 2])]
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in together.items():
        expected = torch.cat([part[key] for part in parts])
        assert (value - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_folding_leaves_the_teacher_untouched_and_shares_what_does_not_change() -> None:
    teacher = teacher_of("wrn40_2", 12)
    before, twin = copy.deepcopy(teacher.state_dict()), folded(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert isinstance(teacher.get_submodule("block1.layer.0.bn2"), nn.BatchNorm2d)
    assert cast(nn.Linear, twin.get_submodule("fc")).weight is cast(nn.Linear, teacher.get_submodule("fc")).weight
    lowered = folded(teacher, torch.bfloat16)
    assert cast(nn.Linear, lowered.get_submodule("fc")).weight.dtype == torch.bfloat16
    assert cast(nn.BatchNorm2d, lowered.get_submodule("bn1")).weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


class Awkward(Teacher):
    """Convolutions whose batch norm must stay: one is a tap itself, one has two readers, one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.image_size, self.classifier_path = 4, 8, "fc"
        self.taps = (Tap(name="stem", channels=5, stride=1), Tap(name="stage1", channels=5, stride=1))
        self.tapped_conv, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.split, self.split_norm = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5)
        self.twice, self.twice_norm = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.shared, self.first, self.second = nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.batch_only = nn.BatchNorm2d(5, track_running_stats=False)
        self.plain = nn.Conv2d(5, 5, 1)
        self.fc = nn.Linear(5, 4)

    def advance(self, index: int, x: Tensor) -> Stage:
        if index == 0:
            return Stage.linear(self.tapped_conv(x))
        split = self.split(self.norm(x))
        y = functional.relu(self.split_norm(split)) + split
        y = self.twice_norm(self.twice(self.twice_norm(self.twice(y))))
        y = self.first(self.shared(y)) + self.second(self.shared(y))
        return Stage.rectified(self.batch_only(self.plain(y)))

    def predict(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.fc(pooled))


def test_a_batch_norm_stays_where_it_does_not_fold_exactly() -> None:
    torch.manual_seed(0)
    teacher = Awkward()
    for norm in (teacher.norm, teacher.split_norm, teacher.twice_norm, teacher.first, teacher.second):
        hostile(norm, 2)
    teacher.double().eval()
    twin = folded(teacher)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in twin.modules()) == 6
    x = images(8).double()
    with torch.no_grad():
        for one, other in zip(everything(twin.tapped(x)).values(), everything(teacher.tapped(x)).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["resnet8", "wrn40_2"])
def test_a_frozen_teacher_in_bfloat16_is_as_far_from_float32_as_autocast_alone(name: str) -> None:
    teacher, x = teacher_of(name, 16), images(16)
    with torch.no_grad():
        exact = teacher.tapped(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            cast_each_time = teacher.tapped(x).logits.float()
    once = FrozenTeacher(teacher, CPU, torch.bfloat16)(x).logits.float()
    spread = (exact - exact.mean()).abs().max()
    assert (once - exact).abs().max() < 2 * (cast_each_time - exact).abs().max() + 0.01 * spread
    torch.testing.assert_close(FrozenTeacher(teacher, CPU, None)(x).logits, exact, rtol=1e-4, atol=1e-5)


def test_the_pre_activation_of_a_wide_resnet_updates_no_statistics_twice() -> None:
    teacher, twin, x = teacher_of("wrn40_2", 12).train(), teacher_of("wrn40_2", 12).train(), images(12)
    expected: dict[str, Tensor] = {}
    for index, path in ((1, "block2.layer.0.bn1"), (3, "bn1")):
        twin.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, name=f"stage{index}": expected.setdefault(name, output)
        )
    logits, tapped = twin(x), teacher.tapped(x)
    torch.testing.assert_close(tapped.logits, logits)
    for name, value in expected.items():
        torch.testing.assert_close(tapped.preactivations[name], value)
    ours, theirs = teacher.state_dict(), twin.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
