"""One target's precision plan: as it is, equalised, or with layers kept in float32, what keeps the budget first."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.ort import OrtModel, load_model
from kdexport.blame.trace import Arrays, trace
from kdexport.graph.export import INPUT
from kdexport.policy import Budget
from kdexport.search.equalise import equalise
from kdexport.search.greedy import keep_fewest
from kdexport.search.ranges import explain_ranges, layer_ranges
from kdexport.verify.parity import run_in_batches
from kdexport.verify.task import kl_divergence

#: Writes a float32 graph in the target's precision with some nodes kept in float32: (source, kept nodes, path).
Cast = Callable[[Path, tuple[str, ...], Path], None]

#: Images on which sensitivities and ranges are measured: every intermediate value of them is held at once.
_PROBES = 16
_BATCH = 32
_LATENCY_RUNS = 15
#: Noise above a third of the signal: the logits are another network's.
_COLLAPSED = 1 / 3
_KEEPABLE = {"Conv", "Gemm", "MatMul"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trade:
    """What one plan costs and brings, on the images of the search.

    ``flips`` and ``top1_drop`` are shares of the images against the float32 graph, ``divergence`` the mean KL in nats,
    ``noise`` the rms error of the logits relative to them, ``latency_ms`` the median of single images on one thread.
    """

    plan: str
    kept: tuple[str, ...]
    equalised: int
    flips: float
    top1: float
    top1_drop: float
    divergence: float
    noise: float
    bytes: int
    latency_ms: float
    within: bool


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The chosen file, what it costs, every trade that was measured, and why the plain cast was not enough."""

    path: Path
    chosen: Trade
    trades: tuple[Trade, ...]
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether the plain cast was another network."""
        return not self.trades[1].noise <= _COLLAPSED

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest; numbers that are not finite become null."""
        return {
            "collapsed": self.collapsed,
            "chosen": _finite(asdict(self.chosen)),
            "trades": [_finite(asdict(trade)) for trade in self.trades],
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True, slots=True, eq=False)
class SearchImages:
    """Images (N,3,S,S) float32 and labels (N,) of the search; never those that judge its result."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def find_plan(
    source: Path, cast: Cast, data: SearchImages, budget: Budget, folder: Path, *, max_trials: int = 24
) -> PrecisionPlan:
    """Plain, then equalised, then with the fewest layers kept; files are written into ``folder``.

    Deterministic but for ``latency_ms``. The search stops after ``max_trials`` casts; its best plan may then be outside
    the budget, which ``chosen.within`` says.
    """
    judge = _Judge(run_in_batches(load_model(source).logits, data.images, (_BATCH,)), data, budget)
    plain = folder / "plain.onnx"
    cast(source, (), plain)
    trades = [judge.measure("fp32", source), judge.measure("plain", plain)]
    if trades[1].within:
        return PrecisionPlan(plain, trades[1], tuple(trades), ())
    feeds = {INPUT: data.images[:_PROBES]}
    reasons = tuple(explain_ranges(layer_ranges(onnx.load(str(source)), feeds)))
    base = _equalised(source, cast, feeds, judge, folder)
    if base is not None:
        trades.append(base.trade)
    if base is None or base.trade.noise > trades[1].noise:
        base = _Base(source, plain, trades[1])
    if base.trade.within:
        return PrecisionPlan(base.file, base.trade, tuple(trades), reasons)
    files: dict[tuple[str, ...], Path] = {}

    def attempt(kept: tuple[str, ...]) -> Trade:
        files[kept] = folder / f"kept-{len(files)}.onnx"
        cast(base.source, kept, files[kept])
        trades.append(judge.measure(f"{len(kept)} kept", files[kept], kept, base.trade.equalised))
        return trades[-1]

    ranked = sensitivities(onnx.load(str(base.source)), base.file, feeds)
    found = keep_fewest(ranked, attempt, max_trials=max_trials)
    return PrecisionPlan(files[found.kept], found.trial, tuple(trades), reasons)


@dataclass(frozen=True, slots=True)
class _Base:
    """A float32 graph, its plain cast, and what that costs."""

    source: Path
    file: Path
    trade: Trade


def _equalised(source: Path, cast: Cast, feeds: Arrays, judge: "_Judge", folder: Path) -> _Base | None:
    balanced = equalise(onnx.load(str(source)), feeds)
    if not balanced.pairs:
        return None
    exact, file = folder / "equalised-fp32.onnx", folder / "equalised.onnx"
    onnx.save(balanced.model, str(exact))
    cast(exact, (), file)
    return _Base(exact, file, judge.measure("equalised", file, (), balanced.pairs))


def sensitivities(model: onnx.ModelProto, cast_file: Path, feeds: dict[str, Any]) -> list[str]:
    """Convolutions and linear layers by the error that the cast makes in each alone, the worst first."""
    names = {node.name for node in model.graph.node if node.op_type in _KEEPABLE}
    errors = dict.fromkeys((node.name for node in model.graph.node if node.name in names), 0.0)
    for row in trace(onnx.load(str(cast_file)), model, feeds).nodes:
        if row.node in names:
            errors[row.node] = max(errors[row.node], row.error if np.isfinite(row.error) else np.inf)
    return sorted(errors, key=lambda name: -errors[name])


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    exact: NDArray[np.float32]
    data: SearchImages
    budget: Budget

    def measure(self, plan: str, path: Path, kept: tuple[str, ...] = (), equalised: int = 0) -> Trade:
        model = load_model(path, threads=1)
        logits = run_in_batches(model.logits, self.data.images, (_BATCH,))
        labels, before, after = self.data.labels, self.exact.argmax(axis=1), logits.argmax(axis=1)
        flips = float(np.mean(before != after))
        drop = float(np.mean(before == labels) - np.mean(after == labels))
        exact, other = self.exact.astype(np.float64), logits.astype(np.float64)
        centred = exact - exact.mean(axis=1, keepdims=True)
        noise = float(np.sqrt(np.mean(np.square(other - exact)) / np.mean(np.square(centred))))
        return Trade(
            plan=plan,
            kept=kept,
            equalised=equalised,
            flips=flips,
            top1=float(np.mean(after == labels)),
            top1_drop=drop,
            divergence=float(np.mean(kl_divergence(exact, other))),
            noise=noise,
            bytes=path.stat().st_size,
            latency_ms=_latency_ms(model, self.data.images[:1]),
            within=bool(np.isfinite(logits).all() and flips <= self.budget.flips and drop <= self.budget.top1_drop),
        )


def _latency_ms(model: OrtModel, image: NDArray[np.float32]) -> float:
    model.logits(image)
    times = []
    for _ in range(_LATENCY_RUNS):
        started = time.perf_counter()
        model.logits(image)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1e3


def _finite(table: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in table.items()}
