"""What an exported graph of a folded network must contain, counted in the network itself."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from kdexport.reparam.operators import LAYERS, NORMS

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.matmul.default, _ATEN.bmm.default, _ATEN.einsum.default, _ATEN.baddbmm.default}


@dataclass(frozen=True, slots=True)
class Structure:
    """The layers with weights of a folded network and the batch norms that are left in it.

    ``exact`` is true for a registered student, which is a chain of plain layers. An exporter may write the layers of
    any other network as fewer operators, never as more. ``weights`` are the names of the weights that layers read.
    """

    layers: int
    norms: int
    exact: bool
    weights: Collection[str]


def structure_of(module: nn.Module) -> Structure:
    """The structure of a folded network: a graph, as the fold of a stored program returns it, or a plain student."""
    if not isinstance(module, fx.GraphModule):
        weights = [name for name, value in module.state_dict().items() if value.dim() > 1]
        return Structure(len(weights), 0, True, frozenset(module.state_dict()))
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    layers = [node for node in nodes if node.target in LAYERS - NORMS]
    products = [node for node in nodes if node.target in _PRODUCTS and any(map(_is_weight, node.all_input_nodes))]
    read = {str(item.target) for node in layers for item in node.all_input_nodes if item.op == "get_attr"}
    norms = sum(node.target in NORMS for node in nodes)
    return Structure(len(layers) + len(products), norms, False, frozenset(read))


def multiplied_weights(module: fx.GraphModule) -> frozenset[str]:
    """Names of the weights that layers and products of a graph multiply by, directly or after a change of shape."""
    found = set[str]()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in (LAYERS - NORMS) | _PRODUCTS:
            found.update(_roots([item for item in node.all_input_nodes if _is_weight(item)]))
    return frozenset(found)


def _roots(nodes: list[Any]) -> set[str]:
    return {name for node in nodes for name in ([str(node.target)] if node.op == "get_attr" else [])} | {
        name for node in nodes if node.all_input_nodes for name in _roots(list(node.all_input_nodes))
    }


def _is_weight(node: Any) -> bool:
    """Whether a value depends on weights alone."""
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_weight, node.all_input_nodes))
