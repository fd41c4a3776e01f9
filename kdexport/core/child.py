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
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

from kdexport.core.stopping import Stopped, stoppable
from kdexport.errors import ForwardedError, UnexpectedError

#: Holds the id of a process that was started here: it writes its errors as JSON on stdout, for its parent to print.
_CHILD = "KDEXPORT_CHILD_PID"

#: Set by torch's launcher for the processes that it starts.
_LAUNCHED = "TORCHELASTIC_RUN_ID"

#: Exit code of a child whose parent has ended, the same as after Ctrl-C.
_ORPHANED = 130

#: After an unexpected error of one of several children, seconds to wait for an explained error of another.
_PATIENCE_S = 5.0

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
        child = subprocess.Popen(
            _command(module, arguments), stdin=stdin, stdout=subprocess.PIPE,
            stderr=None if shows_stderr else subprocess.PIPE, text=True, env=_environment(environment),
        )  # fmt: skip
        with child:
            try:
                stdout, stderr = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                assert timeout_s is not None
                raise ChildTimeoutError(timeout_s) from None
            except BaseException:
                _end(child)
                raise
    return _answer(stdout, child.returncode, stderr or "")


def _end(child: "subprocess.Popen[str]") -> None:
    """End a child whose answer is not needed any more: first so that it can remove its temporary folders."""
    child.terminate()
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def call_together(
    module: str, arguments: Sequence[str], processes: int, environment: Mapping[str, str] | None = None
) -> Any:
    """Run ``module`` in ``processes`` children that find each other as torch's launcher would let them.

    Returns the answer of the first one; ``environment`` is added to theirs. They write to our stderr. If one fails, the
    others are killed and its error is raised alone, as by ``call``: all of them may meet the same one.
    """
    address = {**(environment or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    # As torch's launcher does: threads of several processes would only wait for each other's processors.
    address["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    with _held_pipe() as stdin, contextlib.ExitStack() as stack:
        children: list[tuple[subprocess.Popen[bytes], IO[str]]] = []
        # A child that is still running when this block ends, in any way, is killed.
        stack.callback(_stop, children)
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            answer = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            own = _environment({**address, **{name: str(value) for name, value in ranks.items()}})
            children.append(
                (subprocess.Popen(_command(module, arguments), stdin=stdin, stdout=answer, env=own), answer)
            )
        return _answer_together(children)


def _stop(children: "Sequence[tuple[subprocess.Popen[bytes], IO[str]]]") -> None:
    for child, _ in children:
        child.kill()
    for child, _ in children:
        child.wait()


def _answer_together(children: "Sequence[tuple[subprocess.Popen[bytes], IO[str]]]") -> Any:
    """Wait for all children, or for the first error; returns the answer of the first child.

    A child whose partner is gone fails too, in a library. So an unexpected error is raised only if no explained error
    of another child follows.
    """
    unexpected: ForwardedError | ChildDiedError | None = None
    deadline = 0.0
    while any(child.poll() is None for child, _ in children) and not (unexpected and time.monotonic() > deadline):
        found = [error for child, answer in children if (error := _error_of(child, answer)) is not None]
        if found and unexpected is None:
            unexpected, deadline = found[0], time.monotonic() + _PATIENCE_S
        for error in found:
            _raise_expected(error)
        time.sleep(0.1)
    for child, answer in children:
        _raise_expected(_error_of(child, answer))
        unexpected = unexpected or _error_of(child, answer)
    if unexpected is not None:
        raise unexpected
    return _answer(_written(children[0][1]), 0, "")


def _raise_expected(error: ForwardedError | ChildDiedError | None) -> None:
    if isinstance(error, ForwardedError) and error.code != UnexpectedError.code:
        raise error


def _error_of(child: "subprocess.Popen[bytes]", answer: IO[str]) -> ForwardedError | ChildDiedError | None:
    """The error of a child that has failed; None if it runs, or has ended well."""
    if not child.poll():
        return None
    try:
        _answer(_written(answer), child.returncode, "")
    except (ForwardedError, ChildDiedError) as error:
        return error
    return None


def _written(answer: IO[str]) -> str:
    answer.seek(0)
    return answer.read()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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


def launch(module: str, arguments: Sequence[str], *, descriptors: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Start ``module`` with these open files of ours, and return; it ends when the thread that called this ends.

    It writes to our stdout and stderr, and is in a process group of its own: signals of a terminal reach us only. Only
    for Linux.
    """
    return subprocess.Popen(
        _command(module, arguments), stdin=subprocess.DEVNULL, env=_environment(None), pass_fds=descriptors,
        process_group=0,
    )  # fmt: skip


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
    try:
        with stoppable():
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Stopped as stop:
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    _main()
