"""A manifest with any field missing or changed is read as before or refused, and ends no command unexpectedly."""

import copy
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdexport.bundle.manifest import Manifest, read_manifest
from kdexport.bundle.manifest_fields import require_fields
from kdexport.commands import render
from kdexport.errors import BundleError
from kdexport.report import page
from kdexport.report.page import write_reports
from tests.conftest import Built

Place = tuple[str | int, ...]

DELETED = object()

MUTATIONS: tuple[Callable[[Any], Any], ...] = (
    lambda _: None,
    lambda _: True,
    lambda _: 3,
    lambda _: -1,
    lambda _: 10**400,
    lambda _: float("nan"),
    lambda _: float("-inf"),
    lambda _: 1e300,
    lambda _: "",
    lambda _: "text",
    lambda _: "\ud800",
    lambda _: [],
    lambda _: {},
    lambda value: [value],
    lambda value: {"x": value},
    lambda value: list(value) if isinstance(value, dict | str) else str(value),
    lambda value: dict.fromkeys(map(str, value), 1) if isinstance(value, list) else {"\ud800": 1},
)

TRADE = {
    "kept": ["/conv1/Conv"], "equalised": 1, "flips": 0.01, "top1": 0.9, "top1_drop": 0.0, "divergence": None,
    "noise": 0.1, "bytes": 700_000, "latency_ms": None, "within": True,
}  # fmt: skip

PLAN = {
    "kept": [{"node": "/conv1/Conv", "weight": "conv1.0.weight"}],
    "equalised": [{"first": ["a.weight", "a.bias"], "second": "b.weight", "groups": 1, "exponents": [1, -2]}],
    "collapsed": True, "reasons": ["two layers are sensitive"], "float32": TRADE, "trades": [TRADE, TRADE], "chosen": 1,
    "budget": {"flips": 0.1, "top1_drop": 0.01, "noise": None}, "images": 128, "split": "train",
}  # fmt: skip


@pytest.fixture(scope="module")
def short(built: Built) -> dict[str, Any]:
    """The manifest of a real bundle with every kind of entry, and few of each."""
    data: dict[str, Any] = json.loads((built.bundle / "manifest.json").read_text())
    data["certificate"]["blocks"] = data["certificate"]["blocks"][:1]
    data["certificate"]["hazards"] = [{"layer": "conv1.0", "kind": "range", "detail": "x", "limit": 1.0}]
    rungs = {(check["rung"], check["name"]): check for check in data["parity"] if check["rung"] in "ABCD"}
    data["parity"] = [*list(rungs.values())[:3], *list(rungs.values())[-3:]]
    data["parity"][-1]["undecided"] = True
    data["golden"] = data["golden"][:1]
    data["files"] = dict(list(data["files"].items())[:2])
    data["versions"] = dict(list(data["versions"].items())[:2])
    data["operators"] = {key: dict(list(counts.items())[:2]) for key, counts in data["operators"].items()}
    data["provenance"].pop("recipe", None)
    fp32 = data["targets"]["onnx-fp32"]
    int8 = {
        **copy.deepcopy(fp32),
        "precision": "int8",
        "form": "int8-u8",
        "plan": PLAN,
        "calibration": {"weight_bits": 7},
    }
    data["targets"]["onnx-int8"] = int8
    return data


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every path of a JSON value."""
    if here:
        yield here
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*here, key))


def changed(data: dict[str, Any], place: Place, change: Callable[[Any], Any] | None) -> dict[str, Any]:
    """A copy with the value at ``place`` changed, or deleted if ``change`` is None."""
    result: Any = copy.deepcopy(data)
    inner = result
    for key in place[:-1]:
        inner = inner[key]
    if change is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = change(inner[place[-1]])
    return dict(result)


def used(folder: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the manifest and show it in each way that needs no other file; raises only ``BundleError``."""
    (folder / "manifest.json").write_text(json.dumps(data))
    manifest = read_manifest(folder)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(render, "new_console", lambda: Console(file=terminal, width=160, markup=False))
    render.show_manifest(folder, manifest)
    terminal.flush()
    json.dumps(manifest.data)
    # Drawing takes a second; test_figures.py has the numbers that no plot can show.
    monkeypatch.setattr(page, "_drawn", lambda draw, *numbers: "")
    write_reports(folder, manifest.data)


def test_the_manifest_that_is_changed_is_itself_read_and_shown(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(tmp_path, short, monkeypatch)


@pytest.mark.parametrize("seed", range(4))
def test_any_changed_field_is_read_or_refused(
    seed: int, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    refused = 0
    found = list(places(short))[seed::4]
    for place in found:
        for change in (None, *rng.sample(MUTATIONS, 5)):
            data = changed(short, place, change)
            try:
                used(tmp_path, data, monkeypatch)
            except BundleError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{place} -> {data}") from error
    assert len(found) < refused < 6 * len(found)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (("latency", "ratio"), lambda _: "1.0", "latency.ratio: input should be a valid number"),
        (("parity", 0, "holds"), lambda _: 1, "parity.0.holds: input should be a valid boolean"),
        (("certificate", "blocks"), None, "certificate.blocks: field required"),
        (
            ("operators", "fused", "Conv"),
            lambda _: -1,
            "operators.fused.Conv: input should be greater than or equal to 0",
        ),
        (("parity", 0, "measured"), lambda _: None, "parity.0: holds is true, and measured is null"),
        (("parity", 0, "ran"), lambda _: False, "parity.0: ran is false, and the check holds"),
        (("task",), None, "the manifest: a check is undecided, and there is no task"),
    ],
)
def test_the_refused_field_is_named(
    place: Place, change: Callable[[Any], Any] | None, words: str, short: dict[str, Any], tmp_path: Path
) -> None:
    short["operators"]["fused"]["Conv"] = 53
    (tmp_path / "manifest.json").write_text(json.dumps(changed(short, place, change)))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["policy", "task", "kdexport"])
def test_a_manifest_of_an_earlier_version_is_read(key: str, short: dict[str, Any]) -> None:
    data = copy.deepcopy(short)
    del data[key]
    for check in data["parity"]:
        del check["undecided"]
    for entry in data["targets"].values():
        for later in ("executed", "backend", "form", "calibration", "plan", "compiled", "golden"):
            entry.pop(later, None)
    del data["certificate"]["hazards"]
    assert Manifest.from_json(data).data == data


def test_further_keys_of_a_later_version_are_read(short: dict[str, Any]) -> None:
    data = copy.deepcopy(short)
    for entry in (data, data["export"], data["targets"]["onnx-fp32"], data["parity"][0], data["certificate"]):
        entry["later"] = {"x": [1, None]}
    require_fields(data)
    assert Manifest.from_json(data).data == data
