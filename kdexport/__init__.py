"""Fold, export, verify and package distilled image classifiers.

Importing this package costs nothing: torch, onnx and onnxruntime are imported by the functions that need them.
"""

__version__ = "0.1.0"
