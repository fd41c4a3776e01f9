"""The contract of every method of distillation."""

import copy
from dataclasses import fields, replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from kdexport.reparam.blocks import attach_branches
from kdexport.students import STUDENTS
from tests.training.small_distillation import CLASSES, COUNT, SIZE, Parts, assemble, batch, distiller_inputs
from training.distillers import DISTILLERS
from training.distillers.distiller import Distiller, StepContext
from training.distillers.settings import settings_model
from training.runs.task import FrozenTeacher

NAMES = DISTILLERS.names()
METHODS = pytest.mark.parametrize("name", NAMES)
TEACHING = pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])


def own(losses: dict[str, Tensor]) -> Tensor:
    """Everything but the cross-entropy, added up."""
    values = [value for name, value in losses.items() if name != "cross_entropy"]
    return torch.stack(values or [torch.zeros(())]).sum()


def untouched(module: nn.Module) -> list[str]:
    """Parameters without a gradient, or with one that is zero everywhere."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]


@cache
def trained(name: str) -> Parts:
    """The parts after two optimiser steps; a test that changes more than running statistics must copy them."""
    parts = assemble(name)
    optimizer = torch.optim.SGD(parts.task.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for seed in range(2):
        optimizer.zero_grad()
        torch.stack(list(parts.step(seed).losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return parts


fresh = cache(assemble)


@METHODS
def test_the_losses_reach_every_trained_parameter(name: str) -> None:
    # In this student no shift is taken out again by a batch norm alone, so that every gradient counts.
    parts = assemble(name, student="shufflenetv2")
    losses = parts.step().losses
    if name != "plain":
        own(losses).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        # Losses of the method alone: cross-entropy has no gradient for its parameters.
        assert untouched(parts.distiller) == []
        assert cast(Tensor, next(parts.student.parameters()).grad).any()
    losses["cross_entropy"].backward()  # type: ignore[no-untyped-call]
    assert untouched(parts.task) == []
    assert {id(p) for p in parts.task.parameters()} == {
        id(p) for part in (parts.student, parts.distiller) for p in part.parameters()
    }


@METHODS
def test_no_step_changes_the_teacher(name: str) -> None:
    # Every call of ``assemble`` builds this teacher; this one has taken no step.
    teacher, before = trained(name).teacher, fresh("plain").teacher.state_dict()
    after = teacher.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


@METHODS
def test_building_a_method_leaves_a_teacher_in_training_as_it_is(name: str) -> None:
    parts = fresh("plain")
    teacher = copy.deepcopy(parts.teacher).train().requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    settings = settings_model(name)(name=name)
    DISTILLERS.build(name, settings=settings, student=parts.student, teacher=teacher)
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    assert not any(module._forward_hooks for module in teacher.modules())


@METHODS
def test_a_student_checkpoint_holds_nothing_of_the_method(name: str) -> None:
    parts = trained(name)
    plain = STUDENTS.build("mobilenetv2", num_classes=CLASSES, image_size=SIZE)
    if parts.spec is not None:
        attach_branches(plain, parts.spec)
    assert list(parts.student.state_dict()) == list(plain.state_dict())
    owned = [*parts.distiller.parameters(), *parts.distiller.buffers()]
    places = {tensor.data_ptr() for tensor in owned if tensor.numel()}
    others = [*parts.student.state_dict().values(), *parts.teacher.state_dict().values()]
    assert places.isdisjoint(tensor.data_ptr() for tensor in others)


@METHODS
def test_a_method_that_is_saved_and_loaded_goes_on_bit_by_bit(name: str) -> None:
    parts, other = trained(name), assemble(name, seed=31)
    state = copy.deepcopy(parts.task.state_dict())
    assert not torch.equal(total(other), total(parts))
    for loaded in (parts, other):
        loaded.task.load_state_dict(copy.deepcopy(state))
    for seed in (5, 6):
        ours, theirs = parts.step(seed).losses, other.step(seed).losses
        assert list(ours) == list(theirs)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def total(parts: Parts) -> Tensor:
    return torch.stack(list(parts.step(5).losses.values())).sum()


@METHODS
def test_all_that_a_method_changes_is_in_its_state(name: str) -> None:
    distiller = trained(name).distiller
    tensors = {*dict(distiller.named_parameters()), *dict(distiller.named_buffers())}
    assert set(distiller.state_dict()) == tensors
    kept = [value for module in distiller.modules() for value in vars(module).values()]
    listed = [item for value in kept if isinstance(value, list | tuple) for item in value]
    assert not any(isinstance(value, Tensor | nn.Module) for value in (*kept, *listed))


@TEACHING
def test_the_weight_and_its_ramp_scale_the_loss(name: str) -> None:
    student, branches, teacher, context = distiller_inputs(trained(name))
    distiller = copy.deepcopy(trained(name).distiller)
    state, default = copy.deepcopy(distiller.state_dict()), distiller.settings

    def loss(epoch: float, weight: float, ramp_epochs: float) -> float:
        changes = {"weight": weight * default.weight, "ramp_epochs": ramp_epochs}
        distiller.settings = default.model_copy(update=changes)
        # A memory changes in every pass, and random draws are made again.
        distiller.load_state_dict(state)
        torch.manual_seed(0)
        with torch.no_grad():
            return own(distiller(student, branches, teacher, at(context, epoch))).item()

    whole = loss(7.0, 1.0, 0.0)
    assert whole > 1e-4
    assert loss(7.0, 0.0, 0.0) == 0
    assert loss(0.0, 1.0, 0.0) == pytest.approx(whole, rel=1e-6)
    assert loss(7.0, 3.0, 0.0) == pytest.approx(3 * whole, rel=1e-5)
    for epoch, share in ((0.0, 0.0), (2.0, 0.25), (7.0, 0.875), (8.0, 1.0), (300.0, 1.0)):
        assert loss(epoch, 2.0, 8.0) == pytest.approx(2 * share * whole, rel=1e-5), epoch


def at(context: StepContext, epoch: float) -> StepContext:
    return replace(context, epoch=torch.tensor(epoch))


@METHODS
def test_bf16_and_images_of_any_magnitude_leave_losses_and_gradients_finite(name: str) -> None:
    parts = assemble(name)
    frozen = FrozenTeacher(parts.teacher, torch.device("cpu"), torch.bfloat16)
    images, context = batch(3, parts.spec)
    images = images * torch.tensor([1e4, 1.0, 0.0, 1e-6, 30.0, -1e4]).reshape(COUNT, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = parts.task(images, frozen(images), context).losses
    for value in losses.values():
        assert value.dtype == torch.float32
        assert value.isfinite()
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parts.task.parameters())


@METHODS
def test_a_step_never_waits_for_the_device(name: str) -> None:
    # Tensors on the meta device have no values: reading one, or branching on it, raises.
    told = distiller_inputs(trained(name))
    losses = copy.deepcopy(trained(name).distiller).to("meta")(*(on_meta(item) for item in told))
    assert all(value.shape == () for value in losses.values())


def on_meta(item: Any) -> Any:
    """``item`` and all tensors in it on the meta device, which has no values."""
    if isinstance(item, Tensor):
        return item.to("meta")
    if isinstance(item, dict):
        return {key: on_meta(value) for key, value in item.items()}
    if isinstance(item, list):
        return [on_meta(value) for value in item]
    if item is None:
        return None
    return replace(item, **{field.name: on_meta(getattr(item, field.name)) for field in fields(item)})


@METHODS
def test_a_method_takes_the_settings_of_its_name(name: str) -> None:
    distiller: Distiller = trained(name).distiller
    assert type(distiller.settings) is settings_model(name)
    assert distiller.settings.name == name
