"""Writes merged convolutions into a functional graph and certifies each against the nodes that it replaces.

Merged weights get names and types; the weights that they replace are removed.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kdexport.errors import ReparamError
from kdexport.reparam.certificate import (
    BlockCertificate,
    Hazard,
    dead_channels,
    hostile_input,
    range_hazards,
    relative_error,
)
from kdexport.reparam.convolution import Convolution
from kdexport.reparam.dataflow import Plan, Rewrite, Stage, describe, is_rewritten, same_weights
from kdexport.reparam.evaluation import Evaluation, between
from kdexport.reparam.operators import LAYERS, NORMS, PER_IMAGE, GraphContext, arguments, module_paths, swap_channels


class Merged(nn.Module):
    """Weights of one merged block in float64, and the path, device and type that they will have."""

    def __init__(self, conv: Convolution, path: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        weight = swap_channels(conv.weight, conv.groups) if conv.is_transposed else conv.weight
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias, requires_grad=False)
        self.path, self.device, self.dtype = path, device, dtype


@dataclass(frozen=True, slots=True)
class Rounding:
    """A merged weight by name, and the device and type it is to have."""

    name: str
    device: torch.device
    dtype: torch.dtype


def prune_unused(module: fx.GraphModule) -> list[Rounding]:
    """Remove unused weights, copy the remaining ones, and give the merged ones readable names.

    The merged ones remain float64 until ``round_merged``, so that what is certified is what is written.
    """
    _drop_unused(module)
    roundings = []
    for name, child in list(module.named_children()):
        if isinstance(child, Merged):
            path = _place(module, name, child)
            roundings += [Rounding(f"{path}.{part}", child.device, child.dtype) for part in ("weight", "bias")]
    module.delete_all_unused_submodules()
    module.recompile()
    return roundings


def round_merged(module: fx.GraphModule, roundings: list[Rounding]) -> None:
    """Round the merged weights once. Raises ``ReparamError`` for one that leaves the range of its type."""
    for item in roundings:
        value = module.get_parameter(item.name).to(item.device, item.dtype)
        if not value.isfinite().all():
            raise ReparamError(
                f"The merged {item.name} exceeds the range of {item.dtype}.",
                remedy="A channel with almost no variance has a huge gain: merge in a wider type, or train it again.",
            )
        path, _, part = item.name.rpartition(".")
        setattr(module.get_submodule(path), part, nn.Parameter(value, requires_grad=False))


def _drop_unused(module: fx.GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    own: dict[int, Tensor] = {}
    for name, value in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        if name not in used:
            delattr(owner, attribute)
        elif not isinstance(owner, Merged):
            # The tensors of the original are not shared: what is done to the result must not reach it.
            fresh = own.setdefault(id(value), value.detach().clone())
            is_parameter = isinstance(value, nn.Parameter)
            setattr(owner, attribute, nn.Parameter(fresh, requires_grad=False) if is_parameter else fresh)


def _place(module: fx.GraphModule, holder: str, merged: Merged) -> str:
    path = merged.path
    owner = _submodule(module, path)
    while "weight" in owner._parameters or "bias" in owner._parameters:
        path += ".merged"
        owner = _submodule(module, path)
    owner.weight, owner.bias = merged.weight, merged.bias
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(f"{holder}."):
            node.target = f"{path}.{str(node.target).rpartition('.')[2]}"
    delattr(module, holder)
    return path


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = cast(nn.Module, module._modules[name])
    return module


_ATEN = torch.ops.aten

_CALLS = (_ATEN.linear.default, _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)

_TRANSPOSED_CALLS = (
    _ATEN.linear.default, _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input,
)  # fmt: skip


def rewrite(evaluation: Evaluation, plan: Plan) -> tuple[list[BlockCertificate], list[Hazard]]:
    """Carry out ``plan`` in the graph of ``evaluation``, in place; the float64 error of each block, and warnings.

    New weights are float64 until ``round_merged``.
    """
    writer = _Writer(evaluation)
    for item in plan.rewrites:
        writer.write(item)
    evaluation.graph.eliminate_dead_code()
    evaluation.graph.lint()
    return writer.blocks, writer.hazards


class _Writer:
    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation, self._graph = evaluation, evaluation.graph
        self._module: Any = evaluation.module
        self._context = GraphContext(evaluation)
        self._shapes = dict(evaluation.shapes)
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._written: list[tuple[str, Convolution, torch.device, torch.dtype]] = []
        self.blocks: list[BlockCertificate] = []
        self.hazards: list[Hazard] = []

    def write(self, item: Rewrite) -> None:
        if not any(is_rewritten(stage) for path in item.paths for stage in path.stages):
            return
        total: fx.Node | None = None
        with self._graph.inserting_before(item.node):
            for path in item.paths:
                value = self._replaced.get(path.source, path.source)
                for stage in path.stages:
                    value = self._stage(stage, value)
                total = value if total is None else self._graph.call_function(_ATEN.add.Tensor, (total, value))
        assert total is not None
        total.meta["val"] = item.node.meta["val"]
        item.node.replace_all_uses_with(total)
        self._replaced[item.node] = total

    def _stage(self, stage: Stage, value: fx.Node) -> fx.Node:
        if not is_rewritten(stage):
            return self._keep(stage, value)
        name = self._name(stage)
        with torch.no_grad():
            noise = hostile_input(self._noise_shape(stage))
            reference = sum(self._evaluation.compute(stage.results, {stage.entry: noise, **self._given(stage, noise)}))
            written = self._convolution(stage, value, name)
            candidate = self._evaluation.compute([written], {value: noise})[0]
        assert isinstance(reference, Tensor)
        error = relative_error(candidate, reference)
        self.blocks.append(BlockCertificate(name=name, kind=describe(stage), relative_error=error))
        self._warn(stage, name)
        return written

    def _noise_shape(self, stage: Stage) -> tuple[int, ...]:
        """The shape that the stage reads, with one image if all of its operators treat each image alike."""
        shape = self._shapes[stage.entry]
        entry = self._replaced.get(stage.entry, stage.entry)
        nodes = between(entry, stage.results) - self._evaluation.constants.keys()
        return (1, *shape[1:]) if all(node.target in PER_IMAGE for node in nodes) else shape

    def _warn(self, stage: Stage, name: str) -> None:
        constant, trained = self._context.constant, []
        for node in stage.nodes:
            given = arguments(node) if node.target in LAYERS else {}
            if node.target in NORMS:
                place = self._paths([node])[0]
                variance, gain = constant(given["running_var"]), constant(given["weight"])
                self.hazards += dead_channels(place, variance, gain, given["eps"])
            elif "weight" in given:
                weight = constant(given["weight"])
                trained.append(swap_channels(weight, given["groups"]) if stage.conv.is_transposed else weight)
        if trained:
            self.hazards += range_hazards(name, stage.conv.weight, trained)

    def _given(self, stage: Stage, noise: Tensor) -> dict[fx.Node, Tensor]:
        # What the entry was replaced by is what the old nodes read now.
        return {self._replaced[stage.entry]: noise} if stage.entry in self._replaced else {}

    def _keep(self, stage: Stage, value: fx.Node) -> fx.Node:
        entry = self._replaced.get(stage.entry, stage.entry)
        if value is entry:
            return stage.nodes[-1]
        copies = {entry: value}
        for node in stage.nodes:
            copies[node] = self._graph.node_copy(node, lambda old: copies.get(old, old))
        return copies[stage.nodes[-1]]

    def _convolution(self, stage: Stage, value: fx.Node, name: str) -> fx.Node:
        conv, dims = stage.conv, len(stage.conv.kernel)
        like = stage.results[0].meta["val"]
        holder = self._holder(conv, name, like)
        weight, bias = (self._graph.get_attr(f"{holder}.{part}") for part in ("weight", "bias"))
        if dims == 0:
            return self._graph.call_function(_CALLS[0], (value, weight, bias))
        sides = [before for before, _ in conv.padding]
        if conv.output_padding is not None:
            spread = (list(conv.stride), sides, list(conv.output_padding), conv.groups, list(conv.dilation))
            return self._graph.call_function(_TRANSPOSED_CALLS[dims], (value, weight, bias, *spread))
        symmetric = all(before == after for before, after in conv.padding)
        if conv.pads and not (symmetric and conv.padding_mode == "zeros"):
            sides_outward = [side for pair in reversed(conv.padding) for side in pair]
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            value = self._graph.call_function(_ATEN.pad.default, (value, sides_outward, mode))
            sides = [0] * dims
        geometry = (list(conv.stride), sides, list(conv.dilation), conv.groups)
        return self._graph.call_function(_CALLS[dims], (value, weight, bias, *geometry))

    def _holder(self, conv: Convolution, name: str, like: Tensor) -> str:
        """The attribute that holds the weights of ``conv``, one for all places whose weights are equal."""
        for holder, other, device, dtype in self._written:
            if (device, dtype) == (like.device, like.dtype) and same_weights(conv, other):
                return holder
        holder = f"_merged_{len(self._written)}"
        self._module.add_submodule(holder, Merged(conv, name, like.device, like.dtype))
        self._written.append((holder, conv, like.device, like.dtype))
        return holder

    def _name(self, stage: Stage) -> str:
        """The path of the one layer that was folded into, or of what holds the layers that were merged."""
        weighted = [node for node in stage.nodes if node.target in LAYERS - NORMS]
        layers = self._paths(weighted)
        everything = self._paths(stage.nodes)
        if len(everything) > 1 and len(layers) != 1:
            columns = zip(*(path.split(".") for path in everything), strict=False)
            common = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
            layers = [".".join(column[0] for column in common)]
        base = next((path for path in (*layers, *everything) if path), "merged")
        names = {block.name for block in self.blocks}
        numbered = (base if n == 1 else f"{base}.{n}" for n in itertools.count(1))
        return next(name for name in numbered if name not in names)

    def _paths(self, nodes: Iterable[fx.Node]) -> list[str]:
        return module_paths([str(root.target) for node in nodes for root in self._context.weights(node)])
