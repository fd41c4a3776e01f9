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
_BOOKKEEPING = {"shape_call", "signal", "wait", "NoOp", "Constant", "Signal", "Wait"}
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


def parse_layer_table(messages: list[str], interface: set[str]) -> list[EngineLayer]:
    """Layers of a detailed build log. Tensors of ``interface`` are always float32 and are left out."""
    table = next((text for text in messages if text.startswith("Layers:")), "")
    rows = []
    layers = []
    outside = set(interface)
    for row in table.splitlines()[1:]:
        head = re.match(r"\s*Name: (.*?), LayerType: (\w+)", row)
        if head is None:
            if "LayerType" in row:
                layers.append(EngineLayer(name=row.strip()[:80], kind=_UNREADABLE, datatypes=(_UNREADABLE,)))
            continue
        tensors = re.findall(r"\{ Name: ([^{}]+?), Dimensions: \[([^\]]*)\][^{}]*?Datatype: (\w+)", row)
        # A kernel that only passes the logits on, such as one that cuts off padding, reads a copy of them.
        sources = _sources(row)
        rows.append((head[1], head[2], tensors, sources))
        if sources and all(re.fullmatch(r"graph_output_cast\d+", source) for source in sources):
            outside |= {tensor for tensor, _, _ in tensors}
    for name, kind, tensors, sources in rows:
        # Constants of one element are scaling factors of the kernel, which are float32 in any precision.
        types = {datatype for tensor, dims, datatype in tensors if tensor not in outside and dims not in ("1", "")}
        if not tensors and kind not in _BOOKKEEPING:
            # A kernel without tensors means that the log has another format, from which nothing can be read.
            types = {_UNREADABLE}
        layers.append(EngineLayer(name=name, kind=kind, datatypes=tuple(sorted(types)), nodes=sources))
    return layers


def _sources(metadata: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))))


def parse_inspector(text: str, interface: set[str]) -> list[EngineLayer]:
    """Layers of an engine inspector's JSON, of TensorRT 10 or 11. Tensors of ``interface`` are left out."""
    layers = []
    for row in json.loads(text)["Layers"]:
        tensors = [*row.get("Inputs", []), *row.get("Outputs", [])] if isinstance(row, dict) else []
        types = {_datatype(tensor) for tensor in tensors if tensor.get("Name") not in interface}
        name, kind = (row["Name"], row["LayerType"]) if isinstance(row, dict) else (str(row), _UNREADABLE)
        if not tensors and kind not in _BOOKKEEPING:
            # An engine without detailed profiling verbosity reports only names.
            types = {_UNREADABLE}
        sources = _sources(str(row.get("Metadata", ""))) if isinstance(row, dict) else ()
        layers.append(EngineLayer(name=name, kind=kind, datatypes=tuple(sorted(types)), nodes=sources))
    return layers


def _datatype(tensor: dict[str, Any]) -> str:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    return next((name for name, spelling in _SPELLINGS.items() if re.search(spelling, text)), _UNREADABLE)
