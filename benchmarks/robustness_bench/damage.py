"""Damaged files: random bytes in any file, and random values in the structure of each format."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from robustness_bench.cases import Rng, pick

_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), -float("inf"), True, False,
)  # fmt: skip
_WORDS = (
    "", "x", "input", "logits", "onnx-fp32", "trt-rtx-fp16", "../../etc/passwd", "/etc/passwd", "a/../b", ".", "\x00",
    "\u202e", "\ud83d\ude00", "a" * 5000, "%s%n", "${HOME}", "1e999", "nan", "null", "-1", "fp32", "int8", "\n",
)  # fmt: skip


def some_value(rng: Rng, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = int(rng.integers(6 if depth < 3 else 4))
    if kind < 2:
        return pick(rng, _NUMBERS)
    if kind < 4:
        return pick(rng, (*_WORDS, None, [], {}))
    if kind == 4:
        return {str(pick(rng, _WORDS)): some_value(rng, depth + 1) for _ in range(int(rng.integers(4)))}
    return [some_value(rng, depth + 1) for _ in range(int(rng.integers(4)))]


def damaged_json(value: Any, rng: Rng) -> Any:
    """``value`` with one place removed, replaced, doubled or put elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = pick(rng, sorted(value))
        action = int(rng.integers(8))
        if action == 0:
            return {name: item for name, item in value.items() if name != key}
        if action == 1:
            return {**value, str(pick(rng, (key, *_WORDS))): some_value(rng)}
        if action == 2:
            return {**value, key: value[pick(rng, sorted(value))]}
        return {**value, key: damaged_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = int(rng.integers(len(value)))
        action = int(rng.integers(5))
        if action == 0:
            return value[:index] + value[index + 1 :]
        if action == 1:
            return [*value, *value[index : index + 1] * int(pick(rng, (1, 100)))]
        return [*value[:index], damaged_json(value[index], rng), *value[index + 1 :]]
    return some_value(rng)


def damaged_bytes(content: bytes, rng: Rng) -> bytes:
    """``content`` with bytes changed, cut, inserted, moved or repeated, one to four times."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(data) + 1))
        # Headers are at the start: a fifth of the changes is there.
        at = at % 64 if rng.random() < 0.2 else at
        length = int(pick(rng, (1, 2, 4, 8, 64, 1000)))
        action = int(rng.integers(7))
        if action == 0:
            data[at : at + length] = rng.bytes(min(length, max(0, len(data) - at)))
        elif action == 1:
            del data[at:]
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = rng.bytes(length)
        elif action == 4:
            source = int(rng.integers(len(data) + 1))
            data[at:at] = data[source : source + length]
        elif action == 5:
            data[at : at + 8] = struct.pack("<Q", int(pick(rng, (0, 1, 255, 2**31, 2**32, 2**63, 2**64 - 1))))
        elif data:
            data[at % len(data)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def damaged_manifest(content: bytes, rng: Rng) -> bytes:
    """A manifest, changed as JSON in four of five cases and otherwise as bytes."""
    if rng.random() < 0.2:
        return damaged_bytes(content, rng)
    value = json.loads(content)
    for _ in range(int(rng.integers(1, 4))):
        value = damaged_json(value, rng)
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def damaged_toml(content: bytes, rng: Rng) -> bytes:
    """A TOML file with lines removed, doubled, moved, or with other values."""
    if rng.random() < 0.2:
        return damaged_bytes(content, rng)
    lines = content.decode().splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines) + 1))
        action = int(rng.integers(6))
        key, equals, _ = (lines[at] if at < len(lines) else "").partition("=")
        if action == 0:
            del lines[at : at + 1]
        elif action == 1:
            lines[at:at] = lines[at : at + 1]
        elif action == 2:
            lines.insert(
                at, str(pick(rng, ("[latency]", "[[x]]", "[", "x = ", "a.b.c = 1", "[" * 2000, "x = [" * 900)))
            )
        elif action == 3 and lines:
            lines.insert(at, lines.pop(int(rng.integers(len(lines)))))
        elif equals:
            lines[at] = f"{key}= {_toml_value(rng)}"
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def _toml_value(rng: Rng) -> str:
    text = json.dumps(some_value(rng))
    return text.replace("NaN", "nan").replace("Infinity", "inf") if rng.random() < 0.7 else str(pick(rng, _WORDS))


def damaged_safetensors(content: bytes, rng: Rng) -> bytes:
    """A safetensors file, its header changed as JSON in three of four cases and otherwise as bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(json.loads(content[8 : 8 + length]), rng)
    text = json.dumps(header).encode("utf-8", errors="surrogatepass")
    stated = len(text) if rng.random() < 0.9 else int(pick(rng, (0, 2**31, 2**63, len(text) + 1)))
    return struct.pack("<Q", stated) + text + content[8 + length :]


def damaged_onnx(content: bytes, rng: Rng) -> bytes:
    """An ONNX file with nodes, attributes, tensors or types changed, or with random bytes."""
    if rng.random() < 0.2:
        return damaged_bytes(content, rng)
    model = onnx.load_model_from_string(content)
    for _ in range(int(rng.integers(1, 4))):
        try:
            pick(rng, _GRAPH_CHANGES)(model, rng)
        except (ValueError, TypeError, IndexError, OverflowError):
            # A change that this message cannot have.
            continue
    try:
        return bytes(model.SerializeToString())
    except (DecodeError, ValueError):
        return damaged_bytes(content, rng)


def _change_node(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, model.graph.node)
    action = int(rng.integers(6))
    if action == 0:
        node.op_type = str(
            pick(rng, ("", "Conv", "If", "Loop", "Relu", "Softmax", "Reshape", "x" * 300, "Gemm", "Identity"))
        )
    elif action == 1:
        node.input[int(rng.integers(len(node.input)))] = str(
            pick(rng, ("", "input", "logits", node.output[0], "nowhere"))
        )
    elif action == 2:
        node.output[0] = str(pick(rng, ("", "input", "logits", "x")))
    elif action == 3:
        node.domain = str(pick(rng, ("com.microsoft", "ai.onnx.ml", "x", "\x00")))
    elif action == 4:
        model.graph.node.remove(node)
    else:
        model.graph.node.add().CopyFrom(node)


def _change_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    node = pick(rng, [node for node in model.graph.node if node.attribute])
    attribute = pick(rng, node.attribute)
    number = int(pick(rng, (0, -1, 1, 3, 2**31, 2**62, -(2**63), 1000)))
    action = int(rng.integers(5))
    if action == 0:
        node.attribute.remove(attribute)
    elif action == 1:
        attribute.i = number
    elif action == 2:
        attribute.ints[:] = [number] * int(pick(rng, (0, 1, 2, 4, 9)))
    elif action == 3:
        attribute.type = int(rng.integers(0, 16))
    else:
        attribute.name = str(pick(rng, ("", "pads", "group", "x", "axis")))


def _change_tensor(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = pick(rng, model.graph.initializer)
    action = int(rng.integers(7))
    if action == 0:
        tensor.dims[:] = [int(pick(rng, (0, 1, -1, 3, 2**31, 2**62, 1000)))] * int(pick(rng, (0, 1, 2, 4, 20)))
    elif action == 1:
        tensor.data_type = int(rng.integers(-1, 24))
    elif action == 2:
        tensor.raw_data = rng.bytes(int(pick(rng, (0, 1, 4, 1000))))
    elif action == 3:
        tensor.name = str(pick(rng, ("", "input", "x", "logits")))
    elif action == 4:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", str(pick(rng, ("../manifest.json", "/etc/passwd", "x.bin", "")))
    elif action == 5:
        model.graph.initializer.remove(tensor)
    else:
        tensor.float_data.extend([float("nan")] * 3)


def _change_interface(model: onnx.ModelProto, rng: Rng) -> None:
    graph = model.graph
    action = int(rng.integers(7))
    if action == 0:
        kept = graph.input if rng.random() < 0.5 else graph.output
        kept.add().CopyFrom(kept[0])
    elif action == 1:
        graph.input[0].type.tensor_type.elem_type = int(rng.integers(0, 24))
    elif action == 2:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = int(pick(rng, (0, -1, 2**40, 7)))
    elif action == 3:
        model.ir_version = int(pick(rng, (0, -1, 1, 99, 2**40)))
    elif action == 4:
        model.opset_import[0].version = int(pick(rng, (0, -1, 1, 7, 99, 2**40)))
    elif action == 5:
        del graph.output[:]
    else:
        entry = model.metadata_props.add()
        entry.key, entry.value = str(pick(rng, _WORDS)).replace("\ud83d", ""), "x" * 1000


_GRAPH_CHANGES: tuple[Callable[[onnx.ModelProto, Rng], None], ...] = (
    _change_node, _change_attribute, _change_tensor, _change_interface,
)  # fmt: skip


def damaged_zip(content: bytes, rng: Rng) -> bytes:
    """A .pt2 or .pt file with an entry changed, renamed, removed or added, or with random bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = int(rng.integers(len(entries)))
    name, data = entries[at]
    action = int(rng.integers(5))
    if action == 0:
        del entries[at]
    elif action == 1:
        entries[at] = (str(pick(rng, ("../outside", "/tmp/outside", "x" * 300, "data/../../x", name.upper()))), data)
    elif action == 2:
        entries.append((f"{name}.extra", rng.bytes(100)))
    elif name.endswith(".json") and action == 3:
        entries[at] = (name, _damaged_text(data, rng))
    else:
        entries[at] = (name, damaged_bytes(data, rng))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as made:
        for entry, value in entries:
            made.writestr(entry, value)
    return stream.getvalue()


def _damaged_text(data: bytes, rng: Rng) -> bytes:
    try:
        return json.dumps(damaged_json(json.loads(data), rng)).encode("utf-8", errors="surrogatepass")
    except ValueError:
        return damaged_bytes(data, rng)


def damaged_image(content: bytes, rng: Rng) -> bytes:
    """An image with random bytes, or a PNG whose header states another size with a right checksum."""
    if not content.startswith(b"\x89PNG") or rng.random() < 0.6:
        return damaged_bytes(content, rng)
    header = bytearray(content[16:29])
    width, height = (int(pick(rng, (0, 1, 8, 31, 4096, 65_535, 2**31 - 1, 2**32 - 1))) for _ in range(2))
    header[:8] = struct.pack(">II", width, height)
    if rng.random() < 0.5:
        header[8:] = rng.bytes(5)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + bytes(header)))
    return content[:16] + bytes(header) + checksum + content[33:]
