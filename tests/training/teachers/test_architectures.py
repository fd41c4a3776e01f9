import math
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdexport.errors import ConfigError
from kdexport.students import Tapped
from tests.kdexport.hostile_values import noise, randomize, relative_difference
from tests.training.teachers.described_teachers import SHAPES, built, walk
from training.runs.task import FrozenTeacher
from training.teachers import TEACHERS, Teacher


@dataclass(frozen=True)
class Facts:
    """Published numbers at 100 classes: taps as (channels, side) from shallow to deep, multiply-adds in millions."""

    image_size: int
    parameters: int
    convs: int
    norms: int
    entries: int
    macs: float
    taps: tuple[tuple[int, int], ...]
    pooled: int
    places: int = 2


def vgg_macs(convs: int) -> float:
    """3x3 convolutions on 32, 16, 8, 4 and 4 pixels a side, and one linear layer."""
    total, inputs = 512 * 100, 3
    for width, side in ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4)):
        total += 9 * side * side * (inputs * width + (convs - 1) * width * width)
        inputs = width
    return total / 1e6


def resnet_macs(count: int, widths: tuple[int, ...]) -> float:
    """The stem, then per stage two 3x3 convolutions a block and one 1x1 shortcut where the width changes."""
    total, inputs = 27 * widths[0] * 32**2 + widths[-1] * 100, widths[0]
    for width, side in zip(widths[1:], (32, 16, 8), strict=True):
        total += side**2 * 9 * (inputs * width + (2 * count - 1) * width * width)
        total += side**2 * inputs * width if inputs != width else 0
        inputs = width
    return total / 1e6


RESNET = ((16, 32), (16, 32), (32, 16), (64, 8))
TIMES_FOUR = ((32, 32), (64, 32), (128, 16), (256, 8))
VGG = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4))
SMALL = {
    "resnet8": Facts(32, 83_892, 9, 9, 56, resnet_macs(1, (16, 16, 32, 64)), RESNET, 64),
    "resnet20": Facts(32, 278_324, 21, 21, 128, resnet_macs(3, (16, 16, 32, 64)), RESNET, 64),
    "resnet56": Facts(32, 861_620, 57, 57, 344, resnet_macs(9, (16, 16, 32, 64)), RESNET, 64),
    "resnet8x4": Facts(32, 1_233_540, 10, 10, 62, resnet_macs(1, (32, 64, 128, 256)), TIMES_FOUR, 256),
    "resnet32x4": Facts(32, 7_433_860, 34, 34, 206, 1083.04, TIMES_FOUR, 256),
    "wrn40_2": Facts(32, 2_255_156, 40, 37, 227, 327.61, ((16, 32), (32, 32), (64, 16), (128, 8)), 128),
    "vgg8": Facts(32, 3_965_028, 5, 5, 37, vgg_macs(1), VGG, 512),
    "vgg13": Facts(32, 9_462_180, 10, 10, 72, 284.94, VGG, 512),
    "resnet50": Facts(
        32, 23_705_252, 53, 53, 320, 1298.01, ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)), 2048
    ),
}  # fmt: skip


def swin_taps(width: int) -> tuple[tuple[int, int], ...]:
    return ((width, 56), (width, 56), (2 * width, 28), (4 * width, 14), (8 * width, 7))


#: Published at 1000 classes; 100 classes have 900 rows of the last linear layer, and its bias, less.
LARGE = {
    "resnet50": Facts(
        224, 25_557_032 - 900 * 2049, 53, 53, 320, 4089 - 0.9 * 2.048,
        ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)), 2048, 0,
    ),
    "vgg13": Facts(
        224, 133_053_736 - 900 * 4097, 10, 10, 76, 11308.47 - 0.9 * 4.096,
        ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)), 25_088, 0,
    ),
    "swin_t": Facts(224, 28_288_354 - 900 * 769, 1, 0, 185, 4490, swin_taps(96), 768, -1),
    "swin_s": Facts(224, 49_606_258 - 900 * 769, 1, 0, 353, 8740, swin_taps(96), 768, -1),
    "swin_b": Facts(224, 87_768_224 - 900 * 1025, 1, 0, 353, 15430, swin_taps(128), 1024, -1),
}  # fmt: skip
EVERY_FORM = [*SMALL.items(), *LARGE.items()]
TORCHVISION = {"resnet50": "resnet50", "vgg13": "vgg13_bn", "swin_t": "swin_t", "swin_s": "swin_s", "swin_b": "swin_b"}
# Names of torchvision's modules whose outputs are the taps.
TORCHVISION_TAPS = {
    "resnet50": ("bn1", "layer1", "layer2", "layer3", "layer4"),
    "vgg13": ("features.5", "features.12", "features.19", "features.26", "features.33"),
    "swin": ("features.0", "features.1", "features.3", "features.5", "norm"),
}
every_form = pytest.mark.parametrize(("name", "facts"), EVERY_FORM, ids=[f"{n}-{f.image_size}" for n, f in EVERY_FORM])
every_small = pytest.mark.parametrize("name", SMALL)
#: Small enough to run, and the least size of torchvision's forms.
LEAST = 128


def test_every_teacher_has_its_facts_here() -> None:
    assert set(TEACHERS.names()) == SMALL.keys() | LARGE.keys()


@every_form
def test_a_form_has_the_published_size(name: str, facts: Facts) -> None:
    teacher = built(name, facts.image_size, device="meta").eval()
    assert sum(p.numel() for p in teacher.parameters()) == facts.parameters
    kinds = [type(module) for module in teacher.modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.BatchNorm2d)) == (facts.convs, facts.norms)
    assert len(teacher.state_dict()) == facts.entries


@every_form
def test_a_form_has_the_published_work_and_taps(name: str, facts: Facts) -> None:
    teacher = built(name, facts.image_size, device="meta").eval()
    images = torch.empty(1, 3, facts.image_size, facts.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tapped = teacher.tapped(images)
    assert round(counter.get_total_flops() / 2e6, facts.places) == pytest.approx(round(facts.macs, facts.places))
    assert [(f.shape[1], f.shape[2]) for f in tapped.features.values()] == list(facts.taps)
    assert list(tapped.features) == ["stem", *(f"stage{index}" for index in range(1, len(facts.taps)))]
    assert tapped.pooled.shape == (1, facts.pooled)


SIZES = [
    *((name, size) for name in SMALL for size in (33, 47, 64, 127)),
    *((name, 131) for name in sorted(SMALL.keys() - LARGE.keys())),
    *(("resnet50", size) for size in (128, 129, 150)),
    *(("vgg13", size) for size in (128, 144, 240)),
    *(("swin_t", size) for size in (128, 132, 180, 256)),
    *((name, 132) for name in ("swin_s", "swin_b")),
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_taps_are_known_without_running_at_any_size_that_is_served(name: str, size: int) -> None:
    teacher = built(name, size, 7, device="meta").eval()
    told = {tap.name: (2, tap.channels, *[math.ceil(size / tap.stride)] * 2) for tap in teacher.taps}
    with torch.no_grad():
        tapped = teacher.tapped(torch.empty(2, 3, size, size, device="meta"))
    assert {name: tuple(feature.shape) for name, feature in tapped.features.items()} == told
    assert {name: tuple(feature.shape) for name, feature in tapped.preactivations.items()} == told
    assert tapped.logits.shape == (2, 7)
    reader = teacher.get_submodule(teacher.classifier_path)
    assert isinstance(reader, nn.Linear)
    assert tapped.pooled.shape == (2, reader.in_features)


@every_small
def test_tensors_have_the_names_and_shapes_of_public_checkpoints(name: str) -> None:
    own = built(name, 32, 7, device="meta").state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in own.items()} == SHAPES[name](7)
    assert len(SHAPES[name](100)) == SMALL[name].entries


@pytest.mark.parametrize("name", LARGE)
def test_tensors_have_the_names_and_shapes_of_torchvision(name: str) -> None:
    own = built(name, 224, 1000, device="meta").state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.get_model(TORCHVISION[name]).state_dict()
    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in theirs.items()}


@every_small
@torch.no_grad()
def test_a_small_form_computes_what_its_description_says(name: str) -> None:
    teacher = TEACHERS.build(name, num_classes=7, image_size=32)
    randomize(teacher.double(), seed=5).eval()
    images = noise(2, 3, 32, 32)
    expected, tapped = walk(name, teacher.state_dict(), images), teacher.tapped(images)
    for own, theirs in (
        *zip(tapped.features.values(), expected.features, strict=True),
        *zip(tapped.preactivations.values(), expected.preactivations, strict=True),
        (tapped.pooled, expected.pooled),
        (tapped.logits, expected.logits),
    ):
        assert relative_difference(own, theirs) < 1e-12
        assert own.std() > 0
    for key, feature in tapped.features.items():
        # Neither may be overwritten after it was read.
        assert torch.equal(feature, tapped.preactivations[key].clamp(min=0)) is not name.startswith("wrn")
    layer = teacher.get_submodule(teacher.classifier_path)
    assert torch.equal(layer(tapped.pooled), tapped.logits)
    assert torch.equal(teacher(images), tapped.logits)


@dataclass(frozen=True)
class Pair:
    """Our form and torchvision's model with equal weights; the last stride does not divide the image size."""

    name: str
    teacher: Teacher
    reference: nn.Module
    images: Tensor
    tapped: Tapped


@pytest.fixture(scope="module", params=LARGE)
def pair(request: pytest.FixtureRequest) -> Pair:
    name: str = request.param
    size = {"resnet50": 129, "vgg13": 144}.get(name, 132)
    torch.manual_seed(11)
    teacher = built(name, size, 7).eval()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomize(module, seed=module.num_features)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    with torch.device("meta"):
        reference = torchvision.models.get_model(TORCHVISION[name], num_classes=7)
    reference.load_state_dict(teacher.state_dict(), assign=True)
    images = noise(2, 3, size, size).float()
    with torch.no_grad():
        return Pair(name, teacher, reference.eval(), images, teacher.tapped(images))


@torch.no_grad()
def test_a_large_form_is_torchvisions_model_bit_by_bit_at_every_tap(pair: Pair) -> None:
    seen: list[Tensor] = []
    for path in TORCHVISION_TAPS[pair.name.split("_")[0]]:
        # A copy, because torchvision's ReLUs write over what they read.
        pair.reference.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    logits, tapped = pair.reference(pair.images), pair.tapped
    assert torch.equal(tapped.logits, logits)
    assert logits.std() > 0
    if pair.name.startswith("swin"):
        seen = [tokens.permute(0, 3, 1, 2) for tokens in seen]
    elif pair.name == "resnet50":
        # torchvision's block of a stem ends with the batch norm: its ReLU is used once more elsewhere.
        assert torch.equal(tapped.preactivations["stem"], seen[0])
        seen[0] = seen[0].clamp(min=0)
    for feature, expected in zip(tapped.features.values(), seen, strict=True):
        assert torch.equal(feature, expected)


@torch.no_grad()
def test_a_large_form_keeps_its_preactivations(pair: Pair) -> None:
    tapped = pair.tapped
    for name, feature in tapped.features.items():
        before = tapped.preactivations[name]
        if not pair.name.startswith("swin"):
            assert torch.equal(feature, before.clamp(min=0))
            assert (before < 0).any()
        elif name != "stage4":
            assert torch.equal(feature, before)
    if pair.name.startswith("swin"):
        # Before the final norm: its mean and variance over channels, and its gain and bias, give the feature.
        tokens = tapped.preactivations["stage4"].double()
        centred = tokens - tokens.mean(1, keepdim=True)
        state = {
            name: value.double().reshape(1, -1, 1, 1)
            for name, value in pair.teacher.get_submodule("norm").state_dict().items()
        }
        spread = torch.sqrt(centred.square().mean(1, keepdim=True) + 1e-5)
        assert relative_difference(tapped.features["stage4"], centred / spread * state["weight"] + state["bias"]) < 1e-5


@torch.no_grad()
def test_the_layer_that_is_named_reads_the_pooled_vector(pair: Pair) -> None:
    tapped, read = pair.tapped, list[Tensor]()
    layer = pair.teacher.get_submodule(pair.teacher.classifier_path)
    hook = layer.register_forward_hook(lambda *call: read.extend((call[1][0].clone(), call[2].clone())))
    assert torch.equal(pair.teacher(pair.images), tapped.logits)
    hook.remove()
    assert torch.equal(read[0], tapped.pooled)
    assert torch.equal(read[1], tapped.logits) is (pair.name != "vgg13")


#: Without the largest networks, whose layers occur in smaller ones.
LIGHT = [*((name, 32) for name in SMALL), ("resnet50", LEAST), ("swin_t", LEAST)]


@pytest.mark.parametrize(("name", "size"), LIGHT)
def test_a_frozen_teacher_runs_in_bfloat16_and_channels_last(name: str, size: int) -> None:
    torch.manual_seed(3)
    teacher = built(name, size, 7)
    images = noise(2, 3, size, size).float().to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = teacher.eval().tapped(images)
    tapped = FrozenTeacher(teacher, torch.device("cpu"), torch.bfloat16)(images)
    assert tapped.logits.dtype == torch.bfloat16
    for own, theirs in (
        *zip(tapped.features.values(), exact.features.values(), strict=True),
        *zip(tapped.preactivations.values(), exact.preactivations.values(), strict=True),
        (tapped.logits, exact.logits),
    ):
        error = (own.float() - theirs).norm() / theirs.norm()
        assert 0 < error < 0.05
        assert not own.requires_grad


@pytest.mark.parametrize(("name", "size"), LIGHT)
def test_a_teacher_trains_every_parameter(name: str, size: int) -> None:
    teacher = built(name, size, 7).train()
    teacher(noise(2, 3, size, size).float()).square().sum().backward()
    idle = [key for key, parameter in teacher.named_parameters() if parameter.grad is None]
    assert idle == []


def initial_deviation(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of fresh weights: by the fan-out for convolutions, by the fan-in for linear layers."""
    if len(shape) == 4:
        return math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    return 0.01 if name.startswith("vgg") else math.sqrt(1 / (3 * shape[1]))


@every_small
def test_fresh_weights_follow_the_initialisation_of_the_network(name: str) -> None:
    torch.manual_seed(17)
    teacher = built(name, 32)
    for key, value in teacher.named_parameters():
        if value.ndim > 1:
            # Seven standard errors: thousands of weights are tested.
            allowed = 7 / math.sqrt(2 * value.numel())
            assert value.std(correction=0).item() == pytest.approx(
                initial_deviation(name, tuple(value.shape)), rel=allowed
            ), key
            assert abs(value.mean().item()) < 7 * initial_deviation(name, tuple(value.shape)) / math.sqrt(
                value.numel()
            ), key
            # A uniform distribution would end at 1.73 standard deviations.
            widest = value.abs().max().item() / initial_deviation(name, tuple(value.shape))
            assert widest > 2 if value.ndim == 4 or name.startswith("vgg") else widest < 1.74, key
        elif key.endswith(".weight"):
            assert (value == 1).all(), key
        elif key != "fc.bias" and key != "linear.bias":
            assert (value == 0).all(), key
    if name == "wrn40_2":
        assert (teacher.get_parameter("fc.bias") == 0).all()


@pytest.mark.parametrize("name", ["resnet50", "swin_t"])
def test_fresh_weights_of_a_large_form_are_torchvisions(name: str) -> None:
    torch.manual_seed(5)
    own = built(name, LEAST, 7).state_dict()
    torch.manual_seed(5)
    theirs = torchvision.models.get_model(TORCHVISION[name], num_classes=7).state_dict()
    assert all(torch.equal(value, own[key]) for key, value in theirs.items())


@pytest.mark.parametrize(
    ("name", "size", "remedy"),
    [
        ("swin_t", 130, "Set data.image_size to 128."),
        ("swin_b", 223, "Set data.image_size to 220."),
        ("vgg13", 200, "Set data.image_size to 192 or 208."),
        ("vgg13", 130, "Set data.image_size to 128 or 144."),
    ],
)
def test_sizes_that_would_lose_pixels_are_refused_with_those_that_do_not(name: str, size: int, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(name, size, device="meta")
    assert str(size) in caught.value.message
    assert caught.value.remedy == remedy
