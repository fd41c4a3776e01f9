"""Cross-layer equalisation for int8 (Nagel et al., 2019), and the channel ranges that make it necessary.

An int8 activation has one scale for the whole tensor. If its channels differ in range by orders of magnitude, most of
them are left with few levels. Equalisation scales the channels of a convolution down and the inputs of the next one up;
a ReLU between them commutes with a positive factor. All factors are powers of two, so the equalised float32 graph gives
bit-identical results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.graph.plan import LayerPlan, Scaling
from kdexport.graph.trace import Arrays, run

#: Bits, of eight, that the median channel loses to the widest one before a layer is called hostile.
HOSTILE_BITS = 4.0

#: Passes over all pairs, because a layer between two others is part of two pairs.
_SWEEPS = 3

#: Operators that take the mean of each channel, or only drop dimensions after it: a scaled channel stays scaled.
_POOLING = ("GlobalAveragePool", "ReduceMean", "Reshape", "Flatten", "Squeeze")

#: Largest exponent of a factor, far from the limits of float32.
_MAX_EXPONENT = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRange:
    """Channel ranges of one layer's output: the largest absolute value of the widest and of the median channel.

    ``weight`` and ``median_weight`` are the same for the weights that compute them. ``lost_bits`` is the number of
    bits, of eight, that the median channel loses because the widest one sets the scale.
    """

    layer: str
    channel: int
    widest: float
    median: float
    weight: float
    median_weight: float
    lost_bits: float

    @property
    def hostile(self) -> bool:
        """Whether the median channel has only few levels left."""
        return self.lost_bits >= HOSTILE_BITS

    def __str__(self) -> str:
        return (
            f"{self.layer}: channel {self.channel} reaches {self.widest:.3g}, the median channel {self.median:.2g} "
            f"(weights {self.weight:.3g} and {self.median_weight:.2g}): with one int8 scale for both, the median "
            f"channel has {max(0.0, 8 - self.lost_bits):.1f} of 8 bits"
        )


@dataclass(frozen=True, slots=True)
class Equalised:
    """An equalised graph and its scalings, one for each pair of layers that was changed."""

    model: onnx.ModelProto
    scalings: tuple[Scaling, ...]


def layer_ranges(model: onnx.ModelProto, feeds: Arrays) -> tuple[LayerRange, ...]:
    """Channel ranges of every convolution of a float32 graph on the images ``feeds``, in graph order."""
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in weights]
    values = run(model, feeds, [node.output[0] for node in nodes])
    return tuple(_range(node.name, values[node.output[0]], weights[node.input[1]]) for node in nodes)


def _range(layer: str, values: NDArray[np.float32], weight: NDArray[np.float32]) -> LayerRange:
    peaks = channel_peaks(values)
    rows = np.abs(weight.astype(np.float64)).reshape(len(weight), -1).max(axis=1)
    channel, median = int(peaks.argmax()), float(np.median(peaks))
    widest = float(peaks[channel])
    lost = 0.0 if widest == 0 else 8.0 if median == 0 else min(8.0, math.log2(widest / median))
    return LayerRange(
        layer=layer,
        channel=channel,
        widest=widest,
        median=median,
        weight=float(rows[channel]),
        median_weight=float(np.median(rows)),
        lost_bits=lost,
    )


def channel_peaks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest absolute value per channel of (N,C,H,W) activations."""
    return np.asarray(np.abs(values.astype(np.float64)).max(axis=(0, *range(2, values.ndim))))


def explain_ranges(ranges: Sequence[LayerRange], count: int = 3) -> list[str]:
    """A sentence for each hostile layer, the worst first, at most ``count``."""
    worst = sorted((item for item in ranges if item.hostile), key=lambda item: -item.lost_bits)
    return [str(item) for item in worst[:count]]


def equalise(model: onnx.ModelProto, feeds: Arrays, *, through_pooling: bool = False) -> Equalised:
    """Balance the channel ranges of every pair of convolutions that are connected directly or by a ReLU.

    With ``through_pooling`` also those of the last convolution and a linear layer behind a pooling over all pixels.
    """
    pairs = _pairs(model, through_pooling=through_pooling)
    totals: dict[str, NDArray[np.int64]] = {}
    changed = model
    for _ in range(_SWEEPS):
        peaks = _peaks(changed, feeds, [first.output[0] for first, _ in pairs])
        moved = False
        for first, second in pairs:
            wanted = _exponents(peaks[first.output[0]], _columns(changed, second))
            before = totals.get(first.name, np.zeros_like(wanted))
            totals[first.name] = np.clip(before + wanted, -_MAX_EXPONENT, _MAX_EXPONENT)
            exponents = totals[first.name] - before
            moved = moved or bool(exponents.any())
            changed = apply_scalings(changed, [_scaling(first, second, exponents)])
        if not moved:
            break
    scalings = tuple(_scaling(first, second, totals[first.name]) for first, second in pairs if totals[first.name].any())
    return Equalised(apply_scalings(model, scalings), scalings)


def apply_scalings(model: onnx.ModelProto, scalings: Sequence[Scaling]) -> onnx.ModelProto:
    """A copy of a float32 graph with its layers scaled. Raises ``AuditError`` if it does not have these layers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    touched = {name for scaling in scalings for name in (*scaling.first, scaling.second)}
    items = {item.name: item for item in changed.graph.initializer if item.name in touched}
    weights = {name: numpy_helper.to_array(item) for name, item in items.items()}
    for name, values in LayerPlan(equalised=tuple(scalings)).scaled(weights).items():
        items[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
    return changed


def _scaling(first: onnx.NodeProto, second: onnx.NodeProto, exponents: NDArray[np.int64]) -> Scaling:
    return Scaling(tuple(first.input[1:]), second.input[1], _groups(second), tuple(int(e) for e in exponents))


def _peaks(model: onnx.ModelProto, feeds: Arrays, names: list[str]) -> dict[str, NDArray[np.float64]]:
    return {name: channel_peaks(values) for name, values in run(model, feeds, names).items()} if names else {}


def _pairs(model: onnx.ModelProto, *, through_pooling: bool) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Pairs of convolutions where the second, possibly behind a ReLU, is the only reader of the first.

    With ``through_pooling`` the second may be a linear layer behind a pooling, with one input for each channel.
    """
    graph, found = _Readers(model), []
    for first in model.graph.node:
        if not graph.owns_weights(first, "Conv"):
            continue
        name = graph.behind(first.output[0], ("Relu",), once=True)
        second = graph.only_reader(name)
        if through_pooling and second is not None and second.op_type in _POOLING:
            name = graph.behind(name, _POOLING)
            second = graph.only_reader(name)
            fits = second is not None and graph.owns_weights(second, "Gemm") and _reads_each_once(model, first, second)
        else:
            fits = second is not None and graph.owns_weights(second, "Conv")
        if fits and second is not None and second.input[0] == name:
            found.append((first, second))
    return found


def _reads_each_once(model: onnx.ModelProto, first: onnx.NodeProto, linear: onnx.NodeProto) -> bool:
    """Whether a linear layer (O,I) has one input for each output channel of the convolution ``first``."""
    is_swapped = any(item.name == "transB" and item.i for item in linear.attribute)
    return is_swapped and _weights(model, linear.input[1]).shape[1] == _weights(model, first.input[1]).shape[0]


class _Readers:
    """The nodes that read each tensor of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._stored = {item.name for item in model.graph.initializer}
        self._shared = [name for node in model.graph.node for name in node.input if name in self._stored]
        self._outputs = {value.name for value in model.graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def owns_weights(self, node: onnx.NodeProto, kind: str) -> bool:
        """Whether it is a ``kind`` of which no other node reads a weight: that could not be scaled for one only."""
        stored = (name in self._stored and self._shared.count(name) == 1 for name in node.input[1:])
        return node.op_type == kind and all(stored)

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads ``name``; None if several do or none, or if it is an output of the graph."""
        following = self._readers.get(name, [])
        return following[0] if len(following) == 1 and name not in self._outputs else None

    def behind(self, name: str, kinds: Sequence[str], *, once: bool = False) -> str:
        """The tensor behind the operators of ``kinds`` that alone read ``name``, or ``name``."""
        reader = self.only_reader(name)
        while reader is not None and reader.op_type in kinds:
            name = reader.output[0]
            reader = None if once else self.only_reader(name)
        return name


def _columns(model: onnx.ModelProto, node: onnx.NodeProto) -> NDArray[np.float64] | None:
    """Largest weight of each input channel (I,); None for a depthwise layer, whose scales are per channel anyway."""
    weight = _weights(model, node.input[1])
    groups = _groups(node)
    if groups > 1 and weight.shape[1] == 1:
        return None
    rows = np.abs(weight.astype(np.float64)).max(axis=tuple(range(2, weight.ndim)))
    per_group = rows.reshape(groups, -1, rows.shape[1]).max(axis=1)
    return np.asarray(per_group.reshape(-1))


def _exponents(peaks: NDArray[np.float64], columns: NDArray[np.float64] | None) -> NDArray[np.int64]:
    """Exponents of the factors by which each channel is divided in the first layer and multiplied in the second."""
    live = peaks > 0 if columns is None else (peaks > 0) & (columns > 0)
    if not live.any():
        return np.zeros(len(peaks), np.int64)
    logs = np.zeros_like(peaks)
    # A dense layer balances activations and weights; a depthwise one only activations, as its scales are per channel.
    logs[live] = np.log2(peaks[live]) if columns is None else (np.log2(peaks[live]) - np.log2(columns[live])) / 2
    logs[live] -= np.median(logs[live])
    return np.round(logs).astype(np.int64)


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def _weights(model: onnx.ModelProto, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))
    return values
