"""Whether the fused student is slower than the unfused one, by the sessions and statistics of the gate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from kdexport.stats import sequential as statistics
from kdexport.timing.session import Arm, Request, Session, pinned_cpus, run_session

Verdict = Literal["not slower", "slower", "inconclusive"]
_VERDICTS: dict[statistics.Verdict, Verdict] = {"PASS": "not slower", "FAIL": "slower", "INCONCLUSIVE": "inconclusive"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyResult:
    """Latency ratio candidate / reference with its interval, and the verdict for ``max_slowdown``.

    ``mde`` is the minimum detectable effect: a slowdown this much above the allowed one is detected at the last look
    with 90 % power.
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
    """Two ONNX files to time in onnxruntime on the CPU, with the calls that a server makes."""

    reference: str
    candidate: str
    image_size: int
    batch: int
    threads: int
    pairs: int


def compare_latency(
    comparison: Comparison, *, max_slowdown: float, max_sessions: int, progress: Callable[[int], None] = lambda _: None
) -> LatencyResult:
    """Run sessions until there is a verdict or ``max_sessions`` are done; ``VerificationError`` if one dies."""
    sessions: list[Session] = []
    for look in statistics.looks_until(max_sessions):
        while len(sessions) < look:
            sessions.append(run_session(_request(comparison, seed=len(sessions))))
            progress(len(sessions))
        result = judge(sessions, comparison, max_slowdown)
        if result.verdict != "inconclusive":
            break
    return result


def judge(sessions: Sequence[Session], comparison: Comparison, max_slowdown: float) -> LatencyResult:
    """The t interval over sessions, and its verdict against log(1 + ``max_slowdown``)."""
    ratios = [session.log_ratio for session in sessions]
    interval = statistics.t_interval(ratios)
    (verdict,) = statistics.decide([ratios], math.log1p(max_slowdown))
    return LatencyResult(
        clock="host: onnxruntime session.run on the CPU",
        batch=comparison.batch,
        threads=comparison.threads,
        sessions=interval.sessions,
        ratio=math.exp(interval.mean),
        low=math.exp(interval.low),
        high=math.exp(interval.high),
        reference_ms=float(np.median([session.reference_ms for session in sessions])),
        candidate_ms=float(np.median([session.candidate_ms for session in sessions])),
        max_slowdown=max_slowdown,
        mde=math.expm1(statistics.minimum_detectable_effect(interval.deviation)),
        verdict=_VERDICTS[verdict],
    )


def _request(comparison: Comparison, seed: int) -> Request:
    return Request(
        reference=Arm(path=comparison.reference),
        candidate=Arm(path=comparison.candidate),
        clock="host",
        image_size=comparison.image_size,
        batch=comparison.batch,
        threads=comparison.threads,
        cpus=pinned_cpus(comparison.threads),
        pairs=comparison.pairs,
        seed=seed,
    )
