"""ONNX graphs: export, precision casts, and the audit of what is in them."""
