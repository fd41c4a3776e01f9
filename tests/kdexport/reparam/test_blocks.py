import json
from typing import Any, cast

import pytest
import torch
from torch import nn

from kdexport.errors import ConfigError, ReparamError
from kdexport.reparam.blocks import attach_branches, branch_paths
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.spec import BranchSpec, Placement
from kdexport.students import STUDENTS
from tests.kdexport.hostile_values import noise, relative_difference


def test_parallel_branches_are_the_uniform_mean() -> None:
    branches = [nn.Conv2d(3, 4, 3) for _ in range(3)]
    x = noise(2, 3, 7, 9).float()
    expected = sum((branch(x) for branch in branches), torch.zeros(())) / 3
    assert relative_difference(ParallelBranches(branches)(x), expected) < 1e-6


@pytest.mark.parametrize("image_size", [32, 224])
@pytest.mark.parametrize("placement", ["R1", "R2"])
def test_branches_lie_where_they_are_said_to_lie_and_differ(image_size: int, placement: Placement) -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=image_size)
    spec = BranchSpec(placement=placement, num_branches=3, adapter_channels=12)
    attach_branches(net, spec)
    parallel = net.get_submodule(branch_paths(net, spec)["last"])
    assert isinstance(parallel, ParallelBranches)
    weights = [parallel.get_parameter(f"branches.{i}.0.weight") for i in range(3)]
    assert weights[0].shape == (
        (1280, 160 if image_size == 32 else 320, 1, 1) if placement == "R1" else (12, 1280, 1, 1)
    )
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert net.eval()(noise(2, 3, 33, 35).float()).shape == (2, 5)


@pytest.mark.parametrize("count", [-1, 0, 17])
@pytest.mark.parametrize("placement", ["R1", "R2"])
def test_a_branch_count_out_of_range_is_refused(count: int, placement: Placement) -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    with pytest.raises(ConfigError, match=f"{count} branches were asked for; 1 to 16"):
        attach_branches(net, BranchSpec(placement=placement, num_branches=count, adapter_channels=8))


def test_adapters_without_their_channel_count_are_refused() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    with pytest.raises(ConfigError, match="number of channels that its adapters write"):
        attach_branches(net, BranchSpec(placement="R2", num_branches=2))


def test_branches_sit_at_every_stage_or_where_they_are_named() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    hosts = {host.tap: host.conv for host in net.hosts}
    assert list(hosts) == ["stage1", "stage2", "stage3", "stage4", "last"]
    assert branch_paths(net, BranchSpec(placement="R1", num_branches=2)) == {"last": "conv2.0"}
    assert branch_paths(net, BranchSpec(placement="R1", num_branches=2, layers="multi")) == hosts
    named = BranchSpec(placement="R1", num_branches=2, layers=("stage3", "blocks.3.1.conv.3"))
    assert branch_paths(net, named) == {"stage3": hosts["stage3"], "blocks.3.1.conv.3": "blocks.3.1.conv.3"}
    two = BranchSpec(placement="R2", num_branches=2, layers=("stage2", "last"), adapter_channels=8)
    assert branch_paths(net, two) == {"stage2": "adapters.stage2", "last": "adapters.last"}


def test_each_adapter_writes_its_own_number_of_channels_and_its_reader_is_widened() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    attach_branches(
        net,
        BranchSpec(placement="R2", num_branches=2, layers=("stage1", "stage4", "last"), adapter_channels=(7, 9, 11)),
    )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["adapters.stage1.branches.1.0.weight"] == (7, 12, 1, 1)
    assert shapes["blocks.2.0.conv.0.weight"] == (72, 7, 1, 1)
    assert shapes["conv2.0.weight"] == (1280, 9, 1, 1)
    assert shapes["classifier.0.weight"] == (5, 11)
    assert net.eval()(noise(2, 3, 33, 35).float()).shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": "all"}, "cannot be attached at 'all'"),
        ({"layers": ()}, "No layer is named"),
        ({"layers": ("stage1", "stage2", "stage1")}, "stage1 is named twice"),
        ({"layers": ("stage9",)}, "no layer 'stage9' for R1"),
        ({"layers": ("conv2.9",)}, r"no layer 'conv2\.9' for R1"),
        ({"placement": "R2", "layers": ("conv2.0",), "adapter_channels": 8}, r"no layer 'conv2\.0' for R2"),
        ({"layers": ("blocks.1",)}, r"blocks\.1 of mobilenetv2 is not a convolution"),
        (
            {"placement": "R2", "layers": "multi", "adapter_channels": (8, 8)},
            "2 adapter_channels .* for 5 layers",
        ),
    ],
)
def test_layers_that_do_not_exist_or_are_named_twice_are_refused(changes: dict[str, Any], words: str) -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    before = list(net.state_dict())
    with pytest.raises(ConfigError, match=words):
        attach_branches(net, BranchSpec(**{"placement": "R1", "num_branches": 2, **changes}))
    assert list(net.state_dict()) == before


def test_branches_on_branches_are_refused() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    attach_branches(net, BranchSpec(placement="R1", num_branches=2))
    with pytest.raises(ConfigError, match="has branches already"):
        attach_branches(net, BranchSpec(placement="R1", num_branches=2))


def test_an_adapter_in_front_of_a_depthwise_convolution_is_refused_and_changes_nothing() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=224)  # its first block has no 1x1 convolution
    before = list(net.state_dict())
    with pytest.raises(ReparamError, match="32 groups and the adapter has one"):
        attach_branches(net, BranchSpec(placement="R2", num_branches=2, layers=("stem",), adapter_channels=8))
    assert list(net.state_dict()) == before


def test_a_fresh_branch_keeps_geometry_epsilon_and_momentum_of_what_it_replaces() -> None:
    net = STUDENTS.build("mobilenetv2", num_classes=5, image_size=32)
    path = "blocks.3.0.conv.3"  # depthwise, stride 2
    conv, norm = net.get_submodule(path), net.get_submodule("blocks.3.0.conv.4")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    norm.eps, norm.momentum = 0.003, 0.017
    attach_branches(net, BranchSpec(placement="R1", num_branches=3, layers=(path,)))
    parallel = net.get_submodule(path)
    assert isinstance(parallel, ParallelBranches)
    for branch in parallel.branches:
        twin, fresh = cast(tuple[nn.Conv2d, nn.BatchNorm2d], tuple(branch.children()))
        assert (repr(twin), repr(fresh)) == (repr(conv), repr(norm))
        assert (fresh.eps, fresh.momentum) == (0.003, 0.017)
    assert isinstance(net.get_submodule("blocks.3.0.conv.4"), nn.Identity)


@pytest.mark.parametrize(
    "spec",
    [
        BranchSpec(placement="R1", num_branches=16, layers="multi"),
        BranchSpec(placement="R2", num_branches=2, layers=("stage1", "last"), adapter_channels=(5, 7)),
        BranchSpec(placement="R2", num_branches=1, adapter_channels=9),
    ],
)
def test_a_description_survives_json(spec: BranchSpec) -> None:
    assert BranchSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_description_from_before_there_were_layers_means_the_last_one() -> None:
    old = {"placement": "R1", "num_branches": 4, "adapter_channels": None}
    assert BranchSpec.from_json(old) == BranchSpec(placement="R1", num_branches=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"placement": "R3"},
        {"num_branches": True},
        {"num_branches": 2.0},
        {"adapter_channels": []},
        {"adapter_channels": [8, "9"]},
        {"layers": []},
        {"layers": [1]},
        {"layers": 3},
        {"colour": "red"},
    ],
)
def test_a_foreign_description_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        BranchSpec.from_json({"placement": "R1", "num_branches": 4, **changes})
