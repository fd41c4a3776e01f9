"""Two callables timed against each other inside one process: blocks, pairs in random order, warm-up."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Run = Callable[[], object]
#: Seconds of each of a number of back-to-back runs.
Block = Callable[[Run, int], NDArray[np.float64]]

#: A block is long enough for the clock's own cost to vanish in it.
BLOCK_S, BLOCK_RUNS = 0.005, 10
DROPPED_PAIRS = 5
_WARMUP_S = 0.2
#: Clocks of the two blocks of a pair may differ by this much, and this share of a session's pairs may be dropped.
CLOCK_TOLERANCE, MAX_DROPPED = 0.01, 0.2


@dataclass(frozen=True, slots=True)
class Reading:
    """A GPU's state right after a block: SM clock in MHz, whether power or heat hold it back, heat, processes on it."""

    sm_mhz: float
    throttled: bool
    celsius: float = 0.0
    processes: int = 1


class Guard(Protocol):
    """Reads the state of the device that is timed."""

    def __call__(self) -> Reading:
        """The state now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """How a session is measured: pairs that count, the seed of their order, and when the warm-up is over.

    Where the median log ratios of both halves differ by more than ``settle``, the first half is forgotten and as many
    pairs are measured again; None never extends. ``tails`` keeps every single run.
    """

    pairs: int
    seed: int
    settle: float | None = None
    tails: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """Pairs (P,2) of block medians, reference and candidate, in seconds; what was left out; the runs of a block.

    ``tails_s`` (2,N) holds every run of the reference and of the candidate, N = 0 where they were not asked for.
    ``anchor_s`` (P,) is the anchor's block beside each pair and ``clocks_mhz`` (P,2) the device's clock after its two
    blocks; they are empty without an anchor and without a guard.
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
class _Pass:
    """What pairs left behind. Lists of one length, but for ``tails``, ``anchors`` and ``clocks`` that may be empty."""

    pairs: list[tuple[float, float]] = field(default_factory=list)
    order: list[bool] = field(default_factory=list)
    tails: list[NDArray[np.float64]] = field(default_factory=list)
    anchors: list[float] = field(default_factory=list)
    clocks: list[tuple[float, float]] = field(default_factory=list)
    dropped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Arms:
    """Blocks of both arms and of the anchor, as callables without arguments."""

    reference: Callable[[], NDArray[np.float64]]
    candidate: Callable[[], NDArray[np.float64]]
    anchor: Callable[[], NDArray[np.float64]] | None


def host_block(run: Run, runs: int) -> NDArray[np.float64]:
    """Seconds of each of ``runs`` back-to-back runs, by this process's clock."""
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
    """Time both in pairs of blocks whose order a seeded coin decides; ``block`` is the clock.

    ``anchor`` is a third thing, timed once after each pair, that latencies of another day can be compared through.
    """
    rng = np.random.default_rng(pairing.seed)
    runs = max(_warm(reference), _warm(candidate))
    anchored = None if anchor is None else functools.partial(block, anchor, _warm(anchor))
    arms = _Arms(functools.partial(block, reference, runs), functools.partial(block, candidate, runs), anchored)

    def pairs() -> _Pass:
        return _measure_pairs(arms, pairing, rng, guard)

    once = pairs()
    extended = pairing.settle is not None and not _settled(once.pairs, pairing.settle)
    if extended:
        once = _joined(once, pairs())
    return Measured(
        pairs_s=np.asarray(once.pairs, np.float64).reshape(-1, 2),
        candidate_first=tuple(once.order),
        dropped=once.dropped,
        extended=extended,
        runs=runs,
        tails_s=np.concatenate(once.tails, axis=1) if once.tails else np.empty((2, 0)),
        anchor_s=np.asarray(once.anchors, np.float64),
        clocks_mhz=np.asarray(once.clocks, np.float64).reshape(-1, 2),
    )


def must_drop(first: Reading, second: Reading) -> bool:
    """Whether the device changed under a pair: only whole pairs are dropped, never single runs.

    A process that came or went between its blocks is such a change; one that stays hits both alike and is recorded.
    """
    apart = abs(first.sm_mhz - second.sm_mhz) > CLOCK_TOLERANCE * max(first.sm_mhz, second.sm_mhz)
    return first.throttled or second.throttled or apart or first.processes != second.processes


def slowed(run: Run, share: float) -> Run:
    """``run`` made slower by ``share`` of the time that it takes: a change of known size, to validate the gate with."""

    def longer() -> None:
        started = time.perf_counter()
        run()
        until = started + (time.perf_counter() - started) * (1 + share)
        while time.perf_counter() < until:
            pass

    return longer


def _measure_pairs(arms: _Arms, pairing: Pairing, rng: np.random.Generator, guard: Guard | None) -> _Pass:
    found = _Pass()
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


def _joined(first: _Pass, second: _Pass) -> _Pass:
    half = len(first.pairs) // 2
    return _Pass(
        pairs=first.pairs[half:] + second.pairs,
        order=first.order[half:] + second.order,
        tails=first.tails[half:] + second.tails,
        anchors=first.anchors[half:] + second.anchors,
        clocks=first.clocks[half:] + second.clocks,
        dropped=first.dropped + second.dropped,
    )


def _settled(pairs: list[tuple[float, float]], tolerance: float) -> bool:
    ratios = np.log([later / earlier for earlier, later in pairs])
    middle = len(ratios) // 2
    return middle < 1 or bool(abs(np.median(ratios[:middle]) - np.median(ratios[middle:])) <= tolerance)


def _warm(run: Run) -> int:
    """Run until warm; returns how many runs fill a block."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < _WARMUP_S or count < BLOCK_RUNS:
        run()
        count += 1
    each = (time.perf_counter() - started) / count
    return max(BLOCK_RUNS, math.ceil(BLOCK_S / each))
