"""What `kdexport fuse` takes: a .pt2 file, or a factory of a module that can be imported."""

import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from kdexport.errors import ConfigError, UnknownNameError, first_line
from kdexport.registry import nearest
from kdexport.reparam.archive import read_program


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Input shapes written as 1,3,224,224. Raises ``ConfigError``."""
    shapes = []
    for text in texts:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ConfigError(
                f"--input {text!r} is no shape.", remedy="Write sizes from 1 up, batch first: --input 1,3,224,224"
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
    name, colon, attribute = source.rpartition(":")
    if source.endswith(".pt2") or not colon or "/" in source:
        if shapes:
            raise ConfigError(
                "--input was given with a .pt2 file, which knows its inputs.", remedy="Leave --input out."
            )
        return read_program(Path(source)), None
    if not shapes:
        raise ConfigError(f"{source} came without the shape of its input.", remedy="For example: --input 1,3,224,224")
    module = _call(source, _find(name, attribute))
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return module, tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _find(name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    # Importing runs the user's code, which may raise or exit.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{name!r} cannot be imported from {here}: {type(error).__name__}: {first_line(error)}",
            remedy="Run the command where the package lies, or install it; --debug shows where it fails.",
        ) from error
    if not hasattr(module, attribute):
        raise UnknownNameError(
            f"{name} has no {attribute!r}.",
            remedy=nearest(attribute, [item for item in vars(module) if not item.startswith("_")]),
        )
    return getattr(module, attribute)


def _call(source: str, factory: Any) -> nn.Module:
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ConfigError(
            f"{source} is a {type(factory).__name__}, no factory.",
            remedy="Name a function without arguments that returns a module in evaluation mode.",
        )
    try:
        inspect.signature(factory).bind()
        module = factory()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{source}() failed: {type(error).__name__}: {first_line(error)}",
            remedy="It is called without arguments; --debug shows where it fails.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{source}() returned a {type(module).__name__}, no module.", remedy="Return a torch.nn.Module."
        )
    return module
