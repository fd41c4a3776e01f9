"""The memory of a process of the server."""

import subprocess
import sys

from kdexport.serving.own_process import resident_bytes


def test_the_memory_of_the_process_that_started_this_one_does_not_count() -> None:
    held = bytearray(300 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    program = "from kdexport.serving.own_process import resident_bytes; print(resident_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 5 * 2**20 < int(done.stdout) < 200 * 2**20
    assert resident_bytes() > len(held)
