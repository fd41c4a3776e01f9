"""Folds a trained student into the plain network that is exported, and certifies that nothing changed."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdexport.errors import ReparamError
from kdexport.reparam.algebra import AnyBatchNorm, compose_pointwise_linear, fold_batch_norm, merge_branches
from kdexport.reparam.blocks import ParallelBranches
from kdexport.reparam.certificate import BlockCertificate, Certificate, hostile_input, relative_error
from kdexport.reparam.structure import (
    ComposeAdapters,
    FoldPair,
    MergeBranches,
    Step,
    branch_layers,
    find_steps,
    trace,
)
from kdexport.students.student import Student


@dataclass(frozen=True, slots=True)
class FusedStudent:
    """The plain network, in the type and on the device of the original, and the proof that it computes the same."""

    module: nn.Module
    certificate: Certificate


def fuse_student(student: nn.Module, *, input_shape: tuple[int, ...] | None = None) -> FusedStudent:
    """Fold every batch norm and merge every branch of an eval-mode ``student``, on a copy, in float64.

    The copy has no batch norm and no branch left; weights are rounded once, to the student's type. ``input_shape`` is
    the (N,C,H,W) that the certificate is computed on; a ``Student`` knows its own. Raises ``ReparamError`` for what
    cannot be folded exactly and ``CertificateError`` should the result differ.
    """
    steps = find_steps(student)
    original = copy.deepcopy(student).cpu().double()
    fused = copy.deepcopy(original)
    for step in steps:
        _apply(fused, step)
    certificate = _certify(original, fused, steps, input_shape or _input_shape(student))
    certificate.require()
    reference = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
    return FusedStudent(fused.to(device=reference.device, dtype=reference.dtype).eval(), certificate)


def _apply(module: nn.Module, step: Step) -> None:
    if isinstance(step, FoldPair):
        layer = module.get_submodule(step.layer)
        batch_norm = cast(AnyBatchNorm, module.get_submodule(step.batch_norm))
        _set_weights(layer, fold_batch_norm(cast(Tensor, layer.weight), cast("Tensor | None", layer.bias), batch_norm))
        module.set_submodule(step.batch_norm, nn.Identity())
    elif isinstance(step, MergeBranches):
        module.set_submodule(step.parallel, _merged(module, step.parallel))
    else:
        conv = _merged(module, step.parallel)
        linear = cast(nn.Linear, module.get_submodule(step.linear))
        weight, bias = compose_pointwise_linear((conv.weight, conv.bias), (linear.weight, linear.bias))
        fresh = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        _set_weights(fresh, (weight, bias))
        module.set_submodule(step.linear, fresh)
        module.set_submodule(step.parallel, nn.Identity())


def _merged(module: nn.Module, path: str) -> nn.Conv2d:
    parallel = cast(ParallelBranches, module.get_submodule(path))
    layers = branch_layers(parallel, path)
    folded: list[tuple[Tensor, Tensor | None]] = [
        (conv.weight, conv.bias) if bn is None else fold_batch_norm(conv.weight, conv.bias, cast(AnyBatchNorm, bn))
        for conv, bn in layers
    ]
    # A copy of a branch keeps stride, padding, dilation, groups and padding mode, known and unknown ones.
    conv = copy.deepcopy(layers[0][0])
    _set_weights(conv, merge_branches(folded))
    return conv


def _set_weights(layer: nn.Module, weights: tuple[Tensor, Tensor]) -> None:
    layer.weight = nn.Parameter(weights[0].clone(), requires_grad=False)
    layer.bias = nn.Parameter(weights[1].clone(), requires_grad=False)


def _input_shape(student: nn.Module) -> tuple[int, ...]:
    if isinstance(student, Student):
        return (2, 3, student.image_size, student.image_size)
    for node in trace(student).nodes:
        layer = student.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, ParallelBranches):
            layer = branch_layers(layer, str(node.target))[0][0]
        if isinstance(layer, nn.Conv2d):
            return (2, layer.in_channels, 33, 35)
        if isinstance(layer, nn.Linear):
            return (5, layer.in_features)
    raise ReparamError(
        f"The input of {type(student).__name__} is not known.", remedy="Pass input_shape=(N, C, H, W) to fuse_student."
    )


def _certify(original: nn.Module, fused: nn.Module, steps: list[Step], shape: tuple[int, ...]) -> Certificate:
    recorder = _Recorder(original, steps)
    images = hostile_input(shape)
    with torch.no_grad():
        try:
            reference = recorder.run(images)
        except RuntimeError as error:
            raise ReparamError(
                f"The module does not accept an input of shape {shape}: {error}.",
                remedy="Pass input_shape=(N, C, H, W) to fuse_student.",
            ) from error
        whole = relative_error(fused(images), reference)
        blocks = tuple(recorder.compare(fused, step) for step in steps)
    return Certificate(
        blocks=blocks,
        whole_relative_error=whole,
        input_shape=shape,
        unfused_parameters=sum(p.numel() for p in original.parameters()),
        fused_parameters=sum(p.numel() for p in fused.parameters()),
    )


class _Recorder:
    """Runs the original once and keeps what went into and came out of each block."""

    def __init__(self, module: nn.Module, steps: list[Step]) -> None:
        # Another copy: its hooks must not stay on the caller's reference.
        self._module = copy.deepcopy(module)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for step in steps:
            first, last = _ends(step)
            self._module.get_submodule(first).register_forward_pre_hook(self._keep_input(first))
            self._module.get_submodule(last).register_forward_hook(self._keep_output(last))

    def run(self, images: Tensor) -> Tensor:
        return cast(Tensor, self._module(images))

    def compare(self, fused: nn.Module, step: Step) -> BlockCertificate:
        first, last = _ends(step)
        block_input = self._inputs[first]
        if isinstance(step, ComposeAdapters):
            kind, block = "adapters into classifier", fused.get_submodule(step.linear)
            block_input = block_input.mean((2, 3))
        else:
            kind = "conv + batch norm" if isinstance(step, FoldPair) else "parallel branches"
            block = fused.get_submodule(first)
        return BlockCertificate(
            name=first, kind=kind, relative_error=relative_error(block(block_input), self._outputs[last])
        )

    def _keep_input(self, name: str) -> Any:
        # Cloned, because a following in-place activation would overwrite what is compared.
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[name] = inputs[0].clone()

        return hook

    def _keep_output(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[name] = output.clone()

        return hook


def _ends(step: Step) -> tuple[str, str]:
    if isinstance(step, FoldPair):
        return step.layer, step.batch_norm
    if isinstance(step, MergeBranches):
        return step.parallel, step.parallel
    return step.parallel, step.linear
