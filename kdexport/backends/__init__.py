"""What runs or compiles a graph: torch, onnxruntime, TensorRT."""
