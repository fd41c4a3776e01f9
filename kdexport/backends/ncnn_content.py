"""ncnn's files against the ONNX file that they were converted from: layers, weights, biases, scales and storage types.

pnnx names its layers itself. When a file is written, each layer with weights is paired with its ONNX node by the bits
of its weights; the pairs are kept in a table beside the file, so that a layer with changed weights can still be named.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import INPUT, ONNX_FILE, Finding
from kdexport.backends.ncnn_files import CONVOLUTION, GROUPED, LINEAR, WEIGHTED, Layer, Storage, read_net
from kdexport.backends.weighted_nodes import WeightedNode, weighted_nodes
from kdexport.errors import AuditError, EngineBuildError

#: ncnn's numbers of the activations that a layer computes on its own result.
_FUSED = {1: "Relu", 2: "LeakyRelu", 3: "Clip", 4: "Sigmoid", 5: "Mish", 6: "HardSwish"}
_ALONE = {"ReLU": "Relu", "Clip": "Clip"}
#: Input and output of every file that pnnx writes.
IN, OUT = "in0", "out0"


def pair(layers: Sequence[Layer], nodes: Sequence[WeightedNode]) -> dict[str, str]:
    """The ONNX node of each layer with weights, by the bits of its weight and bias.

    Raises ``EngineBuildError`` if the converter changed, added or dropped weights.
    """
    left = list(nodes)
    pairs: dict[str, str] = {}
    for layer in layers:
        if layer.kind in WEIGHTED:
            node = next((node for node in left if not _differing(layer, node)), None)
            if node is None:
                raise EngineBuildError(
                    f"pnnx wrote the layer {layer} with weights that no node of the graph has.",
                    remedy="Build another target for this network, for example onnx-fp32.",
                )
            left.remove(node)
            pairs[layer.name] = node.name
    if left:
        raise EngineBuildError(
            f"pnnx left out {len(left)} of {len(nodes)} layers with weights: {left[0]}.",
            remedy="Build another target for this network, for example onnx-fp32.",
        )
    return pairs


def content_findings(folder: Path, artifact: str, pairs: Mapping[str, str]) -> list[Finding]:
    """Checks of the pair of files in ``folder`` against the ONNX file there, without a run.

    ``pairs`` name the ONNX node of each layer with weights.
    """
    import onnx

    weights = folder / artifact
    try:
        layers = read_net(weights.with_suffix(".param"), weights)
        nodes = {node.name: node for node in weighted_nodes(onnx.load(str(folder / ONNX_FILE)))}
    except AuditError as error:
        return [Finding("readable", False, error.message)]
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    found = {layer.name: nodes.get(pairs.get(layer.name, "")) for layer in weighted}
    if None in found.values() or sorted(pairs.values()) != sorted(nodes) or len(found) != len(weighted):
        lost = next((str(layer) for layer in weighted if found[layer.name] is None), "a node has no layer")
        return [Finding("each layer is one of the graph", False, f"{lost}; the graph has {len(nodes)} with weights")]
    both = [(layer, node) for layer in weighted if (node := found[layer.name]) is not None]
    return [
        _layers(layers, both, pairs),
        _values("weights", both, _wrong_weight),
        _values("biases", both, _wrong_bias),
        *([_values("scales", both, _wrong_scale)] if any(node.levels is not None for node in nodes.values()) else []),
    ]


def storage_finding(layers: Sequence[Layer], pairs: Mapping[str, str], precision: str, kept: Sequence[str]) -> Finding:
    """Whether the file stores each weight in ``precision``, and those of the nodes in ``kept`` in float32."""
    weighted = [layer for layer in layers if layer.kind in WEIGHTED]
    counts: dict[Storage, int] = {}
    wrong = []
    for layer in weighted:
        storage = layer.storage
        assert storage is not None
        counts[storage] = counts.get(storage, 0) + 1
        node = pairs.get(layer.name, "")
        wanted = "fp32" if node in kept else precision
        if storage != wanted:
            wrong.append(f"{layer} ({node}) is stored in {storage}, expected {wanted}")
    facts = ", ".join(f"{count} layers in {storage}" for storage, count in sorted(counts.items()))
    if wrong:
        facts = f"{len(wrong)} of {len(weighted)} layers: {wrong[0]}"
    return Finding(f"every weight in {precision}", not wrong and bool(weighted), facts)


def _layers(layers: Sequence[Layer], both: Sequence[tuple[Layer, WeightedNode]], pairs: Mapping[str, str]) -> Finding:
    """Whether kinds, geometry, order and activations of the layers with weights are those of the graph."""
    sources = _sources(layers, pairs)
    wrong = [*_wrong_ends(layers)]
    for layer, node in both:
        if layer.kind not in ((CONVOLUTION, GROUPED) if node.is_convolution else (LINEAR,)):
            wrong.append(f"{layer} ({node}) is a layer of another kind")
        elif _geometry(layer) != node.geometry:
            wrong.append(f"{layer} ({node}) has the geometry {_geometry(layer)}, expected {node.geometry}")
        elif sources[layer.name] != node.sources:
            read, expected = (", ".join(sorted(names)) for names in (sources[layer.name], node.sources))
            wrong.append(f"{layer} ({node}) reads the result of {read}, expected {expected}")
        elif (said := _activation(layer, layers)) != node.activation and {said, node.activation} & {"Relu", "Clip"}:
            wrong.append(
                f"{layer} ({node}) is followed by {said or 'no activation'}, expected {node.activation or 'none'}"
            )
    fact = f"{len(layers)} layers, {len(both)} with weights, in the order of the graph"
    return Finding("each layer is one of the graph", not wrong, "; ".join(wrong[:2]) or fact)


def _wrong_ends(layers: Sequence[Layer]) -> list[str]:
    first = [layer for layer in layers if layer.kind == "Input"]
    if [layer.tops for layer in first] != [(IN,)]:
        return [f"the inputs are {', '.join(name for layer in first for name in layer.tops)}, expected {IN}"]
    read = {name for layer in layers for name in layer.bottoms}
    ends = [name for layer in layers for name in layer.tops if name not in read]
    return [] if ends == [OUT] else [f"the outputs are {', '.join(ends)}, expected {OUT}"]


def _sources(layers: Sequence[Layer], pairs: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The nodes with weights, or the input, that are next before each layer."""
    of_blob: dict[str, frozenset[str]] = {IN: frozenset({INPUT})}
    found = {}
    for layer in layers:
        before = frozenset().union(*(of_blob.get(name, frozenset()) for name in layer.bottoms))
        found[layer.name] = before
        after = frozenset({pairs[layer.name]}) if layer.name in pairs else before
        of_blob |= dict.fromkeys([name for name in layer.tops if name != IN], after)
    return found


def _geometry(layer: Layer) -> tuple[int, ...]:
    if layer.kind == LINEAR:
        return ()
    get = layer.number
    across, down = get(4), get(14, get(4))
    pads = (down, across, get(16, down), get(15, across))
    sizes = (get(11, get(1)), get(1), get(13, get(3, 1)), get(3, 1), get(12, get(2, 1)), get(2, 1))
    return (*sizes, *pads, get(7, 1) if layer.kind == GROUPED else 1)


def _activation(layer: Layer, layers: Sequence[Layer]) -> str:
    """The activation of a layer, its own or the only one that reads its result."""
    fused = layer.number(10 if layer.kind == LINEAR and 10 in layer.params else 9)
    if fused:
        return _FUSED.get(fused, f"activation {fused}")
    readers = [other.kind for other in layers if layer.tops[0] in other.bottoms]
    return _ALONE.get(readers[0], "") if len(readers) == 1 else ""


def _values(check: str, both: Sequence[tuple[Layer, WeightedNode]], compare: Any) -> Finding:
    wrong = [f"{layer} ({node}): {fact}" for layer, node in both if (fact := compare(layer, node))]
    total = f"those of {ONNX_FILE}, bit for bit, in {len(both)} layers"
    return Finding(check, not wrong, f"{len(wrong)} of {len(both)} layers: {wrong[0]}" if wrong else total)


def _differing(layer: Layer, node: WeightedNode) -> str:
    return _wrong_weight(layer, node) or _wrong_bias(layer, node)


def _wrong_weight(layer: Layer, node: WeightedNode) -> str:
    stored = layer.tensors["weight"]
    expected = node.levels if stored.dtype == np.int8 and node.levels is not None else node.weight
    return _difference(stored.astype(np.float32), expected.astype(np.float32).reshape(-1), len(expected))


def _wrong_bias(layer: Layer, node: WeightedNode) -> str:
    stored = layer.tensors.get("bias")
    if stored is None or node.bias is None:
        # A layer without a bias may be written with one of zeros.
        rest = stored if node.bias is None else node.bias
        absent = "is missing" if stored is None else "is not in the graph"
        return f"the bias {absent}" if rest is not None and np.any(rest) else ""
    return _difference(stored, node.bias, len(node.bias))


def _wrong_scale(layer: Layer, node: WeightedNode) -> str:
    if layer.storage != "int8":
        # Whether it may be in float32 is the subject of another check.
        return ""
    if node.weight_scales is None or node.input_scale is None:
        return "is in int8, and in the graph in float32"
    expected = int8_scales(layer, node)
    for role, values in expected.items():
        if said := _difference(layer.tensors[role], values, len(values)):
            return f"{role.replace('_', ' ')}: {said}"
    return ""


def int8_scales(layer: Layer, node: WeightedNode) -> dict[str, NDArray[np.float32]]:
    """The scales of an int8 layer as ncnn stores them, levels per value: of each output or group, and of the input.

    Raises ``EngineBuildError`` if outputs of one group have different scales, for which ncnn has no place.
    """
    assert node.weight_scales is not None
    assert node.input_scale is not None
    scales = node.weight_scales.astype(np.float64)
    if layer.kind == GROUPED:
        groups = scales.reshape(layer.number(7, 1), -1)
        if (groups != groups[:, :1]).any():
            raise EngineBuildError(
                f"ncnn has one weight scale for each group of a grouped convolution, and {node} has {groups.shape[1]} "
                "output channels with scales of their own in each.",
                remedy="Build ncnn-fp32 or ncnn-fp16 for this student, or ncnn-int8 for one whose convolutions are "
                "plain or depthwise.",
            )
        scales = groups[:, 0]
    return {
        "weight_scales": (1 / scales).astype(np.float32),
        "input_scale": np.asarray([1 / node.input_scale], np.float32),
    }


def _difference(found: NDArray[Any], expected: NDArray[Any], outputs: int) -> str:
    """How many values differ, and the first output channel with one; empty if none does."""
    if found.size != expected.size:
        return f"{found.size:,} values, expected {expected.size:,}"
    # Bits, so that a NaN equals itself and zeros differ in sign.
    wrong = found.astype("<f4").view("<u4") != expected.astype("<f4").reshape(-1).view("<u4")
    if not wrong.any():
        return ""
    first = int(np.argmax(wrong)) // max(1, expected.size // outputs)
    return f"{int(wrong.sum()):,} of {wrong.size:,} values differ, first in output {first}"
