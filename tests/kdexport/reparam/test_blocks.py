import pytest
import torch
from torch import nn

from kdexport.errors import ConfigError
from kdexport.reparam.blocks import ParallelBranches, attach_branches, branch_paths
from kdexport.reparam.spec import BranchSpec, Placement
from kdexport.students import STUDENTS
from tests.kdexport.hostile import noise, relative_difference


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
