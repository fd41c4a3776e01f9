"""A process that reads damaged files, one after another: python -m robustness_bench.worker BUNDLE SCRATCH SEED.

It takes one index per line on stdin and answers each with one line of JSON. An audit hook sees every file that Python
code opens for writing and every program that it starts.
"""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdexport.bundle.manifest import hash_files
from robustness_bench.cases import judged, kind_of, run_case
from robustness_bench.readers import READERS, Material
from robustness_bench.watch import Watch


def attempt(index: int, seed: int, material: Material, place: Path, watch: Watch) -> dict[str, Any]:
    """One case: prepared, read and judged."""
    kind = kind_of(index)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    rng = np.random.default_rng([seed, index])
    prepared = READERS[kind](material, place, rng)
    before = hash_files(place / "bundle") if (place / "bundle").is_dir() else {}
    memory = _peak()
    started = time.monotonic()
    watch.found, watch.active = [], True
    try:
        exit_code, stderr = run_case(prepared)
    finally:
        watch.active = False
    seconds = time.monotonic() - started
    outside = list(watch.found)
    if before and hash_files(place / "bundle") != before:
        outside.append("the bundle was changed")
    peak = _peak()
    wrong = judged(exit_code, stderr, outside, peak - memory)
    return {
        "index": index,
        "kind": kind,
        "reader": prepared.reader,
        "exit_code": exit_code,
        "seconds": round(seconds, 3),
        "memory_mib": peak // 2**20,
        "wrong": wrong,
        "said": stderr[-600:] if wrong else stderr[:100],
    }


def _peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    bundle, scratch, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # Libraries print to the descriptor below Python too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = scratch / "material"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    material = Material.made(bundle, folder)
    watch = Watch(scratch)
    sys.argv = ["kdexport", "--json"]
    for line in sys.stdin:
        result = attempt(int(line), seed, material, scratch / "case", watch)
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
