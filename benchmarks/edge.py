"""Edge targets on this CPU: latency relative to onnx-fp32, size and build time, one image, one thread.

python benchmarks/edge.py --rounds 20

Students with random weights and a hundred classes, folded: neither latency nor size depends on the weights. int8 is
calibrated on noise. A target that this machine cannot run in its own precision has a size and no latency. ``CPU s`` is
the processor time of a build with the processes that it starts: on a busy machine it says what the seconds would be on
a quiet one. With ``--rounds 0`` nothing is timed but the builds.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from targets import Logits, arms_of, exported, interleaved

from kdexport.backends.base import ONNX_FILE, CompileRequest
from kdexport.core.digests import tool_versions
from kdexport.graph.precision import cast_to_fp16
from kdexport.graph.quantize import parse_form, quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.targets import Target, parse_targets

STUDENTS = ("mobilenetv2", "mobilenetv3", "shufflenetv2")
TARGETS = ("onnx-fp32", "onnx-int8", "ncnn-fp32", "ncnn-fp16", "ncnn-int8")
#: Files beside the artifact that the device needs too.
_PARTS = (".bin", ".param", ".pte", ".tflite", ".mlmodel", ".onnx")


def processor_seconds() -> float:
    """The processor time of this process and of those that it started and that ended."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def built(target: Target, source: Path, folder: Path, size: int) -> tuple[float, float]:
    """Write the files of ``target`` into ``folder``; returns the seconds that casting and compiling took, and those of
    processors.
    """
    started, worked = time.perf_counter(), processor_seconds()
    path = folder / ONNX_FILE
    if target.form.startswith("int8"):
        noise = np.random.default_rng(1).normal(size=(8, 3, size, size)).astype(np.float32)
        calibrate(source, [noise], folder / "ranges.json", method="minmax", percentile=99.99)
        quantize(source, folder / "ranges.json", path, form=parse_form(target.form))
    elif target.form == "fp16":
        cast_to_fp16(source, path)
    else:
        path.write_bytes(source.read_bytes())
    if target.compiles:
        target.runtime.compile(
            CompileRequest(onnx=path, folder=folder, precision=target.precision, image_size=size, batches=(1, 1, 1))
        )
    return time.perf_counter() - started, processor_seconds() - worked


def shipped_bytes(target: Target, folder: Path) -> int:
    """The bytes of the files that a device needs."""
    if not target.compiles:
        return (folder / ONNX_FILE).stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in _PARTS and path.name != ONNX_FILE)


def measure(name: str, size: int, arguments: argparse.Namespace, root: Path) -> None:
    """One table: the targets of a student."""
    source = exported(name, size, root / f"{name}.onnx")
    runs: dict[str, Logits] = {}
    facts: dict[str, tuple[float, float, int]] = {}
    for target in parse_targets(arguments.targets.split(",")):
        folder = root / f"{name}-{target}"
        folder.mkdir()
        facts[str(target)] = (*built(target, source, folder, size), shipped_bytes(target, folder))
        if arguments.rounds and target.not_executable() is None:
            artifact = folder / target.artifact
            runs[str(target)] = target.runtime.open(artifact, target.precision, device="cpu", threads=1).logits
    found = interleaved(arms_of(runs, size), "onnx-fp32", arguments.rounds, arguments.block) if runs else {}
    print(f"\n{name}, {size}x{size}\n\n| target | MB | build s | CPU s | ratio | 95 % interval | median ms |")
    print("|---|---|---|---|---|---|---|")
    absent = "not run here" if arguments.rounds else "not timed"
    for label, (seconds, worked, total) in facts.items():
        ratio, low, high, ms = found.get(label, (0, 0, 0, 0))
        cells = f"{ratio:.2f} | {low:.2f} to {high:.2f} | {ms:.2f}" if label in found else f"{absent} | |"
        print(f"| {label} | {total / 1e6:.2f} | {seconds:.1f} | {worked:.1f} | {cells} |", flush=True)
    seconds, worked, _ = map(sum, zip(*facts.values(), strict=True))
    print(f"\nAll of them: {seconds:.0f} s, {worked:.0f} CPU s")


def main() -> None:
    """Print a table for each student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=float, default=0.2, help="seconds of one block of runs")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--students", default=",".join(STUDENTS))
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    print(
        json.dumps(
            {
                "python": platform.python_version(),
                **tool_versions("onnxruntime-gpu", "ncnn", "pnnx", "executorch", "ai-edge-litert", "torch"),
            }
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.students.split(","):
            measure(name, arguments.size, arguments, Path(folder))


if __name__ == "__main__":
    main()
