"""A seeded sample of damaged files and one fault, what the judges call wrong, and the page that counts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Built

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "robustness.py"


def call(*arguments: str | Path, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=timeout)


def bench(code: str) -> Any:
    """What ``code`` prints as JSON, with the packages of the benchmarks importable."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_sample_of_damaged_files_is_read_or_refused_with_a_sentence(built: Built, tmp_path: Path) -> None:
    done = call("fuzz", built.bundle, "--count", "40", "--seed", "5", "--out", tmp_path / "fuzz.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "fuzz.jsonl").read_text().splitlines()]
    assert {case["kind"] for case in found} == {"manifest", "TOML", "safetensors", "ONNX", "program", "image"}
    assert [case["index"] for case in found] == list(range(40))
    # Most are refused, and some damages do no harm: a sample in which nothing is read would test nothing.
    exits = [case["exit_code"] for case in found]
    assert 0 in exits
    assert 2 in exits
    assert all("error KDX" in case["said"] for case in found if case["exit_code"])


JUDGES = """
import json, os, sys, tempfile
from pathlib import Path
from robustness_bench.cases import Prepared, judged, run_case
from robustness_bench.watch import Watch

folder = Path(tempfile.mkdtemp()).resolve()
outside = Path(tempfile.mkdtemp()).resolve()
watch = Watch(folder)
sys.argv = ["kdexport", "--json"]
def case(read):
    watch.found, watch.active = [], True
    exit_code, stderr = run_case(Prepared("", read))
    watch.active = False
    return judged(exit_code, stderr, list(watch.found), 0).partition(" /")[0]
print(json.dumps([
    case(lambda: None),
    case(lambda: (folder / "a").write_text("x")),
    case(lambda: (outside / "a").write_text("x")),
    case(lambda: os.system("true")).partition(" ")[0],
    case(lambda: 1 / 0),
    case(lambda: sys.exit(7)),
    judged(0, "", [], 2**30),
    judged(1, "Traceback (most recent call last)", [], 0),
]))
"""


def test_each_wrong_end_is_called_wrong() -> None:
    assert bench(JUDGES) == [
        "", "", "outside: open", "outside:", "KDX900", "exit code 7", "memory: 1024 MiB more", "traceback",
    ]  # fmt: skip


FAULT = """
import json, sys, tempfile
from pathlib import Path
from robustness_bench.faults import run_faults

folder = Path(tempfile.mkdtemp()).resolve()
print(json.dumps(list(run_faults(Path(sys.argv[1]), folder, 4, [2]))))
"""


def test_a_full_disk_ends_with_a_sentence_and_leaves_nothing(built: Built) -> None:
    (case,) = bench(FAULT.replace("sys.argv[1]", repr(str(built.bundle))))
    assert (case["kind"], case["reader"], case["wrong"]) == ("full disk", "slim", "")
    if case["ran"]:
        assert case["exit_code"] in (0, 4)


def row(kind: str, reader: str, exit_code: int, wrong: str = "", **more: Any) -> dict[str, Any]:
    return {
        "index": 3, "kind": kind, "reader": reader, "exit_code": exit_code, "seconds": 1.5, "memory_mib": 700,
        "wrong": wrong, "said": "", **more,
    }  # fmt: skip


def test_the_page_counts_what_the_records_say(tmp_path: Path) -> None:
    fuzz = [row("TOML", "recipe", 2), row("TOML", "recipe", 0), row("ONNX", "gate", 1, "KDX900")]
    faults = [row("kill", "slim", -9), row("read-only", "fuse", 4, ran=True), row("full disk", "fuse", 0, ran=False)]
    for name, rows in (("fuzz", fuzz), ("faults", faults)):
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"index": 9, "ki')
    out = tmp_path / "page.md"
    done = call("report", tmp_path / "fuzz", tmp_path / "faults", "--about", "Two cores.", "--out", out)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert "3 damaged files and 2 faults of the machine." in page
    assert "- 1 damaged files and 0 faults ended wrongly" in page
    assert "- 1 faults could not be made on this machine." in page
    assert "| TOML | recipe | 2 | 1 | 1 | 0 | 1.5 | 700 |" in page
    assert "| ONNX | gate | 1 | 0 | 0 | 1 | 1.5 | 700 |" in page
    assert "- ONNX, gate, case 3: 'KDX900'" in page
    assert "Two cores." in page
