"""ONNX graphs: export, precision casts, quantization, audit, and node-by-node comparison."""
