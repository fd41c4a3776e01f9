"""Students and graphs that several test packages share: exported once, because an export takes seconds."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from kdexport.graph.export import export_onnx
from kdexport.graph.precision import cast_to_fp16
from kdexport.reparam.blocks import attach_branches
from kdexport.reparam.fold_student import fuse_student
from kdexport.reparam.spec import BranchSpec
from kdexport.students import STUDENTS, Student
from tests.kdexport.hostile_values import randomize

SIZE, CLASSES, OPSET = 32, 10, 20
VARIANTS: dict[str, BranchSpec | None] = {
    "plain": None,
    "R1": BranchSpec(placement="R1", num_branches=4),
    "R2": BranchSpec(placement="R2", num_branches=3, adapter_channels=24),
}
#: Branches at every stage: exported by name where they are needed, not in every test of a variant.
MULTI = BranchSpec(placement="R1", num_branches=3, layers="multi")
METADATA = {
    "classes": ["<b>", "\u00e9t\u00e9", 'a "quoted" | name'],
    "version": "9.8.7",
    "nested": {"z": None, "a": [1.5]},
}

_FOLDER = tempfile.TemporaryDirectory()


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A folded student and its float32 file."""

    fused: nn.Module
    path: Path
    weights: dict[str, NDArray[np.float32]]


@functools.cache
def unfused(variant: str, name: str = "mobilenetv2") -> Student:
    """A student in evaluation mode whose batch norms are no identities."""
    student = STUDENTS.build(name, num_classes=CLASSES, image_size=SIZE)
    branches = MULTI if variant == "multi" else VARIANTS[variant]
    if branches is not None:
        attach_branches(student, branches)
    return cast(Student, randomize(student, seed=21).eval())


def write(variant: str, path: Path, name: str = "mobilenetv2") -> nn.Module:
    """Fold and export ``variant`` to ``path``; returns the folded module."""
    module = fuse_student(unfused(variant, name)).module
    export_onnx(module, path, image_size=SIZE, opset=OPSET, metadata=METADATA)
    return module


@functools.cache
def exported(variant: str, name: str = "mobilenetv2") -> Exported:
    """The folded ``variant``, exported once per test run."""
    path = Path(_FOLDER.name) / f"{name}-{variant}.onnx"
    module = write(variant, path, name)
    return Exported(module, path, {name: tensor.numpy() for name, tensor in module.state_dict().items()})


@functools.cache
def exported_fp16(variant: str, name: str = "mobilenetv2") -> Path:
    """The float16 form of the folded ``variant``."""
    path = Path(_FOLDER.name) / f"{name}-{variant}-fp16.onnx"
    cast_to_fp16(exported(variant, name).path, path)
    return path


@functools.cache
def exported_unfused(variant: str) -> Path:
    """The file of ``variant`` with its branches in place."""
    path = Path(_FOLDER.name) / f"{variant}-unfused.onnx"
    export_onnx(unfused(variant), path, image_size=SIZE, opset=OPSET, metadata={})
    return path


def small_weights(seed: int = 3, *, classes: int = 7) -> dict[str, NDArray[np.float32]]:
    """Weights for ``small_graph``."""
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (9, 3, 3, 3), "conv.bias": (9,), "linear.weight": (classes, 9), "linear.bias": (classes,)}
    return {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def small_graph(path: Path, weights: dict[str, NDArray[np.float32]], *, size: int = 16) -> Path:
    """A float32 convolution, ReLU, pooling and linear layer, written node by node without the exporter."""
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "linear.weight", "linear.bias"], ["logits"], "linear", transB=1),
    ]
    classes = weights["linear.bias"].size
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


def images(count: int, seed: int = 0, *, size: int = SIZE) -> NDArray[np.float32]:
    """Seeded noise, off centre, (N,3,S,S)."""
    noise = np.random.default_rng(seed).normal(0.3, 1.4, (count, 3, size, size))
    return noise.astype(np.float32)


def small_logits(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logits of ``small_graph`` with ``small_weights`` in float64, computed one shifted product at a time."""
    weights = {name: values.astype(np.float64) for name, values in small_weights().items()}
    n, _, height, width = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((n, 9, height, width)) + weights["conv.bias"][None, :, None, None]
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i : i + height, j : j + width]
            y += np.einsum("nchw,oc->nohw", shifted, weights["conv.weight"][:, :, i, j])
    pooled = np.maximum(y, 0).mean(axis=(2, 3))
    logits: NDArray[np.float64] = pooled @ weights["linear.weight"].T + weights["linear.bias"]
    return logits
