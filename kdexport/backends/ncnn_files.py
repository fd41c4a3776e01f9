"""ncnn's pair of files, read and written: the layers in `.param`, their weights in `.bin`.

The formats are those of ncnn's documentation (param and model file structure) and of its `ModelBin`: a text file with
one layer a line, and the tensors of these layers one after another. A weight begins with a tag that names its storage
type; biases and scales are float32 without a tag. Whatever this module does not know is an error, because a tensor of
unknown length hides everything behind it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import AuditError

Storage = Literal["fp32", "fp16", "int8"]

_MAGIC = "7767517"
_TAGS: dict[int, Storage] = {0: "fp32", 0x01306B47: "fp16", 0x000D4B38: "int8"}
_TYPES: dict[Storage, str] = {"fp32": "<f4", "fp16": "<f2", "int8": "|i1"}

CONVOLUTION, GROUPED, LINEAR = "Convolution", "ConvolutionDepthWise", "InnerProduct"
#: Layers that multiply by weights, and the parameter with the number of these.
WEIGHTED = {CONVOLUTION: 6, GROUPED: 6, LINEAR: 2}
CONSTANT = "MemoryData"
#: The parameter with how an int8 layer stores its scales, in all three.
INT8_SCALES = 8
#: Layers without tensors of their own.
PLAIN_LAYERS = frozenset({
    "Input", "Split", "ReLU", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Swish", "Mish", "GELU", "ELU", "TanH",
    "BinaryOp", "UnaryOp", "Eltwise", "Concat", "Slice", "Crop", "ShuffleChannel", "Reshape", "Permute", "Flatten",
    "Squeeze", "ExpandDims", "Reduction", "Pooling", "Padding", "Softmax", "Dropout", "Noop", "Interp",
})  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One line of a `.param` file, and its tensors: ``weight``, ``bias``, ``weight_scales``, ``input_scale``."""

    kind: str
    name: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    #: As written, by their number: ``{0: "24", 9: "1"}``.
    params: Mapping[int, str]
    tensors: Mapping[str, NDArray[Any]]

    def number(self, key: int, default: int = 0) -> int:
        """An integer parameter."""
        return int(self.params.get(key, default))

    @property
    def storage(self) -> Storage | None:
        """The type in which the file stores the weight; None for a layer without one."""
        weight = self.tensors.get("weight")
        return None if weight is None else {"f4": "fp32", "f2": "fp16", "i1": "int8"}[weight.dtype.str[1:]]  # type: ignore[return-value]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def read_net(param: Path, weights: Path) -> tuple[Layer, ...]:
    """All layers of a pair of files. Raises ``AuditError`` that names what is unknown, damaged or left over."""
    layers, unknown = read_known(param, weights)
    if unknown is not None:
        raise AuditError(
            f"{param.name}: the layer {unknown} is of a kind that kdexport cannot check.",
            remedy="The file was not written by this version of kdexport; build the bundle again.",
        )
    return layers


def read_known(param: Path, weights: Path) -> tuple[tuple[Layer, ...], Layer | None]:
    """The layers up to the first one of an unknown kind, and that one; None if all are known.

    Raises ``AuditError`` for files that are damaged.
    """
    try:
        lines = param.read_text(encoding="utf-8").splitlines()
        data = weights.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(param, f"{type(error).__name__}: {error}") from error
    layers: list[Layer] = []
    start = 0
    for line in _layer_lines(param, lines):
        layer = _parse(param, line)
        if not (layer.kind in WEIGHTED or layer.kind in PLAIN_LAYERS or layer.kind == CONSTANT):
            return tuple(layers), layer
        layer, start = _with_tensors(layer, weights, data, start)
        layers.append(layer)
    if start != len(data):
        raise _damaged(weights, f"{len(data):,} bytes, and the layers of {param.name} have {start:,}")
    return tuple(layers), None


def write_net(layers: tuple[Layer, ...], param: Path, weights: Path) -> None:
    """Inverse of ``read_net``."""
    blobs = {name for layer in layers for name in layer.tops}
    lines = [_MAGIC, f"{len(layers)} {len(blobs)}"]
    parts = []
    for layer in layers:
        counts = f"{len(layer.bottoms)} {len(layer.tops)}"
        given = " ".join(f"{key}={value}" for key, value in layer.params.items())
        lines.append(f"{layer.kind:24s} {layer.name:24s} {counts} {' '.join((*layer.bottoms, *layer.tops))} {given}")
        for tensor, tagged in ((layer.tensors[role], tagged) for role, _, tagged in _stored(layer)):
            parts.append(_tagged_bytes(tensor) if tagged else tensor.astype("<f4").tobytes())
    param.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    weights.write_bytes(b"".join(parts))


def in_half(layer: Layer) -> Layer:
    """A layer whose float32 weight is stored in the nearest float16."""
    if layer.kind not in WEIGHTED:
        return layer
    return replace(layer, tensors={**layer.tensors, "weight": layer.tensors["weight"].astype(np.float16)})


def in_int8(layer: Layer, levels: NDArray[np.int8], scales: Mapping[str, NDArray[np.float32]]) -> Layer:
    """A float32 layer that multiplies ``levels`` in int8, with ``scales`` in levels per value, by role."""
    tensors = {**layer.tensors, "weight": levels.reshape(-1), **scales}
    return replace(layer, params={**layer.params, INT8_SCALES: "1"}, tensors=tensors)


def _layer_lines(param: Path, lines: list[str]) -> list[str]:
    if not lines or lines[0].strip() != _MAGIC:
        raise _damaged(param, f"the first line is not {_MAGIC}")
    rows = [line for line in lines[2:] if line.strip()]
    if len(lines) < 2 or lines[1].split()[:1] != [str(len(rows))]:
        raise _damaged(param, f"it has {len(rows)} layers, and its second line says {lines[1] if lines[1:] else ''!r}")
    return rows


def _parse(param: Path, line: str) -> Layer:
    words = line.split()
    try:
        kind, name, inputs, outputs = words[0], words[1], int(words[2]), int(words[3])
        blobs, given = words[4 : 4 + inputs + outputs], words[4 + inputs + outputs :]
        params = {int(key): value for key, _, value in (word.partition("=") for word in given)}
        if len(blobs) != inputs + outputs or len(params) != len(given):
            raise ValueError("too few words")
    except (IndexError, ValueError) as error:
        raise _damaged(param, f"the line {line.strip()!r} is not a layer ({error})") from error
    return Layer(kind, name, tuple(blobs[:inputs]), tuple(blobs[inputs:]), params, {})


def _stored(layer: Layer) -> list[tuple[str, int, bool]]:
    """The tensors of a layer in the order of the file: role, number of values, and whether a tag is before them."""
    if layer.kind == CONSTANT:
        sizes = [layer.number(key) for key in (0, 1, 11, 2)]
        return [("constant", int(np.prod([size for size in sizes if size])), layer.number(21, 1) == 0)]
    if layer.kind not in WEIGHTED:
        return []
    outputs, is_linear = layer.number(0), layer.kind == LINEAR
    found = [("weight", layer.number(WEIGHTED[layer.kind]), True)]
    if layer.number(1 if is_linear else 5):
        found.append(("bias", outputs, False))
    if layer.number(INT8_SCALES):
        found.append(("weight_scales", layer.number(7, 1) if layer.kind == GROUPED else outputs, False))
        found.append(("input_scale", 1, False))
    return found


def _with_tensors(layer: Layer, weights: Path, data: bytes, start: int) -> tuple[Layer, int]:
    if layer.number(INT8_SCALES) not in (0, 1) and layer.kind in WEIGHTED:
        raise _damaged(weights, f"{layer} stores scales in the form {layer.params[INT8_SCALES]}, which is unknown")
    tensors: dict[str, NDArray[Any]] = {}
    for role, count, tagged in _stored(layer):
        storage: Storage = "fp32"
        if tagged:
            tag = int.from_bytes(data[start : start + 4], "little")
            if tag not in _TAGS:
                raise _damaged(weights, f"the weight of {layer} has the unknown storage type 0x{tag:08x}")
            storage, start = _TAGS[tag], start + 4
        size = count * np.dtype(_TYPES[storage]).itemsize
        if start + size > len(data):
            raise _damaged(weights, f"it ends within the {role} of {layer}")
        tensors[role] = np.frombuffer(data, _TYPES[storage], count, start)
        start += size + (-size % 4)
    return replace(layer, tensors=tensors), start


def _tagged_bytes(tensor: NDArray[Any]) -> bytes:
    storage = next(name for name, kind in _TYPES.items() if np.dtype(kind) == tensor.dtype)
    tag = next(value for value, name in _TAGS.items() if name == storage)
    content = tensor.tobytes()
    return tag.to_bytes(4, "little") + content + b"\0" * (-len(content) % 4)


def _damaged(path: Path, fact: str) -> AuditError:
    return AuditError(f"{path.name}: {fact}.", remedy="The file is damaged; build the bundle again.")
