"""The form in which a frozen teacher runs: batch norms folded, weights in the precision of the run."""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.reparam import fold_batch_norm
from training.teachers.teacher import Teacher


def folded(teacher: Teacher, precision: torch.dtype | None = None) -> Teacher:
    """A copy of an eval-mode ``teacher`` with the same outputs and fewer passes over memory.

    A batch norm folds if it is the only reader of a plain convolution, taps included; all others stay. Weights of
    convolutions and linear layers are cast to ``precision`` once; autocast would cast them at each step. Parameters
    that do not change are shared with ``teacher``, which does not change. A teacher that is not ``traceable`` is
    returned as it is.
    """
    if not teacher.traceable:
        return teacher
    shared = {id(tensor): tensor for tensor in (*teacher.parameters(), *teacher.buffers())}
    twin = copy.deepcopy(teacher, shared)
    pairs = _pairs(twin) if any(isinstance(module, _BatchNorm) for module in twin.modules()) else []
    for conv_path, norm_path in pairs:
        conv, norm = twin.get_submodule(conv_path), twin.get_submodule(norm_path)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        weight, bias = fold_batch_norm(conv.weight, conv.bias, norm)
        conv.weight, conv.bias = _frozen(weight), _frozen(bias)
        twin.set_submodule(norm_path, nn.Identity())
    for layer in twin.modules() if precision is not None else ():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight = _frozen(layer.weight.to(precision))
            layer.bias = None if layer.bias is None else _frozen(layer.bias.to(precision))
    return twin


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=False)


class _AllOutputs(nn.Module):
    """All outputs that a distiller may read, in a form that can be traced, where each tap is one more reader."""

    def __init__(self, network: Teacher) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        tapped = self.network.tapped(images)
        return list(tapped.features.values()), list(tapped.preactivations.values()), tapped.pooled, tapped.logits


def _pairs(network: Teacher) -> list[tuple[str, str]]:
    """The paths of each convolution and of the batch norm that folds into it."""
    root = _AllOutputs(network)
    calls = [node for node in fx.Tracer().trace(root).nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    found = []
    for node, conv_path in zip(calls, targets, strict=True):
        readers = list(node.users)
        if len(readers) != 1 or readers[0].op != "call_module" or type(root.get_submodule(conv_path)) is not nn.Conv2d:
            continue
        norm_path = str(readers[0].target)
        norm = root.get_submodule(norm_path)
        once = targets.count(conv_path) == targets.count(norm_path) == 1
        if once and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
            found.append((conv_path.removeprefix("network."), norm_path.removeprefix("network.")))
    return found
