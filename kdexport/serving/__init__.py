"""The server behind `kdexport serve`: Open Inference Protocol v2 and images over HTTP, in front of onnxruntime."""
