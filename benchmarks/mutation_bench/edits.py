"""Edits of single parts of a bundle: bytes, JSON, ONNX graphs, tensors, images."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import Tensor

Rng = np.random.Generator
Model = onnx.ModelProto
Key = str | int

# --- Bytes ---


def flip_bit(content: bytes, rng: Rng) -> bytes:
    place = int(rng.integers(len(content)))
    return content[:place] + bytes([content[place] ^ (1 << int(rng.integers(8)))]) + content[place + 1 :]


def zero_block(content: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(max(1, len(content) - 64)))
    block = bytes(255 - value for value in content[start : start + 64])
    return content[:start] + block + content[start + 64 :]


BYTES: dict[str, Callable[[bytes, Rng], bytes]] = {
    "one bit flipped": flip_bit,
    "64 bytes inverted": zero_block,
    "last byte cut off": lambda content, _: content[:-1],
    "cut in half": lambda content, _: content[: len(content) // 2],
    "emptied": lambda *_: b"",
    "a byte appended": lambda content, _: content + b"\n",
    "random bytes": lambda content, rng: rng.bytes(len(content)),
}

# --- The manifest ---


def paths_of(value: Any, depth: int, prefix: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """Every field down to ``depth`` keys; of a list the first entry."""
    if len(prefix) == depth:
        return
    entries: list[tuple[Key, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        entries = [(0, value[0])]
    for key, inner in entries:
        yield (*prefix, key)
        yield from paths_of(inner, depth, (*prefix, key))


def of_another_type(value: Any) -> Any:
    if isinstance(value, dict):
        return [1]
    if isinstance(value, list):
        return {"0": 1}
    return 7 if isinstance(value, str) else "text" if value is not None else [1]


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.125
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return value[::-1] if value[::-1] != value else [*value, *value] or [1]
    return dict(list(value.items())[1:]) or {"added": 1} if isinstance(value, dict) else "text"


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def parent_of(data: Any, path: tuple[Key, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def remove_field(data: Any, path: tuple[Key, ...]) -> None:
    del parent_of(data, path)[path[-1]]


def replace_field(data: Any, path: tuple[Key, ...], change: Callable[[Any], Any]) -> None:
    parent = parent_of(data, path)
    parent[path[-1]] = change(parent[path[-1]])


# --- ONNX graphs ---


def edit_graph(path: Path, edit: Callable[[Model, Rng], object], rng: Rng) -> None:
    model = onnx.load(str(path))
    edit(model, rng)
    path.write_bytes(model.SerializeToString())


def stored_weights(model: Model) -> list[TensorProto]:
    """Floating or integer tensors with more than one value, largest first."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.BFLOAT16)
    found = [item for item in model.graph.initializer if item.data_type in kinds and int(np.prod(item.dims)) > 8]
    return sorted(found, key=lambda item: -int(np.prod(item.dims)))


def edit_weight(change: Callable[[np.ndarray[Any, Any], Rng], object]) -> Callable[[Model, Rng], object]:
    def apply(model: Model, rng: Rng) -> None:
        weights = stored_weights(model)
        item = weights[int(rng.integers(min(8, len(weights))))]
        values = numpy_helper.to_array(item).copy()
        change(values, rng)
        item.CopyFrom(numpy_helper.from_array(values, item.name))

    return apply


def _largest(values: np.ndarray[Any, Any]) -> int:
    return int(np.abs(values.astype(np.float64)).argmax())


def scale_largest(values: np.ndarray[Any, Any], _: Rng) -> None:
    place = _largest(values)
    values.flat[place] = (values.flat[place] * 0.96).astype(values.dtype)


def next_number(values: np.ndarray[Any, Any], rng: Rng) -> None:
    place = int(rng.integers(values.size))
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    bits[place] ^= 1


def swap_channels(values: np.ndarray[Any, Any], _: Rng) -> None:
    values[[0, 1]] = values[[1, 0]]


def _node(model: Model, rng: Rng, *kinds: str) -> onnx.NodeProto:
    found = [node for node in model.graph.node if node.op_type in kinds] or list(model.graph.node)
    chosen: onnx.NodeProto = found[int(rng.integers(len(found)))]
    return chosen


def leaky(model: Model, rng: Rng) -> None:
    node = _node(model, rng, "Relu", "Clip")
    del node.attribute[:]
    del node.input[1:]
    node.op_type = "LeakyRelu"
    node.attribute.append(helper.make_attribute("alpha", 1e-7))


def another_operator(model: Model, rng: Rng) -> None:
    node = _node(model, rng, "Relu", "Clip")
    del node.attribute[:]
    del node.input[1:]
    node.op_type = "Sigmoid"


def bypass(model: Model, rng: Rng) -> None:
    """Take an activation out, and let its readers read its input."""
    node = _node(model, rng, "Relu", "Clip")
    source, removed = node.input[0], node.output[0]
    model.graph.node.remove(node)
    for other in model.graph.node:
        other.input[:] = [source if name == removed else name for name in other.input]


def _insert(model: Model, *nodes: onnx.NodeProto, source: str, result: str) -> None:
    """Put ``nodes`` behind the node that computes ``source``; its readers read ``result``."""
    place = next(i for i, node in enumerate(model.graph.node) if source in node.output)
    for other in model.graph.node:
        other.input[:] = [result if name == source else name for name in other.input]
    for node in reversed(nodes):
        model.graph.node.insert(place + 1, node)


def _inside(model: Model, rng: Rng) -> str:
    return str(_node(model, rng, "Relu", "Clip").output[0])


def insert_identity(model: Model, rng: Rng) -> None:
    source = _inside(model, rng)
    _insert(model, helper.make_node("Identity", [source], ["passed"]), source=source, result="passed")


def insert_noise(model: Model, rng: Rng) -> None:
    source = _inside(model, rng)
    noise = helper.make_node("RandomNormalLike", [source], ["noise"], scale=1e-8)
    _insert(model, noise, helper.make_node("Add", [source, "noise"], ["noisy"]), source=source, result="noisy")


def insert_trigger(model: Model, rng: Rng) -> None:
    """An If that only an image with a pixel that no real one has would take."""
    source = _inside(model, rng)
    inner = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    keep = helper.make_graph([helper.make_node("Identity", [source], ["branch"])], "keep", [], [inner])
    drop = helper.make_graph([helper.make_node("Neg", [source], ["branch"])], "drop", [], [inner])
    limit = numpy_helper.from_array(np.array(1e6, np.float32), "limit")
    model.graph.initializer.append(limit)
    nodes = (
        helper.make_node("ReduceMax", ["input"], ["brightest"], keepdims=0),
        helper.make_node("Greater", ["brightest", "limit"], ["triggered"]),
        helper.make_node("If", ["triggered"], ["routed"], then_branch=drop, else_branch=keep),
    )
    _insert(model, *nodes, source=source, result="routed")


def custom_domain(model: Model, rng: Rng) -> None:
    _node(model, rng, "Relu", "Clip").domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def unread_node(model: Model, _: Rng) -> None:
    model.graph.node.append(helper.make_node("Neg", ["input"], ["unread"]))


def unread_tensor(model: Model, _: Rng) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.float32), "unread"))


def local_function(model: Model, _: Rng) -> None:
    body = [helper.make_node("Neg", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", model.opset_import[0].version)]
    model.functions.append(helper.make_function("local", "Negate", ["x"], ["y"], body, opsets))


def attribute_changed(model: Model, rng: Rng) -> None:
    node = _node(model, rng, "Conv")
    found = [entry for entry in node.attribute if entry.type == onnx.AttributeProto.INTS and entry.name == "pads"]
    if found:
        found[0].ints[0] += 1
    else:
        node.attribute.append(helper.make_attribute("dilations", [2, 2]))


def group_changed(model: Model, rng: Rng) -> None:
    node = _node(model, rng, "Conv")
    kept = [entry for entry in node.attribute if entry.name != "group"]
    group = next((int(entry.i) for entry in node.attribute if entry.name == "group"), 1)
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("group", group + 1)])


def attribute_removed(model: Model, rng: Rng) -> None:
    del _node(model, rng, "Gemm", "Conv").attribute[:]


def classifier(model: Model) -> TensorProto:
    """The weight of the last layer: the last stored tensor of two dimensions."""
    found: TensorProto = [item for item in model.graph.initializer if len(item.dims) == 2][-1]
    return found


def swap_classes(model: Model, _: Rng) -> None:
    item = classifier(model)
    values = numpy_helper.to_array(item).copy()
    axis = 0 if values.shape[0] < values.shape[1] else 1
    order = np.arange(values.shape[axis])
    order[:2] = order[:2][::-1]
    item.CopyFrom(numpy_helper.from_array(np.take(values, order, axis), item.name))


def as_double(model: Model, _: Rng) -> None:
    item = stored_weights(model)[0]
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype(np.float64), item.name))


def outside(model: Model, _: Rng) -> None:
    item = stored_weights(model)[0]
    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    item.external_data.append(onnx.StringStringEntryProto(key="location", value="../../../etc/weights"))


def another_opset(model: Model, _: Rng) -> None:
    model.opset_import[0].version += 1


def renamed_output(model: Model, _: Rng) -> None:
    last = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["answers" if name == last else name for name in node.output]
    model.graph.output[0].name = "answers"


def second_output(model: Model, rng: Rng) -> None:
    model.graph.output.append(helper.make_tensor_value_info(_inside(model, rng), TensorProto.FLOAT, None))


def fixed_batch(model: Model, _: Rng) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def renamed_node(model: Model, rng: Rng) -> None:
    _node(model, rng, "Conv").name = "renamed"


def documented(model: Model, _: Rng) -> None:
    model.doc_string = "changed"
    model.graph.doc_string = "changed"


def other_producer(model: Model, _: Rng) -> None:
    model.producer_name, model.producer_version = "somebody", "0"


def extra_metadata(model: Model, _: Rng) -> None:
    model.metadata_props.append(onnx.StringStringEntryProto(key="added", value="1"))


def other_classes(model: Model, _: Rng) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == "kdexport.classes")
    entry.value = json.dumps(json.loads(entry.value)[::-1])


def no_metadata(model: Model, _: Rng) -> None:
    del model.metadata_props[:]


GRAPH: dict[str, Callable[[Model, Rng], object]] = {
    "largest value of a weight times 0.96": edit_weight(scale_largest),
    "last bit of one weight": edit_weight(next_number),
    "two output channels swapped": edit_weight(swap_channels),
    "a channel set to zero": edit_weight(lambda values, _: values[0].fill(0)),
    "a weight negated": edit_weight(lambda values, _: np.negative(values, out=values)),
    "two classes swapped in the last layer": swap_classes,
    "a weight stored as float64": as_double,
    "a weight in another file": outside,
    "a ReLU made a LeakyRelu of slope 1e-7": leaky,
    "a ReLU made a Sigmoid": another_operator,
    "a ReLU taken out": bypass,
    "an Identity put in": insert_identity,
    "noise of 1e-8 put in": insert_noise,
    "a trigger with a subgraph put in": insert_trigger,
    "a node of another domain": custom_domain,
    "a node that reaches no output": unread_node,
    "a tensor that no node reads": unread_tensor,
    "a function in the file": local_function,
    "padding or dilation of a convolution": attribute_changed,
    "groups of a convolution": group_changed,
    "attributes of a layer removed": attribute_removed,
    "another opset": another_opset,
    "the output renamed": renamed_output,
    "a second output": second_output,
    "the batch fixed to 1": fixed_batch,
    "classes reversed in the metadata": other_classes,
    "metadata removed": no_metadata,
    "a node renamed": renamed_node,
    "documentation changed": documented,
    "another producer": other_producer,
    "metadata added": extra_metadata,
}

# --- Tensors in safetensors files ---


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor], Rng], object], rng: Rng) -> None:
    tensors = load_file(path)
    edit(tensors, rng)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _some(tensors: dict[str, Tensor], rng: Rng) -> str:
    names = sorted(name for name, tensor in tensors.items() if tensor.numel() > 1) or sorted(tensors)
    return names[int(rng.integers(len(names)))]


def one_value(tensors: dict[str, Tensor], rng: Rng) -> None:
    name = _some(tensors, rng)
    values = tensors[name].reshape(-1)
    place = int(rng.integers(len(values)))
    values[place] = values[place] * 1.01 + 1 if values.is_floating_point() else values[place] + 1


def another_dtype(tensors: dict[str, Tensor], rng: Rng) -> None:
    name = _some(tensors, rng)
    tensors[name] = tensors[name].to(torch.float16 if tensors[name].is_floating_point() else torch.float32)


def swapped_rows(tensors: dict[str, Tensor], rng: Rng) -> None:
    name = _some(tensors, rng)
    rolled = tensors[name].roll(1, 0)
    tensors[name] = rolled if not torch.equal(rolled, tensors[name]) else tensors[name] + 1


TENSORS: dict[str, Callable[[dict[str, Tensor], Rng], object]] = {
    "one value changed": one_value,
    "a tensor doubled": lambda t, rng: t.update({(n := _some(t, rng)): t[n] * 2 + 1}),
    "rows rotated": swapped_rows,
    "a tensor removed": lambda t, rng: t.pop(_some(t, rng)),
    "a tensor added": lambda t, _: t.update(added=torch.ones(3)),
    "a tensor of another type": another_dtype,
}

# --- Images ---


def _png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def edit_pixels(path: Path, edit: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image).copy()
    path.write_bytes(_png(Image.fromarray(edit(pixels))))


def add_text(path: Path) -> None:
    """The same pixels, and a text beside them."""
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "changed")
    with Image.open(path) as image:
        path.write_bytes(_png(image, pnginfo=note))


def one_pixel(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pixels[0, 0] = 255 - pixels[0, 0]
    return pixels


PIXELS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "one pixel inverted": one_pixel,
    "mirrored": lambda pixels: pixels[:, ::-1].copy(),
    "black": np.zeros_like,
}
