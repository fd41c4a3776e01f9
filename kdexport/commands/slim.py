"""`kdexport slim`: write the form of a bundle that is deployed."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def slim(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the slim bundle.")],
    target: Annotated[
        str | None, typer.Option(help="Targets to keep, separated by commas; all of the bundle by default.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what serve, doctor, gate and triton need of a bundle, without what only verify reads."""
    from kdexport.bundle.slim_form import write_slim

    names = [] if target is None else [name.strip() for name in target.split(",") if name.strip()]
    written = write_slim(bundle, out, names)
    if as_json:
        print_answer(written.to_json())
    else:
        from kdexport.commands.render import show_slim

        show_slim(written)
