import os
import subprocess
import sys

import pytest

from kdexport.core.processors import can_pin, pin_process, usable_cpus
from kdexport.timing.session import pinned_cpus

LINUX = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin a process")


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
