"""Branches on every student, and their merge into the plain network."""

import functools
import re

import pytest
import torch
from torch import nn

from kdexport.errors import ReparamError
from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.spec import BranchSpec
from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import noise, randomize
from tests.kdexport.reparam.plain_network import assert_equal_outputs, assert_plain, flops
from tests.kdexport.students.published_facts import FACTS, FORMS
from tests.kdexport.students.student_forms import ODD_SIZES, every_form

SPECS = {
    "without branches": None,
    "R1 single": BranchSpec(placement="R1", num_branches=3),
    "R1 multi": BranchSpec(placement="R1", num_branches=2, layers="multi"),
    "R2 single": BranchSpec(placement="R2", num_branches=3, adapter_channels=37),
}
# The stem, strided and grouped, depthwise with 3x3 and 5x5 kernels, before squeeze-and-excitation, without activation,
# a shortcut.
CONVOLUTIONS = [
    ("mobilenetv2", 32, ("conv1.0", "blocks.2.0.conv.3")),
    ("mobilenetv3", 32, ("features.0.0", "features.2.block.0.0", "features.4.block.1.0")),
    ("resnet18", 32, ("layer1.0.conv1", "layer2.0.shortcut.0")),
    ("shufflenetv1", 32, ("layer1.0.conv2", "layer2.0.conv1", "layer3.0.conv3")),
    ("shufflenetv2", 32, ("layer1.0.conv1", "layer2.0.conv5", "layer2.1.conv2")),
    ("shufflenetv2", 224, ("stage3.0.branch1.0", "stage2.1.branch2.3")),
]


@functools.cache
def plain(name: str, image_size: int) -> Student:
    net = randomize(STUDENTS.build(name, num_classes=7, image_size=image_size).double().eval())
    assert isinstance(net, Student)
    return net


def branched(name: str, image_size: int, spec: BranchSpec | None) -> Student:
    """A float64 student in evaluation mode, its branches and batch norms hostile."""
    net = STUDENTS.build(name, num_classes=7, image_size=image_size)
    if spec is not None:
        attach_branches(net, spec)
    randomize(net.double().eval(), seed=5)
    return net


def assert_merges(name: str, image_size: int, net: Student) -> nn.Module:
    """Certified at one odd size, exact at another, and then the plain network; returns what is merged."""
    height, width = ODD_SIZES[image_size]
    x = noise(2, 3, width, height)
    result = fuse_student(net, input_shape=(2, 3, height, width))
    assert_equal_outputs(result.module, net, x)
    assert_plain(result.module, plain(name, image_size), x)
    assert len(result.certificate.blocks) >= FACTS[name, image_size].batch_norms
    return result.module


@pytest.mark.parametrize("name", STUDENTS.names())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_small_student_merges_exactly_into_the_plain_one(name: str, spec: BranchSpec | None) -> None:
    net, x = branched(name, 32, spec), noise(1, 3, *ODD_SIZES[32])
    merged = assert_merges(name, 32, net)
    assert flops(merged, x) == flops(plain(name, 32), x)
    # The counts differ in either direction: three narrow adapters cost less than they save in the classifier.
    assert spec is None or flops(net, x) != flops(merged, x)


@pytest.mark.parametrize("name", STUDENTS.names())
def test_an_imagenet_student_merges_exactly_into_the_plain_one(name: str) -> None:
    assert_merges(name, 224, branched(name, 224, BranchSpec(placement="R1", num_branches=2, layers="multi")))


def test_sixteen_grouped_branches_merge_exactly() -> None:
    assert_merges("shufflenetv1", 32, branched("shufflenetv1", 32, BranchSpec(placement="R1", num_branches=16)))


@pytest.mark.parametrize(("name", "image_size", "paths"), CONVOLUTIONS)
def test_branches_in_place_of_any_convolution_merge_exactly(name: str, image_size: int, paths: tuple[str, ...]) -> None:
    net = branched(name, image_size, BranchSpec(placement="R1", num_branches=3, layers=paths))
    for path in paths:
        assert isinstance(net.get_submodule(path), ParallelBranches)
    assert_merges(name, image_size, net)


@every_form
def test_adapters_are_placed_exactly_at_the_taps_from_which_they_fold(name: str, image_size: int) -> None:
    facts, net = FACTS[name, image_size], STUDENTS.build(name, num_classes=7, image_size=image_size)
    state = list(net.state_dict())
    for tap, reason in facts.refusals.items():
        with pytest.raises(ReparamError, match=rf"adapters?\.{tap}\b") as caught:
            attach_branches(net, BranchSpec(placement="R2", num_branches=2, adapter_channels=9, layers=(tap,)))
        assert re.search(reason, str(caught.value))
        assert "R1" in caught.value.remedy
        assert list(net.state_dict()) == state
    legal = tuple(tap for tap in facts.taps if tap not in facts.refusals)
    widths = tuple(10 + 3 * index for index in range(len(legal)))
    spec = BranchSpec(placement="R2", num_branches=1, adapter_channels=widths, layers=legal)
    assert_merges(name, image_size, branched(name, image_size, spec))


@every_form
def test_branches_have_the_shape_of_their_host_and_fresh_weights(name: str, image_size: int) -> None:
    net = STUDENTS.build(name, num_classes=7, image_size=image_size)
    hosts = {host.tap: (net.get_submodule(host.conv), net.get_submodule(host.batch_norm)) for host in net.hosts}
    attach_branches(net, BranchSpec(placement="R1", num_branches=2, layers="multi"))
    for host in net.hosts:
        parallel, (conv, norm) = net.get_submodule(host.conv), hosts[host.tap]
        assert isinstance(parallel, ParallelBranches)
        assert type(net.get_submodule(host.batch_norm)) is nn.Identity
        first, second = parallel.branches
        assert str(first) == str(second) == str(nn.Sequential(conv, norm))
        for branch in (first, second):
            assert not torch.equal(branch.get_parameter("0.weight"), conv.get_parameter("weight"))
        assert not torch.equal(first.get_parameter("0.weight"), second.get_parameter("0.weight"))


def test_a_convolution_without_batch_norm_takes_no_branches() -> None:
    net = STUDENTS.build("mobilenetv3", num_classes=7, image_size=32)
    squeeze = "features.1.block.1.fc1"
    with pytest.raises(ReparamError, match=rf"No batch norm alone reads the output of {re.escape(squeeze)}"):
        attach_branches(net, BranchSpec(placement="R1", num_branches=2, layers=(squeeze,)))


@pytest.mark.parametrize(("name", "image_size"), [form for form in FORMS if form[0] == "mobilenetv3"])
def test_adapters_before_a_hidden_layer_leave_the_classifier_as_it_is(name: str, image_size: int) -> None:
    net = STUDENTS.build(name, num_classes=7, image_size=image_size)
    classifier = net.get_submodule(net.classifier_path)
    attach_branches(net, BranchSpec(placement="R2", num_branches=2, adapter_channels=9))
    assert net.get_submodule(net.classifier_path) is classifier
    hidden = net.get_submodule("classifier.0")
    assert isinstance(hidden, nn.Linear)
    assert hidden.in_features == 9
