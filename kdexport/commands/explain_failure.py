"""`kdexport explain-failure`: find the node that makes a check fail, and write it as files that run alone."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Plugins
from kdexport.diagnose.failed_build import blame_bundle, blame_lines


def explain_failure(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or the folder of a failed build.")],
    out: Annotated[Path, typer.Option(help="Folder for the result and its reproduction.")] = Path("blame"),
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")] = False,
) -> None:
    """Find the first node of a bundle that is wrong, by bisection over its stages and nodes.

    Exits with 1 if a fault was found, with 0 if every stage is right.
    """
    from kdexport.core.progress import Reporter

    with Reporter().stage("blame") as progress:
        found = blame_bundle(bundle, out, progress)
    if as_json:
        described = {"ok": found is None, "exit_code": int(found is not None)}
        typer.echo(json.dumps({**described, "blame": None if found is None else found.to_json()}))
    else:
        typer.echo("\n".join(blame_lines(found)))
    if found is not None:
        raise typer.Exit(1)
