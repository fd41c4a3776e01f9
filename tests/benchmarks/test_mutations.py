"""A seeded sample of the changes of a bundle, each seen or explained, and the page that counts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Built

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mutations.py"


def call(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPT.parents[1],
    )


def test_each_change_of_a_sample_is_seen_or_explained_and_refused_by_the_signature(
    built: Built, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in built.bundle.rglob("*") if path.is_file()}
    # Which changes a seed draws depends on the files of the bundle; these two are tried in every bundle.
    always = r"graphs model\.onnx\b.*: (largest value of a weight .*|padding or dilation of .*)"
    options = ["--count", "50", "--seed", "3", "--always", always]
    done = call("run", built.bundle, *options, "--out", tmp_path / "found.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert len(found) == 100
    groups = {"files", "manifest", "policy", "graphs", "weights", "golden", "metrics", "reports", "together"}
    assert {row["group"] for row in found} == groups
    assert all(row["signature"] for row in found if row["seen_by"] != "undone")
    assert all(row["seen_by"] or row["reason"] for row in found)
    # A changed file whose digest stays the old one is always seen by the digest, whatever it holds.
    plain = [row for row in found if row["group"] in ("files", "graphs", "weights", "metrics") and not row["rehashed"]]
    assert {row["seen_by"] for row in plain if not row["name"].startswith("manifest.json")} == {"files"}
    named = [row for row in found if row["rehashed"] and re.fullmatch(always, f"{row['group']} {row['name']}")]
    assert len(named) == 2
    assert {row["seen_by"] for row in named} == {"graph as rebuilt"}
    assert {path: path.read_bytes() for path in built.bundle.rglob("*") if path.is_file()} == before


def row(group: str, name: str, seen_by: str, *, rehashed: bool = True, signature: bool = True, reason: str = "") -> Any:
    return {
        "group": group, "name": name, "rehashed": rehashed, "seen_by": seen_by, "fact": "", "signature": signature,
        "reason": reason,
    }  # fmt: skip


def test_the_page_counts_what_the_records_say(tmp_path: Path) -> None:
    rows = [
        row("files", "a", "files", rehashed=False),
        row("files", "a", "golden"),
        row("files", "b", "files", rehashed=False),
        row("files", "b", "", reason="text for people"),
        row("graphs", "c", "graph as rebuilt", rehashed=False),
        row("graphs", "c", "", signature=False),
        row("manifest", "d", "undone", signature=False),
    ]
    (tmp_path / "found.jsonl").write_text("\n".join(json.dumps(entry) for entry in rows) + '\n{"group": "half')
    done = call("report", tmp_path / "found.jsonl", "--out", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Mutations of a bundle\n\n4 changes of one bundle, ")
    assert "6 trials. 1 more are undone by new digests." in page
    assert "The signature refuses 5 of 6." in page
    assert "4 are seen by `kdexport verify`, 1 are not, for a reason below, and 1 are not, without a reason." in page
    header, _, files, graphs, whole = [line for line in page.splitlines() if line.startswith("|")][5:]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in (files, graphs, whole)}
    columns = header.strip("| ").split(" | ")
    for group, expected in (
        ("files", {"trials": "2", "golden": "1", "not seen": "1", "signature": "2"}),
        ("graphs", {"trials": "1", "not seen": "1", "signature": "0"}),
        ("all", {"trials": "3", "golden": "1", "not seen": "2", "signature": "2"}),
    ):
        values = {name: value.strip() for name, value in zip(columns[1:], cells[group][1:], strict=True)}
        assert {name: value for name, value in values.items() if value} == expected
    assert "**Text for people** (1)\n\n`files: b`." in page
    assert "**NO REASON KNOWN** (1)\n\n`graphs: c`." in page


REASONS = """
import sys
from pathlib import Path
from mutation_bench.catalogue import Mutation, unseen_reason
from onnx import TensorProto, helper, numpy_helper, save
import numpy as np

def file(folder, name, value):
    weight = numpy_helper.from_array(np.full(3, value, np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"], name=name)
    ends = [helper.make_tensor_value_info(each, TensorProto.FLOAT, [3]) for each in "xy"]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    (Path(sys.argv[1]) / folder).mkdir()
    save(helper.make_model(graph), str(Path(sys.argv[1]) / folder / "model.onnx"))

change = Mutation("files", "model.onnx: one bit flipped", lambda *_: None)
for folder, name, value in (("a", "add", 1), ("name", "adt", 1), ("weight", "add", 2)):
    file(folder, name, value)
root = Path(sys.argv[1])
(root / "cut").mkdir()
(root / "cut" / "model.onnx").write_bytes((root / "a" / "model.onnx").read_bytes()[:-9])
print([bool(unseen_reason(change, root / "a", root / other)) for other in ("name", "weight", "cut")])
"""


def test_only_a_changed_name_in_a_file_is_explained(tmp_path: Path) -> None:
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])}
    command = [sys.executable, "-c", REASONS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=path)
    assert done.stdout == "[True, False, False]\n", done.stderr
