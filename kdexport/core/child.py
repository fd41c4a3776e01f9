"""Child processes: run one of our modules, read its answer as JSON, and end it when its parent ends.

``call`` waits for the end of the child, ``started`` for the line that a server writes when it is ready. Both run
``python -m kdexport.core.child PARENT -m MODULE ...``, so that the new process is tied to its parent before it imports
anything else. On Linux the system kills the child when its parent ends, even by SIGKILL; more precisely, when the
thread that started it ends, so ``call`` and the block of ``started`` wait in that thread. On other systems a thread of
the child waits for the end of stdin, a pipe that only the parent holds open; native code that does not release the
interpreter's lock delays this until it returns.
"""

import contextlib
import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from kdexport.errors import ForwardedError

#: Holds the id of a process that was started here: it writes its errors as JSON on stdout, for its parent to print.
_CHILD = "KDEXPORT_CHILD_PID"

#: Set by torch's launcher for the processes that it starts.
_LAUNCHED = "TORCHELASTIC_RUN_ID"

#: Exit code of a child whose parent has ended, the same as after Ctrl-C.
_ORPHANED = 130

#: An error quotes this many characters from the end of stderr.
_QUOTED_CHARACTERS = 500


class ChildTimeoutError(Exception):
    """A child process gave no answer within ``seconds`` and was killed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.seconds = seconds


class ChildDiedError(Exception):
    """A child process ended without an answer; ``exit_code`` is negative for a signal, ``stderr`` its last output."""

    def __init__(self, exit_code: int, stderr: str) -> None:
        super().__init__(f"exit code {exit_code}: {stderr}")
        self.exit_code = exit_code
        self.stderr = stderr


def call(
    module: str,
    arguments: Sequence[str],
    *,
    timeout_s: float | None,
    environment: Mapping[str, str] | None = None,
    shows_stderr: bool = False,
) -> Any:
    """Run ``module`` with ``arguments`` in a child process; return the last JSON object or list on its stdout.

    ``environment`` is added to ours. With ``shows_stderr`` the child writes to our stderr, and errors do not quote it.
    Raises ``ForwardedError`` with the error that the child reported, ``ChildDiedError`` or ``ChildTimeoutError``.
    """
    with _held_pipe() as stdin:
        try:
            done = subprocess.run(
                _command(module, arguments), stdin=stdin, stdout=subprocess.PIPE,
                stderr=None if shows_stderr else subprocess.PIPE, text=True, env=_environment(environment),
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ChildTimeoutError(error.timeout) from None
    return _answer(done.stdout, done.returncode, done.stderr or "")


@contextlib.contextmanager
def started(module: str, arguments: Sequence[str], *, timeout_s: float) -> Iterator[Any]:
    """Start ``module`` and yield the JSON of its first line on stdout; the child is killed at the end of the block.

    Raises the same errors as ``call``.
    """
    with _held_pipe() as stdin, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        child = subprocess.Popen(
            _command(module, arguments), stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, text=True,
            env=_environment(None),
        )  # fmt: skip
        with child:
            try:
                assert child.stdout is not None
                if not select.select([child.stdout], [], [], timeout_s)[0]:
                    raise ChildTimeoutError(timeout_s)
                line = child.stdout.readline()
                exit_code = 0 if line else child.wait()
                stderr.seek(0)
                yield _answer(line, exit_code, stderr.read())
            finally:
                child.kill()


def end_with_launcher() -> None:
    """In a process that torch's launcher started: end when the launcher ends, even by SIGKILL."""
    if _LAUNCHED in os.environ:
        _end_with_parent()


def describes_errors() -> bool:
    """Whether this process was started by ``call`` or ``started``, whose caller prints its error."""
    return os.environ.get(_CHILD) == str(os.getpid())


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "kdexport.core.child", str(os.getpid()), "-m", module, *arguments]


def _environment(added: Mapping[str, str] | None) -> dict[str, str]:
    # A child runs our own modules, even if the user's folder has modules of the same names.
    return {**os.environ, "PYTHONSAFEPATH": "1", **(added or {})}


@contextlib.contextmanager
def _held_pipe() -> Iterator[int]:
    """A pipe to read from, which ends when this process ends."""
    reading, held = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(held)


def _answer(stdout: str, exit_code: int, stderr: str) -> Any:
    answer = _last_json(stdout)
    if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
        error = answer["error"]
        raise ForwardedError(
            error["message"], remedy=error["remedy"], code=error["code"], exit_code=answer["exit_code"]
        )
    if exit_code != 0 or answer is None:
        raise ChildDiedError(exit_code, stderr.strip()[-_QUOTED_CHARACTERS:])
    return answer


def _last_json(text: str) -> Any:
    # Libraries also write to stdout, some of them while the process ends.
    for line in reversed(text.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict | list):
                return value
    return None


def _end_with_parent() -> None:
    """Have the system kill this process when its parent ends, also after it executes another program."""
    set_parent_death_signal = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _end_with_stdin() -> None:
    """End this process when its stdin ends, that is, when its parent ends."""

    def wait() -> NoReturn:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(_ORPHANED)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> None:
    parent, module = int(sys.argv[1]), sys.argv[3]
    if sys.platform == "linux":
        _end_with_parent()
        # The parent may have ended before the call above.
        if os.getppid() != parent:
            sys.exit(_ORPHANED)
    else:
        _end_with_stdin()
    os.environ[_CHILD] = str(os.getpid())
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
