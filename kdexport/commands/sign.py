"""`kdexport sign`: sign the files of a bundle with a key or a certificate."""

from pathlib import Path
from typing import Annotated

import typer

from kdexport.bundle.layout import SIGNATURE
from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def sign(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    key: Annotated[Path, typer.Option(metavar="PEM", help="Private elliptic curve key, without a password.")],
    certificate: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Certificate of the key, followed by those between it and the root."),
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Sign all files of a bundle (OpenSSF model signing); the signature is model.sig in its folder."""
    from kdexport.bundle.signature import sign_bundle

    signer = sign_bundle(bundle, key=key, certificate=certificate)
    if as_json:
        print_answer({"signature": str(bundle / SIGNATURE), "signed_by": signer.to_json()})
        return
    from kdexport.commands.render import show_signed

    show_signed(bundle, signer)
