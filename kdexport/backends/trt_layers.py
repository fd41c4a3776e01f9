"""The kernels of an engine, read from its build: names, kinds, and the types that they compute in."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import AuditError

#: The types that kernels may read and write; kernels that multiply must have the first.
_DATATYPES = {"fp32": ("Float",), "fp16": ("Half",), "bf16": ("BFloat16",), "int8": ("Int8", "Float")}
_MULTIPLYING = re.compile(r"correlation|conv|gemm|matmul|matrix_?multiply|runtime_fusion", re.IGNORECASE)
_BOOKKEEPING = {"shape_call", "signal", "wait", "NoOp", "Constant", "Signal", "Wait", "TrainStation"}
#: Kinds of kernels that copy a tensor, into another layout or type.
_COPIES = {"Reformat", "NoOp", "Cast"}
_UNREADABLE = "unreadable"
_REMEDY = (
    "The engine was not packaged. Build another precision or with another version of TensorRT, or open an issue in "
    "kdexport's repository with this message and the output of kdexport doctor."
)
#: The spellings of a type by TensorRT 10 (in one phrase with the layout), by 11 (alone) and in the build log.
_SPELLINGS = {
    "Float": r"\b(?:FP32|Float)\b", "Half": r"\b(?:FP16|Half)\b", "BFloat16": r"\b(?:BF16|BFloat16)\b",
    "Int8": r"\b(?:INT8|Int8)\b", "FP8": r"\bFP8\b", "Int32": r"\bInt32\b", "Int64": r"\bInt64\b", "Bool": r"\bBool\b",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One kernel of the engine: its name, kind, and the data types that it reads and writes, without scalars.

    ``nodes`` are the ONNX nodes that it replaces, if the builder reports them.
    """

    name: str
    kind: str
    datatypes: tuple[str, ...]
    nodes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "EngineLayer":
        """Inverse of ``dataclasses.asdict``; tables of earlier versions have no nodes."""
        return cls(
            name=row["name"],
            kind=row["kind"],
            datatypes=tuple(row["datatypes"]),
            nodes=tuple(row.get("nodes", ())),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A serialized engine on disk, unchanged, with the layer table of its build."""

    plan: Path
    layers: tuple[EngineLayer, ...]
    version: str


def require_precision(engine: Engine, target: str, kept: Sequence[str] = (), products: Sequence[str] = ()) -> None:
    """Raise ``AuditError`` unless each kernel in the layer table computes in the precision of ``target``.

    In int8 every convolution and linear layer must read int8; the kernels between them may run in float32, and so may
    those that compute ``products`` of two activations. Each node of ``kept`` must be computed by a float32 kernel that
    multiplies.
    """
    allowed = _DATATYPES[target.rpartition("-")[2]]
    kernels = [layer for layer in engine.layers if layer.kind not in _BOOKKEEPING]
    wrong = [layer for layer in kernels if not (_keeps(layer, [*kept, *products]) or _runs_in(layer, allowed))]
    if wrong or not any(layer.datatypes for layer in kernels):
        first = (
            f"{wrong[0].name} reads or writes {', '.join(wrong[0].datatypes)}" if wrong else "the build lists no kernel"
        )
        raise AuditError(
            f"{len(wrong)} of {len(kernels)} kernels of {target} do not run in {allowed[0]}: {first}.",
            remedy=_REMEDY,
        )
    absent = [node for node in kept if not any(_keeps(layer, [node]) for layer in kernels)]
    if absent:
        raise AuditError(
            f"The plan keeps {absent[0]} in float32, but {target} has no float32 kernel that computes it.",
            remedy=_REMEDY,
        )


def _keeps(layer: EngineLayer, nodes: Sequence[str]) -> bool:
    return _multiplies(layer) and layer.datatypes == ("Float",) and not set(nodes).isdisjoint(layer.nodes)


def _runs_in(layer: EngineLayer, allowed: tuple[str, ...]) -> bool:
    return set(layer.datatypes) <= set(allowed) and (allowed[0] in layer.datatypes or not _multiplies(layer))


def _multiplies(layer: EngineLayer) -> bool:
    return bool(layer.datatypes) and _MULTIPLYING.search(layer.kind) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """A row of a table: the tensors that a kernel reads and writes, each with its type, and the ONNX nodes of it."""

    name: str
    kind: str
    reads: tuple[tuple[str, str], ...]
    writes: tuple[tuple[str, str], ...]
    #: Types of weights; the inspector lists them without names.
    weights: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """A kernel without tensors means that the table has another format, from which nothing can be read."""
        return bool(self.reads or self.writes or self.kind in _BOOKKEEPING)


def parse_layer_table(messages: list[str], interface: set[str]) -> list[EngineLayer]:
    """Layers of a detailed build log. Tensors of ``interface`` are always float32; they and copies are left out."""
    table = next((text for text in messages if text.startswith("Layers:")), "")
    rows = []
    for line in table.splitlines()[1:]:
        head = re.match(r"\s*Name: (.*?), LayerType: (\w+)", line)
        if head is not None:
            read, _, written = line.partition(", Outputs: [")
            rows.append(
                _Row(name=head[1], kind=head[2], reads=_logged(read), writes=_logged(written), nodes=_sources(line))
            )
        elif "LayerType" in line:
            rows.append(_Row(name=line.strip()[:80], kind=_UNREADABLE, reads=(), writes=()))
    return _layers(rows, interface)


def _logged(text: str) -> tuple[tuple[str, str], ...]:
    """The tensors in a part of a row; those of one element are factors, float32 in any precision, and have no type."""
    found = re.findall(r"\{ Name: ([^{}]+?), Dimensions: \[([^\]]*)\][^{}]*?Datatype: (\w+)", text)
    return tuple((tensor, "" if dimensions in ("1", "") else datatype) for tensor, dimensions, datatype in found)


def parse_inspector(text: str, interface: set[str]) -> list[EngineLayer]:
    """Layers of an engine inspector's JSON, of TensorRT 10 or 11; tensors of ``interface`` and copies are left out."""
    return _layers([_inspected(row) for row in json.loads(text)["Layers"]], interface)


def _inspected(row: Any) -> _Row:
    if not isinstance(row, dict):
        # An engine without detailed profiling verbosity reports only names.
        return _Row(name=str(row), kind=_UNREADABLE, reads=(), writes=())
    reads, writes = (
        tuple((str(tensor.get("Name")), _datatype(tensor)) for tensor in row.get(key, []))
        for key in ("Inputs", "Outputs")
    )
    weights = row.get("Weights")
    types = (_datatype({"DataType": weights["Type"]}),) if isinstance(weights, dict) and "Type" in weights else ()
    nodes = _sources(str(row.get("Metadata", "")))
    return _Row(name=row["Name"], kind=row["LayerType"], reads=reads, writes=writes, weights=types, nodes=nodes)


def _sources(metadata: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))))


def _layers(rows: Sequence[_Row], interface: set[str]) -> list[EngineLayer]:
    outside = _with_copies(rows, interface)
    layers = []
    for row in rows:
        types = {datatype for tensor, datatype in (*row.reads, *row.writes) if tensor not in outside}
        types = {*types, *row.weights} - {""} if row.readable else {_UNREADABLE}
        layers.append(EngineLayer(name=row.name, kind=row.kind, datatypes=tuple(sorted(types)), nodes=row.nodes))
    return layers


def _with_copies(rows: Sequence[_Row], interface: set[str]) -> set[str]:
    """``interface`` and its float32 copies: of the input in another layout, and of the logits before they are cut.

    A kernel that computes keeps its tensors: only those that copy, or that replace a cast of an output, are followed.
    """
    outside = set(interface)
    while True:
        found = set(outside)
        for row in rows:
            if row.nodes and all(re.fullmatch(r"graph_output_cast\d+", node) for node in row.nodes):
                # Such as a kernel that cuts off the padding of the logits.
                found |= {tensor for tensor, _ in (*row.reads, *row.writes)}
            elif row.kind in _COPIES:
                for source, target in ((row.reads, row.writes), (row.writes, row.reads)):
                    if source and {tensor for tensor, _ in source} <= found:
                        found |= {tensor for tensor, datatype in target if datatype == "Float"}
        if found == outside:
            return outside
        outside = found


def _datatype(tensor: dict[str, Any]) -> str:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    return next((name for name, spelling in _SPELLINGS.items() if re.search(spelling, text)), _UNREADABLE)
