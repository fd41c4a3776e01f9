"""Rewrites a functional graph without changing one value: what is left are the operators that compute something.

Regions of torch.no_grad and disabled autocast become part of the graph, numbers that are read from weights become
numbers, identities (dropout in evaluation mode, a cast to the same type, a leaky ReLU of slope 1) disappear, and with
them what only they had kept. What draws random numbers is refused.
"""

import operator
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from kdexport.errors import ReparamError
from kdexport.reparam.operators import CONVS, LAYERS, LINEARS, NORMS, TRANSPOSED, arguments

_ATEN = torch.ops.aten
_HIGHER = torch.ops.higher_order

_DROPOUTS = {
    _ATEN.dropout.default, _ATEN.feature_dropout.default, _ATEN.alpha_dropout.default,
    _ATEN.feature_alpha_dropout.default,
}  # fmt: skip

_COPIES = {
    _ATEN.clone.default, _ATEN.contiguous.default, _ATEN.alias.default, _ATEN.detach.default,
    _ATEN.lift_fresh_copy.default, _ATEN._to_copy.default, _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device,
    _ATEN.to.other, _ATEN.type_as.default,
}  # fmt: skip

#: Operators that need the layout that a copy before them makes.
_VIEWS = {_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.view.dtype, _ATEN.as_strided.default}

_ASSERTS = re.compile(r"aten\.(_assert_\w+|sym_constrain_range\w*)\.|\w+\._assert\w*")

_UNTAGGED_GENERATORS = re.compile(r"aten\._philox_(normal|randint|uniform)")


def attribute(module: nn.Module, path: str) -> Any:
    """What ``module`` holds at the dotted ``path``."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def inline_regions(module: fx.GraphModule) -> None:
    """Put the contents of torch.no_grad and disabled autocast regions into the graph itself, in place.

    Raises ``ReparamError`` for a region that computes something else than its contents: control flow and enabled
    autocast.
    """
    graph = module.graph
    while True:
        regions = [node for node in graph.nodes if node.op == "call_function" and _region(module, node) is not None]
        if not regions:
            break
        for node in regions:
            _inline(module, node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and isinstance(attribute(module, str(node.target)), nn.Module):
            if not node.users:
                graph.erase_node(node)
                continue
            user = str(getattr(next(iter(node.users)).target, "__name__", node.name))
            kind = "autocast" if "autocast" in user else "control flow" if "cond" in user else user
            raise ReparamError(
                f"The program contains a separate region ({kind}), which runs under other rules than the rest.",
                remedy="Remove torch.autocast, torch.cond and other regions from forward(); torch.no_grad and "
                "torch.autocast(enabled=False) may stay.",
            )


def _region(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, list[Any]] | None:
    """The graph and the inputs of a region that computes what its contents compute."""
    if node.target is _HIGHER.wrap_with_set_grad_enabled:
        inner, inputs = node.args[1], list(node.args[2:])
    elif node.target is _HIGHER.wrap_with_autocast and not node.args[2]:
        inner, inputs = node.args[4], list(node.args[5:])
    else:
        return None
    assert isinstance(inner, fx.Node)
    region = attribute(module, str(inner.target))
    assert isinstance(region, fx.GraphModule)
    return region, inputs


def _inline(module: fx.GraphModule, node: fx.Node) -> None:
    found = _region(module, node)
    assert found is not None
    region, inputs = found
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    outputs: Any = ()
    with module.graph.inserting_before(node):
        for item in region.graph.nodes:
            if item.op == "placeholder":
                values[item] = next(given)
            elif item.op == "output":
                outputs = fx.node.map_arg(item.args[0], lambda old: values[old])
            else:
                values[item] = module.graph.node_copy(item, lambda old: values[old])
                if item.op == "get_attr":
                    values[item].target = _own(module, attribute(region, str(item.target)))
    if not isinstance(outputs, list | tuple):
        node.replace_all_uses_with(outputs)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _own(module: fx.GraphModule, value: Any) -> str:
    number = sum(name.startswith("_region_") for name in vars(module)["_modules"] | vars(module)["_buffers"])
    name = f"_region_{number}"
    if isinstance(value, nn.Module):
        module.add_module(name, value)
    else:
        module.register_buffer(name, value)
    return name


def fold_numbers(module: fx.GraphModule) -> None:
    """Replace what `.item()` reads from weights, and what is computed from it, by numbers, in place."""
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        reads = node.target in (_ATEN.item.default, _ATEN._local_scalar_dense.default)
        value = None
        if reads and _depends_on_weights_alone(node.args[0]):
            with torch.no_grad():
                value = _compute(module, node.args[0]).item()
        elif not node.all_input_nodes and _is_arithmetic(node.target):
            value = node.target(*node.args, **node.kwargs)
        if value is not None:
            _substitute(node, value)
    for node in reversed(module.graph.nodes):
        is_check = node.op == "call_function" and _ASSERTS.match(str(node.target))
        if is_check and not node.all_input_nodes and not node.users:
            module.graph.erase_node(node)


def _is_arithmetic(target: Any) -> bool:
    home = getattr(target, "__module__", "")
    return home in ("_operator", "math", "builtins") or getattr(target, "__name__", "").startswith("sym_")


def _substitute(node: fx.Node, value: Any) -> None:
    def swap(old: fx.Node) -> Any:
        return value if old is node else old

    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(user.args, swap), fx.node.map_arg(user.kwargs, swap)
    node.graph.erase_node(node)


def _depends_on_weights_alone(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op == "get_attr":
        return True
    return node.op == "call_function" and all(_depends_on_weights_alone(item) for item in node.all_input_nodes)


def _compute(module: fx.GraphModule, node: Any) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args = fx.node.map_arg(node.args, lambda item: _compute(module, item))
    return node.target(*args, **fx.node.map_arg(node.kwargs, lambda item: _compute(module, item)))  # type: ignore[operator]


def remove_identities(graph: fx.Graph) -> None:
    """Let the readers of an operator that returns its input read that input, in place."""
    for node in list(graph.nodes):
        source = _identical(node)
        if source is None:
            continue
        if node.target is _ATEN.native_dropout.default:
            for user in list(node.users):
                if user.args[1] == 0:
                    user.replace_all_uses_with(source)
                    graph.erase_node(user)
            if not node.users:
                graph.erase_node(node)
        else:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _identical(node: fx.Node) -> fx.Node | None:
    """The input that ``node`` returns as it is, None where it may compute something."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    given = arguments(node)
    # Operators name their first argument self, input or tensor.
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in _DROPOUTS or node.target is _ATEN.native_dropout.default:
        return None if _is_active(given) else source
    is_number = {
        _ATEN.leaky_relu.default: "negative_slope", _ATEN.mul.Tensor: "other", _ATEN.mul.Scalar: "other",
        _ATEN.div.Tensor: "other", _ATEN.div.Scalar: "other",
    }.get(node.target)  # type: ignore[call-overload]  # fmt: skip
    if is_number is not None:
        one = given[is_number]
        return source if isinstance(one, int | float) and one == 1 and _same_kind(node, source) else None
    if node.target in (_ATEN.constant_pad_nd.default, _ATEN.pad.default):
        return source if all(isinstance(side, int) and side == 0 for side in given["pad"]) else None
    if node.target in _COPIES and _same_kind(node, source) and _same_layout(node, source):
        return source
    return None


def _is_active(given: dict[str, Any]) -> bool:
    return bool(given["train"]) and given["p"] != 0


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    one, two = node.meta.get("val"), source.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return False
    return (one.dtype, one.device, str(one.shape)) == (two.dtype, two.device, str(two.shape))


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    if any(user.target in _VIEWS for user in node.users):
        return False
    return str(node.meta["val"].stride()) == str(source.meta["val"].stride())


def split_norms(graph: fx.Graph) -> None:
    """Move batch norms behind a concatenation of layers to these layers, in place: each then folds into its own.

    Only where each part comes from a layer with weights of its own and the concatenation has no other reader, so that
    nothing but the folds remains.
    """
    for norm in list(graph.nodes):
        if norm.target not in NORMS or norm.target is not _ATEN.batch_norm.default:
            continue
        joined = arguments(norm)["input"]
        if joined.target is not _ATEN.cat.default or len(joined.users) != 1:
            continue
        parts, given = arguments(joined)["tensors"], arguments(norm)
        if arguments(joined)["dim"] % joined.meta["val"].dim() != 1 or not all(map(_is_own_layer, parts)):
            continue
        start, normed = 0, []
        with graph.inserting_before(norm):
            for part in parts:
                end = start + int(part.meta["val"].shape[1])
                own = [
                    _rows(graph, given[name], start, end) for name in ("weight", "bias", "running_mean", "running_var")
                ]
                rest = (False, given["momentum"], given["eps"], given["cudnn_enabled"])
                normed.append(_like(graph.call_function(norm.target, (part, *own, *rest)), part))
                start = end
            fresh = _like(graph.call_function(joined.target, (normed, 1)), norm)
        norm.replace_all_uses_with(fresh)
        graph.erase_node(norm)
        graph.erase_node(joined)


_NORM_WEIGHTS = ("weight", "bias", "running_mean", "running_var")


def _is_own_layer(node: fx.Node) -> bool:
    if node.target not in CONVS | TRANSPOSED | LINEARS or len(node.users) != 1 or node.meta["val"].dim() < 2:
        return False
    weight = node.args[1] if len(node.args) > 1 else None
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1


def _rows(graph: fx.Graph, weight: Any, start: int, end: int) -> Any:
    if not isinstance(weight, fx.Node):
        return weight
    part = graph.call_function(_ATEN.slice.Tensor, (weight, 0, start, end))
    part.meta["val"] = weight.meta["val"][start:end]
    return part


def _like(node: fx.Node, other: fx.Node) -> fx.Node:
    node.meta.update(other.meta)
    return node


def flatten_before_linear(graph: fx.Graph) -> None:
    """Move a flattening of all dimensions but the last from behind a linear layer to before it, in place.

    A linear layer acts on the last dimension alone. LeViT normalises its output as (N*L,C), which is then the output
    of the linear layer itself.
    """
    for norm in list(graph.nodes):
        flat: Any = norm.args[0] if norm.target in NORMS else None
        linear: Any = flat.args[0] if isinstance(flat, fx.Node) and _flattens(flat) else None
        if flat is None or linear is None or linear.target is not _ATEN.linear.default:
            continue
        sizes = [user for user in linear.users if _reads_size(user, linear)]
        if len(sizes) + 1 != len(linear.users) or linear.meta["val"].dim() < 3:
            continue
        source, shape = linear.args[0], linear.meta["val"].shape
        with graph.inserting_before(linear):
            before: fx.Node = graph.call_function(_ATEN.reshape.default, (source, [-1, source.meta["val"].shape[-1]]))
            before.meta.update(flat.meta)
            flat_shape = (flat.meta["val"].shape[0], source.meta["val"].shape[-1])
            before.meta["val"] = flat.meta["val"].new_empty(flat_shape)
            fresh = _like(graph.call_function(linear.target, (before, *linear.args[1:]), linear.kwargs), linear)
            fresh.meta["val"] = flat.meta["val"]
            # All sizes but the last are those of the source.
            extents = [_size(graph, source, axis) for axis in range(len(shape) - 1)] + [shape[-1]]
        for user in sizes:
            if user.target is _ATEN.reshape_as.default:
                user.target, user.args = _ATEN.reshape.default, (user.args[0], extents)
            else:
                user.replace_all_uses_with(extents[user.args[1]])
                graph.erase_node(user)
        flat.replace_all_uses_with(fresh)
        graph.erase_node(flat)
        graph.erase_node(linear)


def _flattens(node: fx.Node) -> bool:
    """Whether all dimensions but the last of the input become one."""
    if node.target not in _FLATTENINGS or len(node.users) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    inner, outer = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(outer) == 2 and len(inner) > 2 and isinstance(inner[-1], int) and outer[-1] == inner[-1]


def _reads_size(node: fx.Node, source: fx.Node) -> bool:
    if node.target is _ATEN.reshape_as.default:
        return node.args[1] is source and node.args[0] is not source
    return node.target is _ATEN.sym_size.int and node.args[1] != source.meta["val"].dim() - 1


def _size(graph: fx.Graph, source: fx.Node, axis: int) -> Any:
    extent = source.meta["val"].shape[axis]
    if isinstance(extent, int):
        return extent
    node = graph.call_function(_ATEN.sym_size.int, (source, axis))
    node.meta["val"] = extent
    return node


_FLATTENINGS = {_ATEN.flatten.using_ints, _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default}


def remove_dead(graph: fx.Graph) -> None:
    """Drop what no output needs, also what draws numbers; checks of sizes stay."""
    graph.eliminate_dead_code(lambda node: node.is_impure() and not _is_tagged(node))


def refuse_random(graph: fx.Graph) -> None:
    """No operator of ``graph`` draws numbers; raises ``ReparamError`` that names the first that does."""
    for node in graph.nodes:
        if node.op == "call_function" and _draws_numbers(node):
            raise ReparamError(
                f"{_place(node)} draws random numbers: two runs on one input differ, so that a merge cannot be "
                "compared with the original.",
                remedy="Switch it off outside of training: pass training=self.training to functional dropout and "
                "stochastic depth, and remove other noise from the evaluation path.",
            )


def _is_tagged(node: fx.Node) -> bool:
    tags: Iterable[Any] = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or bool(_UNTAGGED_GENERATORS.match(str(node.target)))


def _draws_numbers(node: fx.Node) -> bool:
    if not _is_tagged(node):
        return False
    given = arguments(node)
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    # Attention and recurrent layers draw for their dropout alone.
    chance = next((given[name] for name in ("dropout_p", "dropout", "p") if name in given), None)
    only_dropout = "dropout_p" in given or "dropout" in given or "dropout" in str(node.target)
    return not (only_dropout and chance == 0)


def _place(node: fx.Node) -> str:
    stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    called = stack[-1].removeprefix("L['self'].").removeprefix("L['self']") if stack else ""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    return f"{name} in {called}" if called else f"{name} ({node.name})"


def refuse_broken_weights(module: fx.GraphModule) -> None:
    """No weight that the graph reads is NaN, and none of a layer is infinite; raises ``ReparamError`` that names it."""
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = attribute(module, str(node.target))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        of_layer = any(user.target in LAYERS for user in node.users)
        broken = int(value.isnan().sum()) + (int(value.isinf().sum()) if of_layer else 0)
        if broken:
            what = "NaN" if value.isnan().any() else "infinite values"
            raise ReparamError(
                f"The weight {node.target} holds {what}: {broken} of {value.numel()} values.",
                remedy="The training run diverged or the file is damaged: load a checkpoint with finite weights.",
            )
