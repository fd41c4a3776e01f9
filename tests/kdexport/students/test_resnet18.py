import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize


def build(image_size: int) -> Student:
    return STUDENTS.build("resnet18", num_classes=100, image_size=image_size).eval()


def public_names() -> list[str]:
    """The entries of a public CIFAR ResNet-18, in its order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{key}" for key in norm)]
    for stage in range(1, 5):
        for block in range(2):
            path = f"layer{stage}.{block}"
            for index in (1, 2):
                names += [f"{path}.conv{index}.weight", *(f"{path}.bn{index}.{key}" for key in norm)]
            if stage > 1 and block == 0:
                names += [f"{path}.shortcut.0.weight", *(f"{path}.shortcut.1.{key}" for key in norm)]
    return [*names, "linear.weight", "linear.bias"]


def conv_bn(state: dict[str, Tensor], conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
    weight = state[f"{conv}.weight"]
    out = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
    shift, gain = (state[f"{norm}.{key}"].view(-1, 1, 1) for key in ("running_mean", "weight"))
    return (out - shift) / (state[f"{norm}.running_var"].view(-1, 1, 1) + 1e-5).sqrt() * gain + state[
        f"{norm}.bias"
    ].view(-1, 1, 1)


def test_the_small_form_has_the_names_of_public_checkpoints() -> None:
    state = build(32).state_dict()
    assert list(state) == public_names()
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer3.0.shortcut.0.weight"].shape == (256, 128, 1, 1)
    assert state["linear.weight"].shape == (100, 512)


def test_the_small_form_is_the_public_network() -> None:
    net, x = randomize(build(32).double()), noise(2, 3, 32, 32)
    state = net.state_dict()
    with torch.no_grad():
        logits = net(x)
        x = conv_bn(state, "conv1", "bn1", x, 1).clamp(min=0)
        for stage in range(1, 5):
            for block in range(2):
                path, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                deep = conv_bn(state, f"{path}.conv1", f"{path}.bn1", x, stride).clamp(min=0)
                deep = conv_bn(state, f"{path}.conv2", f"{path}.bn2", deep, 1)
                if f"{path}.shortcut.0.weight" in state:
                    x = conv_bn(state, f"{path}.shortcut.0", f"{path}.shortcut.1", x, stride)
                x = (x + deep).clamp(min=0)
        expected = x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    assert torch.allclose(logits, expected, rtol=1e-10)


def test_torchvision_weights_load_unchanged_and_give_equal_logits() -> None:
    theirs = randomize(torchvision.models.resnet18(num_classes=100).eval())
    ours = build(224)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 3, 96, 111).float()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_taps_of_the_imagenet_form_are_those_of_torchvision() -> None:
    net, theirs, x = build(224), torchvision.models.resnet18(num_classes=100).eval(), noise(1, 3, 64, 64).float()
    randomize(theirs)
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        tapped = net.tapped(x)
        x = theirs.relu(theirs.bn1(theirs.conv1(x)))
        assert torch.equal(tapped.features["stem"], x)
        x = theirs.maxpool(x)
        for index in range(1, 5):
            x = theirs.get_submodule(f"layer{index}")(x)
            assert torch.equal(tapped.features[f"stage{index}"], x)
