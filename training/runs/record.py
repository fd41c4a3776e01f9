"""The records of a run folder: the recipe that it belongs to, and each machine and commit that ran it."""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

from kdexport.core.digests import tool_versions
from kdexport.core.files import write_bytes, write_text
from kdexport.errors import ConfigError, StorageError
from training import REVISION
from training.recipe import Recipe, plugin_digests
from training.runs.state import STATE

_INPUTS_FILE, _RECORD = "inputs.json", "recipe.json"
#: In the record: the epochs after which the run was extended.
_EXTENDED = "extended_from"
#: What a run reads, by the key of its digest.
_INPUTS = {"dataset_sha256": "data set", "teacher_sha256": "teacher"}
#: What is in a run folder once something was trained in it.
_TRAINED = (STATE, "metrics.jsonl", f"teacher/{STATE}", "teacher/model.safetensors", "model.safetensors", "student")
_PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow", "safetensors")


def claim(directory: Path, recipe: Recipe, job: str) -> None:
    """Make ``directory`` the folder of this run; another recipe could not continue there without mixing two runs.

    A recipe that differs only by more epochs extends the run, and the record says after how many epochs. Raises
    ``ConfigError`` if the folder belongs to another recipe, job or revision of the code, and ``StorageError`` if it
    cannot be written.
    """
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        # TensorBoard and safetensors write only to paths that are text.
        raise ConfigError(f"The path {str(directory)!a} is not text in UTF-8.", remedy="Pass another --out.") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        different = difference(directory, recipe, job)
        before = _epochs_to_extend(directory, recipe, job) if different else None
        if before is not None:
            # Apart from its epochs the run must be the same.
            different = difference(directory, _with_epochs(recipe, job, before), job)
        if different:
            weights = directory / "teacher" / "model.safetensors"
            teacher = f" To use its teacher: --teacher-checkpoint {weights}" if weights.is_file() else ""
            raise ConfigError(
                f"{directory} belongs to another run: {different}.",
                remedy=f"Pass another --out, or remove the folder.{teacher}",
            )
        if before is not None:
            described = {**_described(recipe, job), _EXTENDED: [*extensions(directory), before]}
            write_text(directory / _RECORD, json.dumps(described, indent=2))
        if not (directory / _RECORD).is_file():
            write_text(directory / _RECORD, json.dumps(_described(recipe, job), indent=2))
    except OSError as error:
        raise StorageError(f"Cannot write {directory}: {error.strerror}.", remedy="Pass another --out.") from error


@contextmanager
def claimed_if_trained(directory: Path, *, writes: bool) -> Iterator[None]:
    """Let the block claim ``directory``; if it fails before anything is trained there, its records are as before.

    Otherwise the folder would belong to a recipe that the error asks to correct. ``writes`` is for the one of several
    processes that writes the records.
    """
    records = [directory / name for name in (_RECORD, _INPUTS_FILE)]
    before = [path.read_bytes() if path.is_file() else None for path in records]
    trained = _times_of_training(directory)
    try:
        yield
    except BaseException:
        if writes and _times_of_training(directory) == trained:
            # The error of the block is what the user has to see.
            with suppress(OSError):
                for path, content in zip(records, before, strict=True):
                    if content is None:
                        path.unlink(missing_ok=True)
                    else:
                        write_bytes(path, content)
        raise


def _times_of_training(directory: Path) -> dict[str, int]:
    """When each result of a training in ``directory`` was written, in nanoseconds."""
    return {name: (directory / name).stat().st_mtime_ns for name in _TRAINED if (directory / name).exists()}


def difference(directory: Path, recipe: Recipe, job: str) -> str:
    """The first difference between the run in ``directory`` and this one; empty if there is no run, or the same."""
    record = directory / _RECORD
    if not record.is_file():
        return ""
    try:
        there = _flattened(dict(json.loads(record.read_text())))
    except (ValueError, TypeError):
        return "its recipe.json is not valid JSON"
    there.pop(_EXTENDED, None)
    here = _flattened(_described(recipe, job))
    for key in dict.fromkeys((*here, *there)):
        if there.get(key) != here.get(key):
            values = [f"{side[key]!r}" if key in side else "missing" for side in (there, here)]
            return f"{key.removeprefix('recipe.')} is {values[0]} there and {values[1]} in this run"
    return ""


def extensions(directory: Path) -> tuple[int, ...]:
    """The numbers of epochs for which the run in ``directory`` was planned before it was extended."""
    found = _read_json(directory / _RECORD).get(_EXTENDED)
    return tuple(found) if isinstance(found, list) else ()


def _epochs_to_extend(directory: Path, recipe: Recipe, job: str) -> int | None:
    """The epochs of the run in ``directory``, if it has begun and this one has more of them; otherwise None."""
    if not (directory / STATE).is_file():
        return None
    table = "train" if job == "student" else "teacher"
    before = _flattened(_read_json(directory / _RECORD)).get(f"recipe.{table}.epochs")
    return before if isinstance(before, int) and before < getattr(recipe, table).epochs else None


def _with_epochs(recipe: Recipe, job: str, epochs: int) -> Recipe:
    table = "train" if job == "student" else "teacher"
    return recipe.model_copy(update={table: getattr(recipe, table).model_copy(update={"epochs": epochs})})


def claim_input(directory: Path, key: str, sha256: str, place: str) -> None:
    """Record the digest of the data set (``dataset_sha256``) or of the weights (``teacher_sha256``) of a run.

    ``place`` is where these lie now, for the message: the recipe does not tell, because places may change. Raises
    ``ConfigError`` if the run in ``directory`` started with others, and ``StorageError`` if it cannot be written.
    """
    recorded = recorded_inputs(directory)
    if recorded.get(key, sha256) != sha256:
        raise ConfigError(
            f"{directory} belongs to a run with another {_INPUTS[key]}: its sha256 is {recorded[key][:12]}... there "
            f"and {sha256[:12]}... in this run ({place}).",
            remedy="Pass another --out (for a table, another --runs), remove the folder, or pass the "
            f"{_INPUTS[key]} of that run.",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if _read_json(directory / _INPUTS_FILE).get(key) != sha256:
            write_text(directory / _INPUTS_FILE, json.dumps({**recorded, key: sha256}, indent=2))
    except OSError as error:
        raise StorageError(f"Cannot write {directory}: {error.strerror}.", remedy="Pass another --out.") from error


def recorded_inputs(directory: Path) -> dict[str, str]:
    """The digests of what the run in ``directory`` reads, by their keys; without those that are not known yet.

    A run of an earlier version has them only in its student, once an epoch is finished.
    """
    found = _read_json(directory / _INPUTS_FILE)
    for folder in ("best", "student"):
        provenance = _read_json(directory / folder / "student.json").get("provenance")
        found = {**(provenance if isinstance(provenance, dict) else {}), **found}
    return {key: str(found[key]) for key in _INPUTS if found.get(key)}


def _read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise ConfigError(
            f"{path} is not a JSON object.",
            remedy="Pass another --out (for a table, another --runs), or remove the folder.",
        ) from None


def _described(recipe: Recipe, job: str) -> dict[str, Any]:
    plugins = plugin_digests(recipe)
    described = {"job": job, "revision": REVISION, "recipe": recipe.identity()}
    return described | ({"plugins": plugins} if plugins else {})


def described_run(recipe: Recipe, job: str) -> dict[str, Any]:
    """What identifies a run, as values by dotted keys; lists are JSON."""
    flat = _flattened(_described(recipe, job))
    return {key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in flat.items()}


def _flattened(value: Any, path: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flattened(item, f"{path}.{key}" if path else str(key))
    return flat


def note_environment(directory: Path, device: str, processes: int) -> None:
    """Add an entry for this machine to ``directory``/environment.json, which has one for each start of the run."""
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
    """The entries of ``note_environment``, oldest first; empty if there is no such file."""
    path = directory / "environment.json"
    if not path.is_file():
        return []
    try:
        return [dict(entry) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError):
        raise ConfigError(
            f"{path} is not a JSON list of the starts of this run.", remedy="Remove this file; it is only a record."
        ) from None


def source_commit() -> str:
    """The git commit of this code, with ``+changes`` if files differ from it; empty outside a checkout."""
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
    """The name of the GPU, or of the processor with its number of threads; no name or path of the machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"
