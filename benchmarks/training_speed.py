"""Speed and memory of a training step against a plain loop as in public code, interleaved in one process.

python benchmarks/training_speed.py --to docs/results/training.md [--rounds 12] [--steps 4] [--batch 128]
                                    [--threads 2] [--clock wall|cpu]

Images are noise and the teacher is not trained, which does not change the work of a step. The clock ``cpu`` counts the
processor time of an arm, loader workers included, which other programs on the machine affect little.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from training_arms import Arm, Clock, cpu_seconds, noise, our_loop, plain_reference, recipe_of, teacher_weights
from training_report import machine


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95 % interval by Student's t on logarithms."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def memory(method: str, batch: int) -> None:
    """Print the bytes that training steps add to the memory in use before the first one."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(method, batch, teacher_weights(Path(folder)))
        epoch = our_loop(noise(MEMORY_STEPS * batch), recipe, time.perf_counter)
        # The peak is reset here.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        epoch()
    print(json.dumps({"before": before, "peak": _status("VmHWM")}))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measured_memory(method: str, batch: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory", method, "--batch", str(batch)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(answer.stdout))


def measure(rounds: int, steps: int, batch: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds per step of each arm, one value per round."""
    with tempfile.TemporaryDirectory() as folder:
        weights = teacher_weights(Path(folder))
        images = noise(steps * batch)
        arms: dict[str, Arm] = {"reference": plain_reference(images, recipe_of("plain", batch, weights), clock)}
        for method in ("plain", "kdiffusion"):
            arms[method] = our_loop(images, recipe_of(method, batch, weights), clock)
        for arm in arms.values():
            arm()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for index in range(rounds):
            names = list(arms)
            for name in names[index % 3 :] + names[: index % 3]:
                seconds[name].append(arms[name]())
            print({name: round(values[-1], 3) for name, values in seconds.items()}, file=sys.stderr, flush=True)
    return seconds


TEMPLATE = """# The speed of training

    python benchmarks/training_speed.py --rounds {rounds} --steps {steps} --batch {batch} --threads {threads} \\
        --clock {clock} --to docs/results/training.md

The teacher is resnet56, the student MobileNetV2; images are noise of CIFAR's size, batch {batch}.
Machine: {machine}.
{rounds} rounds; in each, every arm runs {steps} steps, one arm after the other in one process, in rotating order.
Ratios are within a round: geometric mean and 95 % interval. {clocked}

The reference loop is our own, in the style of public distillation code: `DataLoader` with two workers, PIL images
that are cropped, flipped and normalised one by one, NCHW, eager, default SGD, an unchanged teacher, and `.item()` of
the loss and of the correct answers at each step. Like the arm *plain* of our loop, it trains the same student with
cross-entropy and runs the forward pass of the same teacher. Its first step of a round does not count, because the
workers fill their queues before it.

| what | goal | measured | |
|---|---|---|---|
{rows}

| arm | images/s, median round | best round |
|---|---|---|
{arms}

Memory is the peak of the resident set during {memory_steps} steps of a new process, minus the resident set before them:
{memories}.
{device}"""
NO_GPU = "\nNo GPU was available for these measurements.\n"
CLOCKED = {
    "wall": "Times are wall-clock times.",
    "cpu": "Other programs used the same processors\n"
    "meanwhile, so times are the processor time of an arm, loader workers included; images/s are those of one\n"
    "processor, and waiting does not count.",
}
MEMORY_STEPS = 3


def page(
    seconds: dict[str, list[float]],
    peaks: dict[str, dict[str, int]],
    *,
    steps: int,
    batch: int,
    threads: int,
    clock: str,
) -> str:
    def ratio(above: str, below: str) -> tuple[float, float, float]:
        return interval([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])

    cost, gain = ratio("kdiffusion", "plain"), ratio("reference", "plain")
    added = {name: peak["peak"] - peak["before"] for name, peak in peaks.items()}
    more = added["kdiffusion"] / added["plain"]
    rows = [
        f"| step, KDiffusion (m = 4, one layer) / plain | at most 1.15 | {_shown(cost)} | {_verdict(cost, 1.15, -1)} |",
        f"| images/s, plain / reference loop | at least 1.5 | {_shown(gain)} | {_verdict(gain, 1.5, 1)} |",
        f"| memory that steps add, KDiffusion / plain | at most 1.3 | {more:.2f} | {_met(more <= 1.3)} |",
    ]
    arms = [
        f"| {name} | {batch / float(np.median(values)):.0f} | {batch / min(values):.0f} |"
        for name, values in seconds.items()
    ]
    memories = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in added.items())
    return TEMPLATE.format(
        rounds=len(seconds["plain"]),
        steps=steps,
        batch=batch,
        machine=machine(),
        threads=threads,
        clock=clock,
        clocked=CLOCKED[clock],
        rows="\n".join(rows),
        arms="\n".join(arms),
        memory_steps=MEMORY_STEPS,
        memories=memories,
        device="" if torch.cuda.is_available() else NO_GPU,
    )


def _shown(estimate: tuple[float, float, float]) -> str:
    return f"{estimate[0]:.3f} ({estimate[1]:.3f} to {estimate[2]:.3f})"


def _verdict(estimate: tuple[float, float, float], limit: float, sign: int) -> str:
    """``sign`` 1: at least ``limit``; -1: at most."""
    mean, low, high = estimate
    if low < limit < high:
        return "undecided: the interval contains the limit"
    return _met(sign * (mean - limit) >= 0)


def _met(holds: bool) -> str:
    return "met" if holds else "not met"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--memory", help="print the memory of one method and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory(options.memory, options.batch)
        return
    clock = time.perf_counter if options.clock == "wall" else cpu_seconds
    seconds = measure(options.rounds, options.steps, options.batch, clock)
    peaks = {method: measured_memory(method, options.batch) for method in ("plain", "kdiffusion")}
    text = page(seconds, peaks, steps=options.steps, batch=options.batch, threads=options.threads, clock=options.clock)
    if options.to:
        # The section of benchmarks/gpu/dry_run.py stays.
        _, heading, counts = options.to.read_text().partition("\n## ") if options.to.is_file() else ("", "", "")
        options.to.write_text(text + heading + counts)
    else:
        print(text)


if __name__ == "__main__":
    main()
