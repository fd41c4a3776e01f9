"""What a run folder says about itself: the recipe that owns it, and each machine and commit that worked on it."""

import json
import platform
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any

from kdexport.core.digests import tool_versions
from kdexport.core.files import write_text
from kdexport.errors import ConfigError, StorageError
from training import REVISION
from training.recipe import Recipe, plugin_digests

_PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow", "safetensors")


def claim(directory: Path, recipe: Recipe, job: str) -> None:
    """Make ``directory`` the folder of ``recipe``; continuing it with another one would mix two runs.

    Raises ``ConfigError`` where it belongs to another recipe, job or revision of the code, ``StorageError`` where it
    cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not is_owner(directory, recipe, job):
            raise ConfigError(
                f"{directory} holds a run of another recipe, or of code that trains otherwise.",
                remedy="Pass another --out, or remove the folder.",
            )
        if not (directory / "recipe.json").is_file():
            plugins = plugin_digests(recipe)
            described = {"job": job, "revision": REVISION, "recipe": recipe.identity()}
            described |= {"plugins": plugins} if plugins else {}
            write_text(directory / "recipe.json", json.dumps(described, indent=2))
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}.", remedy="Pass another --out.") from error


def is_owner(directory: Path, recipe: Recipe, job: str) -> bool:
    """Whether ``directory`` is free or holds this very run."""
    record = directory / "recipe.json"
    if not record.is_file():
        return True
    try:
        kept = json.loads(record.read_text())
        same = (kept["job"], kept["revision"], kept["recipe"]) == (job, REVISION, recipe.identity())
        return same and bool(kept.get("plugins", {}) == plugin_digests(recipe))
    except (ValueError, KeyError, TypeError):
        return False


def note_environment(directory: Path, device: str, processes: int) -> None:
    """Add this machine to ``directory``/environment.json; a run that was continued has one entry for each start."""
    path = directory / "environment.json"
    entries = read_environment(directory)
    entries.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": device,
            "processes": processes,
            "python": platform.python_version(),
            "versions": tool_versions(*_PACKAGES),
            "commit": source_commit(),
        }
    )
    write_text(path, json.dumps(entries, indent=2))


def read_environment(directory: Path) -> list[dict[str, Any]]:
    """The entries of ``note_environment``, oldest first; none where there is no such file."""
    path = directory / "environment.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def source_commit() -> str:
    """The git commit of this code with ``+changes`` where files differ from it; empty outside of a checkout."""
    root = Path(str(resources.files("training"))).parent
    if not (root / ".git").exists():
        return ""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+changes" if changes else head


def device_name() -> str:
    """The accelerator, or the processor and its threads; no name or path of the machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
