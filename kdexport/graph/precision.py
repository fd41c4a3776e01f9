"""ONNX to ONNX: the precision is written into the graph, where every backend reads the same thing."""

import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from kdexport.backends.ort import import_onnxruntime
from kdexport.errors import AuditError

FLOAT16_MAX = 65504.0


def cast_to_fp16(source: Path, path: Path) -> onnx.ModelProto:
    """Write ``source`` (float32) with float16 weights and arithmetic, input and logits staying float32.

    Every weight is the nearest float16 of the float32 one. Raises ``AuditError`` for a weight beyond float16's range.
    """
    import_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    exact = onnx.load(str(source))
    weights = {item.name: numpy_helper.to_array(item) for item in exact.graph.initializer}
    for name, values in weights.items():
        if values.dtype == np.float32 and np.abs(values).max(initial=0) > FLOAT16_MAX:
            raise AuditError(
                f"Weight {name} reaches {np.abs(values).max():.3g}; float16 ends at {FLOAT16_MAX:.0f}.",
                remedy="A batch norm channel with a vanishing variance blows weights up; use fp32 for this student.",
            )
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model = convert_float_to_float16(exact, keep_io_types=True)
    finally:
        logging.disable(level)
    model = _sorted(model)
    for item in model.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT16 and item.name in weights:
            # The converter lifts small values to its own minimum; the nearest float16 keeps them.
            item.CopyFrom(numpy_helper.from_array(weights[item.name].astype(np.float16), item.name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return model


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The converter appends its casts at the end of the node list; the standard asks for topological order."""
    import onnx_ir
    import onnx_ir.passes.common as passes

    graph = onnx_ir.serde.deserialize_model(model)
    passes.TopologicalSortPass()(graph)
    return onnx_ir.serde.serialize_model(graph)
