"""Files and modules outside this package that register students, teachers, distillers or backends when imported.

``--plugin``, and ``plugins = [...]`` of an export configuration, add them to ``KDEXPORT_PLUGINS``, which child
processes inherit. An installed package declares a module as an entry point of the group ``kdexport.students``,
``kdexport.teachers``, ``kdexport.distillers`` or ``kdexport.backends``. A registry imports them on its first use.
"""

import functools
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

from kdexport.errors import ConfigError, KdexportError, first_line

#: Plugins of this process and of its children, separated like the folders in PATH; files as absolute paths.
PLUGINS = "KDEXPORT_PLUGINS"

_TRAINING = "training"
_OURS = ("kdexport", _TRAINING)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry was registered."""

    module: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def is_ours(self) -> bool:
        """Whether the module is part of this project and not a plugin."""
        return self.module.partition(".")[0] in _OURS


#: Where every entry of every registry of this process was registered.
_registered: list[Place] = []

#: The plugins that were imported, with the error if one failed: a second import would register its entries twice.
_imported: dict[str, KdexportError | None] = {}


class _UsersTraining(MetaPathFinder):
    """Finds the modules of a user's package ``training`` that ours does not have: it is a likely name for both."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, module = fullname.partition(".")
        # Only our package has a revision.
        if package != _TRAINING or not module or "." in module or not hasattr(sys.modules.get(package), "REVISION"):
            return None
        places = [str(Path(entry or os.curdir) / package) for entry in sys.path]
        return importlib.machinery.PathFinder.find_spec(fullname, places, target)


_FINDER = _UsersTraining()


def share_name() -> None:
    """Let code of the user, which is imported after this, find the modules of its own package ``training`` too."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def name_collision(error: BaseException) -> str:
    """What to do about an import that failed because ``training`` is our package here; empty for another error."""
    if not isinstance(error, ImportError) or (error.name or "").partition(".")[0] != _TRAINING:
        return ""
    return (
        f"kdexport has a package named {_TRAINING} too, whose modules come first: rename your own package or that "
        "module."
    )


def note_registration(place: Place) -> None:
    """Record an entry, so that a plugin that registers nothing is detected."""
    _registered.append(place)


def use_plugins(sources: Iterable[str] | None, folder: Path | None = None) -> None:
    """Add plugins for this process and its children; files are relative to ``folder``, or to the current one.

    Raises ``ConfigError`` if a file or module does not exist.
    """
    chosen = dict.fromkeys(active_plugins())
    for source in sources or ():
        chosen[_located(source, folder or Path.cwd())] = None
    if chosen:
        os.environ[PLUGINS] = os.pathsep.join(chosen)


def active_plugins() -> list[str]:
    """The plugins of ``KDEXPORT_PLUGINS``: files by path, modules by name."""
    return [source for source in os.environ.get(PLUGINS, "").split(os.pathsep) if source]


def has_plugins(*groups: str) -> bool:
    """Whether there are plugins, or installed packages with an entry point of ``groups``; nothing is imported."""
    return bool(active_plugins()) or _are_installed(groups)


@functools.cache
def _are_installed(groups: tuple[str, ...]) -> bool:
    # This reads every folder of installed packages, and the cells of a table call it hundreds of times.
    return any(metadata.entry_points(group=group) for group in groups)


def import_active_plugins() -> None:
    """Import the plugins of ``KDEXPORT_PLUGINS`` that are not imported yet; raises ``ConfigError``."""
    for source in active_plugins():
        located = _located(source, Path.cwd())
        _import(
            f"The plugin {source}",
            located,
            f"Correct it, or omit --plugin {source}.",
        )


def import_installed_plugins(group: str) -> None:
    """Import the modules that installed packages declare in ``group``; raises ``ConfigError``."""
    for entry in metadata.entry_points(group=group):
        package = entry.dist.name if entry.dist is not None else entry.module
        _import(
            f"The plugin {entry.module} (entry point {entry.name!r} of the installed package {package})",
            entry.module,
            f"Update or uninstall the package: pip uninstall {package}.",
        )


def source_digest(module: str) -> str:
    """sha256 of the source of the plugin that contains ``module``: its file, or all Python files of its package."""
    top = sys.modules[module.partition(".")[0]]
    hasher = hashlib.sha256()
    for name, path in _files(top):
        hasher.update(name.encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _files(module: ModuleType) -> list[tuple[str, Path]]:
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    if folders:
        found = [(path.relative_to(folder).as_posix(), path) for folder in folders for path in folder.rglob("*.py")]
        return sorted(found)
    # The path of a file is not part of the digest, because it does not change what the file does.
    return [("", Path(str(module.__file__)))]


def _is_file(source: str) -> bool:
    return source.endswith(".py") or os.sep in source


def _located(source: str, folder: Path) -> str:
    if not _is_file(source):
        _require_module(source)
        return source
    path = (folder / source).resolve()
    if not path.is_file():
        raise ConfigError(f"There is no plugin file {folder / source}.", remedy="Check the path of --plugin.")
    if os.pathsep in str(path):
        raise ConfigError(
            f"The path of the plugin {path} contains {os.pathsep!r}, which separates plugins in {PLUGINS}.",
            remedy=f"Move the file to a folder without {os.pathsep!r} in its path.",
        )
    return str(path)


def _require_module(name: str) -> None:
    parts = name.split(".")
    try:
        found = all(part.isidentifier() for part in parts) and importlib.util.find_spec(parts[0]) is not None
    # Raised for a module without a specification, for example __main__.
    except ValueError:
        found = False
    if not found:
        raise ConfigError(
            f"There is no plugin module {name!r}.",
            remedy="Pass a file, for example --plugin mynet.py, or install the package that has the module.",
        )


def _import(what: str, identity: str, remedy: str) -> None:
    if identity in _imported:
        error = _imported[identity]
        if error is not None:
            raise error
        return
    # Set before the import, because a plugin may use a registry itself.
    _imported[identity] = None
    known_before, count = identity in sys.modules, _registrations()
    share_name()
    try:
        if _is_file(identity):
            _import_file(Path(identity))
        else:
            importlib.import_module(identity)
        # A module that was imported before has already registered its entries.
        if not known_before and _registrations() == count:
            raise ConfigError(
                f"{what} registers no student, teacher, distiller or backend.",
                remedy='Register a factory in it, for example with @STUDENTS.register("mynet").',
            )
    except KdexportError as error:
        _imported[identity] = error
        raise
    # A plugin is foreign code, which may also call sys.exit.
    except (Exception, SystemExit) as error:
        wrapped = ConfigError(
            f"{what} cannot be imported{_line(identity, error)}: {type(error).__name__}: {first_line(error)}",
            remedy=name_collision(error) or remedy,
        )
        _imported[identity] = wrapped
        raise wrapped from error


def _registrations() -> int:
    return sum(not place.is_ours for place in _registered)


def _line(file: str, error: BaseException) -> str:
    """The line of ``file`` that raised ``error``; empty if it was raised elsewhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]})" if lines else ""


class _Uncached(importlib.machinery.SourceFileLoader):
    """Compiles the file on every import: the cache compares only the time in seconds and the size."""

    def get_code(self, fullname: str) -> object:  # type: ignore[override]  # noqa: ARG002
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(path: Path) -> None:
    # Two files of the same name must be two modules.
    name = f"kdexport_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
