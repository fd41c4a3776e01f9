"""What an operator of a functional graph can be as a linear map: a layer, a sum or a concatenation."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kdexport.errors import ReparamError
from kdexport.reparam.convolution import Convolution
from kdexport.reparam.evaluation import Evaluation

_ATEN = torch.ops.aten
CONVS = {
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.conv1d.padding, _ATEN.conv2d.padding,
    _ATEN.conv3d.padding, _ATEN.convolution.default,
}  # fmt: skip
LINEARS = {_ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default}
NORMS = {
    _ATEN.batch_norm.default, _ATEN._native_batch_norm_legit_no_training.default, _ATEN.native_batch_norm.default,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """``nodes``, the last one the result, compute ``conv`` of ``source``; ``border`` (C,) is what it pads by."""

    source: fx.Node
    conv: Convolution
    nodes: tuple[fx.Node, ...]
    kind: str
    border: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The sum of ``operands`` times ``coefficients``."""

    operands: tuple[fx.Node, ...]
    coefficients: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Concat:
    """``operands`` side by side along the channels."""

    operands: tuple[fx.Node, ...]


Operator = Layer | Sum | Concat


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {item.name: item.default_value for item in schema.arguments if item.has_default_value()}
    bound.update((item.name, value) for item, value in zip(schema.arguments, node.args, strict=False))
    return {**bound, **node.kwargs}


def module_paths(names: list[str]) -> list[str]:
    """The modules that parameters of these names belong to, each once, in order."""
    return [path for path in dict.fromkeys(name.rpartition(".")[0] for name in names) if path]


class Surroundings:
    """What must be known about a graph to read one of its operators."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.shapes, self.constants = evaluation.shapes, evaluation.constants
        self._uses: Counter[Any] = Counter()
        for node in evaluation.graph.nodes:
            if node.target in CONVS | LINEARS | NORMS:
                self._uses.update({self._key(root) for root in self.weights(node)})

    def weights(self, node: fx.Node) -> list[fx.Node]:
        """The parameters and buffers that the constant arguments of ``node`` are computed from."""
        found: dict[fx.Node, None] = {}
        pending = [item for item in node.all_input_nodes if item in self.constants]
        while pending:
            item = pending.pop(0)
            if item.op == "get_attr":
                found[item] = None
            pending.extend(item.all_input_nodes)
        return list(found)

    def require_own_weights(self, node: fx.Node) -> None:
        """Raise ``ReparamError`` where another layer reads a weight of ``node`` too."""
        for root in self.weights(node):
            count = self._uses[self._key(root)]
            if count > 1:
                raise ReparamError(
                    f"{root.target} is used at {count} places; one set of weights cannot hold {count} merges.",
                    remedy="Give each place its own weights.",
                )

    def constant(self, value: Any) -> Any:
        """A node's value where it is constant, None where it is not; what is no node stays as it is."""
        return self.constants.get(value) if isinstance(value, fx.Node) else value

    def per_channel(self, value: Any, shape: tuple[int, ...]) -> float | Tensor | None:
        """A constant scalar, or a constant that broadcasts over ``shape`` as one value per channel; None otherwise."""
        constant = self.constant(value)
        if constant is None or isinstance(constant, int | float):
            return constant
        if not isinstance(constant, Tensor):
            return None
        if constant.numel() == 1 and constant.dim() <= len(shape):
            return float(constant)
        sizes = [1] * (len(shape) - constant.dim()) + list(constant.shape)
        only_channels = len(sizes) == len(shape) and all(s == 1 for axis, s in enumerate(sizes) if axis != 1)
        return constant.flatten() if only_channels and sizes[1] == shape[1] else None

    def place(self, node: fx.Node) -> str:
        """Where in the module ``node`` is: the path of its weights, or else of the module that calls it."""
        paths = module_paths([str(root.target) for root in self.weights(node)])
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        called = stack[-1].removeprefix("L['self'].") if stack else ""
        return paths[0] if paths else f"{called} ({node.name})" if called else node.name

    def _key(self, root: fx.Node) -> Any:
        value: Any = self.evaluation.module
        for part in str(root.target).split("."):
            value = getattr(value, part)
        return value.data_ptr(), tuple(value.shape)
