"""The sensitivity of each layer: the error of the logits that its quantization alone causes.

One cast graph serves all layers; none is cast separately.
"""

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.activation_products import activation_products
from kdexport.backends.base import INPUT, LOGITS
from kdexport.graph.trace import Arrays, dequantized, extract, results, run, trace
from kdexport.stats.logits import logit_noise

#: Operators with weights, which a plan can keep in float32.
KEEPABLE = ("Conv", "Gemm", "MatMul")


def sensitivities(model: onnx.ModelProto, cast: onnx.ModelProto, feeds: Arrays) -> dict[str, float]:
    """By layer of the float32 ``model``: noise of the logits if only its input or output is as in ``cast``.

    A tensor between two layers counts for both, because it is quantized unless both are float32. The rest of the graph
    is float32 and propagates the error to the logits, so a channel that later layers amplify has its full effect.
    """
    products = activation_products(model)
    layers = [node for node in model.graph.node if node.op_type in KEEPABLE and node.name not in products]
    activated = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Clip")}
    tensors = {node.name: (node.input[0], node.output[0], activated.get(node.output[0], "")) for node in layers}
    noise = _noises(model, cast, feeds, {name for names in tensors.values() for name in names} - {INPUT, ""})
    return {layer: max(noise.get(name, 0.0) for name in names) for layer, names in tensors.items()}


def _noises(model: onnx.ModelProto, cast: onnx.ModelProto, feeds: Arrays, tensors: set[str]) -> dict[str, float]:
    own = trace(cast, model, feeds).own
    shared = {name: own[dequantized(cast, name)] for name in results(cast) if name in tensors}
    exact = run(model, feeds, [LOGITS])[LOGITS].astype(np.float64)
    return {
        name: logit_noise(exact, _logits(model, feeds, name, values).astype(np.float64))
        for name, values in shared.items()
    }


def _logits(model: onnx.ModelProto, feeds: Arrays, tensor: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N,K) of the float32 graph with ``tensor`` replaced by ``values``."""
    if tensor == LOGITS:
        return values
    given = {**feeds, tensor: values}
    logits: NDArray[np.float32] = run(extract(model, LOGITS, given, local=True), given, [LOGITS])[LOGITS]
    return logits
