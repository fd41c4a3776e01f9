"""Sessions whose ratios are drawn at random; everything else is as in a measured session."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdexport.gate.arms import Artifact
from kdexport.gate.sequential_test import Measurement
from kdexport.timing.session import Request, Session

FUSED = Artifact(label="new|<bundle>", model=Path("new.onnx"), folder=Path("new"), sha256="a" * 64)
OLD = Artifact(label="old", model=Path("old.onnx"), folder=Path("old"), sha256="b" * 64)


def measurement(clock: str = "host", batch: int = 1) -> Measurement:
    return Measurement(reference=OLD, candidate=FUSED, clock=clock, batch=batch, image_size=32)


def session(
    log_ratio: float,
    seed: int = 0,
    *,
    dropped: int = 0,
    tails_ms: tuple[float, ...] = (),
    anchored: float | None = None,
    cycles_log_ratio: float | None = None,
) -> Session:
    spread = np.linspace(-0.02, 0.02, 9)
    pairs = tuple((2.0, 2.0 * math.exp(log_ratio + shift)) for shift in spread)
    return Session(
        log_ratio=log_ratio, reference_ms=2.0, candidate_ms=2.0 * math.exp(log_ratio), pairs_ms=pairs,
        candidate_first=(True,) * 9, dropped=dropped, runs=10, seed=seed, created_first="candidate", cpus=(1,),
        threads=1, load=(0.5, 1.5), tails_ms=tails_ms,
        anchored=anchored, cycles_log_ratio=cycles_log_ratio,
    )  # fmt: skip


def machine(
    effect: float, deviation: float, *, dropped: int = 0, tails_ms: tuple[float, ...] = ()
) -> tuple[Callable[[Request], Session], list[Request]]:
    """A runner whose sessions differ by ``deviation`` around ``effect``, and the requests that it was sent.

    An anchor takes a millisecond, half of what the reference takes.
    """
    asked: list[Request] = []

    def run(request: Request) -> Session:
        asked.append(request)
        itself = request.reference.path == request.candidate.path
        rng = np.random.default_rng([request.seed, request.batch])
        drawn = (0.0 if itself else effect) + deviation * float(rng.standard_normal())
        anchored = drawn + math.log(2.0) if request.anchor else None
        tails = tails_ms if request.tails else ()
        return session(drawn, request.seed, dropped=dropped, tails_ms=tails, anchored=anchored)

    return run, asked
