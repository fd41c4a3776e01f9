"""Why int8 loses a layer: one scale for a whole tensor, while its channels differ in range by orders of magnitude."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.blame.trace import Arrays, run

#: Bits of eight that the median channel may lose to the widest one before a layer is called hostile: it keeps four.
HOSTILE_BITS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRange:
    """The channels of one layer's result: largest absolute value of the widest and of the median channel.

    ``weight`` and ``median_weight`` are the same of the weights that make them. ``lost_bits`` is what the median
    channel loses of eight because the widest one sets the scale.
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
        """Whether the median channel is left with few levels."""
        return self.lost_bits >= HOSTILE_BITS

    def __str__(self) -> str:
        return (
            f"{self.layer}: channel {self.channel} reaches {self.widest:.3g}, the median channel {self.median:.2g} "
            f"(weights {self.weight:.3g} and {self.median_weight:.2g}): one int8 scale for both leaves the median "
            f"channel {max(0.0, 8 - self.lost_bits):.1f} of 8 bits"
        )


def layer_ranges(model: onnx.ModelProto, feeds: Arrays) -> tuple[LayerRange, ...]:
    """Channel ranges of every convolution of a float32 graph on some images, in order."""
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in weights]
    values = run(model, feeds, [node.output[0] for node in nodes])
    return tuple(_range(node.name, values[node.output[0]], weights[node.input[1]]) for node in nodes)


def channel_peaks(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest absolute value per channel of (N,C,H,W) activations."""
    return np.asarray(np.abs(values.astype(np.float64)).max(axis=(0, *range(2, values.ndim))))


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


def explain_ranges(ranges: Sequence[LayerRange], count: int = 3) -> list[str]:
    """The hostile layers in words, the worst first."""
    worst = sorted((item for item in ranges if item.hostile), key=lambda item: -item.lost_bits)
    return [str(item) for item in worst[:count]]
