"""What kernels an engine consists of, read back from its build: names, kinds, and the types that they compute in."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.errors import AuditError

#: What kernels may read and write; those that multiply must have the first.
_DATATYPES = {"fp32": ("Float",), "fp16": ("Half",), "bf16": ("BFloat16",), "int8": ("Int8", "Float")}
_MULTIPLYING = re.compile(r"correlation|conv|gemm|matmul|matrix_?multiply|runtime_fusion", re.IGNORECASE)
_BOOKKEEPING = {"shape_call", "signal", "wait", "NoOp", "Constant", "Signal", "Wait"}
_UNREADABLE = "unreadable"
#: How TensorRT 10 (in one phrase with the layout) and 11 (by itself) write a type, and how the build log does.
_SPELLINGS = {
    "Float": r"\b(?:FP32|Float)\b", "Half": r"\b(?:FP16|Half)\b", "BFloat16": r"\b(?:BF16|BFloat16)\b",
    "Int8": r"\b(?:INT8|Int8)\b", "FP8": r"\bFP8\b", "Int32": r"\bInt32\b", "Int64": r"\bInt64\b", "Bool": r"\bBool\b",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayer:
    """One kernel of the engine: its name, kind, and the data types it reads and writes, scalars left out.

    ``nodes`` are the ONNX nodes that it was made of, where the builder tells.
    """

    name: str
    kind: str
    datatypes: tuple[str, ...]
    nodes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "EngineLayer":
        """Inverse of ``dataclasses.asdict``; tables of earlier versions name no nodes."""
        return cls(
            name=row["name"],
            kind=row["kind"],
            datatypes=tuple(row["datatypes"]),
            nodes=tuple(row.get("nodes", ())),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A serialized engine on disk, untouched, with the layer table of its own build."""

    plan: Path
    layers: tuple[EngineLayer, ...]
    version: str


def require_precision(engine: Engine, target: str, kept: Sequence[str] = ()) -> None:
    """Raise ``AuditError`` unless each kernel computes in the precision of ``target``, by the layer table of its build.

    int8 means that every convolution and linear layer reads int8; what is between them runs in float32. Each node of
    ``kept`` must be multiplied by a float32 kernel.
    """
    allowed = _DATATYPES[target.rpartition("-")[2]]
    kernels = [layer for layer in engine.layers if layer.kind not in _BOOKKEEPING]
    wrong = [layer for layer in kernels if not (_keeps(layer, kept) or _runs_in(layer, allowed))]
    if wrong or not any(layer.datatypes for layer in kernels):
        first = f"{wrong[0].name} reads or writes {', '.join(wrong[0].datatypes)}" if wrong else "no kernel listed"
        raise AuditError(
            f"{len(wrong)} of {len(kernels)} kernels of {target} do not run in {allowed[0]}: {first}.",
            remedy="The engine is not what was asked for and is not packaged. Report the layer table.",
        )
    absent = [node for node in kept if not any(_keeps(layer, [node]) for layer in kernels)]
    if absent:
        raise AuditError(
            f"The plan keeps {absent[0]} in float32, and {target} lists no float32 kernel that multiplies for it.",
            remedy="The engine is not what was asked for and is not packaged. Report the layer table.",
        )


def _keeps(layer: EngineLayer, nodes: Sequence[str]) -> bool:
    return _multiplies(layer) and layer.datatypes == ("Float",) and not set(nodes).isdisjoint(layer.nodes)


def _runs_in(layer: EngineLayer, allowed: tuple[str, ...]) -> bool:
    return set(layer.datatypes) <= set(allowed) and (allowed[0] in layer.datatypes or not _multiplies(layer))


def _multiplies(layer: EngineLayer) -> bool:
    return bool(layer.datatypes) and _MULTIPLYING.search(layer.kind) is not None


def parse_layer_table(messages: list[str], interface: set[str]) -> list[EngineLayer]:
    """Layers of a detailed build log. Tensors of ``interface`` stay float32 by contract and are left out."""
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
        # A kernel that does nothing but hand the logits over, such as cutting off padding, reads a copy of them.
        sources = _sources(row)
        rows.append((head[1], head[2], tensors, sources))
        if sources and all(re.fullmatch(r"graph_output_cast\d+", source) for source in sources):
            outside |= {tensor for tensor, _, _ in tensors}
    for name, kind, tensors, sources in rows:
        # Constants of one element are scaling factors of the kernel, kept in float32 at any precision.
        types = {datatype for tensor, dims, datatype in tensors if tensor not in outside and dims not in ("1", "")}
        if not tensors and kind not in _BOOKKEEPING:
            # A kernel without a tensor is a log in another format, and no proof of anything.
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
            # Names alone are what an engine without detailed profiling verbosity tells.
            types = {_UNREADABLE}
        sources = _sources(str(row.get("Metadata", ""))) if isinstance(row, dict) else ()
        layers.append(EngineLayer(name=name, kind=kind, datatypes=tuple(sorted(types)), nodes=sources))
    return layers


def _datatype(tensor: dict[str, Any]) -> str:
    text = str(tensor.get("DataType") or tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    return next((name for name, spelling in _SPELLINGS.items() if re.search(spelling, text)), _UNREADABLE)
