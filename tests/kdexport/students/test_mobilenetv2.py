import pytest
import torch
import torchvision
from torch import Tensor, nn

from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile import noise, randomize


def build(image_size: int, num_classes: int = 100) -> Student:
    return STUDENTS.build("mobilenetv2", num_classes=num_classes, image_size=image_size).eval()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def multiply_accumulates(net: nn.Module, x: Tensor) -> int:
    """Of convolutions and linear layers, counted from the shapes that really pass."""
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output.numel() * module.weight[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(x)
    return total


def test_the_small_form_has_the_published_size() -> None:
    net = build(32)
    assert parameters(net) == 812_836
    assert len(net.state_dict()) == 320
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 53
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 53
    assert round(multiply_accumulates(net, noise(1, 3, 32, 32).float()) / 1e6, 2) == 6.52


def test_the_groups_of_the_small_form_have_the_published_sizes() -> None:
    net = build(32)
    sizes = [parameters(net.get_submodule(f"blocks.{i}")) for i in range(7)]
    assert sizes == [608, 4296, 11688, 50464, 80928, 207168, 121760]


def test_the_imagenet_form_has_the_published_size() -> None:
    net = build(224)
    assert parameters(net) == 2_351_972
    assert round(multiply_accumulates(net, noise(1, 3, 224, 224).float()) / 1e6, 1) == 299.6


@pytest.mark.parametrize("num_classes", [1, 7, 1000])
def test_parameters_follow_the_number_of_classes(num_classes: int) -> None:
    assert parameters(build(32, num_classes)) == 812_836 - 1281 * (100 - num_classes)
    assert parameters(build(224, num_classes)) == 2_351_972 - 1281 * (100 - num_classes)


def test_the_small_form_has_the_names_of_public_checkpoints() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in build(32).state_dict().items()}
    assert shapes["conv1.0.weight"] == (16, 3, 3, 3)
    assert shapes["conv1.1.running_var"] == (16,)
    assert shapes["blocks.0.0.conv.0.weight"] == (16, 16, 1, 1)  # expanded even where the factor is one
    assert shapes["blocks.0.0.conv.3.weight"] == (16, 1, 3, 3)
    assert shapes["blocks.6.0.conv.7.bias"] == (160,)
    assert shapes["conv2.0.weight"] == (1280, 160, 1, 1)
    assert shapes["conv2.1.num_batches_tracked"] == ()
    assert shapes["classifier.0.weight"] == (100, 1280)
    assert {name.split(".")[0] for name in shapes} == {"conv1", "blocks", "conv2", "classifier"}
    assert [len(list(build(32).get_submodule(f"blocks.{i}").children())) for i in range(7)] == [1, 2, 3, 4, 3, 3, 1]


@pytest.mark.parametrize("image_size", [32, 64, 128, 224])
def test_each_tap_has_the_channels_and_the_stride_that_it_states(image_size: int) -> None:
    net = build(image_size)
    with torch.no_grad():
        tapped = net.tapped(noise(2, 3, image_size, image_size).float())
    assert list(tapped.features) == list(tapped.preactivations) == [tap.name for tap in net.taps]
    for tap in net.taps:
        side = image_size // tap.stride
        assert tapped.features[tap.name].shape == tapped.preactivations[tap.name].shape
        assert tapped.features[tap.name].shape == (2, tap.channels, side, side)


def test_the_taps_of_the_small_form_are_the_published_ones() -> None:
    shapes = [(tap.channels, 32 // tap.stride) for tap in build(32).taps]
    assert shapes == [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2), (1280, 2)]


def test_the_taps_of_the_imagenet_form_are_the_deepest_features_of_their_stages() -> None:
    net = build(224)
    theirs = torchvision.models.mobilenet_v2(num_classes=100).eval()
    theirs.load_state_dict(net.state_dict())
    outputs, x = [], noise(1, 3, 64, 64).float()
    with torch.no_grad():
        tapped = net.tapped(x)
        for layer in theirs.features:
            x = layer(x)
            outputs.append(x)
    for tap, index in zip(net.taps, (0, 3, 6, 13, 17, 18), strict=True):
        assert torch.equal(tapped.features[tap.name], outputs[index])
        assert index in (0, 18) or outputs[index].shape != outputs[index + 1].shape


@pytest.mark.parametrize(("image_size", "small"), [(32, True), (127, True), (128, False), (224, False)])
def test_the_form_follows_the_image_size(image_size: int, small: bool) -> None:
    net = build(image_size)
    assert ("blocks.0.0.conv.0.weight" in net.state_dict()) is small
    assert net.image_size == image_size


@pytest.mark.parametrize("image_size", [32, 224])
def test_the_paths_that_a_student_states_name_its_last_layers(image_size: int) -> None:
    net = build(image_size, 7)
    conv, norm = net.get_submodule(net.hosts[-1].conv), net.get_submodule(net.hosts[-1].batch_norm)
    classifier = net.get_submodule(net.classifier_path)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(classifier, nn.Linear)
    assert conv.out_channels == norm.num_features == classifier.in_features == net.taps[-1].channels
    assert classifier.out_features == net.num_classes == 7


@pytest.mark.parametrize("image_size", [32, 224])
def test_logits_are_the_classifier_of_the_extracted_feature(image_size: int) -> None:
    net = randomize(build(image_size, 5).double())
    assert isinstance(net, Student)
    x = noise(2, 3, 65, 71)
    with torch.no_grad():
        pooled = net.extract(x).mean((2, 3))
        classifier = net.get_submodule(net.classifier_path)
        assert torch.allclose(net(x), classifier(pooled), rtol=1e-12)


@pytest.mark.parametrize("image_size", [32, 224])
def test_the_classifier_reads_a_feature_without_negative_values(image_size: int) -> None:
    net = randomize(build(image_size, 5).double())
    assert isinstance(net, Student)
    with torch.no_grad():
        feature = net.extract(noise(2, 3, 65, 71))
    assert feature.min() == 0
    assert feature.max() > 0


def test_torchvision_weights_load_unchanged_and_give_equal_logits() -> None:
    theirs = randomize(torchvision.models.mobilenet_v2(num_classes=100).double().eval())
    ours = build(224).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 3, 96, 111)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("image_size", [32, 224])
def test_fresh_branch_weights_follow_the_law_of_the_fan_out(image_size: int) -> None:
    net, conv = build(image_size), nn.Conv2d(64, 512, 3)
    net.init_branch(conv)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
    assert abs(conv.weight.mean().item()) < 1e-3
