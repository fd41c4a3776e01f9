"""How often the gate is wrong on this machine, and how often other common rules are wrong on the same sessions.

python benchmarks/gate.py run --out gate.jsonl             # equal arms, and candidates slowed by 5 % and 10 %
python benchmarks/gate.py run --out gate.jsonl --load 2    # the same, beside two processes with other work
python benchmarks/gate.py run --out gate.jsonl --label "Beside other jobs"     # load from other jobs
python benchmarks/gate.py report gate.jsonl --out docs/results/gate.md

A run that was stopped is continued by the same command. Each replicate is a whole gate as `kdexport gate --baseline`
runs it: a sentinel, then sessions in fresh processes until the verdict. A slowdown of 5 % is a busy wait of 5 % of the
run time after every run.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from kdexport.gate.arms import Artifact, artifact, open_bundle
from kdexport.gate.sequential_test import Measurement, Outcome, Plan, run_sequential_test, session_request
from kdexport.stats.proportions import estimate_proportion
from kdexport.timing.anchor import SIZE, write_anchor_network
from kdexport.timing.machine import this_machine
from kdexport.timing.session import Session, run_session

CONDITIONS = {"A/A": 0.0, "+5 %": 0.05, "+10 %": 0.10}
RULES = {
    "mean20": "mean ratio > 1.05, 20 runs each",
    "mean": "mean ratio > 1.05, all runs",
    "mann_whitney": "Mann-Whitney p < 0.05, all runs",
    "double": "mean ratio > 2.00 (github-action-benchmark's default)",
}


def rules(first: Session, second: Session) -> dict[str, bool]:
    """Which rules fail the build, given the reference's runs in ``first`` and the candidate's in ``second``."""
    reference, candidate = np.asarray(first.reference_tails_ms), np.asarray(second.tails_ms)
    slower = bool(np.median(candidate) > np.median(reference))
    return {
        "mean20": bool(candidate[:20].mean() > 1.05 * reference[:20].mean()),
        "mean": bool(candidate.mean() > 1.05 * reference.mean()),
        "mann_whitney": slower and bool(mannwhitneyu(reference, candidate).pvalue < 0.05),
        "double": bool(candidate.mean() > 2 * reference.mean()),
    }


def replicate(measurement: Measurement, condition: str, index: int, max_slowdown: float) -> dict[str, Any]:
    """One whole gate, and the result of the other rules on its first two sessions."""
    seed = 1000 * list(CONDITIONS).index(condition) + index
    plan = Plan(max_slowdown=max_slowdown, seed=seed, tails=True, slowdown=CONDITIONS[condition])
    started = time.monotonic()
    (outcome,) = run_sequential_test([measurement], plan)
    seconds = time.monotonic() - started
    first, second = outcome.sessions[:2] or [run_session(session_request(measurement, plan, at)) for at in (0, 1)]
    judged = {"together": rules(first, first), "apart": rules(first, second)}
    return {"condition": condition, "replicate": index, "seconds": seconds, "rules": judged, **_facts(outcome)}


def _facts(outcome: Outcome) -> dict[str, Any]:
    interval = outcome.interval
    return {
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "sessions": len(outcome.sessions),
        "ratio": None if interval is None else math.exp(interval.mean),
        "deviation": None if interval is None else interval.deviation,
        "log_ratios": [session.log_ratio for session in outcome.sessions],
        "sentinels": list(outcome.sentinels),
        "milliseconds": float(np.median([s.reference_ms for s in outcome.sessions])) if outcome.sessions else None,
        "loadavg": os.getloadavg()[0],
    }


def _work(seed: int) -> None:
    """Bursts of computation between pauses, like another job on the machine."""
    rng, matrix = random.Random(seed), np.ones((200, 200))
    while True:
        until = time.monotonic() + rng.uniform(0.05, 0.6)
        while time.monotonic() < until:
            matrix = np.tanh(matrix @ matrix.T)
        time.sleep(rng.uniform(0.05, 0.6))


@contextlib.contextmanager
def unrelated(count: int) -> Iterator[None]:
    """Run ``count`` busy processes during the measurement."""
    workers = [multiprocessing.Process(target=_work, args=(seed,), daemon=True) for seed in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def read(path: Path) -> list[dict[str, Any]]:
    """Finished replicates; an incomplete last line of a killed run is skipped."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def run(arguments: argparse.Namespace) -> None:
    """Run the missing replicates; conditions alternate, so that changes of the machine affect all of them alike."""
    beside = f"Beside {arguments.load} processes with other work" if arguments.load else "Nothing else started"
    label = arguments.label or beside
    done = {(r["condition"], r["label"], r["replicate"]) for r in read(arguments.out)}
    counts = dict(zip(CONDITIONS, (arguments.equal, arguments.five, arguments.ten), strict=True))
    wanted = sorted((i / counts[name], name, i) for name in CONDITIONS for i in range(counts[name]))
    with tempfile.TemporaryDirectory() as folder, unrelated(arguments.load), arguments.out.open("a") as stream:
        measurement, model = _measurement(arguments.bundle, Path(folder))
        for _, condition, index in wanted:
            if (condition, label, index) in done:
                continue
            record = replicate(measurement, condition, index, arguments.max_slowdown)
            record |= {"label": label, "model": model, "max_slowdown": arguments.max_slowdown}
            stream.write(json.dumps({**record, "machine": asdict(this_machine())}) + "\n")
            stream.flush()
            print(f"{condition:6} {index:4}  {record['verdict']:12} {record['seconds']:5.1f} s  {record['reason']}")


def _measurement(bundle: Path | None, folder: Path) -> tuple[Measurement, str]:
    if bundle is None:
        arm = Artifact(
            label="built-in network", model=write_anchor_network(folder / "n.onnx"), folder=folder, sha256=""
        )
        size = SIZE
    else:
        opened = open_bundle(bundle)
        arm, size = artifact(opened, "onnx-fp32", "fused", folder), opened.image_size
    label = "built-in network" if bundle is None else f"{opened.manifest.spec.student}, {size}x{size}"
    return Measurement(reference=arm, candidate=arm, clock="host", batch=1, image_size=size), label


def proportion(count: int, total: int) -> str:
    """A proportion with its exact one-sided 95 % bounds."""
    found = estimate_proportion(count, total, 0.95)
    return f"{count} of {total}: {found.value:.1%} ({found.low:.1%} to {found.high:.1%})"


def report(arguments: argparse.Namespace) -> None:
    """Write the page."""
    records = read(arguments.jsonl)
    parts = [_head(records)]
    for label in sorted({record["label"] for record in records}, reverse=True):
        rows = [record for record in records if record["label"] == label]
        parts.append(f"## {label}\n\n{_verdicts(rows)}\n\n{_rules(rows)}\n")
    arguments.out.write_text("\n".join(parts))


def _head(records: list[dict[str, Any]]) -> str:
    machine, first = records[0]["machine"], records[0]
    milliseconds = np.median([r["milliseconds"] for r in records if r["milliseconds"] is not None])
    return f"""# The latency gate: how often it is wrong

`benchmarks/gate.py`, {first["model"]}, batch 1, one thread, limit {first["max_slowdown"]:.0%}, host clock; median run
{milliseconds:.2f} ms. {machine["cpu"]}, {machine["cores"]} cores, onnxruntime {machine["onnxruntime"]}.

Each row counts whole gates: a sentinel, then up to 20 sessions in fresh processes. Proportions have exact one-sided
95 % bounds. A slowdown is a busy wait of that fraction of the run time after every run of the candidate.

The other rules are applied to single runs of the gate's first two sessions. "Apart" takes the runs of the reference
from the first session and those of the candidate from the second: two processes, one after the other, as such rules are
commonly used. "Together" takes both from the first session, where they are interleaved, which favours these rules.

The page shows how this gate and those rules judge a change of known size on one machine. It does not cover other
machines, the clocks `serve` and `gpu`, changes that differ from run to run, or slower students, whose gates take longer
because a block is at least ten runs.
"""


def _verdicts(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| candidate | FAIL | PASS | INCONCLUSIVE | sessions, median | seconds, median | deviation, median | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CONDITIONS:
        mine = [row for row in rows if row["condition"] == name]
        if not mine:
            continue
        verdicts = [row["verdict"] for row in mine]
        deviations = [row["deviation"] for row in mine if row["deviation"] is not None]
        deviation = f"{np.median(deviations):.2%}" if deviations else "none"
        loads = [row["loadavg"] for row in mine]
        lines.append(
            f"| {name} | {proportion(verdicts.count('FAIL'), len(mine))} | {verdicts.count('PASS')} | "
            f"{verdicts.count('INCONCLUSIVE')}, {sum('too noisy' in row['reason'] for row in mine)} by the sentinel | "
            f"{np.median([row['sessions'] for row in mine]):.0f} | {np.median([row['seconds'] for row in mine]):.1f} | "
            f"{deviation} | {min(loads):.1f} to {max(loads):.1f} |"
        )
    return "\n".join(lines)


def _rules(rows: list[dict[str, Any]]) -> str:
    names = [name for name in CONDITIONS if any(row["condition"] == name for row in rows)]
    lines = [f"| rule that would fail the build | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]

    def line(label: str, fails: Any) -> str:
        cells = []
        for name in names:
            mine = [row for row in rows if row["condition"] == name]
            cells.append(proportion(sum(map(fails, mine)), len(mine)))
        return f"| {label} | {' | '.join(cells)} |"

    lines.append(line("this gate", lambda row: row["verdict"] == "FAIL"))
    for how in ("apart", "together"):
        for key, text in RULES.items():
            lines.append(line(f"{text}, {how}", lambda row, how=how, key=key: row["rules"][how][key]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="run replicates")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--bundle", type=Path, help="a bundle; default a small built-in network")
    running.add_argument("--equal", type=int, default=150, help="replicates with equal arms")
    running.add_argument("--five", type=int, default=60, help="replicates slowed by 5 %%")
    running.add_argument("--ten", type=int, default=100, help="replicates slowed by 10 %%")
    running.add_argument("--load", type=int, default=0, help="busy processes to run during the measurement")
    running.add_argument("--label", help="heading of these replicates; default describes --load")
    running.add_argument("--max-slowdown", type=float, default=0.02)
    running.set_defaults(function=run)
    reporting = commands.add_parser("report", help="write the page")
    reporting.add_argument("jsonl", type=Path)
    reporting.add_argument("--out", type=Path, required=True)
    reporting.set_defaults(function=report)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
