"""The task of a distillation run: what it measures beside its losses."""

import copy
import weakref
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from kdexport.reparam.branches import ParallelBranches
from tests.training.small_distillation import assemble, batch
from training.distillers.branched import LayerMatch


def test_a_task_measures_its_student_in_evaluation_mode_and_changes_nothing() -> None:
    parts = assemble("kdiffusion", layers="multi", num_branches=3)
    parts.task.train()
    images, _ = batch(0)
    before, random = copy.deepcopy(parts.task.state_dict()), torch.get_rng_state()
    measured = parts.task.diversity(images, parts.frozen(images))
    assert all(module.training for module in parts.task.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in parts.task.state_dict().items())
    # The deepest layer, by hand: each branch of the student behind the bridge.
    parts.task.eval()
    seen: list[Tensor] = []
    host = cast(ParallelBranches, parts.student.get_submodule("conv2.0"))
    host.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        parts.student(images)
        match = cast(LayerMatch, parts.distiller.layers["last"])  # type: ignore[index]
        target = (parts.frozen(images).features["stage3"] - match.teacher_mean) / match.teacher_std
        target = nn.functional.adaptive_avg_pool2d(target, 1)
        errors = [(match.bridge(branch(seen[0])) - target).square().mean().item() for branch in host.branches]
    found = [measured[f"last/squared_error/branch{index + 1}"] for index in range(3)]
    assert found == pytest.approx(errors, rel=1e-4)
    assert parts.task.diversity(images, parts.frozen(images)) == measured


def test_evaluation_keeps_no_features_of_branches() -> None:
    parts = assemble("average")
    images, _ = batch(0)
    kept: list[weakref.ref[Tensor]] = []
    first = cast(ParallelBranches, parts.student.get_submodule("conv2.0")).branches[0]
    first.register_forward_hook(lambda _module, _inputs, output: kept.append(weakref.ref(output)))
    for mode in (True, False):
        parts.student.train(mode)
        with torch.no_grad():
            parts.student(images)
    assert [reference() for reference in kept] == [None, None]


def test_only_branches_can_differ() -> None:
    parts = assemble("kd")
    images, _ = batch(0)
    with pytest.raises(TypeError, match="KD has no branches"):
        parts.task.diversity(images, parts.frozen(images))
