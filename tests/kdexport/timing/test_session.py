import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kdexport.core.processors import usable_cpus
from kdexport.errors import ForwardedError, VerificationError
from kdexport.stats.sequential import session_statistic
from kdexport.timing import session as timing_session
from kdexport.timing.anchor import write_anchor_network
from kdexport.timing.session import Arm, Request, Session, pinned_cpus, run_session
from tests.kdexport.exported_students import small_graph, small_weights


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("session")
    path = str(small_graph(folder / "same.onnx", small_weights()))
    return Request(
        reference=Arm(path=path), candidate=Arm(path=path), clock="host", image_size=16, batch=8, threads=1,
        cpus=pinned_cpus(1), pairs=12, seed=5, tails=True, anchor=str(write_anchor_network(folder / "anchor.onnx")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def session(request_: Request) -> Session:
    return run_session(request_)


def test_a_session_records_its_conditions_and_measurements(session: Session, request_: Request) -> None:
    assert session.log_ratio == pytest.approx(session_statistic(session.pairs_ms), abs=1e-4)
    assert len(session.pairs_ms) == len(session.candidate_first) == 12
    assert (session.cpus, session.threads, session.seed) == (request_.cpus, 1, 5)
    assert len(session.tails_ms) == len(session.reference_tails_ms) == 12 * session.runs
    assert min(session.tails_ms) > 0
    assert session.created_first in ("reference", "candidate")
    assert all(value >= 0 for value in session.load)
    assert session.gpu is None
    assert session.cycles_log_ratio is None
    assert session.anchored is not None
    assert math.isfinite(session.anchored)
    # One file against itself.
    assert 0.5 < math.exp(session.log_ratio) < 2


def test_a_session_survives_json(session: Session, request_: Request) -> None:
    assert Session.from_json(json.loads(json.dumps(asdict(session)))) == session
    assert Request.from_json(json.loads(json.dumps(asdict(request_)))) == request_


def test_an_injected_slowdown_is_seen(request_: Request) -> None:
    slow = run_session(replace(request_, candidate=replace(request_.candidate, slowdown=0.5), pairs=20))
    assert math.exp(slow.log_ratio) == pytest.approx(1.5, rel=0.15)


def test_sessions_are_pinned_to_processors_that_there_are() -> None:
    assert set(pinned_cpus(1)) <= set(usable_cpus())
    assert len(pinned_cpus(1)) == 1
    assert pinned_cpus(10_000) == usable_cpus()


def test_an_error_of_a_session_keeps_its_code(request_: Request, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x07 not a graph")
    with pytest.raises(ForwardedError) as caught:
        run_session(replace(request_, candidate=Arm(path=str(bad))))
    assert (caught.value.code, caught.value.exit_code) == ("KDX311", 1)
    assert "bad.onnx" in caught.value.message
    with pytest.raises(ForwardedError, match="no clock 'sundial'") as caught:
        run_session(replace(request_, clock="sundial"))
    assert caught.value.exit_code == 2


def test_a_session_that_crashes_is_an_error_with_its_last_output(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho '[1, 2' ; echo out of memory >&2; exit 137\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    with pytest.raises(VerificationError, match="crashed with exit code 137: out of memory"):
        run_session(request_)


def test_a_session_that_hangs_is_an_error(request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 30\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(timing_session, "SESSION_TIMEOUT_S", 0.3)
    with pytest.raises(VerificationError, match=r"took more than 0\.3 s"):
        run_session(request_)


def test_a_session_imports_what_it_times_and_nothing_else() -> None:
    code = "import sys, kdexport.timing.session, kdexport.backends.ort; print(*{n.split('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(done.stdout.split()) & {"torch", "scipy", "pydantic", "typer", "rich", "onnx", "PIL", "matplotlib"}
