"""The name of a model: one rule for the server and for Triton repositories, so that a bundle keeps its name."""

import re
from pathlib import Path

from kdexport.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def default_name(bundle: Path) -> str:
    """The name of a model that was given none: that of its folder."""
    return bundle.resolve().name


def require_name(name: str, remedy: str) -> None:
    """Raise ``ConfigError`` for a name that cannot be part of a URL, a file name and a metric."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a valid model name: 1 to 128 letters, digits, dots, dashes and underscores are allowed, "
            "and the first must be a letter or digit.",
            remedy=remedy,
        )
