"""`kdexport explain-failure`: find the node that makes a check fail, and write it as files that run alone."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer
from kdexport.diagnose.failed_build import blame_bundle, blame_lines


def explain_failure(
    bundle: Annotated[Path, typer.Argument(help="A bundle, or the folder of a failed build.")],
    out: Annotated[Path, typer.Option(help="Folder for the result and its reproduction.")] = Path("blame"),
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the first node of a bundle that is wrong, by bisection over its stages and nodes.

    Exits with 1 if a fault was found, with 0 if every stage is right.
    """
    from kdexport.core.progress import Reporter

    with Reporter().stage("blame") as progress:
        found = blame_bundle(bundle, out, progress)
    if as_json:
        print_answer({"blame": None if found is None else found.to_json()}, exit_code=int(found is not None))
    else:
        typer.echo("\n".join(blame_lines(found)))
    if found is not None:
        raise typer.Exit(1)
