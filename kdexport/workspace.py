"""Results by content: each stage's output lies under the sha256 of its inputs and appears by rename, whole."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdexport.core.files import exclusive, publish, write_text

_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of finished results, ``root/<stage>/<sha256>``, and of runs that can be continued."""

    root: Path

    def path(self, stage: str, key: str) -> Path:
        """Where the result of ``stage`` for inputs ``key`` is or will be."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether that result is finished."""
        return self.path(stage, key).is_dir()

    def produce(self, stage: str, key: str, make: Callable[[Path], None]) -> Path:
        """The finished result, made by ``make(folder)`` unless it exists; a failure leaves nothing behind."""
        final = self.path(stage, key)
        if final.is_dir():
            return final
        self._prepare(stage)
        partial = final.with_name(f"{_PARTIAL}{key}")
        with exclusive(self.root / stage / f".lock-{key}"):
            # Under the lock, what lies there was left by a process that is gone.
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
        """Like ``produce`` for a long run that keeps its own state: its folder stays until it is finished."""
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
        """Remove a result and a run that was begun for it."""
        shutil.rmtree(self.path(stage, key), ignore_errors=True)
        shutil.rmtree(self.path(stage, f"running-{key}"), ignore_errors=True)

    def _prepare(self, stage: str) -> None:
        folder = self.root / stage
        folder.mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        if not ignore.exists():
            write_text(ignore, "*\n")
