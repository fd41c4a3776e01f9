"""The runtimes that compile and run graphs: one file for each, all implementing ``base.Backend``."""

from functools import cache
from typing import TYPE_CHECKING

from kdexport.registry import Registry

if TYPE_CHECKING:
    from kdexport.backends.base import Backend

BACKENDS: "Registry[Backend]" = Registry("backend", "kdexport.backends")


@cache
def backend(name: str) -> "Backend":
    """The backend of that name; raises ``UnknownNameError`` with the nearest names."""
    return BACKENDS.build(name)
