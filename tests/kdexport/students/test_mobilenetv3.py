import pytest
import torch
import torchvision
from torch import nn

from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.students.student_forms import multiply_accumulates

# Kernel, expanded channels, output channels, squeeze-and-excitation, stride: Table 2 of the paper, the first stride
# taken away, and with the stem's one too the 32x32 form.
SMALL = [
    (3, 16, 16, True, 1),
    (3, 72, 24, False, 2),
    (3, 88, 24, False, 1),
    (5, 96, 40, True, 2),
    (5, 240, 40, True, 1),
    (5, 240, 40, True, 1),
    (5, 120, 48, True, 1),
    (5, 144, 48, True, 1),
    (5, 288, 96, True, 2),
    (5, 576, 96, True, 1),
    (5, 576, 96, True, 1),
]


def build(image_size: int, num_classes: int = 100) -> Student:
    return STUDENTS.build("mobilenetv3", num_classes=num_classes, image_size=image_size).eval()


def torchvisions(image_size: int) -> nn.Module:
    make = {32: torchvision.models.mobilenet_v3_small, 224: torchvision.models.mobilenet_v3_large}[image_size]
    net: nn.Module = make(num_classes=100).eval()
    return net


def squeezed(channels: int) -> int:
    """A quarter of the channels, rounded to a multiple of eight, not down by more than a tenth."""
    rounded = max(8, (channels // 4 + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * (channels // 4) else rounded


def arithmetic() -> tuple[int, int]:
    """Parameters and multiply-accumulates of the 32x32 form at 100 classes, from the table."""
    side, inputs = 32, 16
    parameters, macs = 27 * 16 + 2 * 16, 27 * 16 * side**2
    for kernel, expanded, outputs, squeeze, stride in SMALL:
        if expanded != inputs:
            parameters += inputs * expanded + 2 * expanded
            macs += inputs * expanded * side**2
        side //= stride
        parameters += kernel**2 * expanded + 2 * expanded + expanded * outputs + 2 * outputs
        macs += (kernel**2 * expanded + expanded * outputs) * side**2
        if squeeze:
            parameters += 2 * expanded * squeezed(expanded) + expanded + squeezed(expanded)
            macs += 2 * expanded * squeezed(expanded)
        inputs = outputs
    parameters += 96 * 576 + 2 * 576 + 576 * 1024 + 1024 + 1024 * 100 + 100
    macs += 96 * 576 * side**2 + 576 * 1024 + 1024 * 100
    return parameters, macs


def test_the_small_form_has_the_size_that_its_table_gives() -> None:
    net = build(32)
    parameters, macs = arithmetic()
    assert sum(p.numel() for p in net.parameters()) == parameters == 1_620_356
    assert multiply_accumulates(net, noise(1, 3, 32, 32).float()) == macs == 17_599_488


def test_the_small_form_is_torchvisions_small_but_for_two_strides() -> None:
    ours, theirs = (net.get_submodule("features") for net in (build(32), torchvisions(32)))
    changed = {}
    for (name, a), (other, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert name == other
        assert type(a) is type(b)
        if isinstance(a, nn.Conv2d) and str(a) != str(b):
            assert str(a) == str(b).replace("stride=(2, 2)", "stride=(1, 1)")
            changed[name] = a.stride
    assert changed == {"0.0": (1, 1), "1.block.0.0": (1, 1)}


def test_the_small_form_equals_torchvision_from_its_first_stage_on() -> None:
    theirs, net = torchvisions(32), build(32)
    randomize(theirs)
    net.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        tapped = net.tapped(noise(2, 3, 40, 33).float())
        x = tapped.features["stage1"].clone()
        for layer in list(theirs.get_submodule("features").children())[2:]:
            x = layer(x)
        assert torch.equal(tapped.last, x)
        assert torch.equal(tapped.logits, theirs.get_submodule("classifier")(x.mean((2, 3))))


@pytest.mark.parametrize("image_size", [32, 224])
def test_torchvision_weights_load_unchanged(image_size: int) -> None:
    theirs, ours = torchvisions(image_size), build(image_size)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_torchvision_weights_give_equal_logits_at_imagenet_sizes() -> None:
    theirs, ours, x = torchvisions(224), build(224), noise(2, 3, 96, 111).float()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("image_size", "ends"), [(32, (0, 1, 3, 8, 11, 12)), (224, (0, 3, 6, 12, 15, 16))])
def test_the_taps_are_the_deepest_features_of_their_sizes(image_size: int, ends: tuple[int, ...]) -> None:
    net, outputs, x = build(image_size), [], noise(1, 3, 64, 64).float()
    randomize(net)
    with torch.no_grad():
        tapped = net.tapped(x)
        for layer in net.get_submodule("features").children():
            x = layer(x)
            outputs.append(x)
    for tap, end in zip(net.taps, ends, strict=True):
        assert torch.equal(tapped.features[tap.name], outputs[end])
    sizes = [output.shape[2] for output in outputs]
    stages = [end for end in ends[1:-1] if sizes[end + 1] != sizes[end]]
    assert stages == [*ends[1:-2]]


@pytest.mark.parametrize("image_size", [32, 224])
def test_the_pooled_vector_has_passed_the_hidden_layer(image_size: int) -> None:
    net = build(image_size).double()
    randomize(net)
    hidden = net.get_submodule("classifier.0")
    with torch.no_grad():
        tapped = net.tapped(noise(2, 3, 65, 43))
        x = tapped.last.mean((2, 3)) @ hidden.get_parameter("weight").T + hidden.get_parameter("bias")
    assert torch.allclose(tapped.pooled, x * (x + 3).clamp(0, 6) / 6, rtol=1e-12, atol=1e-12)


def test_dropout_leaves_the_pooled_vector_of_a_training_pass_as_it_was() -> None:
    net = build(32).train()
    tapped = net.tapped(noise(4, 3, 32, 32).float())
    before = net.get_submodule("classifier.2")
    assert isinstance(before, nn.Dropout)
    assert before.p == 0.2
    # A hard swish of noise is hardly ever exactly zero; a dropped entry is.
    assert (tapped.pooled == 0).sum() < 0.05 * tapped.pooled.numel()


@pytest.mark.parametrize("image_size", [32, 224])
def test_batch_norms_keep_the_constants_of_the_architecture(image_size: int) -> None:
    norms = [m for m in build(image_size).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 1e-2)}
