"""Paired timing of two callables in one process: warm-up, blocks of runs, pairs of blocks in random order."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Run = Callable[[], object]

#: Times a given number of back-to-back runs: (N,) seconds.
Block = Callable[[Run, int], NDArray[np.float64]]

#: A block takes at least this many seconds and runs, so that the cost of reading the clock is negligible.
BLOCK_S, BLOCK_RUNS = 0.005, 10

#: The first pairs of a session, which are not used.
DROPPED_PAIRS = 5
_WARMUP_S = 0.2

#: Largest relative difference of the GPU clock between the blocks of a pair.
CLOCK_TOLERANCE = 0.01

#: Largest fraction of the pairs of a session that may be dropped.
MAX_DROPPED = 0.2


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a GPU right after a block: SM clock in MHz, throttling, temperature in Celsius, processes on it."""

    sm_mhz: float
    throttled: bool
    celsius: float = 0.0
    processes: int = 1


class Guard(Protocol):
    """Reads the state of the timed device."""

    def __call__(self) -> Reading:
        """The current state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """How a session is measured: the number of pairs, the seed of their order, and when it is extended.

    If the median log ratios of both halves of the session differ by more than ``max_drift``, the first half is
    discarded and ``pairs`` more pairs are measured; None never extends. ``tails`` keeps every single run.
    """

    pairs: int
    seed: int
    max_drift: float | None = None
    tails: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Pairs (P,2) of block medians (reference, candidate) in seconds, the number of dropped pairs, the runs per block.

    ``tails_s`` (2,N) holds every run of the reference and of the candidate; N = 0 unless they were requested.
    ``anchor_s`` (P,) is the median block of the anchor after each pair, empty without an anchor; ``clocks_mhz`` (P,2)
    is the clock of the device after each block, empty without a guard.
    """

    pairs_s: NDArray[np.float64]
    candidate_first: tuple[bool, ...]
    dropped: int
    extended: bool
    runs: int
    tails_s: NDArray[np.float64]
    anchor_s: NDArray[np.float64]
    clocks_mhz: NDArray[np.float64]


@dataclass(slots=True)
class _Pairs:
    """Measured pairs as lists of equal length; ``tails``, ``anchors`` and ``clocks`` may be empty instead."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    order: list[bool] = field(default_factory=list)
    tails: list[NDArray[np.float64]] = field(default_factory=list)
    anchors: list[float] = field(default_factory=list)
    clocks: list[tuple[float, float]] = field(default_factory=list)
    dropped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Arms:
    """Callables that time one block of each arm and of the anchor."""

    reference: Callable[[], NDArray[np.float64]]
    candidate: Callable[[], NDArray[np.float64]]
    anchor: Callable[[], NDArray[np.float64]] | None


def host_block(run: Run, runs: int) -> NDArray[np.float64]:
    """(runs,) seconds of back-to-back runs, by the clock of this process."""
    times = np.empty(runs)
    for index in range(runs):
        started = time.perf_counter()
        run()
        times[index] = time.perf_counter() - started
    return times


def measure(
    reference: Run,
    candidate: Run,
    pairing: Pairing,
    guard: Guard | None = None,
    *,
    block: Block = host_block,
    anchor: Run | None = None,
) -> Measured:
    """Time both arms in pairs of blocks in random order; ``block`` times one block.

    ``anchor`` is timed once after each pair; latencies of different days are compared in units of it.
    """
    rng = np.random.default_rng(pairing.seed)
    runs = max(_warm_up(reference), _warm_up(candidate))
    anchored = None if anchor is None else functools.partial(block, anchor, _warm_up(anchor))
    arms = _Arms(functools.partial(block, reference, runs), functools.partial(block, candidate, runs), anchored)

    measured = _measure_pairs(arms, pairing, rng, guard)
    extended = pairing.max_drift is not None and not _is_stationary(measured.pairs, pairing.max_drift)
    if extended:
        measured = _joined(measured, _measure_pairs(arms, pairing, rng, guard))
    return Measured(
        pairs_s=np.asarray(measured.pairs, np.float64).reshape(-1, 2),
        candidate_first=tuple(measured.order),
        dropped=measured.dropped,
        extended=extended,
        runs=runs,
        tails_s=np.concatenate(measured.tails, axis=1) if measured.tails else np.empty((2, 0)),
        anchor_s=np.asarray(measured.anchors, np.float64),
        clocks_mhz=np.asarray(measured.clocks, np.float64).reshape(-1, 2),
    )


def must_drop(first: Reading, second: Reading) -> bool:
    """Whether the device changed between the two blocks of a pair: throttling, clock, or processes on it.

    Only whole pairs are dropped, never single runs. A process that runs during both blocks slows both alike; it is
    recorded, and the pair is kept.
    """
    clocks_differ = abs(first.sm_mhz - second.sm_mhz) > CLOCK_TOLERANCE * max(first.sm_mhz, second.sm_mhz)
    return first.throttled or second.throttled or clocks_differ or first.processes != second.processes


def slowed(run: Run, fraction: float) -> Run:
    """``run`` followed by a busy wait of ``fraction`` of its own time: a known slowdown, to validate the gate."""

    def slower() -> None:
        started = time.perf_counter()
        run()
        until = started + (time.perf_counter() - started) * (1 + fraction)
        while time.perf_counter() < until:
            pass

    return slower


def _measure_pairs(arms: _Arms, pairing: Pairing, rng: np.random.Generator, guard: Guard | None) -> _Pairs:
    found = _Pairs()
    for index in range(pairing.pairs + DROPPED_PAIRS):
        candidate_first = bool(rng.random() < 0.5)
        times: dict[bool, NDArray[np.float64]] = {}
        readings: dict[bool, Reading] = {}
        for is_candidate in (candidate_first, not candidate_first):
            times[is_candidate] = arms.candidate() if is_candidate else arms.reference()
            if guard is not None:
                readings[is_candidate] = guard()
        anchor = None if arms.anchor is None else float(np.median(arms.anchor()))
        if index < DROPPED_PAIRS:
            continue
        if readings and must_drop(*readings.values()):
            found.dropped += 1
            continue
        found.pairs.append((float(np.median(times[False])), float(np.median(times[True]))))
        found.order.append(candidate_first)
        found.tails += [np.stack([times[False], times[True]])] if pairing.tails else []
        found.anchors += [] if anchor is None else [anchor]
        found.clocks += [(readings[False].sm_mhz, readings[True].sm_mhz)] if readings else []
    return found


def _joined(first: _Pairs, second: _Pairs) -> _Pairs:
    """The second half of ``first`` and all of ``second``."""
    half = len(first.pairs) // 2
    return _Pairs(
        pairs=first.pairs[half:] + second.pairs,
        order=first.order[half:] + second.order,
        tails=first.tails[half:] + second.tails,
        anchors=first.anchors[half:] + second.anchors,
        clocks=first.clocks[half:] + second.clocks,
        dropped=first.dropped + second.dropped,
    )


def _is_stationary(pairs: list[tuple[float, float]], tolerance: float) -> bool:
    """Whether the median log ratios of both halves differ by at most ``tolerance``."""
    ratios = np.log([later / earlier for earlier, later in pairs])
    middle = len(ratios) // 2
    return middle < 1 or bool(abs(np.median(ratios[:middle]) - np.median(ratios[middle:])) <= tolerance)


def _warm_up(run: Run) -> int:
    """Warm ``run`` up; the result is the number of runs per block."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _WARMUP_S or count < BLOCK_RUNS:
        run()
        count += 1
    each = (time.perf_counter() - started) / count
    return max(BLOCK_RUNS, math.ceil(BLOCK_S / each))
