"""Products of two activations, as attention computes them: they have no weight that could be stored in int8."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def activation_products(model: "onnx.ModelProto") -> tuple[str, ...]:
    """Names of the MatMul nodes of a graph whose second factor is not a stored matrix, in float32 or int8."""
    matrices = {item.name for item in model.graph.initializer if len(item.dims) == 2}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and sources.get(node.input[1], node.input[1]) not in matrices
    )
