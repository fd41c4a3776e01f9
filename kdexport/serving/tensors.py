"""Tensors on the wire: raw little-endian bytes or JSON numbers in, logits or classes out."""

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.serving.errors import RequestError
from kdexport.serving.limits import Limits
from kdexport.serving.protocol import InferRequest, RequestInput, RequestOutput, parse_header, require_answerable

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
