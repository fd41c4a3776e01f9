"""Finds by dataflow what can be folded in a module, and refuses what cannot be folded exactly."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import ReparamError
from kdexport.reparam.absorb import absorbing_layer, batch_norm_of
from kdexport.reparam.blocks import Adapters, ParallelBranches
from kdexport.reparam.refusals import (
    refuse_hooks,
    refuse_parametrization,
    refuse_reuse,
    refuse_shared,
    require_eval,
    require_positional,
    require_same_geometry,
    require_statistics,
)

_LINEAR_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, slots=True)
class FoldPair:
    """A convolution or linear layer and the batch norm that alone reads it."""

    layer: str
    batch_norm: str


@dataclass(frozen=True, slots=True)
class MergeBranches:
    """A ``ParallelBranches`` to be replaced by one convolution."""

    parallel: str


@dataclass(frozen=True, slots=True)
class ComposeAdapters:
    """``Adapters`` to be folded into the layer that reads them, and the batch norm of that layer into it too.

    ``pooled`` says that global average pooling lies between.
    """

    parallel: str
    layer: str
    batch_norm: str | None
    pooled: bool


Step = FoldPair | MergeBranches | ComposeAdapters


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ParallelBranches) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """The dataflow graph of ``module``, branches as single nodes; raises ``ReparamError`` where there is none."""
    try:
        return _Tracer().trace(module)
    # Tracing runs the module's own forward, which may raise anything on symbolic values.
    except Exception as error:
        raise ReparamError(
            f"The dataflow of {type(module).__name__} cannot be traced: {error}.",
            remedy="Remove control flow that depends on the input from forward().",
        ) from error


def find_steps(module: nn.Module) -> list[Step]:
    """Everything that must be folded in an eval-mode module, in the order of its dataflow.

    Raises ``ReparamError`` for a module in training mode, and for a batch norm or branch that cannot be removed
    exactly.
    """
    require_eval(module)
    refuse_hooks(module)
    graph = trace(module)
    calls = Counter(id(module.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
    steps: list[Step] = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (functional.batch_norm, torch.batch_norm):
            raise ReparamError(
                f"The function batch_norm is called at {node.name}; only batch norm modules are folded.",
                remedy="Use nn.BatchNorm2d.",
            )
        if node.op != "call_module":
            continue
        target = module.get_submodule(str(node.target))
        if isinstance(target, _BatchNorm):
            steps.append(_fold_pair(module, node, calls))
        elif isinstance(target, ParallelBranches):
            steps.append(_merge(module, node, target, calls))
    _require_called(module, steps)
    composed = {step.layer for step in steps if isinstance(step, ComposeAdapters)}
    return [step for step in steps if not (isinstance(step, FoldPair) and step.layer in composed)]


def batch_norm_after(module: nn.Module, path: str) -> str:
    """The path of the batch norm that alone reads the layer ``path``; raises ``ReparamError`` where there is none."""
    layer = module.get_submodule(path)
    nodes = [n for n in trace(module).nodes if n.op == "call_module" and module.get_submodule(str(n.target)) is layer]
    found = batch_norm_of(module, nodes[0]) if len(nodes) == 1 else None
    if found is None:
        raise ReparamError(
            f"No batch norm alone reads the output of {path}, which is called {len(nodes)} times.",
            remedy="Branches take the place of a convolution and the batch norm directly after it.",
        )
    return found


def branch_layers(parallel: ParallelBranches, path: str) -> list[tuple[nn.Conv2d, nn.Module | None]]:
    """(convolution, batch norm or None) of each branch; raises ``ReparamError`` for one that is not linear."""
    layers: list[tuple[nn.Conv2d, nn.Module | None]] = []
    if not parallel.branches:
        raise ReparamError(f"{path} has no branch.", remedy="Give it at least one.")
    for index, branch in enumerate(parallel.branches):
        parts = list(branch) if type(branch) is nn.Sequential else [branch]
        name = f"{path}.branches.{index}"
        for part in (branch, *parts):
            refuse_parametrization(part, name)
        odd = [part for part in parts if type(part) is not nn.Conv2d and not isinstance(part, _BatchNorm)]
        if odd or not parts or type(parts[0]) is not nn.Conv2d or len(parts) > 2 or _starts_again(parts):
            culprit = type(odd[0]).__name__ if odd else " then ".join(type(part).__name__ for part in parts)
            raise ReparamError(
                f"Branch {name} is not one convolution and at most one batch norm: it contains {culprit}.",
                remedy="Only linear branches can be merged; put non-linearities after the mean.",
            )
        if len(parts) == 2:
            require_statistics(parts[1], f"{name}.1")
        layers.append((parts[0], parts[1] if len(parts) == 2 else None))
    require_same_geometry([conv for conv, _ in layers], path)
    return layers


def _starts_again(parts: list[nn.Module]) -> bool:
    return len(parts) == 2 and not isinstance(parts[1], _BatchNorm)


def _fold_pair(module: nn.Module, node: fx.Node, calls: Counter[int]) -> FoldPair:
    name = str(node.target)
    require_positional(node)
    producer = node.args[0]
    if not isinstance(producer, fx.Node) or producer.op != "call_module":
        raise ReparamError(
            f"Batch norm {name} does not directly follow a convolution or linear layer.",
            remedy="There is nothing before it that it could be folded into.",
        )
    layer_name = str(producer.target)
    layer = module.get_submodule(layer_name)
    if not isinstance(layer, _LINEAR_TYPES):
        raise ReparamError(
            f"Batch norm {name} follows {layer_name}, a {type(layer).__name__}, which is no convolution or linear "
            "layer.",
            remedy="There is nothing before it that it could be folded into.",
        )
    require_positional(producer)
    refuse_shared(layer_name, producer, calls[id(layer)])
    refuse_reuse(name, calls[id(module.get_submodule(name))])
    refuse_parametrization(layer, layer_name)
    refuse_parametrization(module.get_submodule(name), name)
    require_statistics(module.get_submodule(name), name)
    return FoldPair(layer_name, name)


def _merge(module: nn.Module, node: fx.Node, parallel: ParallelBranches, calls: Counter[int]) -> Step:
    path = str(node.target)
    require_positional(node)
    refuse_reuse(path, calls[id(parallel)])
    refuse_parametrization(parallel, path)
    layers = branch_layers(parallel, path)
    if not isinstance(parallel, Adapters):
        return MergeBranches(path)
    reader = absorbing_layer(module, node, layers[0][0], calls)
    name = str(reader.target)
    pooled = isinstance(module.get_submodule(name), nn.Linear)
    return ComposeAdapters(path, name, batch_norm_of(module, reader), pooled)


def _require_called(module: nn.Module, steps: list[Step]) -> None:
    seen = {s.batch_norm if isinstance(s, FoldPair) else s.parallel for s in steps}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{path}.") for path in seen)
        if isinstance(child, _BatchNorm | ParallelBranches) and name not in seen and not inside:
            raise ReparamError(
                f"{name}, a {type(child).__name__}, is never called in the forward pass.",
                remedy="Remove it, or call it as a module.",
            )
