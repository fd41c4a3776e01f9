"""A bundle as an MLServer runtime: FP32 tensors, or JPEGs as base64 in a BYTES tensor."""

import base64
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from kdexport.data.preprocessing import Preprocessing, decode


class OnnxClassifier(MLModel):  # type: ignore[misc]
    """One session with one thread, like the other arms."""

    async def load(self) -> bool:
        bundle = Path(self.settings.parameters.uri)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(bundle / "model.onnx")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        student = json.loads((bundle / "manifest.json").read_text())["student"]
        self._preprocessing = Preprocessing.from_json(student["preprocessing"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (given,) = payload.inputs
        if given.datatype == "BYTES":
            data = base64.b64decode(given.data[0])
            images = self._preprocessing.normalise(self._preprocessing.pixels(decode(data, "upload"))[np.newaxis])
        else:
            images = NumpyCodec.decode_input(given).astype(np.float32)
        logits = self._session.run(None, {"input": images})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])
