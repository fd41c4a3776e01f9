"""`kdexport quickstart`: a complete build on the digits of scikit-learn, from any folder."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.build import build
from kdexport.commands.options import Debug, Json

_NAME = "quickstart"


def quickstart(
    out: Annotated[Path, typer.Option(help="Bundle folder.")] = Path("dist") / _NAME,
    workspace: Annotated[Path, typer.Option(help="Folder in which finished stages are kept.")] = Path(".kdexport"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil, fold, export, verify and package a student on digits, in a few minutes, without fetching data."""
    from kdexport.config import find_config, load_config
    from kdexport.core.progress import Reporter
    from kdexport.targets import parse_target

    path = find_config(_NAME, Path("-"))
    assert path is not None
    able = []
    for name in load_config(path).targets:
        missing = parse_target(name).unavailable()
        if missing is None:
            able.append(name)
        else:
            Reporter().say(f"without {name}: {missing.reason}. {missing.remedy}.")
    build(config=path, target=",".join(able), out=out, workspace=workspace, as_json=as_json, debug=debug)
