"""Fold, export, verify and package distilled image classifiers.

Importing this package costs nothing: torch, onnx and onnxruntime are imported by the functions that need them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdexport.api import build, fuse, gate, load

__version__ = "0.1.0"
__all__ = ["__version__", "build", "fuse", "gate", "load"]


def __getattr__(name: str) -> Any:
    import importlib

    if name in ("load", "fuse"):
        return getattr(importlib.import_module("kdexport.api"), name)
    if name in ("build", "gate"):
        # These packages can be called.
        return importlib.import_module(f"kdexport.{name}")
    raise AttributeError(f"module 'kdexport' has no attribute {name!r}")
