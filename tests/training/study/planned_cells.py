"""The cells of a small table, and their run folders as training leaves them."""

import json
from pathlib import Path
from typing import Any

from training.runs.record import claim, note_environment
from training.study.cells import Cell, plan

PAIR = "cifar100/resnet32x4-shufflenetv2"
#: Accuracy of both methods with two seeds, in the order of the plan.
TOP1 = {("plain", 0): 0.5125, ("kd", 0): 0.5300, ("plain", 1): 0.5005, ("kd", 1): 0.5340}


def cells(runs: Path, *, seeds: tuple[int, ...] = (0, 1), **train: Any) -> list[Cell]:
    return plan([f"{PAIR}/plain", f"{PAIR}/kd"], seeds, runs, {"train": {"epochs": 3, **train}})


def finish(cell: Cell, top1: float) -> None:
    """A run folder as the training leaves it; its best epoch is the second."""
    claim(cell.directory, cell.recipe, "student")
    note_environment(cell.directory, "Some GPU", 2)
    lines = [{"epoch": i + 1, "top1": value} for i, value in enumerate((0.1, top1 + 0.01, top1))]
    (cell.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (cell.directory / "student").mkdir()
    metrics = {"top1": top1, "teacher_top1": 0.7263, "best_epoch_top1": top1 + 0.01}
    (cell.directory / "student" / "student.json").write_text(json.dumps({"provenance": {"metrics": metrics}}))


def finished(runs: Path) -> list[Cell]:
    planned = cells(runs)
    for cell in planned:
        finish(cell, TOP1[cell.method, cell.seed])
    return planned
