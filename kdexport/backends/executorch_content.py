"""What an ExecuTorch program contains, read without running it: its operators, its delegates, and the bits of weights.

XNNPACK's delegate keeps each tensor as it is, only with its axes in the order of its kernels, so that the bytes of each
weight and bias of the ONNX file must be in the program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import ONNX_FILE, Finding
from kdexport.backends.weighted_nodes import WeightedNode, weighted_nodes
from kdexport.errors import AuditError, BackendUnavailableError, first_line

INSTALL = "Run pip install 'kdexport[executorch]'"
DELEGATE = "XnnpackBackend"
#: Operators that multiply by weights; outside of the delegate they would run in the slow portable kernels.
_WEIGHTED = ("conv", "linear", "addmm", "mm", "matmul", "bmm")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramContent:
    """The delegates of a program, the calls of them, and the operators that run outside of them, in order."""

    delegates: tuple[str, ...]
    calls: int
    outside: tuple[str, ...]
    #: Sizes of the input and the output.
    shapes: tuple[tuple[int, ...], ...]


def read_program(data: bytes) -> ProgramContent:
    """What is readable in the bytes of a ``.pte``.

    Raises ``AuditError`` for another file, ``BackendUnavailableError`` without ``executorch``.
    """
    try:
        from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as error:
        raise BackendUnavailableError(
            f"ExecuTorch is not installed, or not whole: {first_line(error)}.", remedy=f"{INSTALL}."
        ) from error
    try:
        found: Any = deserialize_pte_binary(data)
        (plan,) = getattr(found, "program", found).execution_plan
    # A reader of flatbuffers raises whatever its position leads to.
    except Exception as error:
        raise AuditError(
            f"The program cannot be read: {type(error).__name__}.",
            remedy="The file is damaged; build the bundle again.",
        ) from error
    steps = [step.instr_args for chain in plan.chains for step in chain.instructions]
    kernels = [step for step in steps if type(step).__name__ == "KernelCall"]
    names = [plan.operators[step.op_index] for step in kernels]
    ends = [plan.values[place].val for place in (*plan.inputs, *plan.outputs)]
    return ProgramContent(
        delegates=tuple(delegate.id for delegate in plan.delegates),
        calls=sum(type(step).__name__ == "DelegateCall" for step in steps),
        outside=tuple(name.name.removeprefix("aten::") for name in names),
        shapes=tuple(tuple(end.sizes) for end in ends),
    )


def program_findings(folder: Path, artifact: str, precision: str, kept: Sequence[str]) -> list[Finding]:
    """Checks of the program in ``folder`` against the ONNX file beside it."""
    import onnx

    data = (folder / artifact).read_bytes()
    try:
        content = read_program(data)
        nodes = weighted_nodes(onnx.load(str(folder / ONNX_FILE)))
    except AuditError as error:
        return [Finding("readable", False, error.message)]
    return [
        _delegation(content),
        _present("weights", data, {str(node): _weight_forms(node) for node in nodes}),
        _present("biases", data, {str(node): _bias_forms(node) for node in nodes if node.bias is not None}),
        _storage(data, nodes, precision, kept),
    ]


def _delegation(content: ProgramContent) -> Finding:
    """Whether all that multiplies by weights is in XNNPACK; what else is outside is named."""
    wrong = [name for name in content.outside if any(part in name.partition(".")[0] for part in _WEIGHTED)]
    others = sorted({name for name in content.delegates if name != DELEGATE})
    outside = ", ".join(sorted(set(content.outside))) or "none"
    fact = f"{content.calls} calls of XNNPACK; {len(content.outside)} operators outside of it: {outside}"
    if others:
        fact += f"; other delegates: {', '.join(others)}"
    holds = content.calls > 0 and not wrong and not others
    return Finding("layers with weights in XNNPACK", holds, fact)


def _present(check: str, data: bytes, wanted: Mapping[str, list[NDArray[Any]]]) -> Finding:
    """Whether one of the forms of each tensor is in the program."""
    absent = [name for name, forms in wanted.items() if not any(form.tobytes() in data for form in forms)]
    if absent:
        return Finding(check, False, f"{len(absent)} of {len(wanted)} are not in the program: {absent[0]}")
    return Finding(check, True, f"{len(wanted)} as in {ONNX_FILE}, bit for bit")


def _storage(data: bytes, nodes: Sequence[WeightedNode], precision: str, kept: Sequence[str]) -> Finding:
    """Whether no layer has its weight in another type too: a copy in float32 beside int8 would be what runs."""
    wrong = []
    for node in nodes:
        is_int8 = precision == "int8" and node.name not in kept
        if is_int8 != (node.levels is not None):
            wrong.append(f"{node} is {'float32' if node.levels is None else 'int8'} in the graph")
        elif is_int8 and any(form.tobytes() in data for form in _orders(node.weight)):
            wrong.append(f"{node} is in the program in float32")
    fact = f"{len(nodes)} layers, {len(nodes) - len(kept)} of them in {precision}"
    return Finding(f"every weight in {precision}", not wrong, wrong[0] if wrong else fact)


def _weight_forms(node: WeightedNode) -> list[NDArray[Any]]:
    return _orders(node.weight if node.levels is None else node.levels)


def _orders(values: NDArray[Any]) -> list[NDArray[Any]]:
    """A weight in each order of its axes in which XNNPACK stores it: channels last, and for depthwise layers."""
    forms = [values] if values.ndim != 4 else [values.transpose(0, 2, 3, 1), values.transpose(1, 2, 3, 0)]
    return [np.ascontiguousarray(form) for form in forms]


def _bias_forms(node: WeightedNode) -> list[NDArray[Any]]:
    assert node.bias is not None
    if node.weight_scales is None or node.input_scale is None:
        return [node.bias]
    step = node.weight_scales.astype(np.float64) * node.input_scale
    return [node.bias, np.rint(node.bias / step).astype(np.int32)]
