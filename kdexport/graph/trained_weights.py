"""Weights that quantize-aware training changed, in the graph before the cast and in the state of the folded student."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from kdexport.errors import AuditError
from kdexport.graph.plan import TRANSPOSED, Weights

if TYPE_CHECKING:
    from torch import Tensor


def with_weights(model: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
    """A copy of a float32 graph of the folded student whose stored tensors are those of ``weights`` by name.

    Raises ``AuditError`` if one has another shape.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for item in changed.graph.initializer:
        values = _stored_as(item.name, weights)
        if values is None or item.data_type != TensorProto.FLOAT:
            continue
        if list(values.shape) != list(item.dims):
            raise AuditError(
                f"The weights of the int8 targets are for a different student: {item.name} is {list(values.shape)}, "
                f"not {list(item.dims)}.",
                remedy="Build the bundle again.",
            )
        item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), item.name))
    return changed


def _stored_as(name: str, weights: Weights) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None":
    if name in weights:
        return weights[name]
    plain = name.removesuffix(TRANSPOSED)
    return weights[plain].T if plain in weights and plain != name else None


def trained_state(
    state: "Mapping[str, Tensor]", model: onnx.ModelProto, trained: "Mapping[str, Tensor]"
) -> "dict[str, Tensor]":
    """The state of the folded student with ``trained`` tensors, which have their names in the graph ``model``.

    The exporter stores equal tensors once, under the name of one of them; all of them change with it. Raises
    ``AuditError`` for a tensor that the student does not have.
    """
    import torch

    result = dict(state)
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for name, values in trained.items():
        plain = name.removesuffix(TRANSPOSED)
        if name not in state and plain not in state:
            raise AuditError(
                f"The graph has a layer with the tensor {name}, which is not a weight of the folded student.",
                remedy="Set enabled = false under [quantize_aware]: this student cannot be trained for int8.",
            )
        result[plain if name not in state else name] = values if name in state else values.T.contiguous()
        before = torch.from_numpy(np.array(stored[name]))
        for other, value in state.items():
            if other not in stored and value.shape == before.shape and torch.equal(value, before):
                result[other] = values
    return result
