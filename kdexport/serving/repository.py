"""The served models by name and version: a reload replaces the whole table, and running requests keep their model."""

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdexport.bundle.layout import MANIFEST, SIGNATURE
from kdexport.bundle.signature import require_signed
from kdexport.errors import BundleError, ConfigError, KdexportError, RequestError
from kdexport.serving.batch_size import measured_pace
from kdexport.serving.isolated_load import try_bundle
from kdexport.serving.limits import Limits
from kdexport.serving.loading import (
    LoadedModel,
    as_kdexport_error,
    bundle_digest,
    load,
    require_same_contract,
    require_unchanged_files,
    without_library_text,
)
from kdexport.serving.model_names import default_name, require_name
from kdexport.targets import DEFAULT_TARGET

_log = logging.getLogger("kdexport.serving")

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Source:
    """A model's name and its folder: a bundle, or a folder of bundles named 1, 2, 3."""

    name: str
    folder: Path

    def versions(self) -> dict[int, Path]:
        """Bundle folders by version; a single bundle is version 1."""
        if (self.folder / MANIFEST).is_file() or not self.folder.is_dir():
            return {1: self.folder}
        numbered = {int(path.name): path for path in self.folder.iterdir() if _is_version(path.name) and path.is_dir()}
        return numbered or {1: self.folder}


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit() and name[0] != "0" and len(name) < 10


def _facts(path: Path) -> tuple[int, ...] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return (facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size)


def parse_source(argument: str) -> Source:
    """Read ``FOLDER`` or ``NAME=FOLDER``; raises ``ConfigError`` for a name that cannot be part of a URL."""
    name, separator, folder = argument.partition("=")
    path = Path(folder if separator and "/" not in name else argument)
    name = name if separator and "/" not in name else default_name(path)
    require_name(name, f"Give the model another name: kdexport serve NAME={path}")
    return Source(name, path)


def parse_sources(arguments: Iterable[str]) -> tuple[Source, ...]:
    """Read several sources; raises ``ConfigError`` if there are none, or two of the same name."""
    sources = tuple(parse_source(argument) for argument in arguments)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"Two bundles have the name {name}; each needs its own.",
                remedy=f"Name them: kdexport serve {name}=FOLDER {name}-2=FOLDER",
            )
    if not sources:
        raise ConfigError("No bundle was given.", remedy="For example: kdexport serve dist/mobilenetv2")
    return sources


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """The result of a reload: keys of new or replaced models, of removed ones, and the errors of refused ones."""

    loaded: tuple[Key, ...] = ()
    removed: tuple[Key, ...] = ()
    refused: dict[Key, KdexportError] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a reload has loaded and not served yet: all models of the next table, and the errors of refused bundles."""

    models: dict[Key, LoadedModel]
    refused: dict[Key, KdexportError]


class Folders:
    """The folders of the bundles on disk, and whether they changed."""

    def __init__(self, sources: tuple[Source, ...], trusted: Path | None = None) -> None:
        self._sources = sources
        self._trusted = trusted
        self._last: object = None

    def note(self) -> None:
        """Remember how the folders are now."""
        self._last = self._signature()

    def changed(self) -> bool:
        """Whether a folder was replaced, added or removed since ``note``: inode and time of its manifest.

        If signatures are required, also those of its signature.
        """
        return self._last is not None and self._signature() != self._last

    def _signature(self) -> object:
        found: list[tuple[str, int, tuple[int, ...] | None]] = []
        for source in self._sources:
            for number, folder in sorted(source.versions().items()):
                names = (MANIFEST,) if self._trusted is None else (MANIFEST, SIGNATURE)
                found += [(source.name, number, _facts(folder / name)) for name in names]
        return tuple(found)


class Repository:
    """The served models. Reading needs no lock, because a reload replaces the table and never changes it."""

    def __init__(
        self,
        sources: tuple[Source, ...],
        *,
        provider: str,
        limits: Limits,
        target: str = DEFAULT_TARGET,
        trusted: Path | None = None,
        engines: Path | None = None,
    ) -> None:
        self.sources = sources
        self._provider = provider
        self._target = target
        self._limits = limits
        self._trusted = trusted
        self._engines = engines
        self._models: dict[Key, LoadedModel] = {}
        #: The newest version of each name in a table.
        self._newest: tuple[dict[Key, LoadedModel], dict[str, LoadedModel]] = ({}, {})
        self._refused: dict[Key, str] = {}
        self._folders = Folders(sources, trusted)
        self._reloading = threading.Lock()

    @property
    def models(self) -> dict[Key, LoadedModel]:
        """Loaded models by name and version."""
        return self._models

    @property
    def refused(self) -> dict[Key, str]:
        """Error messages of the bundles that the last reload refused."""
        return self._refused

    def find(self, name: str, version: str | None = None) -> LoadedModel:
        """The model of this name and version, or the newest version; raises ``RequestError`` with status 404."""
        if version is None:
            models, newest = self._newest
            # The table is replaced by reloads, and never changed.
            if models is not self._models:
                models = self._models
                newest = {key: models[key, number] for key, number in sorted(models)}
                self._newest = models, newest
            if name in newest:
                return newest[name]
        versions = sorted(number for key, number in self._models if key == name)
        if not versions:
            raise RequestError(
                f"The server has no model {name[:80]!r}.",
                remedy="POST /v2/repository/index lists its models.",
                status=404,
                reason="unknown_model",
            )
        wanted = version or ""
        if not _is_version(wanted) or int(wanted) not in versions:
            raise RequestError(
                f"Model {name!r} has no version {wanted[:20]!r}; its versions are {', '.join(map(str, versions))}.",
                status=404, reason="unknown_model",
            )  # fmt: skip
        return self._models[name, int(wanted)]

    def load_all(self) -> Change:
        """Load all bundles at the start; raises the first error of a model that has no good version."""
        change = self.reload()
        for (name, _), error in change.refused.items():
            if not any(name == loaded for loaded, _ in self._models):
                raise error
        return change

    def reload(self) -> Change:
        """``prepare`` and ``adopt``."""
        return self.adopt(self.prepare())

    def prepare(self) -> Prepared:
        """Load new and changed bundles, and serve on what was loaded before; a refused bundle leaves its old model.

        All versions of a model share their input, output, classes and preprocessing, because clients that name no
        version get the newest; a bundle that differs in them is refused. The files of an unchanged bundle are compared
        with its manifest again, and if signatures are required, its signature is checked again: the trusted key may be
        another one now.
        """
        with self._reloading:
            self._folders.note()
            wanted = {
                (source.name, n): path for source in self.sources for n, path in sorted(source.versions().items())
            }
            models, refused = dict(self._models), dict[Key, KdexportError]()
            for key, folder in wanted.items():
                try:
                    if key not in models or bundle_digest(folder) != models[key].digest:
                        fresh = self._load(key, folder)
                        require_same_contract(fresh, [m for (name, _), m in models.items() if name == key[0]], folder)
                        models[key] = fresh
                        continue
                    require_unchanged_files(folder, models[key].manifest)
                    if self._trusted is not None:
                        require_signed(folder, self._trusted)
                # A folder can be damaged in any way, and none of them may stop the models that run.
                except Exception as error:  # noqa: BLE001
                    refused[key] = without_library_text(as_kdexport_error(error, folder), folder)
            for key in models.keys() - wanted.keys():
                # The last version of a model stays: a folder that is missing is more likely an accident.
                if any(name == key[0] and (name, number) in models for name, number in wanted):
                    del models[key]
            return Prepared(models=models, refused=refused)

    def adopt(self, prepared: Prepared) -> Change:
        """Replace the table by what ``prepare`` has loaded."""
        before, self._models = self._models, prepared.models
        self._refused = {key: error.message for key, error in prepared.refused.items()}
        loaded = tuple(key for key, model in prepared.models.items() if before.get(key) is not model)
        removed = tuple(before.keys() - prepared.models.keys())
        return Change(loaded=loaded, removed=removed, refused=prepared.refused)

    def changed(self) -> bool:
        """Whether a folder was replaced, added or removed since the last reload; see ``Folders``."""
        return self._folders.changed()

    def _load(self, key: Key, folder: Path) -> LoadedModel:
        name, version = key
        # A wrong path is the most common mistake, and is found here without a child process.
        if not (folder / MANIFEST).is_file():
            raise BundleError(
                f"{folder} is neither a bundle nor a folder of bundles named 1, 2, 3: it has no {MANIFEST}.",
                remedy="Pass a folder that `kdexport build` wrote.",
            )
        allowed = try_bundle(folder, self._provider, self._limits, self._target, self._trusted, self._engines)
        model = load(
            folder, name=name, version=version, provider=self._provider, limits=self._limits, allowed_error=allowed,
            target=self._target, trusted=self._trusted, engines=self._engines,
        )  # fmt: skip
        return replace(model, pace=measured_pace(model, folder, self._limits))
