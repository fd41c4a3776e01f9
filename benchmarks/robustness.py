"""Damaged files and faults of the machine: every command ends with a sentence, and nothing is lost.

python benchmarks/robustness.py fuzz dist/quickstart --count 10000 --out fuzz.jsonl
python benchmarks/robustness.py faults dist/quickstart --count 200 --out faults.jsonl
python benchmarks/robustness.py report fuzz.jsonl faults.jsonl --out docs/results/fuzz.md

``fuzz`` damages manifests, TOML, safetensors, ONNX, .pt2 files and images, and reads them as the commands do.
``faults`` kills and stops commands, fills their disk, makes it read-only, runs two at once and lets the clock jump.
Each case is drawn from --seed and its number; a run that was stopped is continued by the same command. The exit code is
1 if a case ended with a traceback, an unexpected error, a crash or a hang, took too much memory, or wrote where it must
not.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from robustness_bench.faults import run_faults
from robustness_bench.fuzz import run_fuzz
from robustness_bench.page import report

Run = Callable[[Path, Path, int, Sequence[int]], Iterator[dict[str, Any]]]


def read(path: Path) -> list[dict[str, Any]]:
    """Finished cases; an incomplete last line of a killed run is skipped."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(arguments: argparse.Namespace) -> int:
    """Run the cases that are missing in the file of results; 1 if one of all cases is wrong."""
    done = {case["index"] for case in read(arguments.out)}
    missing = [index for index in range(arguments.count) if index not in done]
    cases: Run = arguments.cases
    with tempfile.TemporaryDirectory(prefix="kdexport-robustness-") as folder, arguments.out.open("a") as stream:
        for result in cases(arguments.bundle.resolve(), Path(folder).resolve(), arguments.seed, missing):
            stream.write(json.dumps(result) + "\n")
            stream.flush()
            if result["wrong"]:
                print(f"{result['index']} {result['kind']} {result['reader']}: {result['wrong']}", file=sys.stderr)
    return int(any(case["wrong"] for case in read(arguments.out) if case["index"] < arguments.count))


def write_report(arguments: argparse.Namespace) -> int:
    """Write the page."""
    page = report(read(arguments.fuzz), read(arguments.faults), arguments.about)
    arguments.out.write_text(page, encoding="utf-8")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, cases, count in (("fuzz", run_fuzz, 10_000), ("faults", run_faults, 200)):
        running = commands.add_parser(name)
        running.add_argument("bundle", type=Path)
        running.add_argument("--count", type=int, default=count)
        running.add_argument("--seed", type=int, default=0)
        running.add_argument("--out", type=Path, required=True)
        running.set_defaults(function=run, cases=cases)
    reporting = commands.add_parser("report")
    reporting.add_argument("fuzz", type=Path)
    reporting.add_argument("faults", type=Path)
    reporting.add_argument("--about", default="", help="Sentences on the machine, the bundle and what was mended.")
    reporting.add_argument("--out", type=Path, required=True)
    reporting.set_defaults(function=write_report)
    arguments = parser.parse_args()
    # An exception removes the temporary folders.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(arguments.function(arguments))


if __name__ == "__main__":
    main()
