"""How often rung B would fail a correct fold: the error of folded float32 students in torch, onnxruntime and OpenVINO.

python benchmarks/rung_b.py --students 25
python benchmarks/rung_b.py --students 4 --in-order executorch
python benchmarks/rung_b.py --sensitivity runs/one/student --data folder:data/small
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdexport.backends.base import IN_ORDER, ONNX_FILE, CompileRequest
from kdexport.backends.openvino import load_openvino
from kdexport.backends.ort import load_model
from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.data.datasets import DatasetSpec, open_dataset, spread
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.export import export_onnx
from kdexport.reparam.blocks import BranchSpec, attach_branches
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import STUDENTS, Student
from kdexport.targets import parse_target
from kdexport.verify.parity import rung_b
from kdexport.verify.policy import Fp32Policy
from kdexport.verify.reference import make_probes, make_reference, run_exact, run_torch

SPECS = (
    BranchSpec(placement="R1", num_branches=4),
    BranchSpec(placement="R2", num_branches=2, adapter_channels=64),
)
PREPROCESSING = Preprocessing(image_size=40, resize=40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SIZE, EPS = 40, float(np.finfo(np.float32).eps)
Units = dict[str, float]


def briefly_trained(spec: BranchSpec, seed: int) -> Student:
    """A small student after four training steps, so that batch norms and weights differ from their initial values."""
    torch.manual_seed(seed)
    student = STUDENTS.build("mobilenetv2", num_classes=3, image_size=SIZE)
    attach_branches(student, spec)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for _ in range(4):
        images = torch.randn(24, 3, SIZE, SIZE) + torch.randn(24, 1, 1, 1)
        loss = nn.functional.cross_entropy(student(images), (images.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student.eval()


def rms(values: NDArray[np.float64]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def errors(student: Student, folder: Path) -> tuple[dict[str, float], Units]:
    """RMS error of the folded student by runtime, and the units in which it can be expressed."""
    fused = fuse_student(student).module
    images = torch.randn(35, 3, SIZE, SIZE).numpy()
    exact, added = run_exact(student, images)
    path = folder / "fused.onnx"
    export_onnx(fused, path, image_size=SIZE, opset=20, metadata={})
    runs: dict[str, Callable[[NDArray[np.float32]], NDArray[np.floating]]] = {
        "torch": lambda given: run_torch(fused, given),
        "onnxruntime": load_model(path).logits,
        "OpenVINO": load_openvino(path, precision="fp32").logits,
    }
    own = rms(run_torch(student, images) - exact)
    units = {
        "the unfused student's own error": own,
        "the same, at least one unit of the logits": max(own, EPS * rms(exact)),
        "the same, at least one unit of the summed products": max(own, EPS * rms(added)),
    }
    return {name: rms(run(images).astype(np.float64) - exact) for name, run in runs.items()}, units


def in_order_errors(student: Student, name: str, folder: Path) -> dict[str, float]:
    """Rung B's two measures of an engine that adds in order from the bias, in both units."""
    fused = fuse_student(student).module
    pixels = np.random.default_rng(7).integers(0, 256, (24, SIZE, SIZE, 3), dtype=np.uint8)
    probes = make_probes(pixels, PREPROCESSING)
    reference = make_reference(student, fused, probes, forms=(IN_ORDER,))
    path, engine = folder / ONNX_FILE, parse_target(f"{name}-fp32").runtime
    export_onnx(fused, path, image_size=SIZE, opset=20, metadata={})
    engine.compile(CompileRequest(onnx=path, folder=folder, precision="fp32", image_size=SIZE, batches=(1, 1, 1)))
    logits = engine.open(folder / engine.artifact, "fp32", threads=1).run(probes.images, (1,))
    found = {}
    for form, unit in (("fp32", "that of the other engines"), (IN_ORDER, "at least the error of sums in order")):
        for check in rung_b("", logits, reference, probes, Fp32Policy(), form=form):
            found[f"{check.name} | {unit} | {check.allowed:g}"] = check.measured
    return found


def in_order_table(name: str, count: int, folder: Path) -> None:
    """Print rung B of an engine that adds in order, of ``count`` seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(count):
        for spec in SPECS:
            for measure, value in in_order_errors(briefly_trained(spec, seed), name, folder).items():
                found[measure].append(value)
    print("| measure | unit | allowed | students | median | largest | above |\n|---|---|---|---|---|---|---|")
    for measure, values in found.items():
        above = sum(value > float(measure.rpartition("| ")[2]) for value in values)
        print(f"| {measure} | {len(values)} | {np.median(values):.2f} | {max(values):.2f} | {above} |")


def sensitivity(checkpoint: Path, data: str) -> None:
    """Print what rung B measures on 50 images if the largest weight of one layer is off by 1 %, for every layer."""
    trained = open_checkpoint(checkpoint)
    student, fused = load_student(trained), fuse_student(load_student(trained)).module
    test, preprocessing = open_dataset(DatasetSpec(name=data), "test"), trained.spec.preprocessing
    images = preprocessing.normalise(test.read(spread(len(test), 50), preprocessing))
    exact, added = run_exact(student, images)
    unit = max(rms(run_torch(student, images) - exact), EPS * rms(added))
    found = []
    for layer in fused.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weights = layer.weight.data.view(-1)
            place = int(weights.abs().argmax())
            weights[place] *= 1.01
            found.append(rms(run_torch(fused, images) - exact) / unit)
            weights[place] /= 1.01
    caught = sum(value > 2 for value in found)
    print(f"{caught} of {len(found)} layers above 2: median {np.median(found):.0f}, smallest {min(found):.1f}")


def main() -> None:
    """Read the arguments and print a Markdown table, or the result of ``sensitivity``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=25)
    parser.add_argument("--sensitivity", type=Path, help="a student folder")
    parser.add_argument("--data", help="with --sensitivity: digits or folder:DIR")
    parser.add_argument("--in-order", help="a backend that adds in order: executorch or litert")
    arguments = parser.parse_args()
    if arguments.in_order:
        with tempfile.TemporaryDirectory() as folder:
            in_order_table(arguments.in_order, arguments.students, Path(folder))
        return
    if arguments.sensitivity is not None:
        sensitivity(arguments.sensitivity, arguments.data)
        return
    count = arguments.students
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            for spec in SPECS:
                measured, units = errors(briefly_trained(spec, seed), Path(folder))
                for runtime, error in measured.items():
                    for unit, value in units.items():
                        found[runtime, unit].append(error / value)
    print("| runtime | unit of comparison | students | median | largest | above 2 |\n|---|---|---|---|---|---|")
    for (runtime, unit), values in found.items():
        above = sum(value > 2 for value in values)
        print(f"| {runtime} | {unit} | {len(values)} | {np.median(values):.2f} | {max(values):.2f} | {above} |")


if __name__ == "__main__":
    main()
