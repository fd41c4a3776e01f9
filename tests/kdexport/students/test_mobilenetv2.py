import torch
import torchvision

from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize


def build(image_size: int, num_classes: int = 100) -> Student:
    return STUDENTS.build("mobilenetv2", num_classes=num_classes, image_size=image_size).eval()


def test_the_groups_of_the_small_form_have_the_published_sizes() -> None:
    groups = [build(32).get_submodule(f"blocks.{i}") for i in range(7)]
    sizes = [sum(p.numel() for p in group.parameters()) for group in groups]
    assert sizes == [608, 4296, 11688, 50464, 80928, 207168, 121760]


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


def test_torchvision_weights_load_unchanged_and_give_equal_logits() -> None:
    theirs = randomize(torchvision.models.mobilenet_v2(num_classes=100).double().eval())
    ours = build(224).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 3, 96, 111)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
