"""onnxruntime's telemetry is off wherever kdexport imports it: an empty home folder stays empty."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_command
from tests.kdexport.serving.running_server import running

ROOT = Path(__file__).parents[3]


def written(home: Path) -> list[str]:
    return [path.relative_to(home).as_posix() for path in home.rglob("*")]


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_a_server_writes_nothing_to_the_home_folder(fresh_home: Path, zoo: Path) -> None:
    with running(f"zoo={zoo}", "--drain", "0") as server:
        image = (zoo / "golden" / "000.jpeg").read_bytes()
        assert server.ask("POST", "/v1/classify", image).status == 200
        server.stop()
    assert written(fresh_home) == []


def test_doctor_writes_nothing_to_the_home_folder(fresh_home: Path, zoo: Path) -> None:
    assert run_command("doctor", zoo).exit_code == 0
    assert [name for name in written(fresh_home) if "Microsoft" in name] == []
    assert written(fresh_home) == []


def test_without_the_variable_this_version_of_onnxruntime_would_write(fresh_home: Path, zoo: Path) -> None:
    """If this fails, onnxruntime changed, and the tests above need another way to notice telemetry."""
    code = f"import onnxruntime, time; onnxruntime.InferenceSession({str(zoo / 'model.onnx')!r}); time.sleep(1)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), capture_output=True)
    if not written(fresh_home):
        pytest.skip("this build of onnxruntime collects nothing")
    assert any("onnxruntime" in name for name in written(fresh_home))


def test_the_variable_is_set_before_every_import_of_onnxruntime() -> None:
    places = 0
    for path in sorted([*(ROOT / "kdexport").rglob("*.py"), *(ROOT / "training").rglob("*.py")]):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "onnxruntime" for name in names):
                assert isinstance(node, ast.Import | ast.ImportFrom)
                before = lines[node.lineno - 2].strip()
                assert before in ('os.environ["ORT_DISABLE_TELEMETRY"] = "1"', "import_onnxruntime()"), (path, before)
                places += 1
    assert places
