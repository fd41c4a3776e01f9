"""What an engine file contains, read without a GPU: its size, the ONNX nodes it replaces, types and weights.

The format of a plan is not documented. TensorRT-RTX writes the length of the file, names of ONNX layers, a table of its
constants and most weights as they are in the ONNX file. What is not found in a plan is not judged.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdexport.backends.base import Finding, unchecked

#: TensorRT-RTX begins a plan with these four bytes; the length of the file is at byte 16.
_MAGIC, _LENGTH = b"vtrt", slice(16, 24)
#: Types of constants in a plan, by the name of the type in ONNX.
_TYPES = {"FLOAT": "float", "FLOAT16": "half", "BFLOAT16": "bf16", "INT8": "int8"}
_CONSTANT = re.compile(rb"const_payload_size=(\d+) [^{}]*(?:\{[^{}]*\}[^{}]*)*? type=(\w+) \}")
_NODE = re.compile(rb"\[ONNX Layer: ([^\]]*)\]")
#: Shorter tensors could be found in any file by chance.
_SHORTEST_WEIGHT = 64
#: A builder pads some constants and folds others into its kernels.
_LEAST_SHARE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanContent:
    """The length that a plan states, the names of ONNX nodes in it, and the bytes of its constants of each type."""

    stated_length: int | None
    nodes: frozenset[str]
    constants: Mapping[str, int]


def read_plan(plan: bytes) -> PlanContent:
    """What is readable in ``plan``."""
    constants: Counter[str] = Counter()
    for size, kind in _CONSTANT.findall(plan):
        constants[kind.decode()] += int(size)
    known = plan[:4] == _MAGIC and len(plan) >= _LENGTH.stop
    return PlanContent(
        stated_length=int.from_bytes(plan[_LENGTH], "little") if known else None,
        nodes=frozenset(name.decode(errors="replace") for name in _NODE.findall(plan)),
        constants=dict(constants),
    )


def weights_in_plan(plan: bytes, onnx_file: Path) -> list[str]:
    """Names of the weights of ``onnx_file`` whose bytes are in ``plan``."""
    return [name for name, _, content in _weights(onnx_file) if content in plan]


def whole(plan: bytes) -> Finding:
    """Whether the plan is as long as it states."""
    stated = read_plan(plan[: _LENGTH.stop]).stated_length
    if not plan:
        return Finding("plan is whole", False, "the plan is empty")
    if stated is None:
        return unchecked("plan is whole", f"{len(plan):,} bytes; the plan states no length")
    if stated > len(plan):
        return Finding("plan is whole", False, f"truncated: {len(plan):,} bytes, and the plan states {stated:,}")
    return Finding("plan is whole", stated == len(plan), f"{len(plan):,} bytes, and the plan states {stated:,}")


def built_from(plan: bytes, onnx_file: Path, weights: Sequence[str], nodes: frozenset[str]) -> Finding:
    """Whether the plan holds the nodes, types and weights of ``onnx_file``.

    ``weights`` were in the plan when it was built, and ``nodes`` are those of the layer table.
    """
    content, stored = read_plan(plan), _weights(onnx_file)
    wrong = [
        *_missing_nodes(content, nodes),
        *_missing_weights(plan, stored, weights),
        *_missing_types(content, [(kind, len(data)) for _, kind, data in stored]),
    ]
    held = ", ".join(f"{size:,} bytes {kind}" for kind, size in sorted(content.constants.items()))
    fact = f"{len(content.nodes)} nodes and {len(weights)} of {len(stored)} weights of the ONNX file"
    fact += f"; constants: {held}" if held else "; no table of constants"
    return Finding("plan has the content of its ONNX file", not wrong, "; ".join(wrong) or fact)


def _missing_nodes(content: PlanContent, nodes: frozenset[str]) -> list[str]:
    if not content.nodes:
        return []
    absent = sorted(nodes - content.nodes)
    return [f"{len(absent)} nodes of the layer table are not in the plan: {absent[0]}"] if absent else []


def _missing_weights(plan: bytes, stored: Sequence[tuple[str, str, bytes]], weights: Sequence[str]) -> list[str]:
    wanted = set(weights)
    found = {name for name, _, data in stored if name in wanted and data in plan}
    absent = [name for name in weights if name not in found]
    if not absent:
        return []
    return [f"{len(absent)} of {len(weights)} weights are not in the plan as in the ONNX file: {absent[0]}"]


def _missing_types(content: PlanContent, stored: Sequence[tuple[str, int]]) -> list[str]:
    """Types that have many bytes in the ONNX file and few in the plan."""
    # Only the table of TensorRT-RTX is known to have all constants.
    if content.stated_length is None or not content.constants:
        return []
    needed: Counter[str] = Counter()
    for kind, size in stored:
        needed[kind] += size
    kind, size = max(needed.items(), key=lambda item: item[1], default=("", 0))
    held = content.constants.get(kind, 0)
    if held >= _LEAST_SHARE * size:
        return []
    return [f"the plan has {held:,} bytes of constants in {kind}, the ONNX file {size:,}"]


def _weights(onnx_file: Path) -> list[tuple[str, str, bytes]]:
    """(name, type in a plan, bytes) of each weight that is long enough to be recognised."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file), load_external_data=False).graph
    found = [
        (
            tensor.name,
            _TYPES.get(onnx.TensorProto.DataType.Name(tensor.data_type), ""),
            bytes(numpy_helper.to_array(tensor).tobytes()),
        )
        for tensor in graph.initializer
    ]
    return [entry for entry in found if entry[1] and len(entry[2]) >= _SHORTEST_WEIGHT]
