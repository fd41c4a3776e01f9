"""``python -m training``: train a teacher, distil a student, fill a table of results, evaluate, print a recipe.

``kdexport train``, ``teacher``, ``evaluate-run`` and ``table`` are the first four of these in an installed package.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.commands.command_line import run
from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import guarded, name_command, print_answer, print_json
from kdexport.core.files import write_text
from kdexport.core.training_process import PROGRAM
from training import REVISION
from training.recipe import Recipe, load_recipe, merge_overrides, parse_override, plugin_digests
from training.shipped_recipes import shipped_names

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _root(context: typer.Context) -> None:
    """Train a teacher, distil a student, fill a table of results, evaluate, print a recipe."""
    name_command(context.invoked_subcommand)


RecipeOption = Annotated[str, typer.Option("--recipe", help="A recipe by name, or a TOML file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.epochs=30.")]
DataOption = Annotated[str | None, typer.Option("--data", help="Folder of the data set; overrides data.root.")]
TeacherOption = Annotated[
    str | None, typer.Option("--teacher-checkpoint", help="Teacher weights: .safetensors, or a file of torch.save.")
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Run folder with state, metrics and result; continues the run there.")
]


def _tables(overrides: list[str] | None, data: str | None, teacher: str | None) -> dict[str, Any]:
    tables: list[dict[str, Any]] = [parse_override(item) for item in overrides or []]
    if data is not None:
        tables.append({"data": {"root": data.removeprefix("folder:")}})
    if teacher is not None:
        tables.append({"teacher": {"checkpoint": teacher}})
    return merge_overrides(tables)


def _resolve(recipe: str, overrides: list[str] | None, data: str | None, teacher: str | None) -> Recipe:
    return load_recipe(recipe, _tables(overrides, data, teacher))


def _print(value: dict[str, Any], *, as_json: bool) -> None:
    """The result on stdout: the answer of ``--json``, or as it is, for the process that started this one."""
    (print_answer if as_json else print_json)(value)


def _numbers(text: str) -> list[int]:
    from kdexport.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise ConfigError(
            f"--seeds must be different whole numbers of 0 or more, separated by commas; got {text!r}.",
            remedy="For example: --seeds 0,1,2",
        )
    return numbers


@app.command()
def teacher(
    recipe: RecipeOption,
    out: OutOption,
    set_: SetOption = None,
    data: DataOption = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the recipe's teacher."""
    from kdexport.core.progress import Reporter
    from training.runs.record import claim, claimed_if_trained, device_name, note_environment
    from training.train import claim_data, claim_start, make_accelerator, rehearse, train_teacher

    resolved = _resolve(recipe, set_, data, None)
    rehearse(resolved)
    accelerator = make_accelerator(resolved.train)
    with claimed_if_trained(out, writes=accelerator.is_main_process):
        with accelerator.main_process_first():
            claim(out, resolved, "teacher")
            claim_start(out, resolved)
            claim_data(out, resolved, Reporter(quiet=not accelerator.is_main_process).say)
        if accelerator.is_main_process:
            note_environment(out, device_name(), accelerator.num_processes)
        metrics = train_teacher(resolved, out)
    if accelerator.is_main_process:
        _print(metrics, as_json=as_json)


@app.command()
def train(
    recipe: RecipeOption,
    out: OutOption,
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil the recipe's student; without teacher weights, first train the teacher in the same run."""
    from training.train import distil, make_accelerator

    resolved = _resolve(recipe, set_, data, teacher_checkpoint)
    metrics = distil(resolved, out)
    if make_accelerator(resolved.train).is_main_process:
        _print(metrics, as_json=as_json)


@app.command()
def table(
    recipes: Annotated[list[str], typer.Option("--recipes", help="Names, TOML files, patterns: 'cifar100/*/*'.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write; a CSV of all runs is written next to it.")],
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs; finished ones are not repeated.")] = Path(
        "runs"
    ),
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0",
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
    plugin: Plugins = None,
    title: Annotated[str, typer.Option("--title")] = "Distillation results",
    parallel: Annotated[
        int,
        typer.Option("--parallel", min=1, max=64, help="Cells that train at once on one GPU."),
    ] = 1,
    report: Annotated[bool, typer.Option("--report", help="Write the table from existing runs; run nothing.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run or continue every cell of a results table, and write the table."""
    from training.study.table import tabulate

    tabulate(
        recipes, out, runs=runs, seeds=_numbers(seeds), overrides=_tables(set_, data, teacher_checkpoint), title=title,
        run=not report, parallel=parallel,
    )  # fmt: skip
    if as_json:
        print_answer({"out": str(out), "csv": str(out.with_suffix(".csv"))})


@app.command("evaluate-run", hidden=True)
@app.command()
def evaluate(
    recipe: RecipeOption,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A student folder; without it, the teacher.")
    ] = None,
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the recall of each class and the confusion matrix as JSON.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print top-1, top-5 and calibration error of a student checkpoint, or of the teacher, on the test split."""
    from training.train import predictions_of_student, predictions_of_teacher

    resolved = _resolve(recipe, set_, data, teacher_checkpoint)
    found, classes = (
        predictions_of_teacher(resolved) if checkpoint is None else predictions_of_student(resolved, checkpoint)
    )
    if report is not None:
        write_text(report, json.dumps(found.report(classes), indent=1) + "\n")
    _print(found.scalars(), as_json=as_json)


@app.command()
def resolve(
    recipe: RecipeOption,
    set_: SetOption = None,
    data: DataOption = None,
    teacher_checkpoint: TeacherOption = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the complete recipe as JSON, with the revision of the code that would run it and the digests of plugins."""
    resolved = _resolve(recipe, set_, data, teacher_checkpoint)
    described = {"revision": REVISION, "recipe": resolved.model_dump(mode="json"), "plugins": plugin_digests(resolved)}
    _print(described, as_json=as_json)


@app.command()
def propose(
    data: Annotated[str, typer.Option("--data", help="Folder of images.")],
    student: Annotated[str, typer.Option("--student", help="Name or reference of the student.")],
    image_size: Annotated[int | None, typer.Option("--image-size", min=8, max=1024)] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe for a folder of images as JSON: its base, its tables and a line of words."""
    from training.photos import BASE, measure
    from training.photos import propose as choose
    from training.recipe import DataSettings

    proposal = choose(measure(DataSettings(name="folder:", root=data)), student, image_size)
    described = {"base": BASE, "tables": proposal.tables, "summary": proposal.summary}
    _print(described, as_json=as_json)


@app.command("quantize-aware", hidden=True)
def quantize_aware(
    job: Annotated[Path, typer.Argument(help="What is trained, as JSON.")],
    out: OutOption,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the int8 graph of a build, which calls this."""
    from training.quantize_aware import QuantizeAwareJob, train_quantize_aware

    _print(train_quantize_aware(QuantizeAwareJob.read(job), out), as_json=as_json)


@app.command()
def architectures(
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the page to this file instead of printing it.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the table of every student and teacher, measured from the networks, as Markdown."""
    from training.study.architectures import markdown

    if out is not None:
        write_text(out, markdown())
    if as_json:
        print_answer({"page": markdown()} if out is None else {"out": str(out)})
    elif out is None:
        sys.stdout.write(markdown())


def _teachers() -> tuple[str, ...]:
    from training.teachers import TEACHERS

    return TEACHERS.names()


def _distillers() -> tuple[str, ...]:
    from training.distillers import DISTILLERS

    return DISTILLERS.names()


@app.command()
def names(
    kind: Annotated[str, typer.Argument(help="teachers, distillers or recipes.")],
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print registered names as a JSON list."""
    from kdexport.errors import UnknownNameError
    from kdexport.registry import nearest

    known = {"teachers": _teachers, "distillers": _distillers, "recipes": shipped_names}
    if kind not in known:
        raise UnknownNameError(f"There is no list of {kind!r} to print.", remedy=nearest(kind, known))
    if as_json:
        print_answer({kind: list(known[kind]())})
    else:
        sys.stdout.write(json.dumps(list(known[kind]())) + "\n")


if __name__ == "__main__":
    guarded(partial(run, app, os.environ.get(PROGRAM)))
