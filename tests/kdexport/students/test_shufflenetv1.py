import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdexport.students import STUDENTS, Student
from kdexport.students.channel_shuffle import shuffle_channels
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.students.shufflenet_units import conv_and_norm, shuffled

UNITS = {1: 4, 2: 8, 3: 4}


def build(image_size: int) -> Student:
    return STUDENTS.build("shufflenetv1", num_classes=100, image_size=image_size).eval()


def public_unit(state: dict[str, Tensor], path: str, x: Tensor, stride: int) -> Tensor:
    groups = 1 if x.shape[1] == 24 else 3
    deep = shuffled(conv_and_norm(state, path, 1, x, groups).clamp(min=0), groups)
    deep = conv_and_norm(state, path, 2, deep, deep.shape[1], stride).clamp(min=0)
    deep = conv_and_norm(state, path, 3, deep, 3)
    if stride == 2:
        return torch.cat([deep, functional.avg_pool2d(x, 3, 2, 1)], 1).clamp(min=0)
    return (deep + x).clamp(min=0)


@pytest.mark.parametrize("image_size", [32, 224])
def test_units_have_the_published_sizes(image_size: int) -> None:
    net = build(image_size)
    for stage, sizes in {1: [6318, *[10860] * 3], 2: [10860, *[40920] * 7], 3: [40920, *[158640] * 3]}.items():
        units = net.get_submodule(f"layer{stage}").children()
        assert [sum(p.numel() for p in unit.parameters()) for unit in units] == sizes


@pytest.mark.parametrize("image_size", [32, 224])
def test_it_has_the_names_of_public_checkpoints(image_size: int) -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    units = [f"layer{stage}.{unit}." for stage, count in UNITS.items() for unit in range(count)]
    layers = ["1", *(f"{path}{index}" for path in units for index in (1, 2, 3))]
    expected = []
    for layer in layers:
        path, index = layer[:-1], layer[-1]
        expected += [f"{path}conv{index}.weight", *(f"{path}bn{index}.{key}" for key in norm)]
    state = build(image_size).state_dict()
    assert list(state) == [*expected, "linear.weight", "linear.bias"]
    assert state["conv1.weight"].shape == ((24, 3, 1, 1) if image_size == 32 else (24, 3, 3, 3))
    assert state["layer1.0.conv1.weight"].shape == (54, 24, 1, 1)
    assert state["layer1.0.conv3.weight"].shape == (216, 18, 1, 1)
    assert state["layer2.0.conv1.weight"].shape == (60, 80, 1, 1)
    assert state["layer3.3.conv2.weight"].shape == (240, 1, 3, 3)


@pytest.mark.parametrize("image_size", [32, 224])
def test_it_is_the_public_network(image_size: int) -> None:
    net, x = randomize(build(image_size).double()), noise(2, 3, 33, 41)
    assert isinstance(net, Student)
    state = net.state_dict()
    with torch.no_grad():
        tapped = net.tapped(x)
        x = conv_and_norm(state, "", 1, x, 1, 1 if image_size == 32 else 2).clamp(min=0)
        x = x if image_size == 32 else functional.max_pool2d(x, 3, 2, 1)
        for stage, count in UNITS.items():
            for unit in range(count):
                x = public_unit(state, f"layer{stage}.{unit}.", x, 2 if unit == 0 else 1)
            assert torch.allclose(tapped.features[f"stage{stage}"], x, rtol=1e-10, atol=1e-10)
        assert torch.allclose(tapped.logits, x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"])


def test_the_bottleneck_is_activated_after_the_depthwise_convolution_too() -> None:
    """Unlike in the paper, as in the public code: three activations a unit."""
    from tests.kdexport.reparam.plain_network import operators

    counts = operators(build(32), noise(1, 3, 32, 32).float())
    assert counts["relu"] == 1 + 3 * sum(UNITS.values())


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_the_shuffle_takes_one_channel_of_each_group_in_turn(groups: int) -> None:
    x = noise(2, 12, 3, 5)
    assert torch.equal(shuffle_channels(x, groups), shuffled(x, groups))
    assert torch.equal(shuffle_channels(x, groups), nn.ChannelShuffle(groups)(x))
