"""A bundle behind LitServe: litserve_server.py BUNDLE tensor|image PORT."""

import json
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime as ort
from fastapi import Request

from kdexport.data.preprocessing import Preprocessing, decode


class Classifier(litserve.LitAPI):  # type: ignore[misc]
    """One session with one thread, like the other arms."""

    def __init__(self, bundle: Path, mode: str) -> None:
        super().__init__()
        self._bundle, self._mode = bundle, mode

    def setup(self, device: str) -> None:
        del device
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(self._bundle / "model.onnx")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        student = json.loads((self._bundle / "manifest.json").read_text())["student"]
        self._preprocessing = Preprocessing.from_json(student["preprocessing"])

    def decode_request(self, request: Request) -> Any:
        data = request["request"].file.read()
        size = self._preprocessing.image_size
        if self._mode == "tensor":
            return np.frombuffer(data, np.float32).reshape(1, 3, size, size)
        return self._preprocessing.normalise(self._preprocessing.pixels(decode(data, "upload"))[np.newaxis])

    def predict(self, images: Any) -> Any:
        return self._session.run(None, {"input": images})[0]

    def encode_response(self, logits: Any) -> Any:
        return {"class": int(logits.argmax()), "logit": float(logits.max())}


if __name__ == "__main__":
    api = Classifier(Path(sys.argv[1]), sys.argv[2])
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[3]), generate_client_file=False, log_level="warning")
