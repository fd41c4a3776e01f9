"""A latency session: a fresh process that times two arms against each other.

``run_session`` starts the process and reads its result. The process itself takes a request as JSON and prints a
session as JSON:

    python -m kdexport.timing.session '{"clock": "host", ...}'

It imports only what it times, so that a session of a small model takes one or two seconds.
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

from kdexport.backends.base import Runner
from kdexport.backends.pixel_input import Given, arrange
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import fail, print_json
from kdexport.core.processors import can_pin, pin_process, usable_cpus
from kdexport.errors import ConfigError, ForwardedError, KdexportError, VerificationError
from kdexport.stats.sequential import session_statistic
from kdexport.targets import DEFAULT_TARGET, parse_target
from kdexport.timing.anchor import SIZE
from kdexport.timing.clocks import unknown_clock
from kdexport.timing.measure import Block, Guard, Measured, Pairing, Run, host_block, measure, slowed

#: Seconds after which a session is stopped.
SESSION_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """What one arm runs: the file of a target, or a bundle folder for the clock ``serve``.

    ``slowdown`` makes every run longer by that fraction: a known change, to validate the gate itself.
    """

    path: str
    target: str = DEFAULT_TARGET
    slowdown: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A session to run. ``cpus`` are the processors it is pinned to; ``max_drift`` and ``tails`` as in ``Pairing``.

    ``anchor`` is an ONNX file of ``write_anchor_network`` to time beside the arms, empty for none.
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
    max_drift: float | None = None
    tails: bool = False
    anchor: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Request":
        """Inverse of ``dataclasses.asdict`` through JSON."""
        arms = {name: Arm(**data[name]) for name in ("reference", "candidate")}
        return cls(**{**data, **arms, "cpus": tuple(data["cpus"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The result of a session: the median log ratio candidate / reference of its pairs, and the measurements behind it.

    ``pairs_ms`` holds (reference, candidate) of each pair that was not dropped; ``load`` the load average before and
    after; ``created_first`` the arm that was loaded first; ``tails_ms`` and ``reference_tails_ms`` every run of each
    arm if requested. ``anchored`` is the median log ratio candidate / anchor. ``cycles_log_ratio`` is ``log_ratio`` in
    clock cycles of the device instead of time.
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


def pinned_cpus(threads: int) -> tuple[int, ...]:
    """The last ``threads`` usable processors, to which sessions are pinned; most interrupts are served by the first.

    Empty if the system cannot pin a process.
    """
    return usable_cpus()[-threads:] if can_pin() else ()


def run_session(request: Request) -> Session:
    """Run one session in a fresh process; raises its error, or ``VerificationError`` if it crashed or timed out."""
    try:
        result = call("kdexport.timing.session", [json.dumps(asdict(request))], timeout_s=SESSION_TIMEOUT_S)
    except ChildTimeoutError as error:
        raise VerificationError(
            f"A latency session took more than {error.seconds:g} s (the limit).",
            remedy="Pass a smaller --batch, or use a faster or quieter machine.",
        ) from None
    except ForwardedError as error:
        raise ForwardedError(
            f"In a latency session: {error.message}",
            remedy=error.remedy, code=error.code, exit_code=error.exit_code,
        ) from None  # fmt: skip
    except ChildDiedError as error:
        raise VerificationError(
            f"A latency session crashed with exit code {error.exit_code}: {error.stderr}",
            remedy="Run the same command again; if it crashes again, open each model in its runtime.",
        ) from None
    return Session.from_json(result)


def measure_session(request: Request) -> Session:
    """Measure in this process, which stays pinned to ``request.cpus``."""
    pin_process(request.cpus)
    rng = np.random.default_rng([request.seed, 1])
    order = [str(name) for name in rng.permutation(["reference", "candidate"])]
    pairing = Pairing(pairs=request.pairs, seed=request.seed, max_drift=request.max_drift, tails=request.tails)
    before = os.getloadavg()[0]
    with _opened(request, order) as opened:
        runs = opened.runs
        arms = {"reference": request.reference, "candidate": request.candidate}
        if any(arm.slowdown for arm in arms.values()):
            # Both arms are wrapped, so that the overhead of the busy wait cancels out.
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
        cpus=usable_cpus(),
        threads=request.threads,
        load=load,
        tails_ms=tuple(round(float(value), 6) for value in measured.tails_s[1] * 1e3),
        reference_tails_ms=tuple(round(float(value), 6) for value in measured.tails_s[0] * 1e3),
        gpu=facts,
        anchored=_anchored_log_ratio(measured),
        cycles_log_ratio=_cycles_log_ratio(measured),
    )


def _anchored_log_ratio(measured: Measured) -> float | None:
    if not len(measured.anchor_s):
        return None
    return session_statistic(np.stack([measured.anchor_s, measured.pairs_s[:, 1]], axis=1))


def _cycles_log_ratio(measured: Measured) -> float | None:
    clocks = measured.clocks_mhz
    return session_statistic(measured.pairs_s * clocks) if clocks.size and (clocks > 0).all() else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Opened:
    """Both arms and the anchor, ready to run, and how a block of them is timed."""

    runs: dict[str, Run]
    anchor: Run | None = None
    block: Block = host_block
    guard: Guard | None = None
    facts: Callable[[], dict[str, Any] | None] = lambda: None


@contextlib.contextmanager
def _opened(request: Request, order: list[str]) -> Iterator[_Opened]:
    """Both arms as callables, loaded in ``order``: the arm that is loaded first may get the better memory layout."""
    rng = np.random.default_rng([request.seed, 2])
    size = request.image_size
    images = rng.standard_normal((request.batch, 3, size, size), dtype=np.float32)
    arms = {"reference": request.reference, "candidate": request.candidate}
    if request.clock == "host":
        opened = {
            name: open_on_host(Path(arms[name].path), arms[name].target, threads=request.threads) for name in order
        }
        runs = {name: _bound(runner.logits, _given(runner, images)) for name, runner in opened.items()}
        yield _Opened(runs=runs, anchor=_host_anchor(request))
    elif request.clock == "serve":
        from kdexport.timing.http_client import serving

        with serving({name: (arms[name].path, arms[name].target) for name in order}) as client:
            yield _Opened(runs={name: client.request(name, images) for name in order}, anchor=_host_anchor(request))
    elif request.clock == "gpu":
        yield _on_gpu(arms, order, images, request.anchor)
    else:
        raise unknown_clock(request.clock)


def _host_anchor(request: Request) -> Run | None:
    if not request.anchor:
        return None
    return _bound(open_on_host(Path(request.anchor), DEFAULT_TARGET, threads=request.threads).logits, _anchor_image())


def _anchor_image() -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)


def _on_gpu(arms: dict[str, Arm], order: list[str], images: NDArray[np.float32], anchor: str) -> _Opened:
    from kdexport.timing.gpu import device_facts, event_block, open_nvml, open_on_gpu

    if any(arm.slowdown for arm in arms.values()):
        raise ConfigError("A slowdown cannot be injected on the clock gpu.", remedy="Use the clock host.")
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


def open_on_host(path: Path, target: str, *, threads: int) -> Runner:
    """The file of a target on the CPU, in its own runtime."""
    wanted = parse_target(target)
    return wanted.runtime.open(path, wanted.precision, device="cpu", threads=threads)


def _given(runner: Runner, images: NDArray[np.float32]) -> Given:
    """``images`` (n,3,S,S), or as many images of random pixels if the file takes pixels."""
    if runner.takes is None:
        return images
    shape = images.transpose(0, 2, 3, 1).shape
    return arrange(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8), runner.takes.kind)


def _bound(function: Callable[[Any], object], images: Any) -> Run:
    return lambda: function(images)


def _main() -> None:
    try:
        print_json(asdict(measure_session(Request.from_json(json.loads(sys.argv[1])))))
    except KdexportError as error:
        fail(error)


if __name__ == "__main__":
    _main()
