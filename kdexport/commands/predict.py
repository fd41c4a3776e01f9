"""`kdexport predict`: classify images with a target of a bundle."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import new_console, print_answer
from kdexport.errors import DataError

if TYPE_CHECKING:
    from kdexport.inference.loaded_bundle import Prediction, RefusedImage

ServedTarget = Annotated[str | None, typer.Option(help="Target of the bundle; default onnx-fp32.")]
RuntimeThreads = Annotated[int, typer.Option(min=0, help="Threads of the runtime; 0: the runtime chooses.")]


def predict(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    files: Annotated[list[Path], typer.Argument(help="Image files, and folders of them.")],
    target: ServedTarget = None,
    top: Annotated[int, typer.Option(min=1, help="Classes per image, most probable first.")] = 1,
    threads: RuntimeThreads = 0,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout: file, rank, label, probability.")] = False,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Classify images: labels and probabilities. Files that cannot be read are named; the others are answered."""
    import kdexport
    from kdexport.core.progress import Reporter
    from kdexport.inference.loaded_bundle import RefusedImage

    loaded = kdexport.load(bundle, target=target, threads=threads)
    found: list[Prediction] = []
    refused: list[RefusedImage] = []
    with Reporter().stage("predict") as progress:
        for item in loaded.predict_each(files, top=top):
            if isinstance(item, RefusedImage):
                refused.append(item)
            else:
                found.append(item)
            progress(f"{len(found) + len(refused):,} images")
    if as_json:
        named = [{"source": item.source, "reason": item.error.message} for item in refused]
        exit_code: Literal[0, 2] = 2 if refused else 0
        answers = [item.to_json() for item in found]
        print_answer({"predictions": answers, "refused": named}, exit_code=exit_code)
        raise typer.Exit(exit_code)
    if as_csv:
        sys.stdout.write(_csv(found))
    else:
        _show(found)
    require_none_refused(refused, len(found))


def require_none_refused(refused: "Sequence[RefusedImage]", answered: int) -> None:
    """Raise ``DataError`` with the name of each image that could not be read."""
    if refused:
        reasons = "".join(f"\n  {item.error.message}" for item in refused)
        raise DataError(
            f"{len(refused)} of {len(refused) + answered} images cannot be read; the others were answered.{reasons}",
            remedy="Repair these files, or omit them.",
        )


def _csv(found: "Sequence[Prediction]") -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "rank", "label", "probability"))
    for item in found:
        for rank, (label, probability) in enumerate(item.ranking, 1):
            writer.writerow((item.source, rank, label, f"{probability:.6f}"))
    return text.getvalue()


def _show(found: "Sequence[Prediction]") -> None:
    from kdexport.core.tables import Table, terminal_table

    rows = [
        (item.source if rank == 0 else "", label, f"{probability:.2%}")
        for item in found
        for rank, (label, probability) in enumerate(item.ranking)
    ]
    if rows:
        new_console().print(terminal_table(Table(header=("file", "label", "probability"), rows=tuple(rows))))
