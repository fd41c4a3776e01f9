"""The store of finished stages: each result is a folder named by the sha256 of its inputs, and appears complete."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from kdexport.core.digests import digest, tool_versions
from kdexport.core.files import exclusive, publish, write_text
from kdexport.core.import_graph import source_digest

T = TypeVar("T")

_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of finished results, ``root/<stage>/<sha256>``, and of runs that can continue."""

    root: Path

    def path(self, stage: str, key: str) -> Path:
        """The folder of the result of ``stage`` for the inputs ``key``, whether it exists or not."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether this result is finished."""
        return self.path(stage, key).is_dir()

    def produce(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """The finished result, made by ``make(folder)`` unless it exists; after a failure nothing is left."""
        final = self.path(stage, key)
        if final.is_dir():
            return final
        self._prepare(stage)
        partial = final.with_name(f"{_PARTIAL}{key}")
        with exclusive(self.root / stage / f".lock-{key}"):
            # Under the lock, an existing partial folder was left by a process that has ended.
            shutil.rmtree(partial, ignore_errors=True)
            if final.is_dir():
                return final
            partial.mkdir()
            try:
                make(partial)
                publish(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    def resume(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """Like ``produce``, for a long run that can continue after a failure: its folder is kept until it finishes."""
        final = self.path(stage, key)
        if final.is_dir():
            return final
        self._prepare(stage)
        running = final.with_name(f"running-{key}")
        with exclusive(self.root / stage / f".lock-{key}"):
            if not final.is_dir():
                running.mkdir(exist_ok=True)
                make(running)
                publish(running, final)
        return final

    def forget(self, stage: str, key: str) -> None:
        """Remove a result, and an unfinished run for it."""
        shutil.rmtree(self.path(stage, key), ignore_errors=True)
        shutil.rmtree(self.path(stage, f"running-{key}"), ignore_errors=True)

    def _prepare(self, stage: str) -> None:
        folder = self.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        if not ignore.exists():
            write_text(ignore, "*\n")


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

        return self.read(workspace.produce(self.stage, self.key, fill))

    def steps(self) -> Iterator["Step[Any]"]:
        """The steps that this one depends on, then this step; a step that is used twice comes twice."""
        for each in self.made_of:
            if isinstance(each, Step):
                yield from each.steps()
        yield self
