"""The input of `kdexport fuse`: a .pt2 file, or a factory of a module that can be imported."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kdexport.errors import ConfigError
from kdexport.origins.factories import call_factory
from kdexport.origins.program_archive import open_archive, require_archive


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Input shapes written as 1,3,224,224. Raises ``ConfigError``."""
    shapes = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"--input {text!r} is not a valid shape.",
                remedy="Write sizes from 1 up, batch first: --input 1,3,224,224",
            )
        shapes.append(tuple(int(part) for part in parts))
    return shapes


def load_source(
    source: str, shapes: Sequence[tuple[int, ...]]
) -> tuple[nn.Module | ExportedProgram, tuple[Tensor, ...] | None]:
    """The program or module that ``source`` names, and its example inputs where it is a module.

    Importing and calling a factory runs its code, which is the user's own. Raises ``CheckpointError`` for a file and
    ``ConfigError`` for a factory that cannot be used.
    """
    colon = ":" in source
    if source.endswith(".pt2") or not colon or "/" in source:
        require_archive(Path(source))
        if shapes:
            raise ConfigError(
                "--input was given with a .pt2 file, which already contains them.", remedy="Omit --input."
            )
        return open_archive(Path(source)), None
    if not shapes:
        raise ConfigError(
            f"{source} was given without the shape of its input.", remedy="For example: --input 1,3,224,224"
        )
    module = call_factory(source)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return module, tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
