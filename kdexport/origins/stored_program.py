"""A network as data: the operators of an exported program as JSON, which opens without the code that made the network.

An archive of ``torch.export.save`` can hold pickled objects, and a newer torch can write what an older one cannot read.
A stored program holds names of ATen operators, their arguments and the names of weights, and nothing else. Reading it
looks each operator up, so a program is refused, not run, where an operator is unknown or does more than compute.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from kdexport.errors import CheckpointError, ReparamError
from kdexport.reparam.exported import one_output
from kdexport.reparam.simplify import refuse_random

SCHEMA = "kdexport.program/1"

#: Functions of Python on sizes, by the name under which they are stored.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{
            f"operator.{name}": getattr(operator, name)
            for name in (
                "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt", "le",
                "gt", "ge", "and_", "or_",
            )
        },
        **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
        **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
    }
)  # fmt: skip
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}

_OPERATOR = re.compile(r"aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
_NAME = re.compile(r"[A-Za-z_]\w*")
#: Names of weights; the layers of a sequence are numbers.
_PATH = re.compile(r"\w+(\.\w+)*")
#: Texts among arguments are modes, such as "reflect" or "tanh", and the equations of einsum.
_TEXT = re.compile(r"[\w ,.>\-]{0,200}")

#: Kinds of objects among arguments besides numbers, by the key under which they are stored.
_KINDS = MappingProxyType(
    {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format, "device": torch.device}
)
#: Operators that compute nothing: they touch files, print, or check what the exporter has checked.
_REFUSED = {"from_file", "_print", "_assert_async", "_assert_scalar", "record_stream"}


def store_program(module: fx.GraphModule, image_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object and the weights of ``module``: a functional graph from images (N,3,S,S) to logits (N,K).

    Weights that several names share are stored once. Raises ``ReparamError`` for an operator that cannot be stored.
    """
    module = one_output(module)
    names = _shared_once(module)
    _fold_constants(module)
    graph = module.graph
    stored: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        if node.op == "get_attr":
            path = names.get(str(node.target), str(node.target))
            value = _attribute(module, path)
            stored[path] = value.detach().cpu().contiguous()
            kinds[path] = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            nodes.append({"name": node.name, "weight": path})
        elif node.op == "call_function":
            call = {"name": node.name, "call": _call_name(node), "args": _encode(node.args, node)}
            nodes.append({**call, "kwargs": _encode(node.kwargs, node)} if node.kwargs else call)
        elif node.op not in ("placeholder", "output"):
            raise _not_stored(node, f"a node of the kind {node.op}")
    program = {
        "schema": SCHEMA,
        "image_size": image_size,
        "input": next(node.name for node in graph.nodes if node.op == "placeholder"),
        "output": next(node.args[0].name for node in graph.nodes if node.op == "output"),
        "weights": dict(sorted(kinds.items())),
        "nodes": nodes,
    }
    return program, stored


def _shared_once(module: fx.GraphModule) -> dict[str, str]:
    """For each name of a weight the first name of the same tensor."""
    first: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(value), name) for name, value in tensors}


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def _fold_constants(module: fx.GraphModule) -> None:
    """Compute once what depends on no input and no weight, such as grids of positions."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        constant = node.op == "call_function" and all(item in values for item in inputs)
        # Without inputs only a factory is constant; its tensors are small, and its readers become constant too.
        if constant:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: values[item])
            values[node] = node.target(*args, **kwargs)
    for index, (node, value) in enumerate(list(values.items())):
        if isinstance(value, Tensor) and any(user not in values for user in node.users):
            name = f"constant_{index}"
            module.register_buffer(name, value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name), delete_user_cb=lambda user: user not in values)
    module.graph.eliminate_dead_code()
    module.recompile()


def _call_name(node: fx.Node) -> str:
    target: Any = node.target
    name = _FUNCTION_NAMES.get(target) or str(target)
    if name not in _FUNCTIONS:
        problem = _problem(name)
        if problem:
            raise _not_stored(node, problem)
    return name


def _problem(name: str) -> str:
    """Why an operator is not accepted; empty if it is."""
    match = _OPERATOR.fullmatch(name)
    if match is None:
        return f"{name!r} is not an ATen operator"
    found = getattr(getattr(torch.ops.aten, match[1], None), match[2], None)
    if not isinstance(found, torch._ops.OpOverload):
        return f"torch {torch.__version__} has no operator {name}"
    if match[1] in _REFUSED or found._schema.is_mutable:
        return f"{name} does more than compute a value from its inputs"
    return ""


def _not_stored(node: fx.Node, problem: str) -> ReparamError:
    return ReparamError(
        f"The network cannot be stored in a bundle: {node.name}: {problem}.",
        remedy="Replace the operator in forward() by operators of torch itself.",
    )


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_encode(item, node) for item in value]
    if isinstance(value, dict):
        return {str(key): _encode(item, node) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    for kind, accepted in _KINDS.items():
        if isinstance(value, accepted):
            return {kind: "cpu" if kind == "device" else str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and _TEXT.fullmatch(value)):
        return value
    raise _not_stored(node, f"an argument of the type {type(value).__name__}")


def read_program(text: str, tensors: Mapping[str, Tensor], source: str) -> fx.GraphModule:
    """The network of a stored program with its weights, in evaluation mode; nothing of the text is run as code.

    ``meta["input_shape"]`` of the result is the (2,3,S,S) that it is exported with. Raises ``CheckpointError`` for a
    text that is damaged, that names an operator which this torch lacks, or whose weights are not those of ``tensors``.
    """
    try:
        return _Reader(json.loads(text), tensors).module()
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"{source} is not a stored program that torch {torch.__version__} can read: {type(error).__name__}: "
            f"{error}.",
            remedy="Copy the file again. A program of a newer torch may need that version.",
        ) from error


class _Reader:
    def __init__(self, program: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if program["schema"] != SCHEMA:
            raise ValueError(f"schema is {program['schema']!r}, this version reads {SCHEMA}")
        self._program, self._tensors = program, tensors
        self._graph, self._known = fx.Graph(), dict[str, fx.Node]()

    def module(self) -> fx.GraphModule:
        root = self._root()
        self._add(self._program["input"], self._graph.placeholder(_matching(_NAME, self._program["input"])))
        for item in self._program["nodes"]:
            self._add(item["name"], self._weight(item["weight"]) if "weight" in item else self._call(item))
        self._graph.output(self._known[self._program["output"]])
        self._graph.lint()
        refuse_random(self._graph)
        module = fx.GraphModule(root, self._graph)
        size = self._program["image_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"image_size is {size!r}")
        module.meta["input_shape"] = (2, 3, size, size)
        return module.eval()

    def _root(self) -> nn.Module:
        kinds = self._program["weights"]
        if kinds.keys() != self._tensors.keys():
            odd = sorted(kinds.keys() ^ self._tensors.keys())
            raise ValueError(f"{len(odd)} weights are in one of program and file only, first {odd[0]!r}")
        root = nn.Module()
        for path, kind in kinds.items():
            owner, _, name = _matching(_PATH, path).rpartition(".")
            holder = _holder(root, owner)
            if hasattr(holder, name):
                raise ValueError(f"the weight {path!r} has the name of something else")
            if kind == "parameter":
                holder.register_parameter(name, nn.Parameter(self._tensors[path], requires_grad=False))
            elif kind == "buffer":
                holder.register_buffer(name, self._tensors[path])
            else:
                raise ValueError(f"the weight {path!r} is a {kind!r}")
        return root

    def _add(self, name: str, node: fx.Node) -> None:
        if name in self._known:
            raise ValueError(f"two nodes are named {name!r}")
        node.name = _matching(_NAME, name)
        self._known[name] = node

    def _weight(self, path: str) -> fx.Node:
        if path not in self._program["weights"]:
            raise ValueError(f"there is no weight {path!r}")
        return self._graph.get_attr(path)

    def _call(self, item: dict[str, Any]) -> fx.Node:
        name = str(item["call"])
        function = _FUNCTIONS.get(name)
        if function is None:
            problem = _problem(name)
            if problem:
                raise ValueError(problem)
            _, packet, overload = name.split(".")
            function = getattr(getattr(torch.ops.aten, packet), overload)
        args, kwargs = self._decode(item["args"]), self._decode_options(item.get("kwargs", {}))
        return self._graph.call_function(function, tuple(args), kwargs)

    def _decode_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {_matching(_NAME, key): self._decode(value) for key, value in options.items()}

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, dict):
            return self._object(value)
        return _matching(_TEXT, value) if isinstance(value, str) else value

    def _object(self, value: dict[str, Any]) -> Any:
        ((kind, name),) = value.items()
        if kind == "node":
            return self._known[name]
        if kind == "float":
            return float(name)
        if kind == "device":
            return torch.device(_matching(re.compile("cpu"), name))
        found = getattr(torch, _matching(_NAME, name), None)
        if kind not in _KINDS or not isinstance(found, _KINDS[kind]):
            raise ValueError(f"{name!r} is not a {kind}")
        return found


def _matching(pattern: re.Pattern[str], text: Any) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not allowed")
    return text


def _holder(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            if hasattr(module, name):
                raise ValueError(f"the weights use the name {name!r} twice")
            module.add_module(name, nn.Module())
        module = cast(nn.Module, module._modules[name])
    return module
