"""What holds for every student in both forms; what holds for one family is in the file of that family."""

import copy
import functools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.config import find_config, load_config
from kdexport.reparam.structure import batch_norm_after
from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.students.published_facts import FACTS, FORMS
from tests.kdexport.students.student_forms import ODD_SIZES, every_form, multiply_accumulates

ACTIVATIONS = {
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


def build(name: str, image_size: int, num_classes: int = 100) -> Student:
    return STUDENTS.build(name, num_classes=num_classes, image_size=image_size).eval()


@functools.cache
def _hostile(name: str, image_size: int) -> Student:
    net = randomize(build(name, image_size, 7).double(), seed=3)
    assert isinstance(net, Student)
    return net


def hostile(name: str, image_size: int) -> Student:
    """A float64 student of seven classes whose batch norms are no identities; a copy that a test may change."""
    return copy.deepcopy(_hostile(name, image_size))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_both_forms_of_every_student_have_facts() -> None:
    assert {name for name, _ in FACTS} == set(STUDENTS.names())
    assert sorted((name, size) for name in STUDENTS.names() for size in (32, 224)) == FORMS


@pytest.mark.parametrize("name", STUDENTS.names())
def test_each_student_comes_with_a_configuration(name: str, tmp_path: Path) -> None:
    path = find_config(name, tmp_path)
    assert path is not None
    assert load_config(path).student == name


@every_form
def test_the_size_is_the_published_one(name: str, image_size: int) -> None:
    net, facts = build(name, image_size), FACTS[name, image_size]
    assert parameters(net) == facts.parameters
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == facts.convs
    assert sum(isinstance(m, _BatchNorm) for m in net.modules()) == facts.batch_norms
    assert len(net.state_dict()) == facts.entries


@every_form
def test_the_multiply_accumulates_are_the_published_ones(name: str, image_size: int) -> None:
    facts = FACTS[name, image_size]
    macs = multiply_accumulates(build(name, image_size), noise(1, 3, image_size, image_size).float()) / 1e6
    assert abs(macs - facts.macs) <= facts.macs_digit / 2


@every_form
@pytest.mark.parametrize("num_classes", [1000])
def test_only_the_classifier_depends_on_the_number_of_classes(name: str, image_size: int, num_classes: int) -> None:
    facts = FACTS[name, image_size]
    assert parameters(build(name, image_size, num_classes)) == facts.parameters - (facts.reader + 1) * (
        100 - num_classes
    )


@pytest.mark.parametrize("name", STUDENTS.names())
@pytest.mark.parametrize(("image_size", "form"), [(127, 32), (128, 224)])
def test_the_form_follows_the_image_size(name: str, image_size: int, form: int) -> None:
    net, facts = build(name, image_size), FACTS[name, form]
    assert net.image_size == image_size
    assert net.name == name
    assert parameters(net) == facts.parameters
    assert {tap.name: (tap.channels, tap.stride) for tap in net.taps} == facts.taps


@every_form
def test_the_taps_are_the_published_ones_and_stages_leave_out_stem_and_last(name: str, image_size: int) -> None:
    net, facts = build(name, image_size), FACTS[name, image_size]
    assert [(tap.name, (tap.channels, tap.stride)) for tap in net.taps] == list(facts.taps.items())
    assert [tap.name for tap in net.stages] == [tap for tap in facts.taps if tap not in ("stem", "last")]


@pytest.mark.parametrize(
    ("name", "image_size", "height", "width"),
    [
        (name, form, *size)
        for name, form in FORMS
        for size in {32: [(32, 32), (64, 45)], 224: [(224, 224), (128, 131)]}[form]
    ],
)
def test_each_tap_has_the_channels_and_the_stride_that_it_states(
    name: str, image_size: int, height: int, width: int
) -> None:
    net = build(name, image_size, 7)
    with torch.no_grad():
        tapped = net.tapped(noise(1, 3, height, width).float())
    assert list(tapped.features) == list(tapped.preactivations) == [tap.name for tap in net.taps]
    for tap in net.taps:
        shape = (1, tap.channels, math.ceil(height / tap.stride), math.ceil(width / tap.stride))
        assert tapped.features[tap.name].shape == tapped.preactivations[tap.name].shape == shape
    assert tapped.pooled.shape == (1, FACTS[name, image_size].reader)
    assert tapped.logits.shape == (1, 7)


@every_form
@pytest.mark.parametrize("training", [False, True])
def test_a_feature_is_the_activation_of_what_lies_before_it(name: str, image_size: int, training: bool) -> None:
    net = hostile(name, image_size).train(training)
    tapped = net.tapped(noise(2, 3, *ODD_SIZES[image_size]))
    for tap, feature in tapped.features.items():
        before = tapped.preactivations[tap]
        kind = FACTS[name, image_size].activations.get(tap)
        expected = before if kind is None else ACTIVATIONS[kind](before)
        assert torch.allclose(feature, expected, rtol=1e-12, atol=1e-12)
        # An activation in place would have left no negative value, and the comparison would prove nothing.
        assert before.min() < -0.1 * before.abs().max()


@every_form
def test_training_reaches_every_parameter(name: str, image_size: int) -> None:
    net, x = hostile(name, image_size).float().train(), noise(4, 3, *ODD_SIZES[image_size]).float()
    torch.autograd.backward(functional.cross_entropy(net(x), torch.tensor([0, 3, 6, 2])))
    assert [path for path, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_form
def test_logits_are_the_classifier_of_the_pooled_last_feature(name: str, image_size: int) -> None:
    net, x = _hostile(name, image_size), noise(2, 3, *ODD_SIZES[image_size])
    classifier = net.get_submodule(net.classifier_path)
    assert isinstance(classifier, nn.Linear)
    assert (classifier.in_features, classifier.out_features) == (FACTS[name, image_size].reader, 7)
    with torch.no_grad():
        tapped, logits = net.tapped(x), net(x)
        expected = tapped.pooled @ classifier.weight.T + classifier.bias
        assert torch.equal(net.extract(x), tapped.last)
        assert torch.equal(tapped.last, tapped.features[net.taps[-1].name])
        for found in (tapped.logits, net.classify(tapped.last), net.predict(tapped.pooled), expected):
            assert torch.allclose(found, logits, rtol=1e-12, atol=1e-12)
        # The pooled vector does not depend on positions.
        turned = net.pool(tapped.last.flip(2, 3))
        assert torch.allclose(turned, tapped.pooled, rtol=1e-12, atol=1e-12)


@every_form
def test_each_stage_and_the_end_of_the_features_has_a_host(name: str, image_size: int) -> None:
    net = _hostile(name, image_size)
    assert [host.tap for host in net.hosts] == [tap for tap in FACTS[name, image_size].taps if tap != "stem"]
    for host in net.hosts:
        conv, norm = net.get_submodule(host.conv), net.get_submodule(host.batch_norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert conv.bias is None
        assert conv.out_channels == norm.num_features
        assert batch_norm_after(net, host.conv) == host.batch_norm


@every_form
def test_a_host_writes_its_tap_before_the_activation_and_nothing_between(name: str, image_size: int) -> None:
    net, x = _hostile(name, image_size), noise(2, 3, *ODD_SIZES[image_size])
    with torch.no_grad():
        before = net.tapped(x)
        for host in net.hosts:
            changed = copy.deepcopy(net)
            norm = changed.get_submodule(host.batch_norm)
            assert isinstance(norm, nn.BatchNorm2d)
            norm.bias.add_(5.0)
            after = changed.tapped(x)
            difference = after.preactivations[host.tap] - before.preactivations[host.tap]
            moved = (difference - 5.0).abs().amax((0, 2, 3)) < 1e-9
            assert moved.sum() == norm.num_features
            assert not difference[:, ~moved].any()
            earlier = [tap.name for tap in net.taps][: [tap.name for tap in net.taps].index(host.tap)]
            assert all(torch.equal(after.features[tap], before.features[tap]) for tap in earlier)


@every_form
def test_fresh_branch_weights_follow_the_initialisation_of_the_architecture(name: str, image_size: int) -> None:
    net, conv = build(name, image_size), nn.Conv2d(48, 512, 3, groups=2)
    net.init_branch(conv)
    fan_in, fan_out = 24 * 9, 512 * 9
    if FACTS[name, image_size].law == "default":
        assert conv.weight.abs().max().item() <= fan_in**-0.5
        assert conv.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
    else:
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert abs(conv.weight.mean().item()) < 1e-3


@every_form
def test_a_fresh_student_has_weights_of_the_same_initialisation(name: str, image_size: int) -> None:
    net = build(name, image_size)
    for host in net.hosts:
        conv = net.get_submodule(host.conv)
        assert isinstance(conv, nn.Conv2d)
        fan_in = conv.weight[0].numel()
        variance = 1 / (3 * fan_in) if FACTS[name, image_size].law == "default" else 2 / conv.out_channels
        assert conv.kernel_size in ((1, 1), (3, 3))
        variance /= conv.kernel_size[0] ** 2 if FACTS[name, image_size].law == "fan_out" else 1
        # Four standard errors of the deviation of so many draws.
        assert conv.weight.std().item() == pytest.approx(variance**0.5, rel=4 / (2 * conv.weight.numel()) ** 0.5)
