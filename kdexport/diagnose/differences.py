"""Describes how a node differs from the trusted one: in weights, bias, attributes, inputs, or by overflow."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.graph.precision import FLOAT16_MAX

_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def stored_difference(
    suspect: onnx.ModelProto, trusted: onnx.ModelProto, node: onnx.NodeProto, expected: onnx.NodeProto, precision: str
) -> str:
    """How a node and its stored values differ from the trusted node; empty if they differ only by rounding."""
    if precision not in _TYPES:
        return ""
    if node.op_type != expected.op_type:
        return f"is a {node.op_type}, expected {expected.op_type}"
    mine, theirs = _constants(suspect), _constants(trusted)
    if len(node.input) < len(expected.input) or (list(node.input).count("") > list(expected.input).count("")):
        missing = [name for name in expected.input if name not in node.input]
        values = theirs.get(missing[-1]) if missing else None
        if values is not None:
            return f"has no bias; expected {missing[-1]}, {values.size} values up to {np.abs(values).max():.3g}"
        return f"reads {len(node.input)} inputs, expected {len(expected.input)}"
    for name, wanted in zip(node.input, expected.input, strict=False):
        if wanted in theirs and theirs[wanted].dtype == np.float32:
            if name not in mine:
                return f"reads {name}, expected {wanted}"
            text = _values(wanted, mine[name], theirs[wanted].astype(_TYPES[precision]))
            if text:
                return text
    return _attributes(node, expected)


def overflow(trusted: NDArray[Any], own: NDArray[Any]) -> str:
    """Which values overflow in float16; empty if none does."""
    if own.dtype != np.float16 or np.isfinite(own).all():
        return ""
    peak = float(np.abs(trusted[np.isfinite(trusted)].astype(np.float64)).max(initial=0.0))
    count = int((~np.isfinite(own)).sum())
    reach = f"reaches {peak:.4g}" if peak > FLOAT16_MAX else "overflows inside a sum"
    return f"{reach}, but float16 ends at 65504: {count:,} of {own.size:,} values are not finite"


def _constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            values = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
            found |= dict.fromkeys(node.output, values[0]) if values else {}
    return found


def _values(name: str, stored: NDArray[Any], expected: NDArray[Any]) -> str:
    if stored.shape != expected.shape:
        return f"{name} has shape {list(stored.shape)}, expected {list(expected.shape)}"
    mine, theirs = stored.astype(np.float64), expected.astype(np.float64)
    unequal = mine != theirs
    if not unequal.any():
        return ""
    order = _permutation(mine, theirs)
    if order is not None:
        moved = [f"row {place} contains row {source}" for place, source in enumerate(order) if place != source]
        return f"the rows of {name} are in another order: {', '.join(moved[:4])}{', ...' if len(moved) > 4 else ''}"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = mine[theirs != 0] / theirs[theirs != 0]
    if ratios.size > 1 and np.isfinite(ratios).all() and np.ptp(ratios) <= 4e-3 * abs(np.median(ratios)):
        return f"{name} is {np.median(ratios):.4g} times the expected values"
    change = np.abs(mine - theirs)
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(change)), change.shape))
    return (
        f"{int(unequal.sum())} of {unequal.size} values of {name} differ, the largest difference is at {list(place)}: "
        f"{mine[place]:.4g}, expected {theirs[place]:.4g}"
    )


def _permutation(stored: NDArray[Any], expected: NDArray[Any]) -> list[int] | None:
    """The expected row that each stored row equals; None unless the stored rows are a permutation of the expected."""
    if stored.ndim < 1 or stored.shape[0] < 2:
        return None
    known = {row.tobytes(): place for place, row in enumerate(expected)}
    order = [known.get(row.tobytes(), -1) for row in stored]
    return order if len(known) == len(order) and sorted(order) == list(range(len(order))) else None


def _attributes(node: onnx.NodeProto, expected: onnx.NodeProto) -> str:
    mine = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "value"}
    theirs = {a.name: onnx.helper.get_attribute_value(a) for a in expected.attribute if a.name != "value"}
    wrong = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    ignored = {"to"} if node.op_type == "Cast" else set()
    wrong = [key for key in wrong if key not in ignored]
    return f"{wrong[0]} is {mine.get(wrong[0])}, expected {theirs.get(wrong[0])}" if wrong else ""
