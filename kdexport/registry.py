"""Factories by name, found by importing the modules of a package and the plugins: a new entry is one new file."""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.plugins import (
    Place,
    import_active_plugins,
    import_installed_plugins,
    note_registration,
    source_digest,
)  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the names nearest to ``name``, followed by all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[T]):
    factory: Callable[..., T]
    place: Place


class Registry(Generic[T]):
    """Factories by name; modules of ``package`` and plugins register them when they are imported, on first use.

    Plugins are the files and modules given by ``--plugin``, and the entry points of the group ``kdexport.<kind>s`` of
    installed packages (see ``kdexport.plugins``).
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, _Entry[T]] = {}
        self._scanned = False

    @property
    def group(self) -> str:
        """The group of entry points that this registry imports."""
        return f"kdexport.{self.kind}s"

    def register(self, name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator that registers a factory as ``name``; raises ``ConfigError`` if the name is registered already."""
        caller = sys._getframe(1)
        place = Place(str(caller.f_globals.get("__name__")), caller.f_code.co_filename, caller.f_lineno)

        def enter(factory: Callable[..., T]) -> Callable[..., T]:
            if name in self._entries:
                raise ConfigError(
                    f"The {self.kind} {name!r} is registered twice: in {self._entries[name].place}, and in {place}.",
                    remedy="Give one of the two another name.",
                )
            self._entries[name] = _Entry(factory, place)
            note_registration(place)
            return factory

        return enter

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self._scan()
        return tuple(sorted(self._entries))

    def check(self, name: str) -> None:
        """Raise ``UnknownNameError`` unless ``name`` is registered."""
        self._scan()
        if name not in self._entries:
            raise UnknownNameError(
                f"There is no {self.kind} named {name!r}.",
                remedy=f"{nearest(name, self._entries)} Pass --plugin FILE.py for a {self.kind} of your own.",
            )

    def build(self, name: str, **options: object) -> T:
        """Call the factory of ``name``; raises ``UnknownNameError`` with the nearest names."""
        return self.factory(name)(**options)

    def factory(self, name: str) -> Callable[..., T]:
        """The factory of ``name``; raises ``UnknownNameError`` with the nearest names."""
        self.check(name)
        return self._entries[name].factory

    def plugin_digest(self, name: str) -> str:
        """sha256 of the source of the plugin that registered ``name``; empty for an entry of this project."""
        self.check(name)
        place = self._entries[name].place
        return "" if place.is_ours else source_digest(place.module)

    def _scan(self) -> None:
        if not self._scanned:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            import_installed_plugins(self.group)
            self._scanned = True
        # A build configuration may add plugins later.
        import_active_plugins()
