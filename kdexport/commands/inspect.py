"""`kdexport inspect`: show the manifest of a bundle, without running anything."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def inspect(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the manifest of a bundle: student, checks, targets; runs nothing.

    Exits with 1 if a file differs from the manifest.
    """
    from kdexport.bundle.manifest import read_manifest, require_unchanged

    manifest = read_manifest(bundle)
    if as_json:
        # Before the manifest is printed, because stdout has one JSON object.
        require_unchanged(bundle, manifest)
        print_answer(manifest.data)
        return
    from kdexport.commands.render import show_manifest

    show_manifest(bundle, manifest)
    require_unchanged(bundle, manifest)
