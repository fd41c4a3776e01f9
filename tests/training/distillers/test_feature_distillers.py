"""Each method beside KDiffusion against a computation of its own: numpy in float64, written from the papers' text."""

import copy
import math
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from kdexport.errors import ConfigError
from kdexport.students import STUDENTS, Classifier, Stage, Student, Tap, Tapped
from tests.kdexport.hostile_values import noise
from tests.training.distilled import hostile, random_tapped, settings_of
from training.distillers import DISTILLERS
from training.distillers.distiller import Distiller, StepContext
from training.distillers.ofd import channel_moments, measured_margin, writing_batch_norms
from training.distillers.pairs import average_to_smaller, stage_pairs
from training.losses import dist_loss, many_to_one_loss
from training.recipe import Recipe
from training.teachers import TEACHERS, Teacher

Array = NDArray[np.float64]
METHODS = ("at", "dist", "dkd", "norm", "ofd", "reviewkd", "vid")
CIFAR_PAIRS = (
    ("resnet32x4", "shufflenetv1"),
    ("wrn40_2", "shufflenetv1"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet32x4", "shufflenetv2"),
    ("resnet56", "mobilenetv2"),
)
LARGE_STUDENTS = ("mobilenetv2", "mobilenetv3", "resnet18", "shufflenetv1", "shufflenetv2")
PAIRS = [
    *((*pair, 32) for pair in CIFAR_PAIRS),
    *((*pair, 45) for pair in CIFAR_PAIRS[:3]),
    *(("swin_t", student, 224) for student in LARGE_STUDENTS),
]
COUNT, CLASSES, SIZE = 4, 5, 21


@cache
def shapes_of(kind: str, name: str, size: int) -> Any:
    """A network on the meta device: its taps, and forward passes that compute nothing."""
    registry: Any = STUDENTS if kind == "student" else TEACHERS
    with torch.device("meta"):
        return registry.build(name, num_classes=CLASSES, image_size=size).eval()


@cache
def shapes_told(kind: str, name: str, size: int) -> Tapped:
    with torch.no_grad():
        return cast(Tapped, shapes_of(kind, name, size).tapped(torch.zeros(2, 3, size, size, device="meta")))


def context(epoch: float = 200.0, count: int = COUNT) -> StepContext:
    return StepContext(
        epoch=torch.tensor(epoch, dtype=torch.float64),
        orders=torch.zeros(0, 1, dtype=torch.int64),
        labels=torch.arange(count) * 2 % CLASSES,
        samples=torch.arange(count),
    )


def build(name: str, student: Student, teacher: Teacher, **changes: object) -> Distiller:
    """In float64, with batch norms that are not identities and parameters that are not those of a start."""
    torch.manual_seed(2)
    distiller = DISTILLERS.build(name, settings=settings_of(name, **changes), student=student, teacher=teacher)
    hostile(distiller, 5)
    return distiller.double()


def loss_of(distiller: Distiller, student: Tapped, teacher: Tapped) -> float:
    (value,) = distiller(student, {}, teacher, context()).values()
    return float(value.detach())


def small(student: str = "mobilenetv2", teacher: str = "resnet8", size: int = SIZE) -> tuple[Student, Teacher]:
    return shapes_of("student", student, size), shapes_of("teacher", teacher, size)


def told(student: Classifier, teacher: Classifier) -> tuple[Tapped, Tapped]:
    return random_tapped(student, COUNT, 1), random_tapped(teacher, COUNT, 2)


def array(x: Tensor | None) -> Array:
    assert x is not None
    return cast(Array, x.detach().double().numpy())


def parameter(module: nn.Module, path: str) -> Array:
    return array(dict(module.named_parameters())[path])


def averaged(x: Array, height: int, width: int) -> Array:
    """Each output pixel is the mean of the input pixels that it touches."""
    result = np.empty((*x.shape[:2], height, width))
    for i in range(height):
        rows = slice(i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height))
        for j in range(width):
            columns = slice(j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width))
            result[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return result


def peaks(x: Array, side: int) -> Array:
    bounds = [(i * x.shape[2] // side, -(-(i + 1) * x.shape[2] // side)) for i in range(side)]
    rows = [np.stack([x[:, :, a:b, c:d].max((2, 3)) for c, d in bounds], 2) for a, b in bounds]
    return cast(Array, np.stack(rows, 2))


def nearest(x: Array, height: int, width: int) -> Array:
    rows, columns = np.arange(height) * x.shape[2] // height, np.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


def convolved(x: Array, weight: Array) -> Array:
    """Stride 1, the same size, zeros around."""
    reach = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width, result = x.shape[2], x.shape[3], 0.0
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            part = padded[:, :, i : i + height, j : j + width]
            result = result + np.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    return cast(Array, result)


def normalised(x: Array, module: nn.Module, path: str) -> Array:
    """Batch norm by the batch's own statistics."""
    spread = np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    weight, bias = (parameter(module, f"{path}.{key}").reshape(1, -1, 1, 1) for key in ("weight", "bias"))
    return cast(Array, (x - x.mean((0, 2, 3), keepdims=True)) / spread * weight + bias)


def bridged(x: Array, module: nn.Module, path: str) -> Array:
    return normalised(convolved(x, parameter(module, f"{path}.0.weight")), module, f"{path}.1")


# Pairs of stages


@pytest.mark.parametrize(
    ("teacher", "student", "size", "expected"),
    [
        ("resnet32x4", "shufflenetv2", 32, "116@16<-64@32 232@8<-128@16 464@4<-256@8"),
        ("wrn40_2", "shufflenetv1", 32, "240@16<-32@32 480@8<-64@16 960@4<-128@8"),
        ("vgg13", "mobilenetv2", 32, "12@16<-128@16 16@8<-256@8 48@4<-512@4 160@2<-512@4"),
        ("resnet50", "mobilenetv2", 32, "12@16<-256@32 16@8<-512@16 48@4<-1024@8 160@2<-2048@4"),
        ("resnet56", "mobilenetv2", 32, "16@8<-16@32 48@4<-32@16 160@2<-64@8"),
        ("swin_t", "mobilenetv3", 224, "24@56<-96@56 40@28<-192@28 112@14<-384@14 160@7<-768@7"),
        ("swin_t", "resnet18", 224, "64@56<-96@56 128@28<-192@28 256@14<-384@14 512@7<-768@7"),
        ("swin_t", "shufflenetv2", 224, "116@28<-192@28 232@14<-384@14 464@7<-768@7"),
    ],
)
def test_stages_are_paired_from_the_deep_end(teacher: str, student: str, size: int, expected: str) -> None:
    def text(tap: Tap) -> str:
        return f"{tap.channels}@{size // tap.stride}"

    pairs = stage_pairs(*small(student, teacher, size))
    assert " ".join(f"{text(pair.student)}<-{text(pair.teacher)}" for pair in pairs) == expected


def test_the_larger_map_is_averaged_in_each_direction_by_itself() -> None:
    a, b = noise(2, 3, 7, 4), noise(2, 5, 3, 9)
    ours, theirs = average_to_smaller(a, b)
    np.testing.assert_allclose(array(ours), averaged(array(a), 3, 4), rtol=1e-12)
    np.testing.assert_allclose(array(theirs), averaged(array(b), 3, 4), rtol=1e-12)


@pytest.mark.parametrize(("teacher", "student", "size"), PAIRS)
def test_every_method_takes_every_pair(teacher: str, student: str, size: int) -> None:
    ours, theirs = small(student, teacher, size)
    heard, said = shapes_told("student", student, size), shapes_told("teacher", teacher, size)
    moved = StepContext(**{key: getattr(context(count=2), key).to("meta") for key in StepContext.__slots__})
    for name in METHODS:
        with torch.device("meta"):
            distiller = DISTILLERS.build(name, settings=settings_of(name), student=ours, teacher=theirs)
        assert {key: value.shape for key, value in distiller(heard, {}, said, moved).items()} == {name: ()}


@pytest.mark.parametrize("name", ["ofd", "reviewkd"])
def test_a_method_compiles_into_one_graph(name: str) -> None:
    student, teacher = small("shufflenetv2", "vgg8")
    distiller = build(name, student, shown(teacher) if name == "ofd" else teacher)
    heard, said = told(student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(distiller), backend="eager", fullgraph=True)
    (value,) = compiled(heard, {}, said, context()).values()
    assert value.item() == pytest.approx(loss_of(distiller, heard, said), rel=1e-12)


# Attention transfer


@pytest.mark.parametrize(("student", "teacher"), [("mobilenetv2", "resnet8"), ("shufflenetv2", "vgg8")])
@pytest.mark.parametrize("power", [2.0, 1.0, 3.0])
def test_at_is_the_distance_of_normalised_maps(student: str, teacher: str, power: float) -> None:
    ours, theirs = small(student, teacher)
    heard, said = told(ours, theirs)
    expected = 0.0
    for a, b in zip(reversed(ours.stages), reversed(theirs.stages), strict=False):
        maps = [array(heard.features[a.name]), array(said.features[b.name])]
        side = min(x.shape[2] for x in maps)
        energies = [(np.abs(averaged(x, side, side)) ** power).mean(1).reshape(COUNT, -1) for x in maps]
        unit = [energy / np.sqrt((energy**2).sum(1, keepdims=True)) for energy in energies]
        expected += ((unit[0] - unit[1]) ** 2).mean()
    loss = loss_of(build("at", ours, theirs, weight=700.0, power=power), heard, said)
    assert loss == pytest.approx(700 * expected, rel=1e-10)


def test_at_is_zero_where_the_student_looks_where_the_teacher_looks() -> None:
    student, teacher = small("shufflenetv2", "resnet8")
    said = random_tapped(teacher, COUNT, 2)
    seen = {}
    for ours, theirs in zip(student.stages, teacher.stages, strict=True):
        side = -(-student.image_size // ours.stride)
        theirs_small = functional.adaptive_avg_pool2d(said.features[theirs.name], side)
        # The same map in every channel, at another scale for each image.
        energy = theirs_small.square().mean(1, keepdim=True).sqrt()
        seen[ours.name] = energy.expand(-1, ours.channels, -1, -1) * torch.tensor([9, 0.1, 1, 33]).reshape(-1, 1, 1, 1)
    heard = Tapped(features=seen, preactivations=seen, pooled=said.pooled, logits=said.logits)
    distiller = build("at", student, teacher)
    assert loss_of(distiller, heard, said) < 1e-20
    assert loss_of(distiller, random_tapped(student, COUNT, 1), said) > 1


# Variational information distillation


def test_vid_is_the_likelihood_under_a_gaussian_for_each_channel() -> None:
    student, teacher = small("shufflenetv2", "vgg8")
    distiller = build("vid", student, teacher, weight=0.7)
    scales = {name: p for name, p in distiller.named_parameters() if name.endswith("raw_scale")}
    for index, scale in enumerate(scales.values()):
        scale.data = noise(len(scale), seed=index) * 4
    heard, said = told(student, teacher)
    expected = 0.0
    for ours, theirs in zip(student.stages, teacher.stages[1:], strict=True):
        a, b = array(heard.features[ours.name]), array(said.features[theirs.name])
        side = min(a.shape[2], b.shape[2])
        mean, target = averaged(a, side, side), averaged(b, side, side)
        path = f"matches.{ours.name}"
        for position in (0, 2, 4):
            weight = parameter(distiller, f"{path}.regressor.{position}.weight")
            assert weight.shape[0] == theirs.channels
            mean = convolved(np.maximum(mean, 0) if position else mean, weight)
        variance = (np.log1p(np.exp(array(scales[f"{path}.raw_scale"]))) + 1e-5).reshape(1, -1, 1, 1)
        expected += (0.5 * ((mean - target) ** 2 / variance + np.log(variance))).mean()
    assert loss_of(distiller, heard, said) == pytest.approx(0.7 * expected, rel=1e-10)


@pytest.mark.parametrize("variance", [5.0, 0.3, 1.1e-5, 900.0])
def test_vid_learns_its_variances_from_the_one_it_is_told(variance: float) -> None:
    student, teacher = small()
    distiller = DISTILLERS.build(
        "vid", settings=settings_of("vid", initial_variance=variance), student=student, teacher=teacher
    )
    scales = [p for name, p in distiller.named_parameters() if name.endswith("raw_scale")]
    assert [tuple(scale.shape) for scale in scales] == [(16,), (32,), (64,)]
    for scale in scales:
        torch.testing.assert_close(
            functional.softplus(scale.double()) + 1e-5, torch.full_like(scale, variance).double()
        )
        assert scale.requires_grad
    if variance == 5.0:
        assert scales[0][0].item() == pytest.approx(math.log(math.exp(5 - 1e-5) - 1), rel=1e-6)
    assert {f"matches.stage{i}.raw_scale" for i in (2, 3, 4)} <= set(distiller.state_dict())


def test_vid_rests_where_the_variance_is_the_error_that_is_made() -> None:
    student, teacher = small()
    distiller = build("vid", student, teacher)
    heard, said = told(student, teacher)
    (pair,) = stage_pairs(student, teacher)[-1:]
    match = cast(Any, distiller).matches[pair.student.name]
    ours, theirs = average_to_smaller(heard.features[pair.student.name], said.features[pair.teacher.name])
    error = (match.regressor(ours) - theirs).square().mean((0, 2, 3)).detach()
    match.raw_scale.data = torch.log(torch.expm1(error - 1e-5))
    match(heard.features[pair.student.name], said.features[pair.teacher.name]).backward()
    assert match.raw_scale.grad.abs().max() < 1e-12
    assert match.regressor[4].weight.grad.abs().max() > 1e-6


def test_a_variance_below_its_floor_is_refused() -> None:
    from kdexport.core.toml import parse

    tables = {"data": {"name": "digits"}, "teacher": {"name": "resnet8"}, "student": {"name": "mobilenetv2"}}
    with pytest.raises(ConfigError, match="initial_variance"):
        parse(Recipe, {**tables, "distiller": {"name": "vid", "initial_variance": 1e-5}}, "a recipe")


# Overhaul of feature distillation


def shown(teacher: Classifier) -> Teacher:
    """A real network of the kind of ``teacher``, with statistics far from those of a fresh one."""
    torch.manual_seed(6)
    name = "vgg8" if type(teacher).__name__ == "SmallVgg" else "resnet8"
    real = TEACHERS.build(name, num_classes=CLASSES, image_size=teacher.image_size).eval()
    hostile(real, 3)
    return real


def gaussian_margin(norm: nn.Module) -> Array:
    """E[x | x < 0] of x ~ N(bias, weight^2), by a fine sum."""
    scale, shift = np.abs(parameter(norm, "weight")), parameter(norm, "bias")
    x = np.linspace(np.minimum(shift - 12 * scale, -1e-9), 0, 4001)
    density = np.exp(-(((x - shift) / scale) ** 2) / 2)
    # Half of the pixel at either end: the trapezoidal rule.
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
    real = shown(theirs)
    distiller = build("ofd", ours, real, weight=0.02)
    heard, said = told(ours, theirs)
    expected = 0.0
    for depth, norm in enumerate(reversed(norms)):
        a, b = ours.stages[-1 - depth].name, theirs.stages[-1 - depth].name
        s = bridged(array(heard.preactivations[a]), distiller, f"matches.{a}.connector")
        t = averaged(array(said.preactivations[b]), *s.shape[2:])
        margin = gaussian_margin(real.get_submodule(norm))
        stage = 0.0
        for n, c, i, j in np.ndindex(*s.shape):
            goal = max(float(t[n, c, i, j]), float(margin[c]))
            if s[n, c, i, j] > goal or t[n, c, i, j] > 0:
                stage += (float(s[n, c, i, j]) - goal) ** 2
        expected += stage / COUNT / 2**depth
    # The margins are the teacher's, in single precision.
    assert loss_of(distiller, heard, said) == pytest.approx(0.02 * expected, rel=1e-5)


def test_ofd_starts_its_connectors_as_the_paper_says() -> None:
    student, teacher = small("shufflenetv2", "resnet8")
    settings = settings_of("ofd")
    distiller = DISTILLERS.build("ofd", settings=settings, student=student, teacher=shown(teacher))
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


def test_a_margin_that_no_batch_norm_tells_is_measured_and_no_other() -> None:
    torch.manual_seed(1)
    student, teacher = small()[0], _Layered().eval()
    hostile(teacher, 4)
    assert writing_batch_norms(teacher) == {"stage2": "norm"}
    distiller = DISTILLERS.build("ofd", settings=settings_of("ofd"), student=student, teacher=teacher)
    first, second = (distiller.get_buffer(f"matches.{name}.margin") for name in ("stage3", "stage4"))
    assert first.isnan().all()
    known = second.clone()
    np.testing.assert_allclose(array(known), gaussian_margin(teacher.norm), rtol=1e-4)
    said = [teacher.tapped(noise(count, 3, SIZE, SIZE, seed=count).float()) for count in (3, 1, 5)]
    heard = random_tapped(student, 3, 1)
    (value,) = distiller.double()(heard, {}, said[0], context(count=3)).values()
    assert value.isnan(), "a margin that was never measured must not pass for one"
    distiller.float().calibrate(iter(said))
    values = np.concatenate([array(taps.preactivations["stage1"]) for taps in said])
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


# Knowledge review


@pytest.mark.parametrize(("student", "teacher"), [("mobilenetv2", "resnet8"), ("shufflenetv2", "vgg8")])
def test_reviewkd_is_a_chain_from_the_pooled_vector_to_the_shallow_stages(student: str, teacher: str) -> None:
    ours, theirs = small(student, teacher)
    distiller = build("reviewkd", ours, theirs, weight=6.0, max_channels=7)
    heard, said = told(ours, theirs)
    levels = [(array(heard.pooled)[:, :, None, None], array(said.pooled)[:, :, None, None])]
    for a, b in zip(reversed(ours.stages), reversed(theirs.stages), strict=False):
        levels.append((array(heard.features[a.name]), array(said.preactivations[b.name])))
    assert len(cast(nn.ModuleList, distiller.get_submodule("links"))) == len(levels) == 4
    expected, mixture = 0.0, None
    for index, (feature, target) in enumerate(levels):
        own = bridged(feature, distiller, f"links.{index}.reduction")
        assert own.shape[1] == 7
        if mixture is not None:
            deeper = nearest(mixture, *own.shape[2:])
            weight, bias = (parameter(distiller, f"links.{index}.gates.0.{key}") for key in ("weight", "bias"))
            logits = convolved(np.concatenate([own, deeper], 1), weight) + bias.reshape(1, 2, 1, 1)
            gates = 1 / (1 + np.exp(-logits))
            own = own * gates[:, :1] + deeper * gates[:, 1:]
        mixture = nearest(own, *target.shape[2:])
        expected += context_loss(bridged(mixture, distiller, f"links.{index}.expansion"), target)
    assert not any(name.startswith("links.0.gates") for name, _ in distiller.named_parameters())
    assert loss_of(distiller, heard, said) == pytest.approx(6 * expected, rel=1e-9)


def context_loss(prediction: Array, target: Array) -> float:
    terms, sides = [((prediction - target) ** 2).mean()], [side for side in (4, 2, 1) if side < target.shape[2]]
    terms += [((averaged(prediction, side, side) - averaged(target, side, side)) ** 2).mean() for side in sides]
    weights = [1.0, 0.5, 0.25, 0.125][: len(terms)]
    return float(sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights))


def test_reviewkd_has_the_widths_that_are_published_for_its_pairs() -> None:
    published = {
        ("resnet32x4", "shufflenetv1"): (512, [960, 960, 480, 240], [256, 256, 128, 64]),
        ("wrn40_2", "shufflenetv1"): (512, [960, 960, 480, 240], [128, 128, 64, 32]),
        ("resnet32x4", "shufflenetv2"): (512, [1024, 464, 232, 116], [256, 256, 128, 64]),
        ("vgg13", "mobilenetv2"): (512, [1280, 160, 48, 16, 12], [512, 512, 512, 256, 128]),
        ("resnet50", "mobilenetv2"): (512, [1280, 160, 48, 16, 12], [2048, 2048, 1024, 512, 256]),
    }
    for (teacher, student), (middle, inputs, outputs) in published.items():
        with torch.device("meta"):
            distiller = DISTILLERS.build(
                "reviewkd",
                settings=settings_of("reviewkd"),
                student=shapes_of("student", student, 32),
                teacher=shapes_of("teacher", teacher, 32),
            )
        shapes = {name: tuple(p.shape) for name, p in distiller.named_parameters()}
        for index, (ours, theirs) in enumerate(zip(inputs, outputs, strict=True)):
            assert shapes[f"links.{index}.reduction.0.weight"] == (middle, ours, 1, 1)
            assert shapes[f"links.{index}.expansion.0.weight"] == (theirs, middle, 3, 3)
        assert f"links.{len(inputs)}.reduction.0.weight" not in shapes


# N-to-one matching


@pytest.mark.parametrize(
    ("student", "teacher", "size", "side"), [("mobilenetv2", "resnet8", 40, 3), ("resnet18", "vgg8", 21, 3)]
)
def test_norm_matches_every_segment_with_the_teachers_peaks(student: str, teacher: str, size: int, side: int) -> None:
    ours, theirs = small(student, teacher, size)
    distiller = build("norm", ours, theirs, num_segments=3, weight=0.6)
    heard, said = told(ours, theirs)
    feature = averaged(array(heard.last), side, side)
    wide = bridged(feature, distiller, "expansion")
    target = peaks(array(said.last), side)
    width = theirs.taps[-1].channels
    expected = sum(((wide[:, i * width : (i + 1) * width] - target) ** 2).mean() for i in range(3))
    assert loss_of(distiller, heard, said) == pytest.approx(0.6 * expected, rel=1e-10)


def test_a_larger_student_map_is_averaged_to_the_teachers() -> None:
    student, teacher = small("mobilenetv2", "resnet8", 40)
    distiller = build("norm", student, teacher, num_segments=2)
    heard, said = told(student, teacher)
    shrunk = Tapped(
        features={"stage3": said.last[:, :, :2, :1]}, preactivations={}, pooled=said.pooled, logits=said.logits
    )
    wide = bridged(averaged(array(heard.last), 2, 1), distiller, "expansion").reshape(COUNT, 2, -1, 2, 1)
    expected = ((wide - array(shrunk.last)[:, None]) ** 2).mean((0, 2, 3, 4)).sum()
    assert loss_of(distiller, heard, shrunk) == pytest.approx(expected, rel=1e-10)


def test_many_to_one_is_zero_for_copies_and_refuses_a_part_of_a_segment() -> None:
    teacher = noise(3, 5, 2, 7)
    assert many_to_one_loss(teacher.repeat(1, 4, 1, 1), teacher).item() == 0
    # Segments lie one after another: interleaved copies are others.
    assert many_to_one_loss(teacher.repeat_interleave(4, 1), teacher).item() > 0.1
    for wrong in (noise(3, 12, 2, 7), noise(3, 5, 7, 2), noise(2, 5, 2, 7), noise(3, 3, 2, 7)):
        with pytest.raises(ValueError, match="does not go with"):
            many_to_one_loss(wrong, teacher)


# DIST and DKD


def softened(logits: Array, temperature: float) -> Array:
    exponentials = np.exp(logits / temperature)
    return cast(Array, exponentials / exponentials.sum(1, keepdims=True))


def test_dist_is_one_minus_the_correlations_of_rows_and_columns() -> None:
    student, teacher = small()
    heard, said = told(student, teacher)
    p, q = (softened(array(taps.logits), 2.5) for taps in (heard, said))
    rows = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    expected = 2.5**2 * (1.7 * rows + 0.4 * columns)
    distiller = build("dist", student, teacher, inter_class=1.7, intra_class=0.4, temperature=2.5, weight=0.3)
    # The authors' epsilon is in the denominators.
    assert loss_of(distiller, heard, said) == pytest.approx(0.3 * expected, rel=1e-5)


def test_dist_forgives_every_shift_and_scale_of_probabilities_that_keeps_their_order() -> None:
    logits = noise(6, CLASSES) * 2
    assert dist_loss(logits, logits + noise(6, 1), 1.3, 0.7, 3.0).item() == pytest.approx(0, abs=1e-5)
    flatter = torch.log(0.3 * torch.softmax(logits, 1) + 0.7 / CLASSES)
    assert dist_loss(flatter, logits, 1.3, 0.7, 1.0).item() == pytest.approx(0, abs=1e-5)
    assert dist_loss(-logits, logits, 1.3, 0.7, 1.0).item() > 1


@pytest.mark.parametrize("logits", [torch.zeros(3, 4), torch.eye(4)[:3] * 1e4, torch.ones(1, 4) * torch.arange(4)])
def test_dist_is_finite_where_there_is_nothing_to_correlate(logits: Tensor) -> None:
    student = logits.clone().requires_grad_(True)
    loss = dist_loss(student, logits.flip(1), 2.0, 3.0, 4.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert cast(Tensor, student.grad).isfinite().all()
    assert loss.item() <= 4.0**2 * (2 * 2.0 + 2 * 3.0)


def test_dist_refuses_what_is_no_pair_of_logits() -> None:
    with pytest.raises(ValueError, match="does not go with"):
        dist_loss(noise(3, 4), noise(3, 5), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        dist_loss(noise(3, 4), noise(3, 4), 1.0, 1.0, 0.0)


def test_dkd_weighs_the_target_and_the_others_apart() -> None:
    student, teacher = small()
    heard, said = told(student, teacher)
    p, q = (softened(array(taps.logits), 3.0) for taps in (heard, said))
    total = 0.0
    for row, label in enumerate(context().labels.tolist()):
        a, b = p[row, label], q[row, label]
        binary = b * np.log(b / a) + (1 - b) * np.log((1 - b) / (1 - a))
        others = [index for index in range(CLASSES) if index != label]
        rest = sum(q[row, k] / (1 - b) * np.log(q[row, k] / (1 - b) / (p[row, k] / (1 - a))) for k in others)
        total += 9 * (0.6 * binary + 5.0 * rest) / COUNT
    distiller = build("dkd", student, teacher, alpha=0.6, beta=5.0, temperature=3.0, weight=0.4)
    assert loss_of(distiller, heard, said) == pytest.approx(0.4 * total, rel=1e-9)
    assert loss_of(distiller, said, said) == pytest.approx(0, abs=1e-12)
