"""A small bundle built once by the command itself, and the command as a function."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.answers import checked_answer

#: Files of few tests that take minutes, and long ones of the last folders: first, so that no process is left alone with
#: one of them at the end. The second one needs no bundle, so that two processes do not both begin by waiting for it.
_SLOW_FILES = (
    "test_pipeline.py", "test_lifecycle.py", "test_readme.py", "test_plugins.py", "test_mutations.py",
    "test_quantize_aware.py", "test_precision_search.py", "test_teaching.py", "test_train.py",
)  # fmt: skip

CONFIG = """
student = "mobilenetv2"
targets = ["onnx-fp32"]
recipe = "digits"

[overrides.train]
epochs = 1
batch_size = 128
warmup_epochs = 0.5

[overrides.teacher]
epochs = 1
# One epoch does not make a teacher.
plausibility = "reported"

[overrides.distiller]
num_branches = 3
ramp_epochs = 0.5

[verify]
images = 24
golden = 9

[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@dataclass(frozen=True)
class Outcome:
    """A finished command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """The one JSON object on stdout, which has the form of all answers."""
        return checked_answer(self.stdout, self.exit_code)

    @property
    def data(self) -> dict[str, Any]:
        """The result in the answer of ``--json``."""
        return dict(self.answer["result"])

    @property
    def error(self) -> dict[str, str]:
        """The error in the answer of ``--json``."""
        return dict(self.answer["error"])


@pytest.fixture(scope="session", autouse=True)
def equal_students_are_exported_once() -> Iterator[None]:
    """What verification exports of a student is kept for the next student with the same code, weights and settings.

    The export is three quarters of a verification, and most tests verify copies of one bundle with another fault. Tests
    of the exporter itself call it directly. Torch reads its table of operators for every export, from 500 functions.
    """
    import onnx
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from kdexport.diagnose import bisect
    from kdexport.graph import export
    from kdexport.verify import rebuilt_graphs

    made: dict[tuple[object, ...], bytes] = {}
    export_onnx = export.export_onnx

    def exported(module: Any, path: Path, **settings: Any) -> onnx.ModelProto:
        key = _export_key(module, settings)
        if key not in made:
            export_onnx(module, path, **settings)
            made[key] = path.read_bytes()
        path.write_bytes(made[key])
        return onnx.load(str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        for user in (export, rebuilt_graphs, bisect):
            patch.setattr(user, "export_onnx", exported)
        yield


def _export_key(module: Any, settings: dict[str, Any]) -> tuple[object, ...]:
    import torch

    kinds = (bool, int, float, str, tuple, list, type(None))
    plain = [
        {name: value for name, value in vars(each).items() if isinstance(value, kinds)} for each in module.modules()
    ]
    hasher = hashlib.sha256(repr((str(module), plain, settings)).encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        hasher.update(repr((name, tensor.dtype, tensor.shape)).encode())
        hasher.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    # The classes themselves: one that was imported again has other code.
    return (*(type(each) for each in module.modules()), hasher.hexdigest())


Command = Callable[..., Outcome]


def run_command(*arguments: str | Path, cwd: Path | None = None, module: str = "kdexport") -> Outcome:
    """Run ``python -m kdexport`` as a user would, in a process of its own."""
    environment = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False, timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def kdexport() -> Command:
    """``kdexport("build", ...)``."""
    return run_command


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """``here("build", ...)`` in this process: for what a command says, where another one would only import torch again.

    Both streams are captured below Python, so that what native libraries print is seen too.
    """
    from kdexport.__main__ import main

    def run(*arguments: str | Path, cwd: Path | None = None, columns: int = 160) -> Outcome:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["kdexport", *map(str, arguments)])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        return Outcome(int(left.value.code or 0), said.out, said.err)

    return run


@dataclass(frozen=True)
class Built:
    """A bundle with everything it was built from."""

    bundle: Path
    config: Path
    workspace: Path
    checkpoint: Path


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills for all test processes: the first one does, the others wait for it."""
    base = factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder of its own in one that they share.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle of a one-epoch student, built by the real command."""
    root = made_once(tmp_path_factory, "built", _build)
    checkpoint = next((root / "ws" / "train").glob("[!.]*/student"))
    return Built(root / "bundle", root / "tiny.toml", root / "ws", checkpoint)


def _build(root: Path) -> None:
    config = root / "tiny.toml"
    config.write_text(CONFIG)
    done = run_command(
        "build", "--config", config, "--out", root / "bundle", "--workspace", root / "ws", "--target",
        "onnx-fp32,trt-rtx-fp16",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr


def build_targets(built: Built, targets: Sequence[str], out: Path) -> Path:
    """Build the student of ``built``, which is trained and exported already, for other targets, in this process."""
    from kdexport.api import build

    build(
        config=built.config, checkpoint=built.checkpoint, workspace=built.workspace, out=out, targets=targets,
        quiet=True,
    )  # fmt: skip
    return out


@pytest.fixture
def bundle_copy(built: Built, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(built.bundle, tmp_path / "bundle"))
