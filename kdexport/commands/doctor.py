"""`kdexport doctor`: what this machine can build and run, and whether it can serve a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; check whether this machine can serve it.")] = None,
    target: Annotated[str, typer.Option(help="The target of the bundle to serve.")] = "onnx-fp32",
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine can build and run, and what is missing; or whether it can serve BUNDLE."""
    from kdexport.diagnose.environment import examine, examine_bundle

    facts = examine() if bundle is None else examine_bundle(bundle, target=target)
    if as_json:
        print_answer({"facts": [{"what": f.what, "ok": f.ok, "fact": f.fact} for f in facts]})
        return
    from kdexport.commands.render import show_facts

    show_facts(facts)
