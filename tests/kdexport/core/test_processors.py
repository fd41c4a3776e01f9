import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdexport.core.processors import can_pin, pin_process, processor_model, usable_cpus
from kdexport.timing.session import pinned_cpus

FIRST, SECOND = (
    f"processor : {number}\nmodel name : Fast 9000\nflags : {flags}\n\n"
    for number, flags in enumerate(("sse avx2", "avx2 sse"))
)
X86 = FIRST + SECOND
LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process")


def test_a_processor_is_named_by_its_model_and_its_instruction_sets(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(X86)
    (tmp_path / "more").write_text(X86.replace("sse avx2", "sse avx2 vnni"))
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n")
    one, more, arm = (processor_model(tmp_path / name) for name in ("one", "more", "arm"))
    assert "Fast 9000, features " in one
    assert one.partition(", ")[0] == more.partition(", ")[0]
    assert one != more
    assert "0xd0c" in arm
    assert processor_model(tmp_path / "absent")


@LINUX
def test_a_process_is_kept_on_the_processors_that_were_asked_for() -> None:
    code = (
        "import os; from kdexport.core.processors import *; last = usable_cpus()[-1]; pin_process([last]); "
        "assert usable_cpus() == (last,) == tuple(os.sched_getaffinity(0)); pin_process([]); "
        "assert usable_cpus() == (last,)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_affinity_masks_all_processors_are_usable_and_no_session_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert not can_pin()
    assert usable_cpus() == tuple(range(os.cpu_count() or 1))
    assert pinned_cpus(1) == ()
    pin_process(pinned_cpus(1))
