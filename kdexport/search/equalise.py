"""Cross-layer equalisation (Nagel et al., 2019): channels of one convolution scaled down, the next one's input up.

A ReLU passes a positive factor on, so that the network computes the same. The factors are powers of two: in float32 the
equalised graph is the original one bit for bit, and nothing has to be believed.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.blame.trace import Arrays, run
from kdexport.search.ranges import channel_peaks

#: Passes over all pairs: a layer between two others is changed by both sides.
_SWEEPS = 3
#: Factors beyond this would leave the range in which float32 products are exact in either form.
_MAX_EXPONENT = 16


@dataclass(frozen=True, slots=True)
class Equalised:
    """The graph, how many pairs of layers were changed, and by how much at most."""

    model: onnx.ModelProto
    pairs: int
    largest_factor: float


def equalise(model: onnx.ModelProto, feeds: Arrays) -> Equalised:
    """Balance the channel ranges of every pair of convolutions with nothing but a ReLU between them."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    pairs = _pairs(changed)
    touched: set[str] = set()
    largest = 1.0
    for _ in range(_SWEEPS):
        peaks = _peaks(changed, feeds, [first.output[0] for first, _ in pairs])
        moved = False
        for first, second in pairs:
            factors = _factors(peaks[first.output[0]], _columns(changed, second))
            if (factors != 1).any():
                _scale(changed, first, second, factors)
                touched.add(first.name)
                largest = max(largest, float(factors.max()), float((1 / factors).max()))
                moved = True
        if not moved:
            break
    return Equalised(changed, len(touched), largest)


def _peaks(model: onnx.ModelProto, feeds: Arrays, names: list[str]) -> dict[str, NDArray[np.float64]]:
    return {name: channel_peaks(values) for name, values in run(model, feeds, names).items()} if names else {}


def _pairs(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Convolutions whose whole result reaches one other convolution through at most a ReLU."""
    stored = {item.name for item in model.graph.initializer}
    shared = [name for node in model.graph.node for name in node.input if name in stored]
    outputs = {value.name for value in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def own(node: onnx.NodeProto) -> bool:
        # A weight that two layers share cannot be scaled for one of them.
        return node.op_type == "Conv" and all(name in stored and shared.count(name) == 1 for name in node.input[1:])

    found = []
    for node in model.graph.node:
        name = node.output[0]
        following = readers.get(name, [])
        if len(following) == 1 and following[0].op_type == "Relu" and name not in outputs:
            name = following[0].output[0]
            following = readers.get(name, [])
        alone = len(following) == 1 and name not in outputs
        if alone and own(node) and own(following[0]) and following[0].input[0] == name:
            found.append((node, following[0]))
    return found


def _columns(model: onnx.ModelProto, node: onnx.NodeProto) -> NDArray[np.float64] | None:
    """Largest weight that reads each input channel (I,); None for a depthwise one: its scales are per channel."""
    weight = _weights(model, node.input[1])
    groups = _groups(node)
    if groups > 1 and weight.shape[1] == 1:
        return None
    rows = np.abs(weight.astype(np.float64)).max(axis=tuple(range(2, weight.ndim)))
    per_group = rows.reshape(groups, -1, rows.shape[1]).max(axis=1)
    return np.asarray(per_group.reshape(-1))


def _factors(peaks: NDArray[np.float64], columns: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Powers of two by which each channel is divided before and multiplied after."""
    live = peaks > 0 if columns is None else (peaks > 0) & (columns > 0)
    if not live.any():
        return np.ones_like(peaks)
    logs = np.zeros_like(peaks)
    # Equal ranges on both sides of a dense layer; on the activations alone where the weights have a scale per channel.
    logs[live] = np.log2(peaks[live]) if columns is None else (np.log2(peaks[live]) - np.log2(columns[live])) / 2
    logs[live] -= np.median(logs[live])
    result: NDArray[np.float64] = np.exp2(np.clip(np.round(logs), -_MAX_EXPONENT, _MAX_EXPONENT))
    return result


def _scale(model: onnx.ModelProto, first: onnx.NodeProto, second: onnx.NodeProto, factors: NDArray[np.float64]) -> None:
    down = (1 / factors).astype(np.float32)
    for name in first.input[1:]:
        values = _weights(model, name)
        _store(model, name, values * down.reshape(-1, *[1] * (values.ndim - 1)))
    weight, groups = _weights(model, second.input[1]), _groups(second)
    shape = weight.shape
    grouped = weight.reshape(groups, shape[0] // groups, *shape[1:])
    up = factors.astype(np.float32).reshape(groups, 1, shape[1], *[1] * (len(shape) - 2))
    _store(model, second.input[1], (grouped * up).reshape(shape))


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _weights(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))
    return values


def _store(model: onnx.ModelProto, name: str, values: NDArray[np.float32]) -> None:
    item = next(entry for entry in model.graph.initializer if entry.name == name)
    item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
