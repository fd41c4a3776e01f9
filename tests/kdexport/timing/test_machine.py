import pytest

from kdexport.core.processors import usable_cpus
from kdexport.errors import RunnerError
from kdexport.timing.machine import require_cores, this_machine


def test_more_threads_than_processors_are_refused() -> None:
    cores = len(usable_cpus())
    require_cores(cores)
    with pytest.raises(RunnerError) as caught:
        require_cores(cores + 1)
    assert caught.value.exit_code == 4
    expected = f"Timing with {cores + 1} threads needs {cores + 1} processors; this process may use {cores}."
    assert caught.value.message == expected


def test_this_machine_is_named() -> None:
    found = this_machine()
    assert found.cores == len(usable_cpus())
    assert found.cpu
    assert found.onnxruntime[0].isdigit()
