"""The page of results of ``benchmarks/robustness.py``."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Case = Mapping[str, Any]


def report(fuzz: Sequence[Case], faults: Sequence[Case], about: str) -> str:
    """Markdown: what was tried, what each case ended with, and every case that ended wrongly."""
    ran = [case for case in faults if case.get("ran", True)]
    lines = [
        "# Faults and damaged files",
        "",
        f"{len(fuzz):,} damaged files and {len(ran):,} faults of the machine. "
        "`python benchmarks/robustness.py` makes this page and says how to repeat it.",
        "",
        *([about, ""] if about else []),
        f"- {_wrong(fuzz)} damaged files and {_wrong(ran)} faults ended wrongly: with a traceback, an unexpected error "
        "(KDX900), a crash, a hang, 512 MiB more memory, a file outside of the case's folder, or an output that is not "
        "whole.",
        *([f"- {len(faults) - len(ran)} faults could not be made on this machine."] if len(ran) < len(faults) else []),
        "",
        "## Damaged files",
        "",
        "Each file is damaged in its structure (keys, values, nodes, tensors, headers, entries of archives) or in its "
        "bytes, and read as the commands read it; the digests of files beside a manifest are made right, so that the "
        "damaged file itself is read. Refused means: an error with a code and exit code 1 to 4. The peak memory is "
        "that of the process with torch and onnxruntime, which take most of it.",
        "",
        *_table(fuzz, ("read", "refused", "wrong")),
        "",
        "## Faults",
        "",
        "`build` (of a network in a file), `fuse`, `slim`, `sign`, `replay`, `triton` and `gate` are killed (SIGKILL) "
        "or stopped (Ctrl-C, SIGTERM, SIGHUP) at a random time, write to a disk or to a folder of temporary files that "
        "is full or read-only, run twice at once with one output, or run while the clock and the times of all files "
        "jump by up to ten years. Afterwards the output is absent, the old one or the new one, and whole; no temporary "
        "file is left, except by SIGKILL; the place of a "
        "full disk is named; and the same command without the fault succeeds and leaves nothing else behind.",
        "",
        *_table(ran, ("ended well", "ended with an error", "wrong")),
        "",
        *_list([*fuzz, *ran]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _wrong(cases: Sequence[Case]) -> int:
    return sum(bool(case["wrong"]) for case in cases)


def _table(cases: Sequence[Case], columns: tuple[str, str, str]) -> Iterator[str]:
    yield f"| what | by | cases | {' | '.join(columns)} | slowest, s | peak memory, MiB |"
    yield "|---" * 8 + "|"
    for kind, reader in sorted({(str(case["kind"]), str(case["reader"])) for case in cases}):
        mine = [case for case in cases if (case["kind"], case["reader"]) == (kind, reader)]
        counts = Counter(columns[_ending(case)] for case in mine)
        cells = " | ".join(str(counts[column]) for column in columns)
        slowest, memory = max(case["seconds"] for case in mine), max(case["memory_mib"] for case in mine)
        yield f"| {kind} | {reader or 'unknown'} | {len(mine)} | {cells} | {slowest:.1f} | {memory} |"


def _ending(case: Case) -> int:
    return 2 if case["wrong"] else int(case["exit_code"] != 0)


def _list(cases: Sequence[Case]) -> Iterator[str]:
    wrong = [case for case in cases if case["wrong"]]
    if wrong:
        yield "## Cases that ended wrongly"
        yield ""
    for case in wrong:
        yield f"- {case['kind']}, {case['reader'] or 'unknown'}, case {case['index']}: {str(case['wrong'])[:200]!r}"
