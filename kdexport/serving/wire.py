"""Open Inference Protocol v2 on the wire: header and tensor of a request in, logits or class labels out.

Fields and their meaning: kserve/open-inference-protocol (REST), with Triton's extensions for binary tensors and
classification.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

# pydantic reads the types of a TypedDict of Python 3.11 only from here.
from typing_extensions import TypedDict

from kdexport.backends.base import LOGITS
from kdexport.backends.file_interface import PROBABILITIES
from kdexport.backends.pixel_input import FLOAT32, Given, InputKind, image_shape
from kdexport.errors import RequestError
from kdexport.serving.limits import Limits
from kdexport.stats.logits import probabilities_of

HEADER_LENGTH = "inference-header-content-length"
_FLOAT32_BYTES = 4
_FLOAT32: np.dtype[np.float32] = np.dtype(np.float32).newbyteorder("<")
_UINT8 = np.dtype(np.uint8)
_MAX_NAME = 256
#: Largest dimension or byte count that a header may give; Python's integers hold their products.
_MAX_COUNT = 2**40

#: What each kind of pydantic error means, in words of our own; ``{name}`` is a bound from the error's context.
_FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "is missing",
        "model_type": "must be an object",
        "list_type": "must be an array",
        "string_type": "must be a string",
        "bool_type": "must be true or false",
        "int_type": "must be an integer",
        "int_parsing_size": "is too large",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "too_short": "must have at least {min_length} entries",
        "too_long": "must have at most {max_length} entries",
        "string_too_long": "must have at most {max_length} characters",
    }
)

_Name = Annotated[str, Field(max_length=_MAX_NAME)]
_Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """The one input of a classifier and its outputs: n images to (n,K) float32 each, 1 <= n <= ``max_batch``.

    An image is (3,S,S) float32, or pixels if ``takes`` says so.
    """

    input_name: str
    outputs: tuple[str, ...]
    image_size: int
    classes: tuple[str, ...]
    max_batch: int
    takes: InputKind = FLOAT32

    @property
    def shape(self) -> list[int]:
        """The shape of one image."""
        return list(image_shape(self.takes, self.image_size))

    @property
    def datatype(self) -> Literal["FP32", "UINT8"]:
        """The type of the input in the protocol."""
        return "FP32" if self.takes == FLOAT32 else "UINT8"

    @property
    def dtype(self) -> np.dtype[np.float32 | np.uint8]:
        """The type of the input on the wire, little-endian."""
        return _FLOAT32 if self.takes == FLOAT32 else _UINT8

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensor of one image on the wire."""
        return self.dtype.itemsize * self.elements

    @property
    def elements(self) -> int:
        """Numbers in the tensor of one image."""
        return 3 * self.image_size * self.image_size

    @property
    def image_bytes(self) -> int:
        """Bytes of the float32 tensor of one image, which the graph computes with."""
        return _FLOAT32_BYTES * self.elements


def _null_means(default: Callable[[], Any]) -> BeforeValidator:
    """null as ``default()``: clients write an optional member without a value so, for example KServe's SDK."""
    return BeforeValidator(lambda value: default() if value is None else value)


def _allow_null(schema: dict[str, Any]) -> None:
    """Let every optional member of an object's JSON schema be null."""
    required = schema.get("required", [])
    for name, member in schema.get("properties", {}).items():
        null = {"type": "null"}
        if name not in required and member.keys() - {"default", "title"} and null not in member.get("anyOf", []):
            outside = {key: member[key] for key in ("default", "title") if key in member}
            inside = {key: value for key, value in member.items() if key not in outside}
            schema["properties"][name] = {"anyOf": [*inside.pop("anyOf", []), *([inside] if inside else []), null]}
            schema["properties"][name].update(outside)


class _Message(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, hide_input_in_errors=True, json_schema_extra=_allow_null
    )


class TensorParameters(_Message):
    """Parameters of an input tensor."""

    binary_data_size: _Count | None = None
    shared_memory_region: str | None = None


class RequestInput(_Message):
    """An input tensor; ``data`` is absent if its bytes follow the header."""

    name: _Name
    shape: Annotated[list[_Count], Field(max_length=64)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: Annotated[TensorParameters, _null_means(dict)] = TensorParameters()
    data: Any = None


class OutputParameters(_Message):
    """Parameters of a requested output."""

    binary_data: bool | None = None
    classification: Annotated[_Count, _null_means(int)] = 0
    shared_memory_region: str | None = None


class RequestOutput(_Message):
    """A requested output."""

    name: _Name
    parameters: Annotated[OutputParameters, _null_means(dict)] = OutputParameters()


class InferParameters(_Message):
    """Parameters of the request; the protocol allows others, which are ignored."""

    binary_data_output: Annotated[bool, _null_means(bool)] = False
    timeout: Annotated[_Count, _null_means(int)] = 0
    sequence_id: Annotated[int | str, _null_means(int)] = 0


class InferRequest(_Message):
    """The JSON part of an inference request."""

    id: Annotated[str, Field(max_length=1024)] | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=1024)]
    outputs: Annotated[list[RequestOutput], Field(max_length=1024), _null_means(list)] = []
    parameters: Annotated[InferParameters, _null_means(dict)] = InferParameters()


class OutputTensor(TypedDict):
    """An output tensor of a response; ``data`` is absent if its bytes follow the JSON."""

    name: str
    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    data: NotRequired[list[Any]]
    parameters: NotRequired[dict[str, Any]]


class InferResponse(TypedDict):
    """The JSON part of the response to an inference request."""

    id: NotRequired[str]
    model_name: str
    model_version: str
    outputs: list[OutputTensor]


class Prediction(TypedDict):
    """A class and its probability."""

    label: str
    index: Annotated[int, Field(ge=0)]
    probability: Annotated[float, Field(ge=0, le=1)]


class Predictions(TypedDict):
    """The response to an image, most probable class first."""

    model_name: str
    model_version: str
    predictions: list[Prediction]


class Error(TypedDict):
    """The response to a request that failed."""

    error: str


@dataclass(frozen=True, slots=True, eq=False)
class ParsedRequest:
    """The header of a request and its tensor: n images as the signature says, aligned and contiguous."""

    header: InferRequest
    images: Given


def body_limit(signature: Signature, limits: Limits, *, binary: bool) -> int:
    """The most bytes that a request for this model can need, raw or as JSON text; at most the limit on bodies."""
    bytes_per_image = signature.tensor_bytes * 1.2 if binary else signature.elements * 26
    return min(limits.body, int(signature.max_batch * bytes_per_image) + limits.header)


def read_request(
    body: bytes | bytearray, header_length: int | None, signature: Signature, limits: Limits
) -> ParsedRequest:
    """Parse and check the request in ``body``; raises ``RequestError``.

    ``header_length`` is the value of Inference-Header-Content-Length: None for JSON alone, 0 for a body that is the
    tensor and nothing else.
    """
    if header_length == 0:
        return _read_raw_tensor(body, signature)
    length = len(body) if header_length is None else header_length
    if length > len(body):
        raise RequestError(
            f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes.",
            remedy="Set it to the number of bytes of the JSON header.",
        )
    if header_length is not None and length > limits.header:
        raise RequestError(
            f"The JSON header has {length:,} bytes (up to {limits.header:,} allowed).",
            remedy="Send the tensor as bytes after the header.",
            status=413,
            reason="too_large",
        )
    view = memoryview(body)
    header = read_header(bytes(view[:length]), signature, limits)
    return ParsedRequest(header, read_images(header, view[length:], signature))


def read_header(raw: bytes, signature: Signature, limits: Limits) -> InferRequest:
    """Parse and check all of a request but its tensor; raises ``RequestError``."""
    header = _parse_header(raw, limits, signature.max_batch * signature.elements)
    _require_supported(header, signature.outputs, limits)
    _require_shape(header.inputs[0], signature)
    return header


def read_images(header: InferRequest, rest: memoryview, signature: Signature) -> Given:
    """The tensor of a request with a checked header, from its JSON or ``rest``; raises ``RequestError``."""
    tensor = header.inputs[0]
    read = _from_bytes if tensor.data is None else _from_json
    return as_images(read(tensor, rest, signature), tensor.shape, signature)


def _read_raw_tensor(body: bytes | bytearray, signature: Signature) -> ParsedRequest:
    count, rest = divmod(len(body), signature.tensor_bytes)
    if rest or not 1 <= count <= signature.max_batch:
        raise RequestError(
            f"The body has {len(body):,} bytes; a raw tensor has 1 to {signature.max_batch} images of "
            f"{signature.tensor_bytes:,} bytes each.",
            remedy=f"Send {'float32' if signature.takes == FLOAT32 else 'uint8'} values of shape "
            f"[n, {', '.join(map(str, signature.shape))}].",
        )
    tensor = RequestInput(name=signature.input_name, shape=[count, *signature.shape], datatype=signature.datatype)
    header = InferRequest.model_validate({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    return ParsedRequest(header, as_images(np.frombuffer(body, signature.dtype), tensor.shape, signature))


def _parse_header(raw: bytes, limits: Limits, max_elements: int) -> InferRequest:
    """The JSON of a request as ``InferRequest``; raises ``RequestError`` with the first fault.

    Tokens and depth are counted before any object is made of them, so that memory follows from the limits.
    """
    _require_bounded_json(raw, limits, max_elements)
    try:
        return InferRequest.model_validate_json(raw)
    except ValidationError as error:
        raise RequestError(f"The request is not valid {_describe_fault(error)}.") from None


def _describe_fault(error: ValidationError) -> str:
    """The first fault by its kind and place; pydantic's own text may change and never enters a response."""
    fault = error.errors(include_url=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        position = re.search(r"line \d+ column \d+$", fault["msg"])
        return f"JSON: {position[0]}" if position else "JSON"
    place = ".".join(str(part) for part in fault["loc"][:6])[:200] or "the JSON value"
    rule = _FAULTS.get(fault["type"], "has a value of the wrong kind")
    return f"(Open Inference Protocol v2): {place} {rule.format_map(fault.get('ctx', {}))}"


def _require_bounded_json(raw: bytes, limits: Limits, max_elements: int) -> None:
    """Raise if JSON has more tokens than a request can need, or is nested deeper than allowed."""
    openers = raw.count(b"[") + raw.count(b"{")
    tokens = raw.count(b",") + openers
    allowed = 2 * max_elements + limits.json_slack
    if tokens > allowed:
        raise RequestError(
            f"The JSON has {tokens:,} elements (up to {allowed:,} allowed).",
            remedy="Send fewer images in one request.",
            status=413,
            reason="too_large",
        )
    if openers > limits.json_depth and (depth := _depth(raw)) > limits.json_depth:
        raise RequestError(
            f"The JSON is nested {depth:,} levels deep (up to {limits.json_depth} allowed).",
            remedy="Send the data as one flat array.",
            reason="too_deep",
        )


def _depth(raw: bytes) -> int:
    """The deepest nesting; brackets inside strings count too, so the result can only be too large."""
    codes = np.frombuffer(raw, np.uint8)
    up = (codes == ord("[")) | (codes == ord("{"))
    down = (codes == ord("]")) | (codes == ord("}"))
    brackets = np.flatnonzero(up | down)
    steps = np.where(up[brackets], 1, -1)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _require_supported(header: InferRequest, outputs: tuple[str, ...], limits: Limits) -> None:
    """Raise ``RequestError`` for a request that a stateless classifier with one input cannot serve."""
    if len(header.inputs) != 1:
        raise RequestError(f"The request has {len(header.inputs)} inputs; the model takes exactly 1.")
    if len(header.inputs[0].shape) > limits.dims:
        raise RequestError(f"The input has {len(header.inputs[0].shape)} dimensions (up to {limits.dims} allowed).")
    if len(header.outputs) > limits.tensors:
        raise RequestError(f"The request lists {len(header.outputs)} outputs (up to {limits.tensors} allowed).")
    names = [output.name for output in header.outputs]
    if len(set(names)) != len(names):
        raise RequestError("The request lists the same output twice.", remedy="List each output once.")
    for name in names:
        if name not in outputs:
            only = "its only output is" if len(outputs) == 1 else "its outputs are"
            raise RequestError(f"The model has no output {name[:80]!r}; {only} {' and '.join(map(repr, outputs))}.")
    if header.parameters.sequence_id not in (0, ""):
        raise RequestError(
            "The request has a sequence_id, but the model keeps no state between requests.", remedy="Omit sequence_id."
        )
    regions = [header.inputs[0].parameters.shared_memory_region]
    regions += [output.parameters.shared_memory_region for output in header.outputs]
    if any(region is not None for region in regions):
        raise RequestError("This server does not support shared memory.", remedy="Send the tensor in the body.")


def _require_shape(tensor: RequestInput, signature: Signature) -> None:
    """Raise if name, datatype or shape of the input differ from the model's, or if it has too many images."""
    if tensor.name != signature.input_name:
        raise RequestError(f"The model has no input {tensor.name[:80]!r}; its only input is {signature.input_name!r}.")
    if tensor.datatype != signature.datatype:
        raise RequestError(
            f"Input {tensor.name!r} has datatype {tensor.datatype!r}; the model takes {signature.datatype!r}."
        )
    if tensor.shape[1:] != signature.shape or not 1 <= tensor.shape[0] <= signature.max_batch:
        raise RequestError(
            f"Input {tensor.name!r} has shape {tensor.shape}; the model takes "
            f"[n, {', '.join(map(str, signature.shape))}] with n from 1 to {signature.max_batch}."
        )


def _from_bytes(tensor: RequestInput, rest: memoryview, signature: Signature) -> Given:
    size, expected = tensor.parameters.binary_data_size, signature.dtype.itemsize * math.prod(tensor.shape)
    if size is None:
        raise RequestError(
            f"Input {tensor.name!r} has neither data nor binary_data_size.",
            remedy="Send the values in data, or as bytes after the header with their number in binary_data_size.",
        )
    if size != len(rest):
        raise RequestError(f"binary_data_size is {size}, but {len(rest)} bytes follow the header.")
    if size != expected:
        raise RequestError(
            f"binary_data_size is {size}; shape {tensor.shape} of {tensor.datatype} takes {expected} bytes."
        )
    return np.frombuffer(rest, signature.dtype)


def _from_json(tensor: RequestInput, rest: memoryview, signature: Signature) -> Given:
    if tensor.parameters.binary_data_size is not None or len(rest):
        raise RequestError(
            f"Input {tensor.name!r} has its data both as JSON and as bytes.", remedy="Send it in one of the two forms."
        )
    values = _flatten(tensor)
    expected = math.prod(tensor.shape)
    if len(values) != expected:
        raise RequestError(
            f"The data of input {tensor.name!r} has {len(values):,} elements; shape {tensor.shape} takes {expected:,}."
        )
    if signature.takes != FLOAT32:
        return _pixels_from_json(tensor, values)
    if not set(map(type, values)) <= {int, float}:
        raise RequestError(f"The data of input {tensor.name!r} has an element that is not a number.")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(np.float32)
    except OverflowError:
        raise RequestError(
            f"The data of input {tensor.name!r} has a number that float32 cannot represent (up to 3.4e38 allowed)."
        ) from None


def _pixels_from_json(tensor: RequestInput, values: list[Any]) -> NDArray[np.uint8]:
    if set(map(type, values)) != {int} or not (min(values) >= 0 and max(values) <= 255):
        raise RequestError(
            f"The data of input {tensor.name!r} has an element that is not a pixel; each must be an integer from 0 to "
            "255.",
            remedy="Send the RGB values of the image as they are; the model normalises them.",
        )
    return np.array(values, np.uint8)


def _flatten(tensor: RequestInput) -> list[Any]:
    """JSON data in row-major order: clients send it flat, or nested like the shape."""
    values = tensor.data
    if not isinstance(values, list):
        raise RequestError(f"The data of input {tensor.name!r} is not an array.")
    if not (values and isinstance(values[0], list)):
        return values
    count = tensor.shape[0]
    for extent in tensor.shape[1:]:
        if len(values) != count or not all(isinstance(row, list) and len(row) == extent for row in values):
            raise RequestError(
                f"The nesting of the data of input {tensor.name!r} does not match its shape {tensor.shape}.",
                remedy="Send the data as one flat array.",
            )
        values = list(itertools.chain.from_iterable(values))
        count *= extent
    return values


def all_finite(values: Given) -> bool:
    """Whether no value is NaN or infinite."""
    # A search for a zero byte takes half of the time of ``all``.
    return b"\0" not in np.isfinite(values).tobytes()


def as_images(flat: Given, shape: Sequence[int], signature: Signature) -> Given:
    """The values (n*3*S*S,) of a request as ``shape``, aligned; raises ``RequestError`` if one is NaN or infinite."""
    # The tensor starts wherever the header ended; onnxruntime needs aligned memory in native byte order.
    native = flat if flat.flags.aligned and flat.dtype.isnative else flat.astype(flat.dtype.newbyteorder("="))
    if signature.takes == FLOAT32 and not all_finite(native):
        raise RequestError(f"Input {signature.input_name!r} has NaN or infinity; all values must be finite.")
    return native.reshape(shape)


def write_response(
    header: InferRequest, logits: NDArray[np.float32], signature: Signature, *, model: str, version: str
) -> tuple[bytes, int | None]:
    """(body, header length or None) of the response: JSON, or JSON followed by raw tensors."""
    requested = header.outputs or [RequestOutput(name=name) for name in signature.outputs]
    outputs, blobs = [], []
    for output in requested:
        binary = output.parameters.binary_data
        if binary is None:
            binary = header.parameters.binary_data_output
        values = probabilities_of(logits).astype(np.float32) if output.name == PROBABILITIES else logits
        description, blob = _encode_output(output, values, signature, binary=binary)
        outputs.append(description)
        blobs.append(blob)
    response: InferResponse = {"model_name": model, "model_version": version, "outputs": outputs}
    if header.id is not None:
        response = {"id": header.id, **response}
    text = json.dumps(response, separators=(",", ":")).encode()
    return (b"".join([text, *blobs]), len(text)) if any(blobs) else (text, None)


def only_binary_logits(header: InferRequest, signature: Signature) -> bool:
    """Whether the response has the logits as bytes and nothing else, so that no other part of it depends on them."""
    parameters = [output.parameters for output in header.outputs]
    names = [output.name for output in header.outputs] or list(signature.outputs)
    asked = header.parameters.binary_data_output
    return names == [LOGITS] and all(
        given.classification == 0 and (asked if given.binary_data is None else given.binary_data)
        for given in parameters or [OutputParameters()]
    )


def _encode_output(
    output: RequestOutput, values: NDArray[np.float32], signature: Signature, *, binary: bool
) -> tuple[OutputTensor, bytes]:
    top = min(output.parameters.classification, values.shape[1])
    if top == 0:
        description: OutputTensor = {"name": output.name, "datatype": "FP32", "shape": list(values.shape)}
        if not binary:
            return {**description, "data": values.reshape(-1).tolist()}, b""
        blob = values.astype("<f4", copy=False).tobytes()
    else:
        entries = [entry for row in values for entry in _classification(row, top, signature.classes)]
        description = {"name": output.name, "datatype": "BYTES", "shape": [len(values), top]}
        if not binary:
            return {**description, "data": entries}, b""
        encoded = [entry.encode() for entry in entries]
        blob = b"".join(len(entry).to_bytes(4, "little") + entry for entry in encoded)
    return {**description, "parameters": {"binary_data_size": len(blob)}}, blob


def rank(row: NDArray[np.float32], top: int) -> list[int]:
    """Indices of the ``top`` largest values of (K,), largest first; equal values in index order."""
    return [int(index) for index in np.argsort(-row, kind="stable")[:top]]


def _classification(row: NDArray[np.float32], top: int, classes: tuple[str, ...]) -> list[str]:
    """``score:index:label`` for the ``top`` largest of (K,) values, the form of Triton's classification extension."""
    return [f"{row[index]:f}:{index}:{classes[index]}" for index in rank(row, top)]
