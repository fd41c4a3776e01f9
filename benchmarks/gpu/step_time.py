"""The time of a training step on a GPU: started from Python, as a CUDA graph, compiled, and several seeds at once.

python benchmarks/gpu/step_time.py [--arms loop,graph,compiled] [--seeds 1,2,4] [--steps 300] [--method NAME]
                                   [--out FILE.jsonl] [--dry]

An arm is one process's work: one line of JSON is written when it is done, so that a run that is stopped keeps those
before. Images are noise and the teacher is not trained, which does not change the work of a step. ``--dry`` is for a
device that runs no kernel. Several seeds take turns as cells of ``kdexport table --parallel`` do, each with its stream.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from unchecked import unchecked

sys.path.append(str(Path(__file__).parents[1]))
from training_arms import Cell, noise, our_cell, our_loop

from kdexport.checkpoint import save_tensors
from training.recipe import Recipe, load_recipe
from training.runs.step import epoch_plan
from training.runs.turns import Ended, GiveWay, Job, Watcher, take_turns
from training.teachers import TEACHERS

PAIR, TEACHER, CLASSES, SIDE, BATCH = "cifar100/resnet32x4-shufflenetv1", "resnet32x4", 100, 32, 64
ROUNDS = 3
#: A cell of 240 epochs of CIFAR-100 in 10 minutes.
GOAL_MS = 3.2


def recipe_of(method: str, weights: Path, *, seed: int, capture: str, compiling: str) -> Recipe:
    changes = {
        "teacher": {"checkpoint": str(weights)},
        "train": {"batch_size": BATCH, "seed": seed, "capture": capture, "compile": compiling, "learning_rate": 1e-3},
    }
    return load_recipe(f"{PAIR}/{method}", changes)


def one_seed(recipe: Recipe, steps: int) -> dict[str, float]:
    """Milliseconds of a step, over rounds of one epoch each; the first one is not counted."""
    epoch = our_loop(noise(steps * BATCH), recipe, time.perf_counter)
    epoch()
    times = [1e3 * epoch() for _ in range(ROUNDS)]
    return {"step_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times)}


class _FirstError(Watcher):
    """Raises the error of a seed."""

    def ended(self, run: Ended) -> bool:
        if run.error is not None:
            raise run.error
        return True


def several_seeds(recipes: list[Recipe], steps: int) -> dict[str, float]:
    """Milliseconds in which every seed makes one step, in the turns of ``kdexport table --parallel``."""
    images = noise(steps * BATCH)
    # The first seed has the first turn and the last one the last: they read the clock for all.
    began: list[float] = []
    times: list[float] = []

    def job(place: int) -> Job:
        def run(give_way: GiveWay) -> None:
            cell = our_cell(images, recipes[place])
            assert cell.captured is not None
            give_way()
            for epoch in range(ROUNDS + 1):
                _begin(cell, epoch)
                give_way()
                if place == 0:
                    torch.cuda.synchronize()
                    began.append(time.perf_counter())
                while cell.captured.left:
                    cell.captured()
                    if cell.captured.left:
                        give_way()
                if place == len(recipes) - 1:
                    torch.cuda.synchronize()
                    times.append(1e3 * (time.perf_counter() - began[-1]) / steps)
                give_way()

        return run

    take_turns([job(place) for place in range(len(recipes))], len(recipes), torch.device("cuda"), _FirstError())
    assert len(times) == ROUNDS + 1
    return {"step_ms": statistics.median(times[1:]), "fastest_ms": min(times[1:]), "slowest_ms": max(times[1:])}


def _begin(cell: Cell, epoch: int) -> None:
    job = cell.job
    batches: Any = job.batches
    assert cell.captured is not None
    plan = epoch_plan(job.settings, epoch, steps=batches.steps, branches=job.branches, device=cell.accelerator.device)
    cell.step.clear()
    cell.captured.begin(plan, batches.draws(epoch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="loop,graph")
    parser.add_argument("--seeds", default="1", help="numbers of seeds at once, for the arm graph")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--method", default="kdiffusion-multi")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA device. On one that runs no kernel: build/null-device/run python ... --dry")
    with tempfile.TemporaryDirectory() as folder, unchecked() if options.dry else nullcontext():
        weights = Path(folder) / "teacher.safetensors"
        save_tensors(weights, TEACHERS.build(TEACHER, num_classes=CLASSES, image_size=SIDE).state_dict())

        def recipe(arm: str, seed: int) -> Recipe:
            capture, compiling = ("no" if arm == "loop" else "yes"), ("yes" if arm == "compiled" else "no")
            return recipe_of(options.method, weights, seed=seed, capture=capture, compiling=compiling)

        for arm in options.arms.split(","):
            for seeds in map(int, options.seeds.split(",")) if arm == "graph" else [1]:
                started = time.monotonic()
                torch.cuda.reset_peak_memory_stats()
                if seeds == 1:
                    found = one_seed(recipe(arm, 0), options.steps)
                else:
                    found = several_seeds([recipe(arm, seed) for seed in range(seeds)], options.steps)
                line = {
                    "arm": arm,
                    "seeds": seeds,
                    "method": options.method,
                    **{name: round(value, 4) for name, value in found.items()},
                    "a_step_of_one_seed_ms": round(found["step_ms"] / seeds, 4),
                    "goal_ms": GOAL_MS,
                    "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                    "seconds": round(time.monotonic() - started, 1),
                    "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                }
                print(json.dumps(line), flush=True)
                if options.out:
                    with options.out.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
