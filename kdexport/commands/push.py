"""`kdexport push`: send a verified bundle to the Hugging Face Hub or to an OCI registry."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import new_console, print_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdexport.sharing.transfer import SentFile


def push(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    place: Annotated[str, typer.Argument(help="hf://OWNER/NAME or oci://HOST/NAME:TAG.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent; send nothing.")] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository on the Hub readable by its owner only.")
    ] = False,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Send a verified bundle to the Hugging Face Hub or to an OCI registry; its README.md is the model card."""
    from kdexport.core.progress import Reporter
    from kdexport.sharing.places import parse_place
    from kdexport.sharing.transfer import files_to_send
    from kdexport.sharing.transfer import push as send

    target = parse_place(place, pushes=True)
    files = files_to_send(bundle)
    url = ""
    if not dry_run:
        with Reporter().stage("push") as progress:
            url = send(bundle, target, files, private=private, progress=progress)
    if as_json:
        described = {"place": str(target), "dry_run": dry_run, "files": [file.to_json() for file in files]}
        print_answer({**described, "bytes": sum(file.bytes for file in files), **({"url": url} if url else {})})
        return
    _show(files, str(target), url)


def _show(files: "Sequence[SentFile]", place: str, url: str) -> None:
    from kdexport.core.tables import Table, terminal_table

    console = new_console()
    rows = tuple((file.name, f"{file.bytes:,}", file.sha256[:12]) for file in files)
    console.print(terminal_table(Table(header=("file", "bytes", "sha256"), rows=rows)))
    total = f"{len(files)} files, {sum(file.bytes for file in files):,} bytes"
    done = f"Sent to {url}" if url else f"Would be sent to {place}; nothing was sent"
    console.print(f"{total}. {done}.", soft_wrap=True)
