"""The least that answers the same bytes: least_server.py BUNDLE PORT.

A protocol on the event loop that finds the tensor in a request by its length, runs the model and writes the response:
no parser, no checks, no deadlines, no statistics. No server can be faster in this language, on this loop.
"""

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class Least(asyncio.Protocol):
    """One connection; all of them share ``session``."""

    def __init__(self, session: ort.InferenceSession, size: int, name: str) -> None:
        self._run, self._shape, self._name = session.run, (1, 3, size, size), name
        self._bytes = 12 * size * size
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # That of uvloop is a transport without being one of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n") + 4
        if self._data.startswith(b"GET"):
            self._data = b""
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        # A client sends its next request after the response, and the tensor is the end of one.
        length = _LENGTH.search(self._data)
        if end < 4 or length is None or len(self._data) < end + int(length[1]):
            return
        start = len(self._data) - self._bytes
        images = np.frombuffer(self._data, np.float32, self._bytes // 4, start).astype(np.float32)
        self._data = b""
        (logits,) = self._run(["logits"], {"input": images.reshape(self._shape)})
        described = {
            "name": "logits", "datatype": "FP32", "shape": list(logits.shape),
            "parameters": {"binary_data_size": logits.nbytes},
        }  # fmt: skip
        text = json.dumps({"model_name": self._name, "model_version": "1", "outputs": [described]}).encode()
        head = (
            f"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ninference-header-content-length: {len(text)}"
            f"\r\ncontent-length: {len(text) + logits.nbytes}\r\n\r\n"
        )
        self._transport.write(head.encode() + text + logits.tobytes())


async def serve(bundle: Path, port: int) -> None:
    """Answer until the process is ended."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    size = json.loads((bundle / "manifest.json").read_text())["student"]["preprocessing"]["image_size"]
    server = await asyncio.get_running_loop().create_server(
        lambda: Least(session, size, bundle.name), "127.0.0.1", port
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
