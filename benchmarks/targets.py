"""The CPU targets: latency relative to onnx-fp32, top-1 on CIFAR-100, and build time.

python benchmarks/targets.py latency
python benchmarks/targets.py branches
python benchmarks/targets.py accuracy --checkpoint runs/one/student --data data/cifar100
python benchmarks/targets.py build --config FILE --checkpoint runs/one/student --data data/cifar100
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from merge import briefly_trained
from numpy.typing import NDArray

from kdexport.backends.openvino import load_openvino
from kdexport.backends.ort import load_model
from kdexport.checkpoint import load_student, open_checkpoint
from kdexport.data.datasets import DatasetSpec, open_dataset
from kdexport.data.preprocessing import Preprocessing
from kdexport.graph.export import export_onnx
from kdexport.graph.precision import cast_to_bf16
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import METHODS, Method, calibrate
from kdexport.reparam.blocks import BranchSpec
from kdexport.reparam.fold_student import fuse_student
from kdexport.students import STUDENTS
from kdexport.targets import parse_target

OPSET, CLASSES = 20, 100
TARGETS = "onnx-fp32,onnx-int8,openvino-fp32,openvino-int8"
Arm = Callable[[], object]
Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def interleaved(arms: dict[str, Arm], reference: str, rounds: int, block_s: float) -> dict[str, tuple[float, ...]]:
    """Per arm: ratio to ``reference`` (median over rounds), its 95 % bootstrap interval, and median milliseconds.

    Every round times a block of each arm in an order of its own; a block is its median run.
    """
    rng = np.random.default_rng(7)
    runs = {name: max(3, int(block_s / max(_once(arm), 1e-6))) for name, arm in arms.items()}
    rows: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in rng.permutation(list(arms)):
            rows[name].append(float(np.median([_once(arms[name]) for _ in range(runs[name])])))
    base = np.log(rows[reference])
    answer = {}
    for name, times in rows.items():
        ratios = np.log(times) - base
        draws = np.median(rng.choice(ratios, (4000, rounds)), axis=1)
        low, high = np.quantile(draws, [0.025, 0.975])
        answer[name] = (*np.exp([np.median(ratios), low, high]).tolist(), float(np.median(times)) * 1e3)
    return answer


def _once(arm: Arm) -> float:
    started = time.perf_counter()
    arm()
    return time.perf_counter() - started


def show(title: str, found: dict[str, tuple[float, ...]]) -> None:
    """A Markdown table of ``interleaved``."""
    print(f"\n{title}\n\n| what | ratio | 95 % interval | median ms |\n|---|---|---|---|")
    for name, (ratio, low, high, ms) in found.items():
        print(f"| {name} | {ratio:.3f} | {low:.3f} to {high:.3f} | {ms:.3f} |", flush=True)


def quantized(source: Path, batches: Iterable[NDArray[np.float32]], *, bits: int, method: Method = "minmax") -> Path:
    """``source`` quantized in the form for CPUs, calibrated on ``batches``."""
    path = source.with_name(f"{source.stem}-{method}-{bits}.onnx")
    ranges = path.with_suffix(".json")
    calibrate(source, batches, ranges, method=method, percentile=99.99)
    quantize(source, ranges, path, form="int8-u8", weight_bits=bits)
    return path


def cpu_targets(source: Path, image_size: int, threads: int) -> dict[str, Logits]:
    """The CPU targets of a float32 file by name; int8 is calibrated on noise, which does not change its latency."""
    noise = np.random.default_rng(1).normal(size=(16, 3, image_size, image_size)).astype(np.float32)
    seven, eight = (quantized(source, [noise], bits=bits) for bits in (7, 8))
    models: dict[str, Logits] = {
        "onnx-fp32": load_model(source, threads=threads).logits,
        "onnx-int8, 7-bit weights": load_model(seven, threads=threads).logits,
        "onnx-int8, 8-bit weights": load_model(eight, threads=threads).logits,
        "openvino-fp32": load_openvino(source, precision="fp32", threads=threads).logits,
        "openvino-int8, 7-bit weights": load_openvino(seven, precision="int8", threads=threads).logits,
    }
    if parse_target("openvino-bf16").unavailable() is None:
        narrow = source.with_name(f"{source.stem}-bf16.onnx")
        cast_to_bf16(source, narrow)
        models["openvino-bf16"] = load_openvino(narrow, precision="bf16", threads=threads).logits
    return models


def exported(name: str, image_size: int, path: Path) -> Path:
    """A folded student with random weights: latency does not depend on them."""
    torch.manual_seed(0)
    student = STUDENTS.build(name, num_classes=CLASSES, image_size=image_size).eval()
    export_onnx(fuse_student(student).module, path, image_size=image_size, opset=OPSET, metadata={})
    return path


def latency(arguments: argparse.Namespace) -> None:
    """MobileNetV2 at 224 and the students at 32, batch 1."""
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("mobilenetv2", 224), ("mobilenetv2", 32), ("resnet18", 32)):
            source = exported(name, size, Path(folder) / f"{name}-{size}.onnx")
            arms = arms_of(cpu_targets(source, size, arguments.threads), size)
            found = interleaved(arms, "onnx-fp32", arguments.rounds, arguments.block)
            show(f"{name}, {size}x{size}, batch 1, {arguments.threads} thread(s)", found)


def arms_of(models: dict[str, Logits], image_size: int) -> dict[str, Arm]:
    """One image through each model."""
    image = np.random.default_rng(2).normal(size=(1, 3, image_size, image_size)).astype(np.float32)
    return {name: (lambda run=run: run(image)) for name, run in models.items()}  # type: ignore[misc]


def branches(arguments: argparse.Namespace) -> None:
    """The folded student against the plain and the branched one, with onnxruntime's graph optimisation off and on."""
    spec = BranchSpec(placement="R1", num_branches=4, layers="multi")
    unfused = briefly_trained("mobilenetv2", spec)
    modules: dict[str, torch.nn.Module] = {
        "fused": fuse_student(unfused).module,
        "plain": briefly_trained("mobilenetv2", None),
        "unfused, m = 4": unfused,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in modules}
        for name, module in modules.items():
            export_onnx(module, paths[name], image_size=32, opset=OPSET, metadata={})
        for optimise in (False, True):
            models: dict[str, Logits] = {
                name: load_model(path, threads=arguments.threads, optimise=optimise).logits
                for name, path in paths.items()
            }
            found = interleaved(arms_of(models, 32), "fused", arguments.rounds, arguments.block)
            show(f"mobilenetv2, 32x32, graph optimisation {'on' if optimise else 'off'}: time / that of fused", found)


def accuracy(arguments: argparse.Namespace) -> None:
    """Top-1 on the whole test split, calibrated on 256 images of the training split."""
    trained = open_checkpoint(arguments.checkpoint)
    spec, data = trained.spec, DatasetSpec(name=arguments.dataset, root=arguments.data)
    test, train = open_dataset(data, "test"), open_dataset(data, "train")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "fp32.onnx"
        module = fuse_student(load_student(trained)).module
        export_onnx(module, source, image_size=spec.image_size, opset=OPSET, metadata={})
        chosen = [int(i) for i in np.linspace(0, len(train) - 1, 256).round()]
        images = spec.preprocessing.normalise(train.read(chosen, spec.preprocessing))
        models = {"onnx-fp32": load_model(source).logits}
        for method in METHODS:
            for bits in (7, 8):
                path = quantized(source, np.array_split(images, 16), bits=bits, method=method)
                models[f"onnx-int8, {method}, {bits}-bit weights"] = load_model(path).logits
                models[f"openvino-int8, {method}, {bits}-bit weights"] = load_openvino(path, precision="int8").logits
        found = {name: np.empty(len(test), np.int64) for name in models}
        for indices, batch in in_batches(test.read, len(test), spec.preprocessing):
            for name, run in models.items():
                found[name][indices] = run(batch).argmax(1)
    base = found["onnx-fp32"]
    print(f"\n| target | top-1 of {len(test)} | points lost | predictions that differ |\n|---|---|---|---|")
    for name, labels in found.items():
        right = float((labels == test.labels).mean())
        lost = float((base == test.labels).mean()) - right
        print(f"| {name} | {right:.2%} | {lost * 100:+.2f} | {int((labels != base).sum())} |")


def in_batches(
    read: Callable[[list[int], Preprocessing], NDArray[np.uint8]], count: int, preprocessing: Preprocessing
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """Indices and normalised images in batches of 250."""
    for start in range(0, count, 250):
        indices = list(range(start, min(start + 250, count)))
        yield indices, preprocessing.normalise(read(indices, preprocessing))


def build(arguments: argparse.Namespace) -> None:
    """Wall time of one command that builds and verifies every CPU target of a trained student in a new workspace."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kdexport", "build", "--config", str(arguments.config), "--target", TARGETS]
        command += ["--checkpoint", str(arguments.checkpoint), "--data", arguments.data]
        command += ["--workspace", f"{folder}/ws", "--out", f"{folder}/out"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"{TARGETS}: {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Read the arguments and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"latency": latency, "branches": branches, "accuracy": accuracy, "build": build}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--block", type=float, default=0.05, help="seconds of one block of runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--data", default="")
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()
