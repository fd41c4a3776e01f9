import pytest
import torch
import torchvision
from torch import Tensor

from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.students.shufflenet_units import conv_and_norm, shuffled

UNITS = {1: 4, 2: 8, 3: 4}


def build(image_size: int) -> Student:
    return STUDENTS.build("shufflenetv2", num_classes=100, image_size=image_size).eval()


def public_unit(state: dict[str, Tensor], path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and what the public code reads before the activation: not shuffled."""
    if f"{path}conv5.weight" in state:
        left = conv_and_norm(state, path, 2, conv_and_norm(state, path, 1, x, x.shape[1], 2)).clamp(min=0)
        right = conv_and_norm(state, path, 3, x).clamp(min=0)
        right = conv_and_norm(state, path, 5, conv_and_norm(state, path, 4, right, right.shape[1], 2))
    else:
        left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        right = conv_and_norm(state, path, 1, right).clamp(min=0)
        right = conv_and_norm(state, path, 3, conv_and_norm(state, path, 2, right, right.shape[1]))
    return shuffled(torch.cat([left, right.clamp(min=0)], 1), 2), torch.cat([left, right], 1)


def test_stages_of_the_small_form_have_the_published_sizes() -> None:
    stages = [build(32).get_submodule(f"layer{stage}") for stage in UNITS]
    assert [sum(p.numel() for p in stage.parameters()) for stage in stages] == [30_192, 244_180, 501_352]


def test_the_small_form_has_the_names_of_public_checkpoints() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layers = ["1"]
    for stage, count in UNITS.items():
        layers += [f"layer{stage}.0.{index}" for index in range(1, 6)]
        layers += [f"layer{stage}.{unit}.{index}" for unit in range(1, count) for index in range(1, 4)]
    expected = []
    for layer in [*layers, "2"]:
        path, index = layer[:-1], layer[-1]
        expected += [f"{path}conv{index}.weight", *(f"{path}bn{index}.{key}" for key in norm)]
    state = build(32).state_dict()
    assert list(state) == [*expected, "linear.weight", "linear.bias"]
    assert state["conv1.weight"].shape == (24, 3, 1, 1)
    assert state["layer1.0.conv1.weight"].shape == (24, 1, 3, 3)
    assert state["layer1.0.conv2.weight"].shape == (58, 24, 1, 1)
    assert state["layer2.0.conv4.weight"].shape == (116, 1, 3, 3)
    assert state["layer3.3.conv3.weight"].shape == (232, 232, 1, 1)
    assert state["conv2.weight"].shape == (1024, 464, 1, 1)


def test_the_small_form_is_the_public_network_but_for_the_order_before_the_activation() -> None:
    net, x = randomize(build(32).double()), noise(2, 3, 33, 41)
    assert isinstance(net, Student)
    state = net.state_dict()
    with torch.no_grad():
        tapped = net.tapped(x)
        x = conv_and_norm(state, "", 1, x).clamp(min=0)
        for stage, count in UNITS.items():
            before = x
            for unit in range(count):
                x, before = public_unit(state, f"layer{stage}.{unit}.", x)
            assert torch.allclose(tapped.features[f"stage{stage}"], x, rtol=1e-10, atol=1e-10)
            ours = tapped.preactivations[f"stage{stage}"]
            assert torch.allclose(ours, shuffled(before, 2), rtol=1e-10, atol=1e-10)
            assert not torch.allclose(ours, before)
        pooled = conv_and_norm(state, "", 2, x).clamp(min=0).mean((2, 3))
        assert torch.allclose(tapped.logits, pooled @ state["linear.weight"].T + state["linear.bias"])


def test_torchvision_weights_load_unchanged_and_give_equal_logits() -> None:
    theirs = randomize(torchvision.models.shufflenet_v2_x1_0(num_classes=100).eval())
    ours = build(224)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 3, 96, 111).float()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("image_size", [32, 224])
def test_values_before_the_activation_are_not_computed_unless_asked_for(image_size: int) -> None:
    from tests.kdexport.reparam.plain_network import operators

    counts = operators(build(image_size), noise(1, 3, image_size, image_size).float())
    assert counts["cat"] == counts["transpose"] == sum(UNITS.values())


def test_the_taps_of_the_imagenet_form_are_those_of_torchvision() -> None:
    theirs, net = torchvision.models.shufflenet_v2_x1_0(num_classes=100).eval(), build(224)
    randomize(theirs)
    net.load_state_dict(theirs.state_dict())
    x = noise(1, 3, 64, 64).float()
    with torch.no_grad():
        tapped = net.tapped(x)
        for tap, modules in {
            "stem": ("conv1",),
            "stage1": ("maxpool", "stage2"),
            "stage2": ("stage3",),
            "stage3": ("stage4",),
            "last": ("conv5",),
        }.items():
            for module in modules:
                x = theirs.get_submodule(module)(x)
            assert torch.equal(tapped.features[tap], x)
