"""One session: a fresh process that times two arms against each other; JSON in, JSON out.

    python -m kdexport.timing.session '{"clock": "host", ...}'

It imports what it times and nothing else, so that a session of a small model takes a second or two.

Sessions from the outside: which processors they are held on, how they are started, and what became of them.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Logits
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import fail, print_json
from kdexport.errors import ConfigError, ForwardedError, KdexportError, VerificationError
from kdexport.stats.sequential import session_statistic
from kdexport.targets import DEFAULT_TARGET, parse_target
from kdexport.timing.anchor import SIZE
from kdexport.timing.clocks import CLOCKS
from kdexport.timing.measure import Block, Guard, Measured, Pairing, Run, host_block, measure, slowed


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one arm runs: the file of a target, or for the clock ``serve`` a bundle folder.

    ``slowdown`` makes every run longer by that share: a known change, for validating the gate itself.
    """

    path: str
    target: str = DEFAULT_TARGET
    slowdown: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A session to run. ``cpus`` are those that it is held on; ``settle`` and ``tails`` as in ``Pairing``.

    ``anchor`` is an ONNX file of ``network.write_network`` to time beside the arms, empty for none.
    """

    reference: Arm
    candidate: Arm
    clock: str
    image_size: int
    batch: int
    threads: int
    cpus: tuple[int, ...]
    pairs: int
    seed: int
    settle: float | None = None
    tails: bool = False
    anchor: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Request":
        """Inverse of ``dataclasses.asdict`` through JSON."""
        arms = {name: Arm(**data[name]) for name in ("reference", "candidate")}
        return cls(**{**data, **arms, "cpus": tuple(data["cpus"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What a session found: the median log ratio candidate / reference of its pairs, and all that it rests on.

    ``pairs_ms`` holds reference and candidate of each pair that counts; ``load`` the machine's load average before and
    after; ``created_first`` the arm that was loaded first; ``tails_ms`` every run of the candidate where asked for, and
    ``reference_tails_ms`` those of the reference. ``anchored`` is the median log ratio candidate / anchor, and
    ``cycles_log_ratio`` is ``log_ratio`` with each block's time multiplied by the device's clock.
    """

    log_ratio: float
    reference_ms: float
    candidate_ms: float
    pairs_ms: tuple[tuple[float, float], ...] = ()
    candidate_first: tuple[bool, ...] = ()
    dropped: int = 0
    extended: bool = False
    runs: int = 0
    seed: int = 0
    created_first: str = ""
    cpus: tuple[int, ...] = ()
    threads: int = 0
    load: tuple[float, float] = (0.0, 0.0)
    tails_ms: tuple[float, ...] = ()
    reference_tails_ms: tuple[float, ...] = ()
    gpu: dict[str, Any] | None = None
    anchored: float | None = None
    cycles_log_ratio: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Session":
        """Inverse of ``dataclasses.asdict`` through JSON."""
        tuples = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **tuples, "pairs_ms": tuple((a, b) for a, b in data["pairs_ms"])})


def run(request: Request) -> Session:
    """Measure in this process, which is pinned to ``request.cpus`` for good."""
    if request.cpus:
        os.sched_setaffinity(0, request.cpus)
    rng = np.random.default_rng([request.seed, 1])
    order = [str(name) for name in rng.permutation(["reference", "candidate"])]
    pairing = Pairing(pairs=request.pairs, seed=request.seed, settle=request.settle, tails=request.tails)
    before = os.getloadavg()[0]
    with _opened(request, order) as opened:
        runs = opened.runs
        arms = {"reference": request.reference, "candidate": request.candidate}
        if any(arm.slowdown for arm in arms.values()):
            # Both arms, so that what the waiting itself costs is no part of the difference.
            runs = {name: slowed(runs[name], arm.slowdown) for name, arm in arms.items()}
        both = (runs["reference"], runs["candidate"])
        measured = measure(*both, pairing, opened.guard, block=opened.block, anchor=opened.anchor)
        facts = opened.facts()
    return _session(request, measured, order[0], (before, os.getloadavg()[0]), facts)


def _session(
    request: Request, measured: Measured, created_first: str, load: tuple[float, float], facts: dict[str, Any] | None
) -> Session:
    pairs_ms = measured.pairs_s * 1e3
    valid = len(pairs_ms) > 0
    return Session(
        log_ratio=session_statistic(measured.pairs_s) if valid else float("nan"),
        reference_ms=float(np.median(pairs_ms[:, 0])) if valid else float("nan"),
        candidate_ms=float(np.median(pairs_ms[:, 1])) if valid else float("nan"),
        pairs_ms=tuple((round(float(a), 6), round(float(b), 6)) for a, b in pairs_ms),
        candidate_first=measured.candidate_first,
        dropped=measured.dropped,
        extended=measured.extended,
        runs=measured.runs,
        seed=request.seed,
        created_first=created_first,
        cpus=tuple(sorted(os.sched_getaffinity(0))),
        threads=request.threads,
        load=load,
        tails_ms=tuple(round(float(value), 6) for value in measured.tails_s[1] * 1e3),
        reference_tails_ms=tuple(round(float(value), 6) for value in measured.tails_s[0] * 1e3),
        gpu=facts,
        anchored=_beside(measured.anchor_s, measured.pairs_s[:, 1]),
        cycles_log_ratio=_cycles(measured),
    )


def _beside(first_s: NDArray[np.float64], second_s: NDArray[np.float64]) -> float | None:
    return session_statistic(np.stack([first_s, second_s], axis=1)) if len(first_s) else None


def _cycles(measured: Measured) -> float | None:
    clocks = measured.clocks_mhz
    return session_statistic(measured.pairs_s * clocks) if clocks.size and (clocks > 0).all() else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Opened:
    """Both arms, ready to run, the anchor where there is one, and the clock that times them."""

    runs: dict[str, Run]
    anchor: Run | None = None
    block: Block = host_block
    guard: Guard | None = None
    facts: Callable[[], dict[str, Any] | None] = lambda: None


@contextlib.contextmanager
def _opened(request: Request, order: list[str]) -> Iterator[_Opened]:
    """Both arms as callables, created in ``order``: the one that comes first may get the better memory."""
    rng = np.random.default_rng([request.seed, 2])
    size = request.image_size
    images = rng.standard_normal((request.batch, 3, size, size), dtype=np.float32)
    arms = {"reference": request.reference, "candidate": request.candidate}
    if request.clock == "host":
        opened = {
            name: open_on_host(Path(arms[name].path), arms[name].target, threads=request.threads) for name in order
        }
        runs = {name: _bound(logits, images) for name, logits in opened.items()}
        yield _Opened(runs=runs, anchor=_host_anchor(request))
    elif request.clock == "serve":
        from kdexport.timing.http_client import serving

        with serving({name: (arms[name].path, arms[name].target) for name in order}) as client:
            yield _Opened(runs={name: client.request(name, images) for name in order}, anchor=_host_anchor(request))
    elif request.clock == "gpu":
        yield _on_gpu(arms, order, images, request.anchor)
    else:
        raise ConfigError(f"There is no clock {request.clock!r} in a session.", remedy=f"Known: {', '.join(CLOCKS)}.")


def _host_anchor(request: Request) -> Run | None:
    if not request.anchor:
        return None
    return _bound(open_on_host(Path(request.anchor), DEFAULT_TARGET, threads=request.threads), _anchor_image())


def _anchor_image() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)


def _on_gpu(arms: dict[str, Arm], order: list[str], images: NDArray[np.float32], anchor: str) -> _Opened:
    from kdexport.timing.gpu import device_facts, event_block, open_nvml, open_on_gpu

    if any(arm.slowdown for arm in arms.values()):
        raise ConfigError("A known slowdown cannot be injected on a GPU.", remedy="Use the clock host for it.")
    runs: dict[str, Run] = {name: open_on_gpu(Path(arms[name].path), arms[name].target, images) for name in order}
    facts = device_facts()
    guard = open_nvml(facts["uuid"])
    return _Opened(
        runs=runs,
        anchor=open_on_gpu(Path(anchor), DEFAULT_TARGET, _anchor_image()) if anchor else None,
        block=event_block,
        guard=guard,
        facts=lambda: {**facts, "nvml": None if guard is None else guard.facts()},
    )


def open_on_host(path: Path, target: str, *, threads: int) -> Logits:
    """A target's file on the CPU, in its own runtime: (n,3,S,S) float32 to logits (n,K)."""
    wanted = parse_target(target)
    return wanted.runtime.open(path, wanted.precision, device="cpu", threads=threads).logits


def _bound(function: Callable[[Any], object], images: Any) -> Run:
    return lambda: function(images)


def _main() -> None:
    try:
        print_json(asdict(run(Request.from_json(json.loads(sys.argv[1])))))
    except KdexportError as error:
        fail(error)


SESSION_TIMEOUT_S = 600


def usable_cpus() -> tuple[int, ...]:
    """Processors that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def pinned_cpus(threads: int) -> tuple[int, ...]:
    """The processors that sessions of ``threads`` threads are held on: the last ones, for interrupts meet the first."""
    return usable_cpus()[-threads:]


def run_session(request: Request) -> Session:
    """Run one session in a fresh process; raises what it raised, or ``VerificationError`` if it died or hung."""
    try:
        answer = call("kdexport.timing.session", [json.dumps(asdict(request))], timeout_s=SESSION_TIMEOUT_S)
    except ChildTimeoutError as error:
        raise VerificationError(
            f"A latency session did not end within {error.seconds:g} s.",
            remedy="Use a smaller batch or fewer pairs, or a quieter machine.",
        ) from None
    except ForwardedError as error:
        raise ForwardedError(
            f"In a latency session: {error.message}",
            remedy=error.remedy, code=error.code, exit_code=error.exit_code,
        ) from None  # fmt: skip
    except ChildDiedError as error:
        raise VerificationError(
            f"A latency session died with exit code {error.exit_code}: {error.said}",
            remedy="Run the same command again; if it stays, open both files in onnxruntime by hand.",
        ) from None
    return Session.from_json(answer)


if __name__ == "__main__":
    _main()
