"""Finds by dataflow what can be folded in a module, and refuses with a reason what cannot be folded exactly."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from kdexport.errors import ReparamError
from kdexport.reparam.branches import Adapters, ParallelBranches

_POOLING = {functional.adaptive_avg_pool2d}

_TRANSPARENT = {torch.flatten, functional.dropout}

_MOVES_CHANNELS = {"view", "reshape", "transpose", "permute", "chunk", "split", "channel_shuffle", "pixel_shuffle"}

_USE_R1 = "Let branches take the place of this stage's own convolution instead (placement R1)."


def absorbing_layer(module: nn.Module, node: fx.Node, conv: nn.Conv2d, calls: Counter[int]) -> fx.Node:
    """The call of the layer that alone reads the adapters called at ``node``, whose branches look like ``conv``.

    That is the linear layer after global average pooling, or an ungrouped convolution directly after them that reads
    no padded zeros. Raises ``ReparamError`` that names what is between, or why the reader cannot absorb them.
    """
    path, pooled, current = str(node.target), False, node
    while True:
        current = _only_user(path, current)
        layer = module.get_submodule(str(current.target)) if current.op == "call_module" else None
        if isinstance(layer, nn.Linear) and pooled:
            require_pointwise(conv, path, "the pooling after it")
            break
        if isinstance(layer, nn.Conv2d) and not pooled:
            require_pointwise(conv, path, f"convolution {current.target}, whose kernel would grow")
            _require_absorbable(path, str(current.target), layer)
            break
        is_pool = isinstance(layer, nn.AdaptiveAvgPool2d) or current.target in _POOLING
        if is_pool and _pools_to_one(current, layer):
            pooled = True
        elif not isinstance(layer, nn.Dropout | nn.Identity | nn.Flatten) and current.target not in _TRANSPARENT:
            _refuse_between(path, current, layer)
    name = str(current.target)
    require_positional(current)
    refuse_reuse(name, calls[id(layer)])
    refuse_parametrization(cast(nn.Module, layer), name)
    return current


def batch_norm_of(module: nn.Module, layer: fx.Node) -> str | None:
    """The path of the batch norm that alone reads the output of ``layer``, None where there is none."""
    users = list(layer.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    name = str(users[0].target)
    return name if isinstance(module.get_submodule(name), _BatchNorm) else None


def _only_user(path: str, node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) == 1:
        return users[0]
    names = ", ".join(str(user.target) if user.op == "call_module" else user.name for user in users) or "none"
    raise ReparamError(
        f"The output of adapter {path} has {len(users)} users ({names}); adapters fold into exactly one layer.",
        remedy=_USE_R1,
    )


def _require_absorbable(path: str, name: str, reader: nn.Conv2d) -> None:
    if reader.groups != 1:
        raise ReparamError(
            f"Adapter {path} is read by {name}, which has {reader.groups} groups and the adapter has one: the fold "
            f"would be an ungrouped convolution with {reader.groups} times the operations.",
            remedy=_USE_R1,
        )
    pads = any(reader.kernel_size[d] > 1 for d in (0, 1)) if reader.padding == "same" else _nonzero(reader.padding)
    if pads and reader.padding_mode == "zeros":
        raise ReparamError(
            f"Adapter {path} is read by {name}, which pads zeros around the adapter's output: the shift of the "
            "adapter's batch norms is missing at the border, and no single convolution has such a border.",
            remedy=_USE_R1,
        )


def _nonzero(padding: Any) -> bool:
    return padding != "valid" and any(size > 0 for size in padding)


def _refuse_between(path: str, node: fx.Node, layer: nn.Module | None) -> None:
    what = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", str(node.target))
    shuffles = what in _MOVES_CHANNELS or isinstance(layer, nn.ChannelShuffle)
    reason = "which moves channels or positions" if shuffles else "which does not commute with a linear map"
    raise ReparamError(
        f"Between adapter {path} and the layer that reads it is {what}, {reason}.",
        remedy="R2 adapters need a 1x1 convolution, or global average pooling and a linear classifier, directly after "
        "them; use R1.",
    )


def _pools_to_one(node: fx.Node, layer: nn.Module | None) -> bool:
    size: Any = layer.output_size if isinstance(layer, nn.AdaptiveAvgPool2d) else node.args[1]
    return size in (1, (1, 1))


def require_eval(module: nn.Module) -> None:
    """Every submodule is in evaluation mode."""
    for name, child in module.named_modules():
        if child.training:
            raise ReparamError(
                f"{name or type(module).__name__} is in training mode: its batch norms would use the batch's "
                "statistics.",
                remedy="Call .eval() on the module first; a factory returns module.eval().",
            )


def require_same_geometry(convs: list[nn.Conv2d], path: str) -> None:
    """Branches that are summed share everything but their weights."""

    def geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
        return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, tuple(conv.weight.shape)

    for index, conv in enumerate(convs):
        if geometry(conv) != geometry(convs[0]):
            raise ReparamError(
                f"Branch {path}.branches.{index} has geometry {geometry(conv)}, branch 0 has {geometry(convs[0])}.",
                remedy="Branches are summed into one convolution and must share stride, padding, dilation and groups.",
            )


def refuse_shared(name: str, node: fx.Node, count: int) -> None:
    """The layer before a batch norm is called once and read by it alone."""
    refuse_reuse(name, count)
    if len(node.users) != 1:
        raise ReparamError(
            f"The output of {name} has {len(node.users)} users; after folding, the others would read another value.",
            remedy="Give the batch norm a layer of its own.",
        )


def refuse_reuse(name: str, count: int) -> None:
    """A module that is folded has one place in the forward pass."""
    if count > 1:
        raise ReparamError(
            f"{name} is called at {count} places of the forward pass; one set of weights cannot hold {count} folds.",
            remedy="Give each place its own module.",
        )


def refuse_parametrization(module: nn.Module, name: str) -> None:
    """A module that is folded has no parametrization that computes its weight in each pass."""
    if nn.utils.parametrize.is_parametrized(module):
        raise ReparamError(
            f"{name} is parametrized, so its weight is computed again in each pass.",
            remedy="Call torch.nn.utils.parametrize.remove_parametrizations on it first: the weight is then stored.",
        )


def require_positional(node: fx.Node) -> None:
    """A module is called with one positional argument."""
    if len(node.args) != 1 or node.kwargs:
        raise ReparamError(
            f"{node.target} is not called with one positional argument.", remedy=f"Call {node.target}(x) in forward()."
        )


def require_statistics(batch_norm: nn.Module, name: str) -> None:
    """A batch norm keeps running statistics."""
    if cast(_BatchNorm, batch_norm).running_mean is None:
        raise ReparamError(
            f"{name} keeps no running statistics: its output depends on the other images of the batch.",
            remedy="Train with track_running_stats=True; there is no exact fold otherwise.",
        )


def require_pointwise(conv: nn.Conv2d, path: str, reader: str) -> None:
    """An adapter acts on each position alike, so that it commutes with what reads it."""
    pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
    if not pointwise or conv.padding not in ((0, 0), "valid", "same"):
        raise ReparamError(
            f"The branches of adapter {path} are not plain 1x1 convolutions: {conv}. They do not fold into {reader}.",
            remedy="Only an ungrouped, unpadded 1x1 convolution of stride 1 folds into the plain student's graph.",
        )


def refuse_hooks(module: nn.Module, *, stored: bool = False) -> None:
    """No submodule has a forward hook: it would run on traced values, or be dropped with what is folded.

    With ``stored`` those of weight norm, spectral norm and pruning are allowed, whose weights can be stored instead.
    """
    for name, child in module.named_modules():
        hooks = [*child._forward_pre_hooks.values(), *child._forward_hooks.values()]
        for hook in hooks:
            way_out = next((text for kind, text in _STORABLE.items() if isinstance(hook, kind)), None)
            if way_out is not None and stored:
                continue
            raise ReparamError(
                f"{name or type(module).__name__} has a forward hook, which folding would remove or run on other "
                "values.",
                remedy=way_out or "Remove it first: call remove() on what register_forward_hook returned.",
            )


_STORABLE: dict[type, str] = {
    WeightNorm: "Call torch.nn.utils.remove_weight_norm on it first: the weight is then stored.",
    SpectralNorm: "Call torch.nn.utils.remove_spectral_norm on it first: the weight is then stored.",
    prune.BasePruningMethod: "Call torch.nn.utils.prune.remove on it first: the pruned weight is then stored.",
}


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
    """``Adapters`` that fold into the layer that reads them, together with the batch norm of that layer.

    ``pooled``: global average pooling is between the two.
    """

    parallel: str
    layer: str
    batch_norm: str | None
    pooled: bool


Step = FoldPair | MergeBranches | ComposeAdapters


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ParallelBranches | _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


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
    _refuse_other_norms(module)
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


def _refuse_other_norms(module: nn.Module) -> None:
    """Each batch norm computes what torch's own does: another class may add an activation, or hide from the fold."""
    for name, child in module.named_modules():
        is_norm = isinstance(child, _BatchNorm) or "BatchNorm" in type(child).__name__
        if is_norm and type(child).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise ReparamError(
                f"{name} is a {type(child).__name__}, which may compute more than a batch norm.",
                remedy="Use nn.BatchNorm2d and put an activation after it as a module of its own.",
            )


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
            f"Batch norm {name} follows {layer_name}, a {type(layer).__name__}, which is not a convolution or linear "
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
