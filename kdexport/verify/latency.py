"""Is the candidate slower than the reference? Interleaved blocks, fresh processes as the sample, three verdicts.

A run's latency depends on the process it happens in (memory layout, thread placement) more than on anything inside it,
so sessions, not iterations, are the sample size. Within a session both arms alternate in random order, so that drift
and other load hit both alike (duet benchmarking, Bulej et al., 2020).
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdexport.errors import VerificationError

Verdict = Literal["not slower", "slower", "inconclusive"]

#: Looks of the group-sequential test, and the one-sided error of each; their union stays near 1 % (simulated).
LOOKS = (6, 12, 20)
ALPHA_PER_LOOK = 0.005

_BLOCK_S, _BLOCK_RUNS = 0.005, 10
_DROPPED_PAIRS = 5
_WARMUP_S = 0.2
_SESSION_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One fresh process: the median log ratio candidate / reference of its pairs, and each arm's median in ms."""

    log_ratio: float
    reference_ms: float
    candidate_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyResult:
    """Latency ratio candidate / reference with its interval, and what follows for ``max_slowdown``.

    ``mde`` is the resolution of this machine: a slowdown this much above the allowed one would be found at the last
    look with 90 % power.
    """

    clock: str
    batch: int
    threads: int
    sessions: int
    ratio: float
    low: float
    high: float
    reference_ms: float
    candidate_ms: float
    max_slowdown: float
    mde: float
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two ONNX files to be timed by onnxruntime on the CPU, as a server would call it."""

    reference: str
    candidate: str
    image_size: int
    batch: int
    threads: int
    pairs: int


def compare_latency(
    comparison: Comparison, *, max_slowdown: float, max_sessions: int, progress: Callable[[int], None] = lambda _: None
) -> LatencyResult:
    """Run sessions until the verdict is clear or ``max_sessions`` are done; ``VerificationError`` if one dies."""
    sessions: list[Session] = []
    looks = sorted({look for look in LOOKS if look < max_sessions} | {max_sessions})
    for look in looks:
        while len(sessions) < look:
            sessions.append(_run_session(comparison, seed=len(sessions)))
            progress(len(sessions))
        result = judge(sessions, comparison, max_slowdown)
        if result.verdict != "inconclusive":
            return result
    return result


def judge(sessions: Sequence[Session], comparison: Comparison, max_slowdown: float) -> LatencyResult:
    """The t interval over sessions, and its verdict against log(1 + ``max_slowdown``)."""
    from scipy import stats

    ratios = np.asarray([session.log_ratio for session in sessions])
    count = len(ratios)
    mean, deviation = float(ratios.mean()), float(ratios.std(ddof=1))
    half = float(stats.t.ppf(1 - ALPHA_PER_LOOK, count - 1)) * deviation / math.sqrt(count)
    limit = math.log1p(max_slowdown)
    verdict: Verdict = "slower" if mean - half > limit else "not slower" if mean + half < limit else "inconclusive"
    last = LOOKS[-1]
    power = float(stats.t.ppf(1 - ALPHA_PER_LOOK, last - 1) + stats.t.ppf(0.9, last - 1))
    return LatencyResult(
        clock="host: onnxruntime session.run on the CPU",
        batch=comparison.batch,
        threads=comparison.threads,
        sessions=count,
        ratio=math.exp(mean),
        low=math.exp(mean - half),
        high=math.exp(mean + half),
        reference_ms=float(np.median([session.reference_ms for session in sessions])),
        candidate_ms=float(np.median([session.candidate_ms for session in sessions])),
        max_slowdown=max_slowdown,
        mde=math.expm1(power * deviation / math.sqrt(last)),
        verdict=verdict,
    )


def _run_session(comparison: Comparison, seed: int) -> Session:
    command = [sys.executable, "-m", "kdexport.verify.latency", json.dumps({**asdict(comparison), "seed": seed})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SESSION_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"A latency session did not end within {error.timeout:g} s.",
            remedy="Set a smaller batch or fewer pairs under [latency], or use a quieter machine.",
        ) from None
    if done.returncode != 0:
        raise VerificationError(
            f"A latency session died with exit code {done.returncode}: {done.stderr.strip()[-300:]}",
            remedy="Run the same command again; if it stays, open both files in onnxruntime by hand.",
        )
    return Session(**json.loads(done.stdout.strip().rpartition("\n")[2]))


def measure_session(
    reference: Callable[[], object], candidate: Callable[[], object], *, pairs: int, seed: int
) -> Session:
    """Time two callables in random-order pairs of blocks within this process."""
    rng = np.random.default_rng(seed)
    runs = max(_warm(reference), _warm(candidate))
    values: list[tuple[float, float]] = []
    for _ in range(pairs + _DROPPED_PAIRS):
        if rng.random() < 0.5:
            first, second = _block(reference, runs), _block(candidate, runs)
        else:
            second, first = _block(candidate, runs), _block(reference, runs)
        values.append((first, second))
    kept: NDArray[np.float64] = np.asarray(values[_DROPPED_PAIRS:])
    return Session(
        log_ratio=float(np.median(np.log(kept[:, 1]) - np.log(kept[:, 0]))),
        reference_ms=float(np.median(kept[:, 0])) * 1e3,
        candidate_ms=float(np.median(kept[:, 1])) * 1e3,
    )


def _warm(run: Callable[[], object]) -> int:
    """Run until warm; returns how many runs fill a block."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _WARMUP_S or count < _BLOCK_RUNS:
        run()
        count += 1
    each = (time.perf_counter() - started) / count
    return max(_BLOCK_RUNS, math.ceil(_BLOCK_S / each))


def _block(run: Callable[[], object], runs: int) -> float:
    """Median seconds of ``runs`` back-to-back runs."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def _main() -> None:
    from kdexport.backends.ort import load_model

    request = json.loads(sys.argv[1])
    rng = np.random.default_rng(request["seed"])
    size = request["image_size"]
    images = rng.standard_normal((request["batch"], 3, size, size), dtype=np.float32)
    arms = {}
    # The session that is created first may get the better memory: the order is part of what is randomised.
    for arm in rng.permutation(["reference", "candidate"]):
        arms[str(arm)] = load_model(Path(request[str(arm)]), threads=request["threads"])
    session = measure_session(
        lambda: arms["reference"].logits(images),
        lambda: arms["candidate"].logits(images),
        pairs=request["pairs"],
        seed=request["seed"],
    )
    sys.stdout.write(json.dumps(asdict(session)))


if __name__ == "__main__":
    _main()
