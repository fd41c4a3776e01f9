"""Named factories, found by scanning a package: a new entry is one new file."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kdexport.errors import UnknownNameError


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that points from a wrong name to the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


T = TypeVar("T")


class Registry(Generic[T]):
    """Factories by name; the modules of ``package`` are imported on first use, so that they register themselves."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._factories: dict[str, Callable[..., T]] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that enters a factory under ``name``; a second entry of one name raises ``ValueError``."""

        def enter(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._factories:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._factories[name] = factory
            return factory

        return enter

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._scan()
        return tuple(sorted(self._factories))

    def check(self, name: str) -> None:
        """Raise ``UnknownNameError`` unless ``name`` is registered."""
        self._scan()
        if name not in self._factories:
            raise UnknownNameError(f"There is no {self.kind} named {name!r}.", remedy=nearest(name, self._factories))

    def build(self, name: str, **options: object) -> T:
        """Call the factory of ``name``; raises ``UnknownNameError`` with the nearest names."""
        self.check(name)
        return self._factories[name](**options)

    def _scan(self) -> None:
        if self._scanned:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        self._scanned = True
