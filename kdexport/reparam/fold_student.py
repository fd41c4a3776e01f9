"""Folds a trained student into the plain network that is exported, and certifies that nothing changed."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kdexport.errors import ReparamError
from kdexport.reparam.algebra import AnyBatchNorm, fold_batch_norm, merge_branches
from kdexport.reparam.branches import ParallelBranches
from kdexport.reparam.certificate import (
    BlockCertificate,
    Certificate,
    Hazard,
    find_hazards,
    hostile_input,
    relative_error,
)
from kdexport.reparam.compose import compose, pool_to_linear
from kdexport.reparam.convolution import from_layer
from kdexport.reparam.evaluation import in_float64
from kdexport.reparam.exported import export_module, functional_graph, one_output
from kdexport.reparam.program import merge_graph
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
    """The plain network, in the type and on the device of the original, and the proof that it computes the same.

    ``exact`` is the same network before its weights were rounded, in float64 on the CPU.
    """

    module: nn.Module
    certificate: Certificate
    exact: nn.Module


def fuse_student(student: nn.Module, *, input_shape: tuple[int, ...] | None = None) -> FusedStudent:
    """Fold every batch norm and merge every branch of an eval-mode ``student``, on a copy, in float64.

    The copy has no batch norm and no branch left; weights are rounded once, to the student's type. ``input_shape`` is
    the (N,C,H,W) that the certificate is computed on; a ``Student`` knows its own. A graph, as ``read_program`` makes
    it, is merged as ``fuse_module`` does it. Raises ``ReparamError`` for what cannot be folded exactly and
    ``CertificateError`` should the result differ.
    """
    fused, exact, certificate = _fold(student, input_shape)
    certificate.require()
    reference = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
    rounded = fused.to(device=reference.device, dtype=reference.dtype).eval()
    for name, tensor in rounded.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ReparamError(
                f"The folded {name} exceeds the range of {reference.dtype}.",
                remedy="A channel with almost no variance has a huge gain: fold in a wider type, or train it again.",
            )
    return FusedStudent(rounded, certificate, exact)


def certify_fold(student: nn.Module, *, input_shape: tuple[int, ...] | None = None) -> tuple[nn.Module, Certificate]:
    """The float64 fold of an eval-mode ``student`` on the CPU and its certificate, which may not hold.

    Raises ``ReparamError`` for what cannot be folded exactly.
    """
    _, exact, certificate = _fold(student, input_shape)
    return exact, certificate


def _fold(student: nn.Module, input_shape: tuple[int, ...] | None) -> tuple[nn.Module, nn.Module, Certificate]:
    """The folded network to be rounded, the same in float64, and the certificate."""
    if isinstance(student, fx.GraphModule):
        return _merge_graph(student)
    steps = find_steps(student)
    original = copy.deepcopy(student).cpu().double()
    fused = copy.deepcopy(original)
    for step in steps:
        _apply(fused, step)
    hazards = find_hazards(original, fused, {_folded(step): _trained_layers(original, step) for step in steps})
    certificate = _certify(original, fused, steps, hazards, input_shape or _input_shape(student))
    return copy.deepcopy(fused), fused, certificate


def _merge_graph(student: fx.GraphModule) -> tuple[nn.Module, nn.Module, Certificate]:
    shape = student.meta["input_shape"]
    like = next((p for p in student.parameters() if p.is_floating_point()), torch.zeros(()))
    own = copy.deepcopy(student).cpu()
    graph = functional_graph(export_module(own, (torch.zeros(shape, dtype=like.dtype),)))
    merged = merge_graph(graph, [hostile_input(shape)])
    plain = one_output(graph)
    return plain, in_float64(plain), merged.certificate


def _apply(module: nn.Module, step: Step) -> None:
    if isinstance(step, FoldPair):
        layer = module.get_submodule(step.layer)
        batch_norm = cast(AnyBatchNorm, module.get_submodule(step.batch_norm))
        _set_weights(layer, fold_batch_norm(cast(Tensor, layer.weight), cast("Tensor | None", layer.bias), batch_norm))
        _replace(module, step.batch_norm, nn.Identity())
    elif isinstance(step, MergeBranches):
        _replace(module, step.parallel, _merged(module, step.parallel))
    else:
        _compose(module, step)


def _compose(module: nn.Module, step: ComposeAdapters) -> None:
    adapter, reader = _merged(module, step.parallel), module.get_submodule(step.layer)
    join = pool_to_linear if step.pooled else compose
    folded = join(from_layer(adapter), from_layer(reader))
    weights = folded.weight, folded.bias
    if step.batch_norm is not None:
        weights = fold_batch_norm(*weights, cast(AnyBatchNorm, module.get_submodule(step.batch_norm)))
        _replace(module, step.batch_norm, nn.Identity())
    # A copy of the reader keeps its geometry; only its input channels change.
    fresh = copy.deepcopy(reader)
    _set_weights(fresh, weights)
    setattr(fresh, "in_features" if step.pooled else "in_channels", adapter.in_channels)
    _replace(module, step.layer, fresh)
    _replace(module, step.parallel, nn.Identity())


def _replace(module: nn.Module, path: str, fresh: nn.Module) -> None:
    # A module can be registered under several names, and forward() may call it by any of them.
    old = module.get_submodule(path)
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child is old:
            module.set_submodule(name, fresh)


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
    # The layout of a fresh layer: in another, the convolution that runs is another one.
    layer.weight = nn.Parameter(weights[0].clone(memory_format=torch.contiguous_format), requires_grad=False)
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


def _certify(
    original: nn.Module, fused: nn.Module, steps: list[Step], hazards: tuple[Hazard, ...], shape: tuple[int, ...]
) -> Certificate:
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
        hazards=hazards,
    )


class _Recorder:
    """Runs the original once for the shape that each block reads, and compares blocks on noise of that shape.

    Noise, because the activations of a real network can be dead, and any fold is right on zeros.
    """

    def __init__(self, module: nn.Module, steps: list[Step]) -> None:
        # Another copy: its hooks must not stay on the caller's reference.
        self._module = copy.deepcopy(module)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for step in steps:
            first = _first(step)
            self._module.get_submodule(first).register_forward_pre_hook(self._keep_shape(first))

    def run(self, images: Tensor) -> Tensor:
        return cast(Tensor, self._module(images))

    def compare(self, fused: nn.Module, step: Step) -> BlockCertificate:
        first = _first(step)
        block, x = self._module.get_submodule(first), hostile_input(self._shapes[first])
        if isinstance(step, ComposeAdapters):
            kind = "adapters into classifier" if step.pooled else "adapters into conv"
            adapted, plain = (block(x).mean((2, 3)), x.mean((2, 3))) if step.pooled else (block(x), x)
            reference, candidate = (
                self._module.get_submodule(step.layer)(adapted),
                fused.get_submodule(step.layer)(plain),
            )
            if step.batch_norm is not None:
                reference = self._module.get_submodule(step.batch_norm)(reference)
        elif isinstance(step, FoldPair):
            kind, reference = "conv + batch norm", self._module.get_submodule(step.batch_norm)(block(x))
            candidate = fused.get_submodule(first)(x)
        else:
            kind, reference, candidate = "parallel branches", block(x), fused.get_submodule(first)(x)
        return BlockCertificate(name=first, kind=kind, relative_error=relative_error(candidate, reference))

    def _keep_shape(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._shapes[name] = tuple(inputs[0].shape)

        return hook


def _folded(step: Step) -> str:
    return step.parallel if isinstance(step, MergeBranches) else step.layer


def _trained_layers(original: nn.Module, step: Step) -> tuple[str, ...]:
    if not isinstance(step, MergeBranches):
        return (step.layer,)
    parallel = cast(ParallelBranches, original.get_submodule(step.parallel))
    convs = {id(conv) for conv, _ in branch_layers(parallel, step.parallel)}
    return tuple(name for name, module in original.named_modules() if id(module) in convs)


def _first(step: Step) -> str:
    return step.layer if isinstance(step, FoldPair) else step.parallel
