"""Cells that train at once: on a CPU they take turns by the same code, and must end with the bits of each alone."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from kdexport.errors import BackendUnavailableError, ConfigError, KdexportError, TrainingError
from tests.training.small_runs import tiny_recipe
from tests.training.study.planned_cells import cells as planned_cells
from tests.training.study.planned_cells import finish
from training.__main__ import app
from training.recipe import Recipe
from training.runs.turns import Memory, Shared
from training.study.cells import Cell, read, run_cell
from training.study.parallel import Together, require_parallel
from training.train import distil, process_settings

CPU = torch.device("cpu")
#: Methods that draw noise in a step, or mix images on the host.
CHANGES: dict[str, tuple[str, ...]] = {
    "noise": ("distiller.name=kdiffusion",),
    "mixed": ("distiller.name=kd", "train.mixup=0.4"),
}


def small_cells(images: Path, runs: Path) -> list[Cell]:
    """Two methods with one seed, and the first of them with another; two epochs of three steps each."""
    base = ("train.epochs=2", "distiller.ramp_epochs=0.5", "train.compile=no")
    cells = []
    for name, seed in (("noise", 0), ("mixed", 0), ("noise", 1)):
        recipe = tiny_recipe(images, *base, *CHANGES[name], f"train.seed={seed}")
        cells.append(Cell(name=name, recipe=recipe, seed=seed, directory=runs / f"{name}-{seed}"))
    return cells


def together(
    at_once: int, run: Callable[..., object] = distil, memory: Memory | None = None
) -> tuple[Together, list[str]]:
    lines: list[str] = []
    made = Together(
        at_once=at_once,
        device=CPU,
        distil=run,
        process_settings=process_settings,
        written=lambda: lines.append("written"),
        say=lines.append,
        memory=memory,
    )
    return made, lines


def outcome(cell: Cell) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Weights, state and metrics of a run, without what depends on the time."""
    lines = [json.loads(line) for line in (cell.directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_s"]
    state = (cell.directory / "resume.safetensors").read_bytes()
    # The metadata has the metrics, with the time; the tensors follow it.
    tensors = state[8 + int.from_bytes(state[:8], "little") :]
    return (cell.directory / "student" / "model.safetensors").read_bytes(), tensors, lines


def test_cells_in_turns_that_were_stopped_and_continued_end_with_the_bits_of_each_alone(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = small_cells(tiny_images, tmp_path / "alone")
    for cell in alone:
        run_cell(cell, tmp_path / "alone", distil)
    at_once, turns = small_cells(tiny_images, tmp_path / "together"), []

    def interrupted(recipe: Recipe, directory: Path, teacher: Path, shared: Shared | None) -> object:
        assert shared is not None

        def give_way() -> None:
            turns.append(shared.name)
            if len(turns) == 8:
                signal.raise_signal(signal.SIGINT)
            shared.give_way()

        return distil(recipe, directory, teacher, replace(shared, give_way=give_way))

    made, lines = together(2, interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.run(at_once, tmp_path / "together")
    assert turns == ["noise seed 0", "mixed seed 0"] * 4
    assert [read(cell).state for cell in at_once] == ["unfinished"] * 2 + ["not run"]
    made, lines = together(3)
    made.run(at_once, tmp_path / "together")
    for one, other in zip(alone, at_once, strict=True):
        assert outcome(one) == outcome(other)
    assert outcome(alone[0])[0] != outcome(alone[2])[0]
    assert lines.count("written") == 3
    assert lines[0] == "noise seed 0 begins, cell 1 of 3"
    shown = capsys.readouterr().err
    assert "noise seed 1: epoch 2/2" in shown
    # What is finished is not repeated, and no line says that it began.
    before = {path: path.read_bytes() for path in (tmp_path / "together").rglob("*") if path.is_file()}
    made, lines = together(2)
    made.run(at_once, tmp_path / "together")
    assert lines == []
    assert {path: path.read_bytes() for path in (tmp_path / "together").rglob("*") if path.is_file()} == before


def test_a_cell_that_diverges_is_noted_and_one_that_ends_with_an_error_loses_no_other(tmp_path: Path) -> None:
    planned = planned_cells(tmp_path)
    error = ConfigError("There is no data.", remedy="Pass --data.")

    def run(recipe: Recipe, directory: Path, teacher: Path, shared: Shared | None) -> None:
        assert shared is not None
        place = [cell.directory for cell in planned].index(directory)
        shared.give_way()
        if place == 0:
            raise TrainingError("loss is not finite in epoch 2.", remedy="Lower it.")
        if place == 1:
            shared.give_way()
            raise error
        for _ in range(5):
            shared.give_way()
        finish(planned[place], 0.5)

    made, lines = together(3, run)
    with pytest.raises(KdexportError) as raised:
        made.run(planned, tmp_path)
    assert raised.value is error
    assert [read(cell).state for cell in planned] == ["failed", "not run", "done", "done"]
    assert "ends with an error" not in lines[0]
    assert any("kd seed 0 ended with an error; the cells that run go on, no other begins" in line for line in lines)
    assert lines.count("written") == 4


class Room:
    """A device on which a cell holds what it adds to ``held``."""

    def __init__(self) -> None:
        self.held = 0

    def taken(self) -> int:
        return self.held

    def free(self) -> int:
        return 8 * 2**30 - self.held

    def release(self) -> None:
        pass


def test_a_cell_that_finds_too_little_memory_beside_others_continues_alone(tmp_path: Path) -> None:
    planned, room, tries = planned_cells(tmp_path), Room(), list[int]()

    def run(recipe: Recipe, directory: Path, teacher: Path, shared: Shared | None) -> None:
        assert shared is not None
        place = [cell.directory for cell in planned].index(directory)
        room.held += 2**30
        try:
            shared.give_way()
            tries.append(place)
            if tries.count(1) == 1 and place == 1:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                except RuntimeError as error:
                    raise BackendUnavailableError("The step cannot be captured.", remedy="Do not.") from error
            finish(planned[place], 0.5)
        finally:
            room.held -= 2**30

    made, lines = together(2, run, room)
    made.run(planned, tmp_path)
    assert {read(cell).state for cell in planned} == {"done"}
    assert tries == [0, 1, 2, 3, 1]
    assert [line for line in lines if "too little" in line] == [
        f"{planned[1].name} seed 0 found too little memory beside the others, it took 1.0 GiB of the memory of the "
        "GPU; it continues after them"
    ]
    assert f"{planned[3].name} seed 1 ended, it took 1.0 GiB of the memory of the GPU" in lines


def test_cells_of_different_precision_do_not_run_at_once(tmp_path: Path) -> None:
    planned = planned_cells(tmp_path)
    planned[2] = replace(
        planned[2],
        recipe=planned[2].recipe.model_copy(
            update={"train": planned[2].recipe.train.model_copy(update={"mixed_precision": "bf16"})}
        ),
    )
    crowd, seen = set[int](), []

    def run(recipe: Recipe, directory: Path, teacher: Path, shared: Shared | None) -> None:
        assert shared is not None
        place = [cell.directory for cell in planned].index(directory)
        crowd.add(place)
        shared.give_way()
        seen.append((place, sorted(crowd)))
        crowd.remove(place)

    made, _ = together(4, run)
    made.run(planned, tmp_path)
    assert seen == [(0, [0, 1, 3]), (1, [1, 3]), (3, [3]), (2, [2])]


def test_what_cannot_train_at_once_is_refused(tmp_path: Path) -> None:
    def on(kind: str, processes: int = 1) -> Accelerator:
        return cast(Accelerator, SimpleNamespace(device=torch.device(kind), num_processes=processes))

    planned = planned_cells(tmp_path)
    require_parallel(1, planned, on("cpu", 2))
    require_parallel(2, planned, on("cuda"))
    with pytest.raises(BackendUnavailableError, match="--parallel 2 needs a CUDA device, and there is none: on a CPU"):
        require_parallel(2, planned, on("cpu"))
    with pytest.raises(ConfigError, match="but 2 processes were started"):
        require_parallel(3, planned, on("cuda", 2))
    tracked = planned_cells(tmp_path, trackers=("wandb",))
    with pytest.raises(ConfigError, match=r"plain seed 0 to train\.trackers = wandb: a tracker has one run"):
        require_parallel(2, tracked, on("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is not refused")
def test_the_command_refuses_before_it_writes_anything(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    arguments = ["table", "--recipes=digits", "--runs", str(tmp_path / "runs"), "--out", str(out), "--parallel", "2"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, BackendUnavailableError)
    assert done.exception.remedy == "Omit --parallel, or run on a machine with a GPU."
    assert list(tmp_path.iterdir()) == []
