"""`kdexport pull`: fetch a bundle from the Hugging Face Hub or from an OCI registry."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import new_console, print_answer


def pull(
    place: Annotated[str, typer.Argument(help="hf://OWNER/NAME[@REVISION] or oci://HOST/NAME:TAG[@sha256:DIGEST].")],
    out: Annotated[Path, typer.Option(help="Folder for the bundle; an older bundle there is replaced.")],
    signature: Annotated[
        Path | None, typer.Option(metavar="PEM", help="Public key or root certificate; refuse another signature.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch a bundle; it appears at --out when every file has the digest of its manifest."""
    from kdexport.core.progress import Reporter
    from kdexport.sharing.places import parse_place
    from kdexport.sharing.transfer import pull as fetch

    target = parse_place(place, pushes=False)
    with Reporter().stage("pull") as progress:
        manifest, signer = fetch(target, out, trusted=signature, progress=progress)
    if as_json:
        signed_by = {} if signer is None else {"signed_by": signer.to_json()}
        facts = {"student": manifest.spec.student, "targets": list(manifest.targets), "files": len(manifest.files)}
        print_answer({"place": str(target), "bundle": str(out), **facts, **signed_by})
        return
    console = new_console()
    if signer is not None:
        console.print(f"Signature: {signer.files} files, by {signer}.", soft_wrap=True)
    console.print(
        f"{out}: {manifest.spec.student}, {', '.join(manifest.targets)}; {len(manifest.files)} files as in its "
        "manifest.", soft_wrap=True,
    )  # fmt: skip
    console.print(f"Next:    kdexport doctor {out}", soft_wrap=True)
