"""The store of finished stages: each result is a folder named by the sha256 of its inputs, and appears complete.

Beside each result lie the sha256 of its files, which are compared before it is used again: a result that was damaged
later is named, and is never part of a bundle.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from kdexport.core.digests import digest, sha256_file, tool_versions
from kdexport.core.files import exclusive, publish, write_text, writing
from kdexport.core.import_graph import source_digest
from kdexport.errors import StorageError, first_line

T = TypeVar("T")

_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of finished results, ``root/<stage>/<sha256>``, and of runs that can continue."""

    root: Path
    #: Results whose files were compared by this process.
    _compared: set[Path] = field(default_factory=set, compare=False, repr=False)

    def path(self, stage: str, key: str) -> Path:
        """The folder of the result of ``stage`` for the inputs ``key``, whether it exists or not."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether this result is finished."""
        return self.path(stage, key).is_dir()

    def finished(self, stage: str, key: str, part: str = ".") -> Path:
        """A file or folder of a finished result; raises ``StorageError`` if it is not as it was made.

        A result of an earlier version, without digests, is taken as it is.
        """
        final = self.path(stage, key)
        if final / part not in self._compared:
            listed = self._digests(stage, key)
            differing = _differing(final, listed, part) if listed.is_file() else ""
            if differing:
                raise _damaged(final, differing)
            self._compared.add(final / part)
        return final / part

    def produce(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """The finished result, made by ``make(folder)`` unless it exists; after a failure nothing is left."""
        final = self.path(stage, key)
        if final.is_dir():
            return self.finished(stage, key)
        self._prepare(stage)
        partial = final.with_name(f"{_PARTIAL}{key}")
        with exclusive(self.root / stage / f".lock-{key}"):
            # Under the lock, an existing partial folder was left by a process that has ended.
            shutil.rmtree(partial, ignore_errors=True)
            if final.is_dir():
                return final
            try:
                with writing(final):
                    partial.mkdir()
                    make(partial)
                    self._publish(partial, stage, key)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def resume(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """Like ``produce``, for a long run that can continue after a failure: its folder is kept until it finishes."""
        final = self.path(stage, key)
        if final.is_dir():
            return self.finished(stage, key)
        self._prepare(stage)
        running = final.with_name(f"running-{key}")
        with exclusive(self.root / stage / f".lock-{key}"):
            if not final.is_dir():
                with writing(final):
                    running.mkdir(exist_ok=True)
                    make(running)
                    self._publish(running, stage, key)
        return final

    def forget(self, stage: str, key: str) -> None:
        """Remove a result, and an unfinished run for it."""
        shutil.rmtree(self.path(stage, key), ignore_errors=True)
        shutil.rmtree(self.path(stage, f"running-{key}"), ignore_errors=True)
        self._digests(stage, key).unlink(missing_ok=True)

    def _publish(self, made: Path, stage: str, key: str) -> None:
        """Write the digests of a result, then let it appear: a result never appears without them."""
        files = sorted(path for path in made.rglob("*") if path.is_file())
        digests = {path.relative_to(made).as_posix(): sha256_file(path) for path in files}
        write_text(self._digests(stage, key), json.dumps(digests, indent=1) + "\n")
        publish(made, self.path(stage, key))
        self._compared.add(self.path(stage, key))

    def _digests(self, stage: str, key: str) -> Path:
        return self.root / stage / f".sha256-{key}.json"

    def _prepare(self, stage: str) -> None:
        folder = self.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        if not ignore.exists():
            write_text(ignore, "*\n")


def _differing(folder: Path, listed: Path, part: str) -> str:
    """What differs between the files of ``part`` of a result and their digests; empty if nothing does."""
    try:
        digests = json.loads(listed.read_text(encoding="utf-8"))
        names = [name for name in digests if part == "." or name == part or name.startswith(f"{part}/")]
        for name in names:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256_file(folder / name) != digests[name]:
                return f"{name} changed since it was made"
    except (OSError, ValueError, TypeError) as error:
        return f"{listed.name} cannot be read ({type(error).__name__})"
    return ""


def _damaged(folder: Path, differing: str) -> StorageError:
    return StorageError(
        f"The stored result {folder} is damaged: {differing}.",
        remedy=f"Run `rm -r '{folder}'` and the same command again, which makes this result again, or the same command "
        "with --fresh, which makes all of them again.",
    )


def _silent(_detail: str) -> None:
    """Show no progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Making:
    """The argument of the function that makes a result: an empty folder, and the workspace with earlier results."""

    folder: Path
    key: str
    workspace: Workspace
    progress: Callable[[str], None] = _silent


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Step(Generic[T]):
    """A result of a build, whether it is made yet or not; ``key`` is the sha256 of everything that it depends on.

    That is ``made_of``, the versions of ``tools``, and code: the function that declares the step around ``make``, the
    definitions of its module that this function uses, all modules of kdexport that these import, and ``modules``, which
    a registry imports. A step is declared in one place; that declaration makes it, finds it again and removes it.
    """

    #: The folder of a workspace that has the results.
    stage: str
    #: Earlier steps and JSON values.
    made_of: tuple[Any, ...]
    #: Fills the folder.
    make: Callable[[Making], None]
    #: Reads the finished folder.
    read: Callable[[Path], T]
    #: Names of packages.
    tools: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    #: Whether the folder of a run that failed is kept, so that ``make`` can continue in it.
    resumable: bool = False
    key: str = field(init=False)

    def __post_init__(self) -> None:
        inputs = [each.key if isinstance(each, Step) else each for each in self.made_of]
        code = source_digest(self.code, *self.modules)
        object.__setattr__(self, "key", digest([self.stage, inputs, tool_versions(*self.tools), code]))

    @property
    def code(self) -> str:
        """``module:function`` of the function that declares this step."""
        return f"{self.make.__module__}:{self.make.__qualname__.partition('.')[0]}"

    def result(self, workspace: Workspace, progress: Callable[[str], None] = _silent) -> T:
        """The result, made unless it is in ``workspace``."""

        def fill(folder: Path) -> None:
            self.make(Making(folder=folder, key=self.key, workspace=workspace, progress=progress))

        produce = workspace.resume if self.resumable else workspace.produce
        folder = produce(self.stage, self.key, fill)
        try:
            return self.read(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, f"it cannot be read ({type(error).__name__}: {first_line(error)})") from error

    def steps(self) -> Iterator["Step[Any]"]:
        """The steps that this one depends on, then this step; a step that is used twice comes twice."""
        for each in self.made_of:
            if isinstance(each, Step):
                yield from each.steps()
        yield self
