"""`kdexport explain-failure`: from a failed check to the node that is to blame, as files that anybody can run."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.errors import OutputError

if TYPE_CHECKING:
    from kdexport.blame.bisect import Blame


def explain_failure(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or the folder of a failed build.")],
    out: Annotated[Path, typer.Option(help="Folder for the finding and its reproduction.")] = Path("blame"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")] = False,  # noqa: ARG001
) -> None:
    """Bisect a bundle over its stages and nodes: which node is the first that is off, and how.

    Exits with 1 where one was found, with 0 where every stage is right.
    """
    from kdexport.reporter import Reporter

    with Reporter().stage("blame") as progress:
        found = blame_bundle(bundle, out, progress)
    if as_json:
        described = {"ok": found is None, "exit_code": int(found is not None)}
        typer.echo(json.dumps({**described, "blame": None if found is None else found.to_json()}))
    else:
        typer.echo("\n".join(blame_lines(found)))
    if found is not None:
        raise typer.Exit(1)


def blame_bundle(bundle: Path, out: Path, progress: Callable[[str], None]) -> "Blame | None":
    """Explain ``bundle`` into ``out``, which is replaced whole; nothing is written where nothing is wrong."""
    from kdexport.blame.bisect import REPORT, explain, write_blame
    from kdexport.bundle import read_manifest
    from kdexport.workspace import replace_folder, require_replaceable, require_writable

    manifest = read_manifest(bundle)
    try:
        require_replaceable(out, lambda folder: (folder / REPORT).is_file())
    except OutputError as error:
        raise OutputError(
            f"{out} exists and was not written by `kdexport explain-failure`.", remedy=error.remedy
        ) from None
    require_writable(out)
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "blame"
        found = explain(bundle, manifest, made, progress)
        if found is None:
            return None
        found = found.moved(out)
        write_blame(made, found)
        replace_folder(made, out)
    return found


def blame_lines(found: "Blame | None") -> list[str]:
    """What is said about a finding on a terminal."""
    if found is None:
        return ["Every stage from the unfused weights to the files is right on the golden images."]
    lines = [f"Blamed: {found.sentence()}."]
    if found.reproduction:
        lines.append(f"Reproduce: python {found.reproduction}/reproduce.py   (needs onnxruntime alone)")
    return lines
