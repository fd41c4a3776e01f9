"""Runs functional graphs in float64, whole and in parts."""

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kdexport.errors import ReparamError, first_line

_ATEN = torch.ops.aten
_FACTORIES = {
    _ATEN.full.default,
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.scalar_tensor.default,
    _ATEN.zeros.default,
    _ATEN.ones.default,
}


class Constants(dict[fx.Node, Any]):
    """Values that depend on weights alone. Weights are stored as they are and read in float64, which saves memory."""

    def __getitem__(self, node: fx.Node) -> Any:
        value = super().__getitem__(node)
        return _wide(value) if isinstance(value, Tensor) else value

    def get(self, node: fx.Node, default: Any = None) -> Any:
        """The value of ``node`` in float64, ``default`` if it is not constant."""
        if node not in self:
            return default
        return self[node]


class Evaluation(fx.Interpreter):
    """A graph in float64 on the CPU, whatever the type and device of its weights.

    After ``evaluate`` it knows the ``shapes`` of all tensors, the ``constants`` (what depends on weights alone) and the
    ``scalars`` (sizes).
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.graph: fx.Graph = module.graph
        self.extra_traceback = False
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.constants = Constants()
        self.scalars: dict[fx.Node, int] = {}

    def evaluate(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors among the outputs for ``inputs``, one per placeholder, in their order.

        Raises ``ReparamError`` where the graph does not run.
        """
        self.scalars.clear()
        # Not run(): it would unflatten inputs and outputs by the signature of the original.
        places = (node for node in self.graph.nodes if node.op == "placeholder")
        given = dict(zip(places, inputs, strict=True))
        self.shapes.update((node, tuple(value.shape)) for node, value in given.items())
        output = next(node for node in self.graph.nodes if node.op == "output")
        try:
            with torch.no_grad():
                wanted = [item for item in pytree.tree_leaves(output.args) if isinstance(item, fx.Node)]
                values = self.compute(wanted, given)
        # Operators answer inputs that do not fit with any error.
        except Exception as error:
            raise ReparamError(
                f"The program does not run in float64 on {[tuple(x.shape) for x in inputs]}: {first_line(error)}",
                remedy="Check the input shape; every operator must run in float64 on the CPU.",
            ) from error
        return [value for value in values if isinstance(value, Tensor)]

    def compute(self, wanted: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of some nodes, where those of ``given`` are given."""
        known = {**self.scalars, **given}
        needed = _needed(wanted, known)
        last_use = {node: user for user in self.graph.nodes if user in needed for node in user.all_input_nodes}
        drop: dict[fx.Node, list[fx.Node]] = {}
        for node, user in last_use.items():
            drop.setdefault(user, []).append(node)
        self.env = dict(known)
        for node in self.graph.nodes:
            if node in needed and node not in known:
                self.env[node] = self.run_node(node)
                for stale in drop.get(node, []):
                    if stale not in wanted:
                        self.env.pop(stale, None)
        return [self.env[node] for node in wanted]

    def run_node(self, n: fx.Node) -> Any:
        """One node's value, remembered by shape."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        if isinstance(value, Tensor | tuple | list):
            inputs = n.all_input_nodes
            computed = inputs and all(node in self.constants for node in inputs)
            if n.op == "get_attr" or n.target in _FACTORIES or (n.op == "call_function" and computed):
                self.constants[n] = self.fetch_attr(str(n.target)).detach() if n.op == "get_attr" else value
        elif isinstance(value, int):
            self.scalars[n] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight in float64."""
        value = super().get_attr(target, args, kwargs)
        return _wide(value.detach()) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator, with every narrower floating type that it names replaced by float64."""
        return super().call_function(target, _map(args), _map(kwargs))


def in_float64(module: nn.Module) -> nn.Module:
    """A copy of ``module`` on the CPU in float64; a graph's operators that name a narrower type name float64 in it."""
    wide = copy.deepcopy(module).cpu().double()
    if isinstance(wide, fx.GraphModule):
        for node in wide.graph.nodes:
            if node.op == "call_function":
                node.args, node.kwargs = _map(node.args), _map(node.kwargs)
        wide.recompile()
    return wide


def between(entry: fx.Node, results: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that compute ``results`` from the value of ``entry``, without it, and what they read besides."""
    return _needed(results, {entry}) - {entry}


def _needed(wanted: Sequence[fx.Node], known: Container[fx.Node]) -> set[fx.Node]:
    needed, pending = set(wanted), [node for node in wanted if node not in known]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                if node not in known:
                    pending.append(node)
    return needed


def _wide(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64) if value.is_floating_point() else value.cpu()


def _map(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, dict):
        return {key: _map(item) for key, item in value.items()}
    return type(value)(_map(item) for item in value) if isinstance(value, list | tuple) else value
