import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from kdexport.core.child import ChildDiedError, ChildTimeoutError, call, call_together, started
from kdexport.errors import ForwardedError
from tests.processes import is_running, wait_until

#: In the place of a package that a child imports: writes its process id and waits.
WAITING = """
import os, sys, time
if "kdexport.core.child" in sys.orig_argv:
    path = os.environ["PLACE"]
    with open(path + ".partial", "w") as stream:
        stream.write(str(os.getpid()))
    os.replace(path + ".partial", path)
    time.sleep(300)
"""

SESSION = """
from kdexport.timing.session import Arm, Request, run_session
run_session(Request(
    reference=Arm(path="a"), candidate=Arm(path="b"), clock="{clock}", image_size=8, batch=1, threads=1, cpus=(),
    pairs=2, seed=0,
))
"""

#: Every kind of child that the project starts: the package that it imports, and what starts it.
KINDS = {
    "training": ("pydantic", "from kdexport.build.train import resolve_recipe; resolve_recipe('digits', {})"),
    "the names of teachers": ("pydantic", "from kdexport.commands.listing import LISTS; LISTS['teachers']()"),
    "a latency session": ("onnxruntime", SESSION.format(clock="host")),
    "the server of a latency session": ("uvicorn", SESSION.format(clock="serve")),
    "the trial of a bundle": (
        "asyncio",
        """
        from pathlib import Path
        from kdexport.serving.isolated_load import try_bundle
        from kdexport.serving.limits import Limits
        try_bundle(Path("x"), "CPUExecutionProvider", Limits())
        """,
    ),
    "the builder of an engine": (
        "tensorrt_rtx",
        """
        from kdexport.backends.trt import EngineRequest, build_engine
        build_engine(EngineRequest(
            backend="trt-rtx", onnx="a.onnx", plan="a.plan", shape=(3, 8, 8), batches=(1, 1, 1), compute_capabilities=()
        ))
        """,
    ),
    "the run of an engine": (
        "polygraphy",
        """
        from pathlib import Path
        import numpy as np
        from kdexport.backends.trt import run_engine
        run_engine(Path("a.plan"), "trt-rtx", np.zeros((1, 3, 8, 8), np.float32), (1,))
        """,
    ),
}


def search_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes source code a module that a child can import."""
    monkeypatch.setenv("PYTHONPATH", search_path(tmp_path))

    def write(source: str) -> str:
        (tmp_path / "answering.py").write_text(dedent(source))
        return "answering"

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is read from /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_child_ends_with_its_parent_whatever_it_does(kind: str, tmp_path: Path) -> None:
    package, code = KINDS[kind]
    (tmp_path / f"{package}.py").write_text(WAITING)
    place = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": search_path(tmp_path), "PYTHONSAFEPATH": "1", "PLACE": str(place)}
    with (tmp_path / "stderr").open("w") as stderr:
        parent = subprocess.Popen([sys.executable, "-c", dedent(code)], stderr=stderr, cwd=tmp_path, env=environment)
    pid = 0
    try:
        wait_until(lambda: place.exists() or parent.poll() is not None, 120)
        assert place.exists(), (tmp_path / "stderr").read_text()
        pid = int(place.read_text())
        assert is_running(pid)
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), 10)
    finally:
        if pid and is_running(pid):
            os.kill(pid, signal.SIGKILL)
        parent.kill()
        parent.wait()


def test_where_the_system_kills_no_orphans_a_child_ends_with_the_pipe_of_its_parent() -> None:
    code = "import time; from kdexport.core import child; child._end_with_stdin(); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "1\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=10) == 130


def test_a_child_whose_parent_is_gone_before_it_starts_runs_nothing(tmp_path: Path) -> None:
    # No process can have this one as its parent and another one too.
    command = [sys.executable, "-m", "kdexport.core.child", str(os.getpid() + 1), "-m", "json.tool", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_answer_is_the_last_json_whatever_is_printed_around_it(module: Callable[[str], str]) -> None:
    name = module("""
        import json, os, sys
        print("{'half': 'an answer'", 12, sep="\\n")
        print(json.dumps([*sys.argv[1:], os.environ["COLOUR"], os.environ["PYTHONSAFEPATH"], __name__]))
        print("Goodbye", "3", sep="\\n")
        """)
    answer = call(name, ["a b", "--c"], timeout_s=60, environment={"COLOUR": "teal"})
    assert answer == ["a b", "--c", "teal", "1", "__main__"]


def test_an_error_of_ours_keeps_its_message_code_and_exit_code(module: Callable[[str], str]) -> None:
    name = module("""
        from kdexport.core.console import guarded
        from kdexport.errors import RunnerError

        def main():
            raise RunnerError("Too few processors.", remedy="Buy some.")

        guarded(main)
        """)
    with pytest.raises(ForwardedError) as called:
        call(name, [], timeout_s=60)
    with pytest.raises(ForwardedError) as begun, started(name, [], timeout_s=60):
        pass
    for error in (called.value, begun.value):
        told = (error.message, error.remedy, error.code, error.exit_code)
        assert told == ("Too few processors.", "Buy some.", "KDX403", 4)


@pytest.mark.parametrize(
    ("source", "exit_code", "said"),
    [
        (
            "import os, sys; sys.stderr.write('a' * 999 + 'b' * 499 + '.'); os.kill(os.getpid(), 11)",
            -11,
            "b" * 499 + ".",
        ),
        ("raise SystemExit(7)", 7, ""),
        # An answer before the crash does not count, and no answer is none, whatever the exit code.
        ("print('{\"a\": 1}', flush=True); import os; os._exit(3)", 3, ""),
        ("print('12')", 0, ""),
    ],
    ids=["a signal", "an exit code", "a crash after the answer", "no answer"],
)
def test_a_crash_has_its_exit_code_and_the_end_of_what_it_said(
    source: str, exit_code: int, said: str, module: Callable[[str], str]
) -> None:
    with pytest.raises(ChildDiedError) as caught:
        call(module(source), [], timeout_s=60)
    assert (caught.value.exit_code, caught.value.stderr) == (exit_code, said)


def test_a_child_that_hangs_is_killed(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module("import os, time; open(os.environ['PLACE'], 'w').write(str(os.getpid())); time.sleep(300)")
    place = tmp_path / "pid"
    with pytest.raises(ChildTimeoutError, match="no answer within 5 s"):
        call(name, [], timeout_s=5, environment={"PLACE": str(place)})
    assert not is_running(int(place.read_text()))


def test_a_started_child_answers_goes_on_and_is_killed_with_the_block(module: Callable[[str], str]) -> None:
    name = module("import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(300)")
    with started(name, [], timeout_s=60) as answer:
        assert is_running(answer["pid"])
    assert not is_running(answer["pid"])


def test_a_started_child_that_ends_or_hangs_before_its_answer_is_an_error(module: Callable[[str], str]) -> None:
    dying = module("import sys; sys.stderr.write('no room'); sys.exit(5)")
    with pytest.raises(ChildDiedError, match="exit code 5: no room"), started(dying, [], timeout_s=60):
        pass
    with pytest.raises(ChildTimeoutError), started(module("import time; time.sleep(300)"), [], timeout_s=0.5):
        pass


def test_a_child_of_a_child_describes_errors_to_the_one_that_started_it(module: Callable[[str], str]) -> None:
    # Started without ``call`` it is no child of ours, though the variable of its parent is in its environment.
    name = module("""
        import json, subprocess, sys
        code = "from kdexport.core.console import guarded\\n"
        code += "from kdexport.errors import RunnerError\\n"
        code += "def main(): raise RunnerError('Few.', remedy='Buy.')\\n"
        code += "guarded(main)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        print(json.dumps([done.returncode, done.stdout, done.stderr]))
        """)
    assert call(name, [], timeout_s=60) == [4, "", "error KDX403: Few.\nBuy.\n"]


def test_a_module_of_the_same_name_in_the_users_folder_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "training.py").write_text("print('[\"hijacked\"]')")
    monkeypatch.chdir(tmp_path)
    assert "hijacked" not in json.dumps(call("training", ["names", "teachers"], timeout_s=None))


TOGETHER = """
    import json, os, sys, time
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert os.environ["LOCAL_RANK"] == str(rank) and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
"""


def test_several_children_know_each_other_and_the_first_one_answers(module: Callable[[str], str]) -> None:
    name = module(TOGETHER + "    print(json.dumps([rank, size, *sys.argv[1:]]))")
    assert call_together(name, ["x"], 3) == [0, 3, "x"]


def test_of_several_children_that_fail_one_error_is_reported_and_no_child_stays(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    # The first one only notices that its partner is gone; the second one knows why; the third one would never end.
    name = module(
        TOGETHER
        + """
    def fail(code, message):
        error = {"code": code, "message": message, "remedy": "Do this."}
        print(json.dumps({"ok": False, "exit_code": 2, "error": error}))
        sys.exit(2)
    if rank == 0:
        open(sys.argv[1], "w").close()
        fail("KDX900", "connection closed")
    if rank == 1:
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.1)
        time.sleep(0.5)
        fail("KDX201", "image 7 is damaged")
    time.sleep(300)
    """
    )
    started_at = time.monotonic()
    with pytest.raises(ForwardedError, match="image 7 is damaged") as caught:
        call_together(name, [str(tmp_path / "failed")], 3)
    assert (caught.value.code, caught.value.exit_code) == ("KDX201", 2)
    assert time.monotonic() - started_at < 60


def test_a_child_among_several_that_dies_without_a_word_is_an_error(module: Callable[[str], str]) -> None:
    name = module(TOGETHER + "    sys.exit(7 * rank)")
    with pytest.raises(ChildDiedError) as caught:
        call_together(name, [], 2)
    assert caught.value.exit_code == 7
