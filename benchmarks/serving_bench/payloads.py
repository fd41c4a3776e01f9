"""Request bodies in the form of each server: one image as a binary FP32 tensor, as JSON and as a JPEG."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BOUNDARY = "kdexport-benchmark"


@dataclass(frozen=True, slots=True)
class Payload:
    """Path, headers and body of a request."""

    kind: str
    path: str
    headers: dict[str, str]
    body: bytes


def tensor(image_size: int) -> NDArray[np.float32]:
    """One normalised image (1,3,S,S)."""
    return np.random.default_rng(1).normal(0, 1, (1, 3, image_size, image_size)).astype(np.float32)


def photo(width: int, height: int) -> bytes:
    """A JPEG with as much detail as a photograph, about 0.27 bytes per pixel."""
    rng = np.random.default_rng(2)
    layers = np.zeros((height, width, 3))
    for step, strength in ((64, 70), (16, 40), (4, 18), (1, 9)):
        small = rng.normal(0, strength, (height // step + 2, width // step + 2, 3))
        layers += small.repeat(step, 0).repeat(step, 1)[:height, :width]
    stream = io.BytesIO()
    Image.fromarray(np.clip(layers + 128, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def oip_binary(model: str, image_size: int) -> Payload:
    """Open Inference Protocol, with binary input and output."""
    values = tensor(image_size)
    header = {
        "inputs": [
            {
                "name": "input", "shape": list(values.shape), "datatype": "FP32",
                "parameters": {"binary_data_size": values.nbytes},
            }
        ],
        "parameters": {"binary_data_output": True},
    }  # fmt: skip
    text = json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return Payload("FP32 binary", f"/v2/models/{model}/infer", headers, text + values.tobytes())


def oip_json(model: str, image_size: int) -> Payload:
    """Open Inference Protocol, with input and output as JSON."""
    values = tensor(image_size)
    entry = {"name": "input", "shape": list(values.shape), "datatype": "FP32"}
    body = json.dumps({"inputs": [{**entry, "data": [round(float(value), 5) for value in values.ravel()]}]})
    return Payload("FP32 JSON", f"/v2/models/{model}/infer", {"Content-Type": "application/json"}, body.encode())


def oip_base64_jpeg(model: str, image_size: int) -> Payload:
    """A JPEG as base64 in a BYTES tensor, for a server that reads only JSON."""
    data = base64.b64encode(jpeg(image_size)).decode()
    entry = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [data]}
    body = json.dumps({"inputs": [entry]}).encode()
    return Payload("JPEG", f"/v2/models/{model}/infer", {"Content-Type": "application/json"}, body)


def jpeg(image_size: int) -> bytes:
    """A typical upload for a student of this size."""
    return photo(640, 480) if image_size > 64 else photo(image_size, image_size)


def raw_jpeg(path: str, image_size: int) -> Payload:
    """The image as the body."""
    return Payload("JPEG", path, {"Content-Type": "image/jpeg"}, jpeg(image_size))


def multipart(kind: str, path: str, data: bytes) -> Payload:
    """A form with one file, ``request``."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="request"; filename="x"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return Payload(kind, path, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body)


#: The requests to kdexport by kind: (model, image size) to payload.
KDEXPORT: dict[str, Callable[[str, int], Payload]] = {
    "FP32 binary": oip_binary,
    "FP32 JSON": oip_json,
    "JPEG": lambda model, size: raw_jpeg(f"/v1/classify?model={model}", size),
}
