"""`kdexport inspect`: show the manifest of a bundle, without running anything."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_json


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the manifest of a bundle: student, checks, targets; runs nothing."""
    from kdexport.bundle.manifest import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        print_json(manifest.data)
    else:
        from kdexport.commands.render import show_manifest

        show_manifest(bundle, manifest)
