"""Serving verified bundles: over HTTP behind onnxruntime, or as a Triton model repository."""
