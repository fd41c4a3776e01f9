"""Packages that not every machine has."""

import importlib.util

import pytest


def require_openvino() -> None:
    """Skip where OpenVINO is absent; finding it must not import it, which would report the import over the network."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed", allow_module_level=True)


def require_ncnn() -> None:
    """Skip where ncnn or its converter is absent."""
    for name in ("ncnn", "pnnx"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


def require_litert() -> None:
    """Skip where LiteRT's interpreter is absent."""
    if importlib.util.find_spec("ai_edge_litert") is None:
        pytest.skip("ai-edge-litert is not installed", allow_module_level=True)


def require_coremltools() -> None:
    """Skip where coremltools is absent."""
    if importlib.util.find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed", allow_module_level=True)


def require_executorch() -> None:
    """Skip where ExecuTorch or what registers its int8 operators is absent."""
    for name in ("executorch", "torchao"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
