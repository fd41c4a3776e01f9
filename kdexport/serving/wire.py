"""Tensors on the wire: raw little-endian bytes or JSON numbers in, logits or classes out.

Open Inference Protocol v2: the typed request header, and what may be asked of a classifier.

Fields and meaning: kserve/open-inference-protocol (REST), with Triton's extensions for binary
tensors and classification.
"""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdexport.errors import RequestError
from kdexport.serving.limits import Limits

_MAX_NAME = 256

#: Largest value of a dimension or byte count that a header may name; products stay far below 2^63 in Python anyway.
_MAX_COUNT = 2**40

Name = Annotated[str, Field(max_length=_MAX_NAME)]

Scalar = bool | int | float | str

Parameters = Annotated[dict[Name, Scalar], Field(max_length=64)]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, hide_input_in_errors=True)


class TensorParameters(_Message):
    """Parameters of one input: only a binary size changes its meaning."""

    binary_data_size: Annotated[int, Field(ge=0, le=_MAX_COUNT)] | None = None
    shared_memory_region: str | None = None


class RequestInput(_Message):
    """One input tensor; ``data`` is absent where its bytes follow the header."""

    name: Name
    shape: Annotated[list[Annotated[int, Field(ge=0, le=_MAX_COUNT)]], Field(max_length=64)]
    datatype: Annotated[str, Field(max_length=16)]
    parameters: TensorParameters = TensorParameters()
    data: Any = None


class OutputParameters(_Message):
    """Parameters of one wanted output."""

    binary_data: bool | None = None
    classification: Annotated[int, Field(ge=0, le=_MAX_COUNT)] = 0
    shared_memory_region: str | None = None


class RequestOutput(_Message):
    """One wanted output."""

    name: Name
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Message):
    """Parameters of the request; others are allowed by the protocol and change nothing here."""

    binary_data_output: bool = False
    timeout: Annotated[int, Field(ge=0, le=_MAX_COUNT)] = 0
    sequence_id: int | str = 0


class InferRequest(_Message):
    """The JSON part of an inference request."""

    id: Annotated[str, Field(max_length=1024)] | None = None
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=1024)]
    outputs: Annotated[list[RequestOutput], Field(max_length=1024)] = []
    parameters: InferParameters = InferParameters()


def parse_header(data: bytes | memoryview, limits: Limits, max_elements: int) -> InferRequest:
    """The JSON of a request as ``InferRequest``; raises ``RequestError`` with the first fault.

    Tokens and depth are counted before any object is made of them, so that memory follows from the limits.
    """
    raw = bytes(data)
    require_modest(raw, limits, max_elements)
    try:
        return InferRequest.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"][:6])[:200]
        raise RequestError(f"The request is not valid: {place + ': ' if place else ''}{fault['msg'][:300]}.") from None


def require_modest(raw: bytes, limits: Limits, max_elements: int) -> None:
    """Raise where JSON has more tokens than a request can need, or nests deeper than allowed."""
    openers = raw.count(b"[") + raw.count(b"{")
    tokens = raw.count(b",") + openers
    allowed = 2 * max_elements + limits.json_slack
    if tokens > allowed:
        raise RequestError(
            f"The JSON has {tokens:,} elements (up to {allowed:,} allowed).", status=413, reason="too_large"
        )
    if openers > limits.json_depth and _depth(raw) > limits.json_depth:
        raise RequestError(f"The JSON nests deeper than {limits.json_depth} levels.", reason="too_deep")


def _depth(raw: bytes) -> int:
    """Deepest nesting; brackets inside strings count too, which only ever overstates it."""
    import numpy as np

    codes = np.frombuffer(raw, np.uint8)
    up = (codes == ord("[")) | (codes == ord("{"))
    down = (codes == ord("]")) | (codes == ord("}"))
    places = np.flatnonzero(up | down)
    steps = np.where(up[places], 1, -1)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def require_answerable(request: InferRequest, output_name: str, limits: Limits) -> None:
    """Raise ``RequestError`` for what a stateless classifier with one input and one output cannot do."""
    if len(request.inputs) != 1:
        raise RequestError(f"The request has {len(request.inputs)} inputs (1 allowed).")
    if len(request.inputs[0].shape) > limits.dims:
        raise RequestError(f"The input has {len(request.inputs[0].shape)} dimensions (up to {limits.dims} allowed).")
    if len(request.outputs) > limits.tensors:
        raise RequestError(f"The request wants {len(request.outputs)} outputs (up to {limits.tensors} allowed).")
    names = [output.name for output in request.outputs]
    if len(set(names)) != len(names):
        raise RequestError("An output is asked for twice.")
    for name in names:
        if name != output_name:
            raise RequestError(f"There is no output {name[:80]!r}; the model has {output_name!r}.")
    if request.parameters.sequence_id not in (0, ""):
        raise RequestError("The model keeps no state: sequence_id cannot be used.")
    regions = [request.inputs[0].parameters.shared_memory_region]
    regions += [output.parameters.shared_memory_region for output in request.outputs]
    if any(region is not None for region in regions):
        raise RequestError("Shared memory is not served; send the tensor in the body.")


HEADER_LENGTH = "inference-header-content-length"

_ITEM = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """The one input and output of a classifier: (n,3,S,S) float32 to (n,K) float32, 1 <= n <= ``max_batch``."""

    input_name: str
    output_name: str
    image_size: int
    classes: tuple[str, ...]
    max_batch: int

    @property
    def elements(self) -> int:
        """Numbers in one image."""
        return 3 * self.image_size * self.image_size

    @property
    def image_bytes(self) -> int:
        """Bytes of the float32 tensor of one image."""
        return _ITEM * self.elements


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request whose tensor was read: (n,3,S,S) float32, aligned and contiguous."""

    request: InferRequest
    images: NDArray[np.float32]


def body_limit(signature: Signature, limits: Limits, *, binary: bool) -> int:
    """Bytes that a request for this model can need, raw or as JSON text, and never more than the body limit."""
    each = signature.image_bytes * 1.2 if binary else signature.elements * 26
    return min(limits.body, int(signature.max_batch * each) + limits.header)


def read_request(body: bytes | bytearray, header_length: int | None, signature: Signature, limits: Limits) -> Asked:
    """The request in ``body``; raises ``RequestError``.

    ``header_length`` is the value of Inference-Header-Content-Length: None for JSON alone, 0 for a body that is the
    tensor and nothing else.
    """
    if header_length == 0:
        return _raw(body, signature)
    length = len(body) if header_length is None else header_length
    if length > len(body):
        raise RequestError(f"Inference-Header-Content-Length is {length}, the body has {len(body)} bytes.")
    if header_length is not None and length > limits.header:
        raise RequestError(
            f"The request header has {length} bytes (up to {limits.header} allowed).", status=413, reason="too_large"
        )
    view = memoryview(body)
    request = parse_header(view[:length], limits, signature.max_batch * signature.elements)
    require_answerable(request, signature.output_name, limits)
    given = request.inputs[0]
    count = _batch(given, signature)
    flat = _from_bytes(given, view[length:]) if given.data is None else _from_json(given, view[length:])
    return Asked(request, _shaped(flat, count, signature))


def _raw(body: bytes | bytearray, signature: Signature) -> Asked:
    count, rest = divmod(len(body), signature.image_bytes)
    if rest or not 1 <= count <= signature.max_batch:
        raise RequestError(
            f"The body has {len(body)} bytes; a raw request is 1 to {signature.max_batch} images of "
            f"{signature.image_bytes} bytes."
        )
    shape = [count, 3, signature.image_size, signature.image_size]
    given = RequestInput(name=signature.input_name, shape=shape, datatype="FP32")
    request = InferRequest.model_validate({"inputs": [given], "parameters": {"binary_data_output": True}})
    return Asked(request, _shaped(np.frombuffer(body, "<f4"), count, signature))


def _batch(given: RequestInput, signature: Signature) -> int:
    """Number of images; raises where name, datatype or shape is not the model's."""
    size = signature.image_size
    if given.name != signature.input_name:
        raise RequestError(f"There is no input {given.name[:80]!r}; the model has {signature.input_name!r}.")
    if given.datatype != "FP32":
        raise RequestError(f"Input {given.name!r} has datatype {given.datatype!r}; the model takes 'FP32'.")
    if given.shape[1:] != [3, size, size] or not 1 <= given.shape[0] <= signature.max_batch:
        raise RequestError(
            f"Input {given.name!r} has shape {given.shape}; the model takes [n, 3, {size}, {size}] with n from 1 to "
            f"{signature.max_batch}."
        )
    return given.shape[0]


def _from_bytes(given: RequestInput, rest: memoryview) -> NDArray[np.float32]:
    size = given.parameters.binary_data_size
    if size is None:
        raise RequestError(f"Input {given.name!r} has neither data nor binary_data_size.")
    if size != len(rest):
        raise RequestError(f"binary_data_size is {size}, and {len(rest)} bytes follow the header.")
    if size != _ITEM * math.prod(given.shape):
        raise RequestError(
            f"binary_data_size is {size}; shape {given.shape} of FP32 takes {_ITEM * math.prod(given.shape)} bytes."
        )
    return np.frombuffer(rest, "<f4")


def _from_json(given: RequestInput, rest: memoryview) -> NDArray[np.float32]:
    if given.parameters.binary_data_size is not None or len(rest):
        raise RequestError(f"Input {given.name!r} has data as JSON and as bytes.")
    values = _flat(given)
    if len(values) != math.prod(given.shape) or not set(map(type, values)) <= {int, float}:
        raise RequestError(
            f"The data of input {given.name!r} has {len(values)} elements; shape {given.shape} takes "
            f"{math.prod(given.shape)} numbers."
        )
    try:
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(np.float32)
    except OverflowError:
        raise RequestError(f"The data of input {given.name!r} holds a number beyond float32.") from None


def _flat(given: RequestInput) -> list[Any]:
    """JSON data in row-major order: flat as it is, or nested exactly like the shape; both are in use."""
    values = given.data
    if not isinstance(values, list):
        raise RequestError(f"The data of input {given.name!r} is not an array.")
    if not (values and isinstance(values[0], list)):
        return values
    count = given.shape[0]
    for extent in given.shape[1:]:
        if len(values) != count or not all(isinstance(row, list) and len(row) == extent for row in values):
            raise RequestError(f"The data of input {given.name!r} is nested otherwise than its shape {given.shape}.")
        values = list(itertools.chain.from_iterable(values))
        count *= extent
    return values


def _shaped(flat: NDArray[np.float32], count: int, signature: Signature) -> NDArray[np.float32]:
    images = flat.reshape(count, 3, signature.image_size, signature.image_size)
    # The tensor begins wherever the header ended; onnxruntime is entitled to aligned memory of its own byte order.
    aligned = np.require(images, np.float32, ["C", "A"])
    if not np.isfinite(aligned).all():
        raise RequestError(f"Input {signature.input_name!r} holds NaN or infinity.")
    return aligned


def write_response(
    asked: InferRequest, logits: NDArray[np.float32], signature: Signature, *, model: str, version: str
) -> tuple[bytes, int | None]:
    """(body, header length or None) of the answer: JSON, or JSON followed by raw tensors."""
    wanted = asked.outputs or [RequestOutput(name=signature.output_name)]
    outputs, blobs = [], []
    for output in wanted:
        binary = output.parameters.binary_data
        if binary is None:
            binary = asked.parameters.binary_data_output
        described, blob = _output(output, logits, signature, binary=binary)
        outputs.append(described)
        blobs.append(blob)
    header = {"model_name": model, "model_version": version, "outputs": outputs}
    if asked.id is not None:
        header = {"id": asked.id, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    return (b"".join([text, *blobs]), len(text)) if any(blobs) else (text, None)


def _output(
    output: RequestOutput, logits: NDArray[np.float32], signature: Signature, *, binary: bool
) -> tuple[dict[str, Any], bytes]:
    top = output.parameters.classification
    if top == 0:
        described = {"name": output.name, "datatype": "FP32", "shape": list(logits.shape)}
        if not binary:
            return {**described, "data": logits.reshape(-1).tolist()}, b""
        blob = logits.astype("<f4", copy=False).tobytes()
    else:
        words = [word for row in logits for word in classes_of(row, min(top, row.size), signature.classes)]
        shape = [len(logits), min(top, logits.shape[1])]
        described = {"name": output.name, "datatype": "BYTES", "shape": shape}
        if not binary:
            return {**described, "data": words}, b""
        encoded = [word.encode() for word in words]
        blob = b"".join(len(word).to_bytes(4, "little") + word for word in encoded)
    return {**described, "parameters": {"binary_data_size": len(blob)}}, blob


def ranked(row: NDArray[np.float32], top: int) -> list[int]:
    """Indices of the ``top`` largest values of (K,), best first; ties in index order."""
    return [int(index) for index in np.argsort(-row, kind="stable")[:top]]


def classes_of(row: NDArray[np.float32], top: int, classes: tuple[str, ...]) -> list[str]:
    """``score:index:label`` for the ``top`` largest of (K,) logits, as Triton's classification extension has it."""
    return [f"{row[index]:f}:{index}:{classes[index]}" for index in ranked(row, top)]
