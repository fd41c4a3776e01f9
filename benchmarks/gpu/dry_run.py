"""Every shipped method takes its first steps on a CUDA device that runs no kernel; counts what a step does there.

    make gpu-dry
    python benchmarks/gpu/dry_run.py --device build/null-device --to docs/results/training.md [--methods kd,average]
                                     [--keep build/gpu-dry]

Each method trains by the command line, in the loop and as a CUDA graph, in a process of its own. Numbers mean nothing
on that device, so the checks of losses, weights and predictions are switched off; placement, precision, capture and
waiting are those of a GPU. ``--keep`` stores the counts of a method when it is done; a later call takes those of the
same code and the same torch, so that a run that was stopped continues.
"""

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from unchecked import unchecked

RECIPE, TEACHER, CLASSES, SIDE = "cifar100/resnet32x4-shufflenetv1", "resnet32x4", 100, 32
#: The order is that of the counters in null_device/runtime.cpp.
COUNTS = ("operations", "captured", "graph_launches", "synchronisations", "blocking_copies", "allocations")
#: Training images of each class: an epoch of 32 steps of 64 images, four whole graphs, of which the first 8 steps do
#: not count.
IMAGES, BATCH, WARM_UP = 21, 64, 8
#: The goals of a step that is part of a CUDA graph.
MOST_OPERATIONS, MOST_WAITS, GRAPHS = 900, 0, 1
HEADING = "## Operations of a step on CUDA"

#: What a step of a method does, by the name of a counter, for each form of the step.
Counts = dict[str, dict[str, float]]


def counts(runtime: ctypes.CDLL) -> dict[str, int]:
    values = (ctypes.c_uint64 * len(COUNTS))()
    runtime.null_cuda_counts(values)
    return dict(zip(COUNTS, values, strict=True))


def write_noise(root: Path) -> None:
    """Folders of noise of CIFAR's size, with as many classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("test", 2)):
        for label in range(CLASSES):
            folder = root / split / f"class{label:03}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def write_teacher(path: Path) -> None:
    from kdexport.checkpoint import save_tensors
    from training.teachers import TEACHERS

    torch.manual_seed(0)
    save_tensors(path, TEACHERS.build(TEACHER, num_classes=CLASSES, image_size=SIDE).state_dict())


def measured(method: str, work: Path) -> Counts:
    """What a step of ``method`` does in each form; this process is on the null device."""
    found = {}
    for form, capture in (("loop", "no"), ("graph", "yes")):
        found[form] = _trained(method, capture, work)
    return found


def _trained(method: str, capture: str, work: Path) -> dict[str, float]:
    from training.__main__ import app
    from training.runs import captured, loop
    from training.runs.watch import LossWatch

    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    per_step: dict[str, float] = {}
    graphs: list[float] = []
    capture_steps = captured._captured

    def counted(body: Any, pool: Any) -> Any:
        before = counts(runtime)["captured"]
        graph = capture_steps(body, pool)
        graphs.append((counts(runtime)["captured"] - before) / body.args[0])
        return graph

    class Counting(LossWatch):
        """Counts from the end of the warm-up to the last step."""

        def steps_done(self, count: int) -> None:
            super().steps_done(count)
            if self._steps == WARM_UP:
                self.before = counts(runtime)

        def means(self) -> tuple[tuple[str, ...], torch.Tensor]:
            after, steps = counts(runtime), self._steps - WARM_UP
            per_step.update({name: (after[name] - self.before[name]) / steps for name in COUNTS})
            return super().means()

    arguments = [
        *("train", "--recipe", f"{RECIPE}/{method}", "--teacher-checkpoint", str(work / "teacher.safetensors")),
        *("--out", str(work / f"{method.replace('/', '-')}-{capture}")),
    ]
    changes = {
        "data.name": f"folder:{work / 'data'}",
        "train.epochs": "1",
        "train.batch_size": str(BATCH),
        "train.milestones": "[]",
        "distiller.ramp_epochs": "0.5",
        "train.compile": "no",
        "train.capture": capture,
        "teacher.plausibility": "reported",
    }
    command = [*arguments, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]
    with unchecked(), patch.object(loop, "LossWatch", Counting), patch.object(captured, "_captured", counted):
        app(command, standalone_mode=False)
    return {**per_step, "in_graph": graphs[0] if graphs else 0.0}


def on_null_device(device: Path, method: str, work: Path) -> Counts | str:
    """``measured`` in a process on the null device; the end of its errors if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [str(device / "run"), sys.executable, __file__, "--one", method, "--work", str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return "\n".join(done.stderr.splitlines()[-12:])
    return dict(json.loads((work / f"{method}.json").read_text()))


def source_digest(root: Path = Path(__file__).parents[2]) -> str:
    """sha256 of the code that counts depend on, and of the version of torch."""
    folders = ("training", "kdexport", "benchmarks/gpu")
    files = sorted(
        path
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".toml", ".cpp") and "__pycache__" not in path.parts
    )
    found = hashlib.sha256(torch.__version__.encode())
    for path in files:
        found.update(f"\0{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


class Kept:
    """Counts of methods in files of ``folder``, for the code ``source``; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, source: str) -> None:
        self._folder, self._source = folder, source

    def read(self, method: str) -> Counts | None:
        """The counts of ``method``; None if there are none of this code."""
        if self._folder is None or not (self._folder / f"{method}.json").is_file():
            return None
        stored = json.loads((self._folder / f"{method}.json").read_text())
        return dict(stored["counts"]) if stored["source"] == self._source else None

    def write(self, method: str, counted: Counts) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{method}.json.partial"
            partial.write_text(json.dumps({"source": self._source, "counts": counted}))
            partial.replace(self._folder / f"{method}.json")


def operations(found: dict[str, float]) -> float:
    """The operations that a step puts on the device, in its graph or not."""
    return found["operations"] + found["in_graph"]


def waits(found: dict[str, float]) -> float:
    return found["synchronisations"] + found["blocking_copies"]


def page(results: dict[str, Counts]) -> str:
    """The section with the counts of each method, and whether they meet the goals."""
    rows = [
        f"| {method} | {operations(forms['loop']):.0f} | {waits(forms['loop']):g} | {operations(forms['graph']):.0f} "
        f"| {waits(forms['graph']):g} | {forms['graph']['graph_launches']:g} |"
        for method, forms in results.items()
    ]
    graphs = [forms["graph"] for forms in results.values()]
    most = max(map(operations, graphs))
    fewer = sum(operations(found) <= MOST_OPERATIONS for found in graphs)
    waited, started = max(map(waits, graphs)), {found["graph_launches"] for found in graphs}
    goals = (
        (
            f"operations of a step as a graph, at most {MOST_OPERATIONS}",
            f"{fewer} of {len(graphs)} methods, the largest has {most:.0f}",
            most <= MOST_OPERATIONS,
        ),
        (f"waiting for the device in a step, {MOST_WAITS} times", f"{waited:g}", waited <= MOST_WAITS),
        (
            f"graphs started by a step, at most {GRAPHS}",
            f"{max(started):g}",
            min(started) > 0 and max(started) <= GRAPHS,
        ),
    )
    verdicts = [f"| {goal} | {found} | {'met' if holds else 'missed'} |" for goal, found, holds in goals]
    return f"""{HEADING}

    make gpu-dry

Counted on a CUDA device that runs no kernel (benchmarks/gpu/null_device), not measured on a GPU:
{RECIPE} with each method through `kdexport train`, batch {BATCH}, bf16, not compiled,
torch {torch.__version__}. An operation is a kernel, a product, a convolution, a copy or a fill. *Loop* starts each of
them from Python (`train.capture = "no"`), *graph* starts those of several steps at once, and their number is divided by
that of the steps. Losses are sent to the host every eighth step, which is part of the count. The steps of the epoch
are a multiple of eight; other epochs end with one smaller graph.

| goal | found | |
|---|---|---|
{chr(10).join(verdicts)}

| method | loop: operations | waits | graph: operations | waits | graphs started |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=Path, default=Path("build/null-device"))
    parser.add_argument("--to", type=Path, help="write the counts as the last section of this page")
    parser.add_argument("--keep", type=Path, help="keep the counts of each method here and continue")
    parser.add_argument("--methods", default="", help="separated by commas; all of them without it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        (options.work / f"{options.one}.json").write_text(json.dumps(measured(options.one, options.work)))
        return
    from training.shipped_recipes import shipped_names

    methods = [name.removeprefix(f"{RECIPE}/") for name in shipped_names() if name.startswith(f"{RECIPE}/")]
    results: dict[str, Counts] = {}
    failed, kept = [], Kept(options.keep, source_digest())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_noise(work / "data")
        write_teacher(work / "teacher.safetensors")
        for method in options.methods.split(",") if options.methods else methods:
            found = kept.read(method) or on_null_device(options.device, method, work)
            if isinstance(found, str):
                failed.append(method)
                print(f"{method}: failed\n{found}", file=sys.stderr, flush=True)
                continue
            results[method] = found
            kept.write(method, found)
            print(method, json.dumps(found), flush=True)
    if results and options.to:
        before = options.to.read_text().partition(HEADING)[0].rstrip() if options.to.is_file() else ""
        options.to.write_text(f"{before}\n\n{page(results)}".lstrip())
    elif results:
        print(page(results))
    if failed:
        sys.exit(f"These methods do not train on the null device: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
