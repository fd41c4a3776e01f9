"""The cells of a results table: recipes with seeds, how each is run, and its result as read from its folder."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.core.digests import digest, sha256_file
from kdexport.core.files import write_text
from kdexport.data.datasets import dataset_digest
from kdexport.errors import ConfigError, KdexportError, ReparamError, TrainingError, first_line
from training.recipe import Recipe, load_recipe, plugin_digests
from training.runs.record import claim_input, difference, read_environment, recorded_inputs
from training.shipped_recipes import shipped_names

_FAILURE = "failure.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One run: a recipe with the name of its row, one seed, and the folder of the run."""

    name: str
    recipe: Recipe
    seed: int
    directory: Path

    @property
    def pair(self) -> str:
        """Teacher and student, as a heading."""
        return f"{self.recipe.teacher.name} to {self.recipe.student.name}"

    @property
    def method(self) -> str:
        """The last part of the recipe's name, which is different for each variant of a distiller."""
        return Path(self.name).name.removesuffix(".toml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a cell: top-1 in percent after its last and its best epoch, or the reason for its absence.

    ``state`` is "not run", "unfinished", "failed" or "done"; only "done" has numbers.
    """

    cell: Cell
    state: str
    epochs: int = 0
    last: float | None = None
    best: float | None = None
    teacher: float | None = None
    device: str = ""
    date: str = ""
    commit: str = ""
    message: str = ""


def plan(patterns: Sequence[str], seeds: Iterable[int], runs: Path, overrides: dict[str, Any]) -> list[Cell]:
    """Cells ordered by seed, so that an unfinished table already compares all recipes.

    Raises ``ConfigError`` for a pattern without a recipe, and for a recipe that is selected twice.
    """
    names = [name for pattern in patterns for name in _matching(pattern)]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise ConfigError(f"--recipes selects {repeated} twice.", remedy="Narrow the patterns of --recipes.")
    cells = []
    for seed in seeds:
        for name in names:
            recipe = load_recipe(name, overrides)
            seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
            folder = runs / name.removesuffix(".toml").lstrip("./") / f"seed{seed}"
            cells.append(Cell(name=name, recipe=seeded, seed=seed, directory=folder))
    return cells


def _matching(pattern: str) -> list[str]:
    if pattern.endswith(".toml"):
        return [pattern]
    found = [name for name in shipped_names() if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ConfigError(
            f"No recipe matches {pattern!r}.",
            remedy="Run kdexport list recipes for the names of all recipes.",
        )
    return found


def teacher_directory(cell: Cell, runs: Path) -> Path:
    """The folder of the teacher that all cells with the same teacher, data and protocol share."""
    parts = {key: table for key, table in cell.recipe.identity().items() if key in ("data", "teacher", "train")}
    # Seed, epochs and learning rate of the student do not affect the teacher.
    parts["train"] = {k: v for k, v in parts["train"].items() if k not in ("seed", "epochs", "learning_rate")}
    sources = plugin_digests(cell.recipe)
    if "teacher" in sources:
        parts["plugin"] = sources["teacher"]
    return runs / "teachers" / f"{cell.recipe.teacher.name}-{digest(parts)[:12]}"


def run_cell(cell: Cell, runs: Path, distil: Callable[[Recipe, Path, Path], object]) -> None:
    """Run or continue ``cell``; if it diverges or cannot be folded, its folder notes that, and it is not repeated."""
    if read(cell).state in ("done", "failed"):
        require_same_inputs(cell, runs)
        return
    try:
        distil(cell.recipe, cell.directory, teacher_directory(cell, runs))
    except (TrainingError, ReparamError) as error:
        note_failure(cell, error)


def require_same_inputs(cell: Cell, runs: Path) -> None:
    """Raise ``ConfigError`` if ``cell`` ran with another data set or other teacher weights than those given now."""
    recorded = recorded_inputs(cell.directory)
    if "dataset_sha256" in recorded:
        spec = cell.recipe.data.spec()
        sha256 = dataset_digest(spec, cell.directory / "dataset")
        claim_input(cell.directory, "dataset_sha256", sha256, spec.root or spec.name)
    weights = Path(cell.recipe.teacher.checkpoint or teacher_directory(cell, runs) / "model.safetensors")
    if "teacher_sha256" in recorded and weights.is_file():
        claim_input(cell.directory, "teacher_sha256", sha256_file(weights), str(weights))


def require_one_data_set(cells: Sequence[Cell]) -> None:
    """Raise ``ConfigError`` if two cells of one table ran on different data sets of the same name."""
    seen: dict[str, tuple[str, Path]] = {}
    for cell in cells:
        sha256 = recorded_inputs(cell.directory).get("dataset_sha256")
        if sha256 is None:
            continue
        first, folder = seen.setdefault(cell.recipe.data.name, (sha256, cell.directory))
        if sha256 != first:
            raise ConfigError(
                f"The runs {folder} and {cell.directory} are of different data sets: sha256 {first[:12]}... and "
                f"{sha256[:12]}...",
                remedy="Pass --recipes or --seeds with runs of one data set, or remove the folder of the other.",
            )


def note_failure(cell: Cell, error: KdexportError) -> None:
    """Write why ``cell`` has no result; to run it again, remove that file."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"code": error.code, "message": error.message, "remedy": error.remedy})
    write_text(cell.directory / _FAILURE, text)


def read(cell: Cell) -> Result:
    """The result of ``cell`` from its folder; raises ``ConfigError`` if the folder belongs to another run."""
    folder = cell.directory
    different = difference(folder, cell.recipe, "student")
    if different:
        raise ConfigError(
            f"{folder} belongs to another run: {different}.",
            remedy="Pass another --runs, or the same overrides as for that run.",
        )
    try:
        return _result(cell)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"The results in {folder} cannot be read ({type(error).__name__}: {first_line(error)}).",
            remedy="Copy the folder from its source again, or remove it to run the cell again.",
        ) from error


def _result(cell: Cell) -> Result:
    folder = cell.directory
    metrics, failure = folder / "metrics.jsonl", folder / _FAILURE
    if failure.is_file():
        return Result(cell=cell, state="failed", message=str(json.loads(failure.read_text())["message"]))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    described = folder / "student" / "student.json"
    if not described.is_file():
        return Result(cell=cell, state="unfinished" if lines else "not run", epochs=len(lines))
    measured = json.loads(described.read_text())["provenance"]["metrics"]
    latest: dict[str, Any] = next(reversed(read_environment(folder)), {})
    return Result(
        cell=cell,
        state="done",
        epochs=len(lines),
        last=100 * float(measured["top1"]),
        best=100 * max(float(line["top1"]) for line in lines),
        teacher=100 * float(measured["teacher_top1"]) if "teacher_top1" in measured else None,
        device=str(latest.get("device", "")),
        date=str(latest.get("started", ""))[:10],
        commit=str(latest.get("commit", "")),
    )
