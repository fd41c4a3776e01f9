"""The counts of a step on the CUDA device that runs no kernel; the device itself needs a compiler and a minute."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


@pytest.fixture(name="dry_run")
def _dry_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("dry_run", FOLDER / "dry_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counters_have_the_order_of_the_device(dry_run: ModuleType) -> None:
    listed = re.search(r"enum Count \{ (.*?), NUMBER_OF_COUNTS \}", (FOLDER / "null_device/runtime.cpp").read_text())
    assert listed is not None
    assert tuple(name.lower() for name in listed[1].split(", ")) == dry_run.COUNTS


def test_the_page_says_which_goals_are_met(dry_run: ModuleType) -> None:
    def forms(in_graph: float, waits: float = 0.0, launches: float = 1.0) -> dict[str, dict[str, float]]:
        none = dict.fromkeys(dry_run.COUNTS, 0.0)
        graph = {
            **none,
            "operations": 2.25,
            "in_graph": in_graph,
            "graph_launches": launches,
            "synchronisations": waits,
        }
        return {"loop": {**none, "operations": 1000.0, "in_graph": 0.0, "blocking_copies": 3.0}, "graph": graph}

    page = dry_run.page({"kd": forms(800), "average": forms(897)})
    assert page.count("| met |") == 3
    assert "2 of 2 methods, the largest has 899" in page
    assert "| kd | 1000 | 3 | 802 | 0 | 1 |" in page
    assert "| kd | 1000 | 3 | 802 | 0 | 0.125 |" in dry_run.page({"kd": forms(800, launches=0.125)})
    assert dry_run.page({"kd": forms(800, launches=0.125)}).count("| met |") == 3
    assert dry_run.page({"kd": forms(800, launches=0.0)}).count("| met |") == 2
    page = dry_run.page({"kd": forms(800), "average": forms(950, waits=0.5, launches=2.0)})
    assert page.count("| missed |") == 3
    assert "1 of 2 methods, the largest has 952" in page


def test_counts_are_kept_for_the_same_code_only(dry_run: ModuleType, tmp_path: Path) -> None:
    counts = {"loop": {"operations": 1000.0}, "graph": {"operations": 2.25}}
    dry_run.Kept(tmp_path / "kept", "one").write("kd", counts)
    assert dry_run.Kept(tmp_path / "kept", "one").read("kd") == counts
    assert dry_run.Kept(tmp_path / "kept", "one").read("average") is None
    assert dry_run.Kept(tmp_path / "kept", "another").read("kd") is None
    dry_run.Kept(None, "one").write("kd", counts)
    assert dry_run.Kept(None, "one").read("kd") is None
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["kd.json"]


def test_the_digest_of_the_code_changes_with_code_and_recipes(dry_run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    code, recipe, page = (tmp_path / "training" / name for name in ("step.py", "kd.toml", "notes.md"))
    digests = []
    for path, text in ((code, "a"), (code, "b"), (recipe, "a"), (page, "a")):
        path.write_text(text)
        digests.append(dry_run.source_digest(tmp_path))
    assert len(set(digests)) == 3
    assert digests[3] == digests[2]


def test_the_campaign_names_its_phases_and_what_is_missing(tmp_path: Path) -> None:
    script = FOLDER / "campaign.sh"
    wrong = subprocess.run(["bash", script, "9"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "PHASE must be 1 or 2; got 9" in wrong.stderr
    places = {"OUT": str(tmp_path / "out"), "KEEP": str(tmp_path / "keep"), "BUNDLE": str(tmp_path / "none")}
    done = subprocess.run(
        ["bash", script, "2"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **places}
    )
    assert done.returncode == 0, done.stderr
    assert "gate, bench, serve: left out, there is no bundle" in done.stdout
    assert "cells: left out, DATA and TEACHER are not set" in done.stdout
    assert (tmp_path / "out" / "phase2.txt").read_text() == done.stdout
