import subprocess
import sys
from pathlib import Path

import pytest

from kdexport import reparam

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx", "sklearn", "training")
MODULES = [
    "", ".errors", ".registry", ".config", ".targets", ".data.datasets", ".data.preprocessing", ".checkpoint",
    ".core.digests", ".cli", ".bundle.manifest", ".serving.server", ".timing.session", ".pipeline",
]  # fmt: skip


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", [f"kdexport{name}" for name in MODULES])
def test_a_module_imports_no_heavy_library(module: str) -> None:
    assert not imported_by(f"import {module}") & set(HEAVY)


def test_the_check_would_notice_torch() -> None:
    assert "torch" in imported_by("import kdexport.reparam.algebra")


def test_torchvision_waits_for_a_network_that_needs_it() -> None:
    """It takes as long to import as torch, and so would every command."""
    assert "torchvision" not in imported_by("import kdexport.students, kdexport.pipeline, training.teachers")
    large = "from kdexport.students import STUDENTS; STUDENTS.build('resnet18', num_classes=2, image_size=224)"
    assert "torchvision" in imported_by(large)


@pytest.mark.parametrize("name", sorted(reparam.__all__))
def test_every_public_name_that_waits_for_its_first_use_is_there(name: str) -> None:
    assert getattr(reparam, name).__name__ == name


#: What only some systems have: macOS has no affinity masks, and Windows has little of the rest.
ABSENT = """
import os, select, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (os, ("sched_getaffinity", "sched_setaffinity", "getloadavg", "getuid", "geteuid", "mkfifo", "fork", "uname")),
    (signal, ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM")),
):
    for name in names:
        delattr(module, name)
"""


@pytest.mark.parametrize("package", ["kdexport", "training"])
def test_every_module_is_imported_where_the_system_lacks_what_only_linux_has(package: str) -> None:
    """Our modules alone: the libraries that they import have loaded before."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__main__.py"
    ]
    libraries = "import torch, torchvision, onnx, onnxruntime, scipy.stats, typer, pydantic, tensorboard\n"
    later = "import importlib\nfor name in {names}: importlib.import_module(name)\n"
    # The first imports bring every library; then ours are imported again, without what is absent.
    forget = f"for name in [n for n in sys.modules if n.partition('.')[0] == '{package}']: del sys.modules[name]\n"
    every = later.format(names=names)
    code = f"{libraries}{every}{ABSENT}{forget}{every}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
