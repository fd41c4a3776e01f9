"""Branches that are computed together against the layer itself, in float64."""

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from kdexport.reparam.branches import ParallelBranches
from training.runs.joint_branches import branches_together, joinable


def branch(groups: int = 1, outputs: int = 12, *, bias: bool = False, momentum: float | None = 0.3) -> nn.Sequential:
    conv = nn.Conv2d(6, outputs, 3, 2, 1, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps=0.02, momentum=momentum))


def layer_of(count: int, make: Callable[[], nn.Module] = branch) -> ParallelBranches:
    """Branches with random weights, statistics and counts."""
    torch.manual_seed(3)
    layer = ParallelBranches([make() for _ in range(count)]).double()
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                if value is not None:
                    nn.init.uniform_(value, 0.4, 2.5)
    return layer.to(memory_format=torch.channels_last)


def images() -> Tensor:
    values = torch.randn(5, 6, 7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values.contiguous(memory_format=torch.channels_last)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def watched(layer: ParallelBranches) -> tuple[Tensor, list[Tensor], Tensor]:
    """What ``layer`` and its branches write, and the gradient of its input; parameters get theirs."""
    outputs: list[Tensor] = []
    for part in layer.branches:
        part.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    x = images().requires_grad_()
    written = layer(x)
    # Unlike in every element, and the branches count apart from their mean.
    weights = torch.linspace(-1, 2, written.numel(), dtype=torch.float64).reshape(written.shape)
    loss = (written * weights).sum() + sum((index + 1) * (part**3).mean() for index, part in enumerate(outputs))
    loss.backward()
    assert x.grad is not None
    return written.detach(), [output.detach() for output in outputs], x.grad


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 12), (3, 12), (6, 6), (6, 12)])
@pytest.mark.parametrize("bias", [False, True])
def test_branches_write_and_learn_together_what_they_do_alone(
    count: int, groups: int, outputs: int, bias: bool
) -> None:
    alone = layer_of(count, lambda: branch(groups, outputs, bias=bias))
    joint = copy.deepcopy(alone)
    assert joinable(joint)
    expected, apart, gradient = watched(alone)
    with branches_together([joint]):
        found, parts, own = watched(joint)
    for one, other in ((found, expected), (own, gradient), *zip(parts, apart, strict=True)):
        close(one, other)
    assert len(parts) == count
    for (name, value), other in zip(joint.named_parameters(), alone.parameters(), strict=True):
        assert value.grad is not None, name
        assert other.grad is not None, name
        # A bias before a batch norm has a gradient of rounding errors only.
        if not (name.endswith("0.bias") and name.count(".") == 3):
            close(value.grad, other.grad)
    for (name, buffer), kept in zip(joint.named_buffers(), alone.buffers(), strict=True):
        close(buffer, kept)
        assert not name.endswith("tracked") or buffer == 1


def test_after_the_block_a_layer_computes_its_branches_one_by_one() -> None:
    layer, calls = layer_of(3), list[object]()
    with branches_together([layer]):
        layer(images())
    layer.branches[1].register_forward_pre_hook(lambda *_: calls.append(1))
    layer(images())
    assert calls == [1]
    assert "forward" not in layer.__dict__


def test_batch_norms_whose_count_is_kept_elsewhere_are_not_counted() -> None:
    layer = layer_of(2)
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.num_batches_tracked = None
    with branches_together([layer]):
        layer(images())
    assert all(norm.num_batches_tracked is None for norm in layer.modules() if isinstance(norm, nn.BatchNorm2d))


def other_padding() -> nn.Module:
    made = branch()
    cast(nn.Conv2d, made[0]).padding_mode = "reflect"
    return made


def watched_inside() -> nn.Module:
    made = branch()
    made[0].register_forward_hook(lambda *_: None)
    return made


class Scaled(nn.Conv2d):
    """A convolution of another class may compute something else."""


UNLIKE: dict[str, list[Callable[[], nn.Module]]] = {
    "one branch": [branch],
    "a bare convolution": [lambda: nn.Conv2d(6, 12, 3, 2, 1)] * 2,
    "another class": [lambda: nn.Sequential(Scaled(6, 12, 3, 2, 1), nn.BatchNorm2d(12))] * 2,
    "three parts": [lambda: nn.Sequential(*branch(), nn.ReLU())] * 2,
    "a mean over all batches": [lambda: branch(momentum=None)] * 2,
    "no statistics": [lambda: nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, track_running_stats=False))] * 2,
    "no scale": [lambda: nn.Sequential(nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12, affine=False))] * 2,
    "padding by reflection": [other_padding] * 2,
    "a hook inside": [branch, watched_inside],
    "other momenta": [branch, lambda: branch(momentum=0.2)],
    "other groups": [branch, lambda: branch(3)],
    "one bias": [branch, lambda: branch(bias=True)],
}


@pytest.mark.parametrize("name", UNLIKE)
def test_branches_of_other_forms_are_not_joined(name: str) -> None:
    made = iter(UNLIKE[name])
    assert not joinable(layer_of(len(UNLIKE[name]), lambda: next(made)()))
