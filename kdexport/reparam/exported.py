"""Exports modules as programs, and reads programs as functional graphs whose weights keep their names."""

import contextlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from kdexport.core.console import quiet
from kdexport.errors import ReparamError, first_line
from kdexport.reparam.simplify import (
    flatten_before_linear,
    fold_numbers,
    inline_regions,
    refuse_broken_weights,
    refuse_random,
    remove_dead,
    remove_identities,
    split_norms,
)

_ATEN = torch.ops.aten
_BATCH = "batch"
_DROPOUTS = {_ATEN.dropout.default, _ATEN.feature_dropout.default, _ATEN.native_dropout.default}


def export_module(module: nn.Module, example_inputs: Sequence[Tensor]) -> ExportedProgram:
    """The program of an eval-mode module with a dynamic batch, the first dimension of every input.

    Raises ``ReparamError`` for a forward pass that cannot be exported for every batch size.
    """
    # torch.export takes a size of 1 for a constant.
    examples = tuple(torch.cat([x, x]) if x.dim() > 0 and x.shape[0] == 1 else x for x in example_inputs)
    batch, shapes = Dim(_BATCH, min=1), torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for example in examples:
        if example.dim() > 0:
            shapes[example] = {0: batch}
    try:
        # Strict export prints the graph that it gives up on.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            try:
                return torch.export.export(module, examples, dynamic_shapes=shapes)
            except GuardOnDataDependentSymNode:
                # float(self.weight) is a number for the stricter tracer alone.
                return torch.export.export(module, examples, dynamic_shapes=shapes, strict=True)
    # The module's own forward runs here, and may raise anything.
    except Exception as error:
        first = error.__context__ if isinstance(error.__context__, GuardOnDataDependentSymNode) else error
        sizes = ", ".join(str(tuple(x.shape)) for x in examples)
        by_value = isinstance(first, GuardOnDataDependentSymNode)
        reason = ("its path depends on values of the input" if by_value else first_line(first)) + _place(str(first))
        raise ReparamError(
            f"{type(module).__name__} cannot be exported for inputs {sizes} of any batch size: {reason}",
            remedy="Check the input shape; forward() must not depend on values or on one batch size. `kdexport fuse` "
            "also takes a .pt2 file of a fixed batch.",
        ) from error


def _place(reason: str) -> str:
    """The line of the network's own code that an error of the exporter names; empty if there is none."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', reason)
    own = [(file, line) for file, line in lines if "site-packages" not in file and not file.startswith("<")]
    return f" ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""


def functional_graph(program: ExportedProgram) -> fx.GraphModule:
    """A fresh graph of ``program`` without in-place operators, asserts and identities; weights are read by their names.

    Raises ``ReparamError`` for a program in training mode, for one that writes to its buffers, for one that draws
    random numbers, for a weight that is NaN, and for inputs that are no positional tensors.
    """
    module = _plain_graph(program.module())
    if not _drop_mutation(module.graph):
        # The general way, which takes its time.
        flat = program.run_decompositions({})
        if flat.graph_signature.buffers_to_mutate:
            written = ", ".join(sorted(set(flat.graph_signature.buffers_to_mutate.values()))[:3])
            raise ReparamError(
                f"The program writes to its buffers ({written}), so that one call changes the next.",
                remedy="Export it in evaluation mode.",
            )
        module = _plain_graph(flat.module())
    fold_numbers(module)
    remove_identities(module.graph)
    # What nothing reads any more must not count as a reader.
    remove_dead(module.graph)
    refuse_random(module.graph)
    refuse_broken_weights(module)
    split_norms(module.graph)
    flatten_before_linear(module.graph)
    module.graph.lint()
    module.recompile()
    _positional_inputs(program, module)
    return module


def one_output(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` as a plain graph from positional inputs to its one output tensor, with the same weights.

    What torch.export makes takes and returns nested structures, and cannot change its mode.
    """
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {})
    while isinstance(result, list | tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, fx.Node):
        raise ReparamError(
            "The network has several outputs.", remedy="Name the one with the logits: output under [student]."
        )
    graph.output(result)
    return fx.GraphModule(module, graph)


def _plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` without regions, guards and asserts, in place."""
    for node in list(module.graph.nodes):
        # Guards repeat the shapes that the program is exported for, and asserts the types: a re-export sets both again.
        if node.op == "call_module":
            module.graph.erase_node(node)
    inline_regions(module)
    for node in list(module.graph.nodes):
        if node.target is _ATEN._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    _refuse_training(module.graph)
    return module


def _drop_mutation(graph: fx.Graph) -> bool:
    """Replace in-place operators on values without views by functional ones; returns whether all were replaced.

    What reads the value after the operator reads its result instead.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        changed = node.args[0]
        twin = getattr(
            getattr(_ATEN, schema.name.removeprefix("aten::").removesuffix("_"), None), _overload(node), None
        )
        if twin is None or not _returns_fresh(changed) or any(_may_view(user) for user in changed.users):
            return False
        node.target = twin
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])
    return True


def _returns_fresh(node: fx.Node) -> bool:
    """Whether an operator returns a tensor of its own, never a view of what it reads."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and all(r.alias_info is None for r in schema.returns)


def _may_view(node: fx.Node) -> bool:
    """Whether an operator may return a view of what it reads; in-place ones become functions."""
    schema = getattr(node.target, "_schema", None)
    if node.op == "output":
        return False
    return schema is None or (not schema.is_mutable and not _returns_fresh(node)) or node.target in _VIEWS_SOMETIMES


#: Operators that return their input itself where it already is what they make, which their schemas do not say.
_VIEWS_SOMETIMES = {
    _ATEN.reshape.default, _ATEN.contiguous.default, _ATEN.flatten.using_ints, _ATEN.to.dtype, _ATEN.dropout.default,
    _ATEN.to.device, _ATEN.to.dtype_layout, _ATEN.to.other, _ATEN.type_as.default, _ATEN.feature_dropout.default,
}  # fmt: skip


def _overload(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[2]


def reexport(module: fx.GraphModule, program: ExportedProgram, shapes: Sequence[Sequence[int]]) -> ExportedProgram:
    """Export a rewritten graph of ``program`` again, dynamic in the same dimensions, with no path of this machine.

    ``shapes`` are sizes that the program accepts, one per input.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    dims: dict[str, Any] = {}
    named = [
        {
            axis: dims.setdefault(str(size), _dim(program, str(size), node.name, axis))
            for axis, size in enumerate(node.meta["val"].shape)
            if not isinstance(size, int)
        }
        for node in inputs
    ]
    values = [node.meta["val"] for node in inputs]
    examples = tuple(
        torch.zeros(tuple(sizes), dtype=value.dtype, device=value.device)
        for sizes, value in zip(shapes, values, strict=True)
    )
    with quiet():
        try:
            written = torch.export.export(module, examples, dynamic_shapes=tuple(named))
        except UserError:
            # The bounds of the original do not name every size that its operators exclude: let torch derive them.
            free = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in named)
            written = torch.export.export(module, examples, dynamic_shapes=free)
    for node in written.graph.nodes:
        node.meta.pop("stack_trace", None)
    return written


def _dim(program: ExportedProgram, symbol: str, name: str, axis: int) -> Any:
    if not re.fullmatch(r"[a-z]\w*", symbol):
        return Dim.AUTO
    bounds = next((value for key, value in program.range_constraints.items() if str(key) == symbol), None)
    lower = 1 if bounds is None else max(int(bounds.lower), 1)
    upper = None if bounds is None or not str(bounds.upper).isdigit() else int(bounds.upper)
    return Dim(_BATCH if axis == 0 else f"{name}_{axis}", min=lower, max=upper)


def _positional_inputs(program: ExportedProgram, module: fx.GraphModule) -> None:
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    plain = all(isinstance(node.meta.get("val"), Tensor) for node in inputs)
    args, kwargs = program.example_inputs if program.example_inputs is not None else ((None,) * len(inputs), {})
    if not plain or kwargs or len(args) != len(inputs):
        raise ReparamError(
            "The program takes inputs that are not positional tensors.",
            remedy="Wrap the module so that forward() takes tensors by position.",
        )


def _refuse_training(graph: fx.Graph) -> None:
    for node in graph.nodes:
        name = str(node.target)
        trains = (
            (node.target is _ATEN.batch_norm.default and node.args[5] and node.args[3] is not None)
            or (node.target is _ATEN.native_batch_norm.default and node.args[5])
            or re.match(r"aten\._native_batch_norm_legit(_functional)?\.default|aten\._batch_norm_with_update", name)
            or (node.target in _DROPOUTS and node.args[2] and node.args[1] != 0)
        )
        if trains:
            raise ReparamError(
                f"The program was exported in training mode: {node.name} is active.",
                remedy="Call .eval() on the module before torch.export.export, and pass training=self.training to "
                "functional dropout.",
            )
