import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdexport.errors import ConfigError, TrainingError
from tests.training.small_runs import OVERRIDES
from tests.training.study.planned_cells import TOP1, cells, finish, finished
from training.__main__ import app
from training.runs.record import claim
from training.study.cells import Cell, read, run_cell
from training.study.table import interval, spread, to_csv, to_markdown


def page(planned: list[Cell]) -> str:
    return to_markdown([read(cell) for cell in planned], title="T", command="python")


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each row after its method."""
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines[2:]}


def test_the_page_has_means_deviations_and_paired_differences_of_the_last_epoch(tmp_path: Path) -> None:
    text = page(finished(tmp_path))
    assert "## resnet32x4 to shufflenetv2" in text
    assert "Teacher: 72.63 (published 79.42, Yao et al., 2024)." in text
    plain, kd = rows(text)["plain"], rows(text)["kd"]
    assert plain[:4] == ["71.82", "50.65 \u00b1 0.85", "51.65 \u00b1 0.85", ""]
    # Differences of one seed: 1.75 and 3.35; t at one degree of freedom is 12.7062.
    half = 12.706204736 * statistics.stdev([1.75, 3.35]) / math.sqrt(2)
    assert kd[:2] == ["74.45", "53.20 \u00b1 0.28"]
    assert kd[3] == f"+2.55 [{2.55 - half:+.2f}, {2.55 + half:+.2f}]"
    assert kd[4:7] == ["2", "3", "Some GPU"]
    assert len(kd[7]) == len("2026-01-01")


def test_the_csv_has_one_line_for_each_run(tmp_path: Path) -> None:
    planned = finished(tmp_path)
    lines = list(csv.DictReader(to_csv([read(cell) for cell in planned]).splitlines()))
    assert [(line["method"], int(line["seed"])) for line in lines] == list(TOP1)
    assert [float(line["top1_last"]) for line in lines] == [round(100 * value, 2) for value in TOP1.values()]
    assert [float(line["top1_best"]) for line in lines] == [round(100 * value + 1, 2) for value in TOP1.values()]
    assert {line["state"] for line in lines} == {"done"}
    assert {(line["teacher"], line["student"], line["epochs"]) for line in lines} == {
        ("resnet32x4", "shufflenetv2", "3")
    }


def test_a_cell_that_was_not_run_or_not_finished_is_marked(tmp_path: Path) -> None:
    planned = cells(tmp_path)
    assert rows(page(planned))["kd"][:2] == ["74.45", "not run"]
    kd = planned[1]
    claim(kd.directory, kd.recipe, "student")
    (kd.directory / "metrics.jsonl").write_text('{"epoch": 1, "top1": 0.9}\n')
    assert rows(page(planned))["kd"][:3] == ["74.45", "epoch 1 of 3, seed 0", ""]
    finish(planned[3], 0.4)
    assert rows(page(planned))["kd"][1] == "40.00 (epoch 1 of 3, seed 0)"
    # No difference is shown to a plain student that was not trained.
    assert rows(page(planned))["kd"][3] == ""


def test_a_run_that_diverged_is_noted_not_repeated_and_does_not_stop_the_others(tmp_path: Path) -> None:
    planned, ran = cells(tmp_path, seeds=(0,)), []

    def diverge(recipe: Any, directory: Path, teacher: Path) -> None:
        ran.append(directory)
        if recipe.distiller.name == "kd":
            raise TrainingError("loss is not finite in epoch 2.", remedy="Lower it.")
        finish(planned[0], 0.5)

    for _ in range(2):
        for cell in planned:
            run_cell(cell, tmp_path, diverge)
    assert ran == [cell.directory for cell in planned]
    assert rows(page(planned))["kd"][1] == "failed, seed 0: loss is not finite in epoch 2."
    assert rows(page(planned))["plain"][1] == "50.00"


def test_one_value_has_no_deviation_and_one_difference_no_interval() -> None:
    assert spread([61.234]) == "61.23"
    assert interval([-0.456]) == "-0.46"
    assert interval([]) == ""


def test_the_command_runs_the_cells_continues_and_writes_page_and_csv(tiny_images: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text('extends = "digits"\n')
    for name in ("plain", "kd"):
        (tmp_path / f"{name}.toml").write_text(f'extends = ["base.toml", "parts/{name}"]\n')
    options = [f"--recipes={tmp_path / name}.toml" for name in ("plain", "kd")]
    sets = [f"data.name=folder:{tiny_images}", *OVERRIDES, "train.epochs=1", "distiller.ramp_epochs=0.0"]
    options += [part for text in sets for part in ("--set", text)]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results" / "table.md")]
    runner = CliRunner()
    only = runner.invoke(app, ["table", *options, "--report"])
    assert only.exception is None
    assert rows((tmp_path / "results" / "table.md").read_text())["kd"][1] == "not run"
    assert not (tmp_path / "runs").exists()
    assert runner.invoke(app, ["table", *options]).exception is None
    lines = list(csv.DictReader((tmp_path / "results" / "table.csv").read_text().splitlines()))
    assert [(line["method"], line["state"]) for line in lines] == [("plain", "done"), ("kd", "done")]
    assert len(list((tmp_path / "runs" / "teachers").iterdir())) == 1
    # A second call runs nothing again.
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert runner.invoke(app, ["table", *options]).exception is None
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("seeds", ["", "0,0", "a", "-1", "0,,1"])
def test_seeds_must_be_a_list_of_different_numbers(seeds: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["table", "--recipes", "digits", "--out", str(tmp_path / "t.md"), f"--seeds={seeds}"]
    )
    assert isinstance(done.exception, ConfigError)
