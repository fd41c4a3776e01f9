"""`kdexport replay`: make the weights and graphs of a bundle again from its unfused student, and compare."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def replay(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    out: Annotated[Path | None, typer.Option(help="New folder for the rebuilt files.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rebuild the folded weights and every ONNX file from the unfused student, and compare them with the bundle's own.

    Exits with 1 if one differs.
    """
    from kdexport.bundle.manifest import read_manifest
    from kdexport.core.progress import Reporter
    from kdexport.verify.rebuilt_files import DIFFERENT, rebuild_files

    manifest = read_manifest(bundle)
    with Reporter().stage("replay") as progress:
        files = rebuild_files(bundle, manifest, out, progress)
    failed = any(file.outcome == DIFFERENT for file in files)
    if as_json:
        print_answer({"files": [file.to_json() for file in files]}, exit_code=int(failed))
    else:
        from kdexport.commands.render import show_rebuilt

        show_rebuilt(bundle, files)
    if failed:
        raise typer.Exit(1)
