"""Starts workers that read damaged files, and notes those that hang or crash them."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robustness_bench.cases import ROOT, kind_of

#: Longest time of one case.
LIMIT_S = 30.0
#: A process is replaced after this many cases, so that a slow leak is not counted as the memory of one of them.
_CASES = 500
#: Importing torch on a busy machine.
_START_S = 300.0


class _Worker:
    def __init__(self, bundle: Path, scratch: Path, seed: int) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "tmp").mkdir(exist_ok=True)
        home = scratch / "home"
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ, "TMPDIR": str(scratch / "tmp"), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1", "COLUMNS": "160", "NO_COLOR": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        }  # fmt: skip
        command = [sys.executable, "-m", "robustness_bench.worker", str(bundle), str(scratch), str(seed)]
        with (scratch / "worker.log").open("a") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=scratch,
                env=environment,
            )  # fmt: skip
        self.done = 0

    def ask(self, index: int) -> dict[str, Any]:
        """The result of a case; a worker that gives none is stopped."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # The first answer waits for the imports too.
        limit = LIMIT_S if self.done else _START_S
        unanswered: dict[str, Any] = {"index": index, "kind": kind_of(index), "reader": "", "exit_code": None}
        try:
            self.process.stdin.write(f"{index}\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], limit)[0]:
                self.stop()
                return unanswered | {
                    "seconds": limit,
                    "memory_mib": 0,
                    "wrong": f"hang: over {limit:.0f} s",
                    "said": "",
                }
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            return unanswered | {
                "seconds": 0.0, "memory_mib": 0, "wrong": f"crash: exit code {self.process.returncode}", "said": "",
            }  # fmt: skip
        self.done += 1
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def run_fuzz(bundle: Path, scratch: Path, seed: int, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The result of each case, in order; ``scratch`` is the only folder in which anything may be written."""
    worker: _Worker | None = None
    try:
        for index in indices:
            worker = worker or _Worker(bundle, scratch, seed)
            result = worker.ask(index)
            if worker.process.poll() is not None or worker.done >= _CASES or result["wrong"].startswith("memory"):
                worker.stop()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.stop()
