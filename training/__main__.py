"""``python -m training``: train a teacher, distil a student, evaluate a checkpoint, print a resolved recipe."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.checkpoint import sha256_file
from kdexport.console import guarded
from kdexport.fingerprint import dataset_digest
from training import REVISION
from training.recipe import Recipe, load_recipe, merge_overrides, parse_override, recipe_names

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe by name, or a TOML file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.epochs=30.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Where the data set lies; overrides data.root.")]
TeacherOption = Annotated[
    str | None, typer.Option("--teacher-checkpoint", help="Teacher weights, .pt or .safetensors.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Run folder: state, metrics, result. Continues what is there.")]


def _resolve(recipe: str, overrides: list[str] | None, data: str | None, teacher: str | None) -> Recipe:
    tables: list[dict[str, Any]] = [parse_override(item) for item in overrides or []]
    if data is not None:
        tables.append({"data": {"root": data}})
    if teacher is not None:
        tables.append({"teacher": {"checkpoint": teacher}})
    return load_recipe(recipe, merge_overrides(tables))


@app.command()
def teacher(recipe: RecipeOption, out: OutOption, set_: SetOption = None, data: DataOption = None) -> None:
    """Train the recipe's teacher."""
    from training.rehearsal import rehearse
    from training.train import make_accelerator, train_teacher

    resolved = _resolve(recipe, set_, data, None)
    rehearse(resolved)
    accelerator = make_accelerator(resolved.train)
    with accelerator.main_process_first():
        _claim(out, resolved, "teacher")
    metrics = train_teacher(resolved, out)
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(metrics) + "\n")


@app.command()
def train(
    recipe: RecipeOption,
    out: OutOption,
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
) -> None:
    """Distil the recipe's student; without teacher weights the teacher is trained first, in the same run."""
    from training.rehearsal import rehearse
    from training.train import Origin, make_accelerator, train_student, train_teacher

    resolved = _resolve(recipe, set_, data, teacher_checkpoint)
    rehearse(resolved)
    accelerator = make_accelerator(resolved.train)
    with accelerator.main_process_first():
        _claim(out, resolved, "student")
        dataset = dataset_digest(resolved.data.spec(), out / "dataset")
    if not resolved.teacher.checkpoint:
        weights = out / "teacher" / "model.safetensors"
        if not weights.is_file():
            train_teacher(resolved, out / "teacher")
        resolved = resolved.model_copy(
            update={"teacher": resolved.teacher.model_copy(update={"checkpoint": str(weights)})}
        )
    checkpoint = Path(resolved.teacher.checkpoint)
    digest = sha256_file(checkpoint) if checkpoint.is_file() else ""
    metrics = train_student(resolved, out, Origin(dataset_sha256=dataset, teacher_sha256=digest))
    if accelerator.is_main_process:
        sys.stdout.write(json.dumps(metrics) + "\n")


@app.command()
def evaluate(
    recipe: RecipeOption,
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="A student folder; else the teacher.")] = None,
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
) -> None:
    """Print the top-1 of a student checkpoint, or of the teacher's, on the test split."""
    from training.train import evaluate_student, evaluate_teacher

    resolved = _resolve(recipe, set_, data, teacher_checkpoint)
    value = evaluate_teacher(resolved) if checkpoint is None else evaluate_student(resolved, checkpoint)
    sys.stdout.write(json.dumps({"top1": value}) + "\n")


@app.command()
def resolve(
    recipe: RecipeOption, set_: SetOption = None, data: DataOption = None, teacher_checkpoint: TeacherOption = None
) -> None:
    """Print the complete recipe as JSON, with the revision of the code that would run it."""
    resolved = _resolve(recipe, set_, data, teacher_checkpoint).model_dump(mode="json")
    sys.stdout.write(json.dumps({"revision": REVISION, "recipe": resolved}) + "\n")


@app.command()
def architectures(
    out: Annotated[Path | None, typer.Option("--out", help="Write the page there instead of printing it.")] = None,
) -> None:
    """Print the table of every student and teacher, measured from the networks, as Markdown."""
    from training.architectures import markdown

    if out is None:
        sys.stdout.write(markdown())
    else:
        out.write_text(markdown(), encoding="utf-8")


@app.command()
def names(kind: Annotated[str, typer.Argument(help="teachers, distillers or recipes.")]) -> None:
    """Print registered names as a JSON list."""
    from kdexport.errors import UnknownNameError
    from kdexport.registry import nearest
    from training.distillers import DISTILLERS
    from training.teachers import TEACHERS

    known = {"teachers": TEACHERS.names, "distillers": DISTILLERS.names, "recipes": recipe_names}
    if kind not in known:
        raise UnknownNameError(f"There is no list of {kind!r}.", remedy=nearest(kind, known))
    sys.stdout.write(json.dumps(list(known[kind]())) + "\n")


def _claim(out: Path, recipe: Recipe, job: str) -> None:
    """A run folder belongs to one recipe: continuing it with another would mix two runs."""
    from kdexport.errors import ConfigError, StorageError

    tables = recipe.model_dump(mode="json")
    # Places may change between two calls; what lies there is the same by the digests of the caller.
    tables["data"].update(root="", workers=0)
    tables["teacher"].update(checkpoint="")
    described = {"job": job, "recipe": tables}
    record = out / "recipe.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if record.is_file():
            if json.loads(record.read_text()) == described:
                return
            raise ConfigError(
                f"{out} holds a run of another recipe.", remedy="Pass another --out, or remove the folder."
            )
        partial = out / ".recipe.json.partial"
        partial.write_text(json.dumps(described, indent=2))
        partial.replace(record)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}.", remedy="Pass another --out.") from error


if __name__ == "__main__":
    guarded(app)
