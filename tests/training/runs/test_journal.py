import json
import sys
import time
from pathlib import Path

import pytest

from training.runs.journal import Journal

HISTORY = [{"loss/a": 2.0, "lr": 0.1, "top1": 0.2, "images_per_s": 9.0}, {"loss/a": 1.0, "lr": 0.1, "top1": 0.4}]
LAYER = {"last/ambiguity": 0.1, "last/squared_error/branch1": 0.5, "last/squared_error_of_mean": 0.4}
DIVERSITY = [{"epoch": 1, **LAYER}, {"epoch": 2, **LAYER}]


def journal(directory: Path, said: list[str], *, draws: bool = True) -> Journal:
    return Journal(directory, "a run", done=0, draws=draws, teacher_top1=0.7, say=said.append)


def test_lines_are_written_each_epoch_and_plots_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    with journal(tmp_path, said) as written:
        written.write(HISTORY[:1], DIVERSITY[:1], last=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["diversity.jsonl", "metrics.jsonl", "tensorboard"]
        written.write(HISTORY, DIVERSITY, last=True)
    assert [json.loads(line) for line in (tmp_path / "diversity.jsonl").read_text().splitlines()] == DIVERSITY
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [{"epoch": 1, **HISTORY[0]}, {"epoch": 2, **HISTORY[1]}]
    for name in ("curves.png", "diversity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert said == []
    assert not list(tmp_path.glob(".*"))


def test_a_long_run_is_drawn_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.runs.journal._REDRAW_S", -1.0)
    with journal(tmp_path, []) as written:
        written.write(HISTORY[:1], [], last=False)
    assert (tmp_path / "curves.png").is_file()
    assert not (tmp_path / "diversity.png").exists()


def test_without_matplotlib_the_run_continues_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("training.runs.journal._REDRAW_S", -1.0)
    said: list[str] = []
    with journal(tmp_path, said) as written:
        written.write(HISTORY[:1], DIVERSITY[:1], last=False)
        written.write(HISTORY, DIVERSITY, last=True)
    assert len(said) == 1
    assert said[0].startswith("a run: no plots. Plots need matplotlib")
    assert "pip install 'kdexport[plots]'" in said[0]
    assert not list(tmp_path.glob("*.png"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_continues_in_the_same_second_is_read_after_the_run_before(tmp_path: Path) -> None:
    """TensorBoard reads event files by name: the second of their start, then host and process."""
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    # So near to the next second that the file could else be named after it by chance.
    while time.time() % 1 > 0.7:
        time.sleep(0.05)
    earlier = folder / f"events.out.tfevents.{int(time.time()):010d}.zzz.99999.0"
    earlier.touch()
    with journal(tmp_path, [], draws=False) as written:
        written.write(HISTORY[:1], [], last=False)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2
    assert names[0] == earlier.name
