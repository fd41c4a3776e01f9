"""`kdexport evaluate`: the accuracy of a target of a bundle on labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.commands.predict import RuntimeThreads, ServedTarget, require_none_refused
from kdexport.core.console import new_console, print_answer

if TYPE_CHECKING:
    from rich.console import Console

    from kdexport.inference.loaded_bundle import Evaluation
    from kdexport.stats.proportions import Estimate

#: Rows of the tables of classes and of mistakes; --json has all.
_SHOWN = 10


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    data: Annotated[str, typer.Option(help="Images in class folders, with or without splits; CIFAR-100; or digits.")],
    target: ServedTarget = None,
    threads: RuntimeThreads = 0,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Top-1, top-5, each class, confusion and calibration error of a target on labelled images, with intervals."""
    import kdexport
    from kdexport.core.progress import Reporter

    reporter = Reporter()
    loaded = kdexport.load(bundle, target=target, threads=threads)
    with reporter.stage("evaluate") as progress:
        found = loaded.evaluate(data, progress=progress)
    if as_json:
        exit_code = 2 if found.refused else 0
        print_answer(found.to_json(), exit_code=exit_code)
        raise typer.Exit(exit_code)
    _show(found, new_console())
    require_none_refused(found.refused, found.scores.images)


def _show(found: "Evaluation", console: "Console") -> None:
    from kdexport.core.tables import Table, terminal_table

    scores = found.scores
    rows = (
        ("top-1", *_interval(scores.top1)),
        (f"top-{scores.k}", *_interval(scores.topk)),
        ("calibration error", *_interval(scores.calibration_error)),
    )
    console.print(f"{found.target} in {found.execution}: {scores.images:,} images of {found.source}", soft_wrap=True)
    console.print(terminal_table(Table(header=("", "measured", "95 % interval"), rows=rows)))
    seen = [(item, item.recall) for item in scores.classes if item.recall is not None]
    listed = tuple(
        (item.name, str(item.images), *_interval(recall), "" if item.precision is None else f"{item.precision:.2%}")
        for item, recall in sorted(seen, key=lambda pair: pair[1].value)[:_SHOWN]
    )
    console.print()
    header = ("lowest classes", "images", "recognised", "95 % interval", "precision")
    console.print(terminal_table(Table(header=header, rows=listed)))
    mistakes = tuple((true, said, str(count)) for true, said, count in scores.most_confused(_SHOWN))
    if mistakes:
        console.print()
        console.print(terminal_table(Table(header=("class", "taken for", "images"), rows=mistakes)))


def _interval(estimate: "Estimate") -> tuple[str, str]:
    return f"{estimate.value:.2%}", f"{estimate.low:.2%} to {estimate.high:.2%}"
