"""What processes are told, and how many there are."""

import sys
from pathlib import Path

import pytest

from kdexport.backends.ort import CPU, CUDA
from kdexport.errors import ServerError
from kdexport.serving.limits import Limits
from kdexport.serving.processes import process_plan
from kdexport.serving.processes.process_plan import Plan, processes_for
from kdexport.serving.server import Surroundings
from kdexport.serving.service import Settings

TOKEN = "0123456789abcdef"


def test_a_plan_is_read_as_it_was_written_and_its_text_has_no_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    settings = Settings(
        target="onnx-int8", instances=3, processes=2, limits=Limits(queue=5, drain_seconds=0.5), token=TOKEN,
        token_file=file, trusted=tmp_path / "key.pem",
    )  # fmt: skip
    surroundings = Surroundings(access_log="a b.jsonl", origins=("https://a.example", "*"), tracing=True)
    plan = Plan(
        bundles=("a=x y", "b"), settings=settings, surroundings=surroundings, tls_cert=Path("c"), tls_key=Path("k"),
        supervisor_bytes=7,
    )  # fmt: skip
    assert Plan.from_text(plan.to_text()) == plan
    assert TOKEN not in plan.to_text()
    file.write_text("short")
    with pytest.raises(ServerError, match="has 5 characters"):
        Plan.from_text(plan.to_text())


def test_instances_are_processes_on_a_cpu_up_to_one_for_each_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_plan, "usable_processors", lambda: 4)
    monkeypatch.setattr(process_plan, "_SHARES_PORTS", True)
    assert [processes_for(count, CPU) for count in (0, 1, 2, 4, 5, 256)] == [1, 1, 2, 4, 4, 4]
    assert processes_for(3, CUDA) == 1
    monkeypatch.setattr(process_plan, "_SHARES_PORTS", False)
    assert processes_for(4, CPU) == 1
    assert (sys.platform == "linux") or not process_plan._SHARES_PORTS
