"""Networks by reference: ``torchvision:NAME``, ``timm:NAME``, ``MODULE:FACTORY`` or the path of a .pt2 file."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdexport.errors import ConfigError

Kind = Literal["torchvision", "timm", "factory", "program"]

#: Ends of the names of files with weights; a text with another end is the name of a library's weights.
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A network that is not registered; ``name`` is what follows the library, the factory, or the path of a file."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.kind in ("torchvision", "timm") else self.name

    @property
    def label(self) -> str:
        """The reference without the folders of this machine, for bundles and file names."""
        return Path(self.name).name if self.kind == "program" else str(self)

    @property
    def folder_name(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^\w.\-]+", "-", self.label.removesuffix(".pt2"))


def parse_reference(text: str) -> Reference | None:
    """The reference that ``text`` is; None for a text that can only be a registered name.

    Raises ``ConfigError`` for a text with a colon that is not a reference.
    """
    library, colon, name = text.partition(":")
    if library == "torchvision" and name:
        return Reference(kind="torchvision", name=name)
    if library == "timm" and name:
        return Reference(kind="timm", name=name)
    if text.endswith(".pt2"):
        return Reference(kind="program", name=text)
    if _FACTORY.fullmatch(text):
        return Reference(kind="factory", name=text)
    if colon or text.endswith(WEIGHT_FILES) or "/" in text:
        raise ConfigError(
            f"{text!r} is neither a registered name nor a reference to a network.",
            remedy="Pass a registered name (`kdexport list students`), torchvision:NAME, timm:NAME, MODULE:FACTORY, or "
            "a .pt2 file. Files of weights are passed with --weights.",
        )
    return None


def weights_file(weights: str | None) -> Path | None:
    """The file that ``weights`` names; None for the name of a library's weights."""
    if weights is None or not (weights.endswith(WEIGHT_FILES) or "/" in weights or Path(weights).is_file()):
        return None
    return Path(weights)
