"""One form's precision plan: as it is, equalised, or with layers kept in float32, what keeps the budget first.

The fewest layers to keep: greedy by measured sensitivity, deterministic, with a bounded number of trials.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import onnx

from kdexport.backends.base import INPUT
from kdexport.graph.equalise import equalise, explain_ranges, layer_ranges
from kdexport.graph.plan import PLAIN, Kept, LayerPlan
from kdexport.precision_search.costs import Judge, SearchBudget, SearchImages, Trade
from kdexport.precision_search.sensitivity import sensitivities
from kdexport.stats.logits import COLLAPSED


class Judged(Protocol):
    """A trial that knows whether it is within the budget."""

    @property
    def within(self) -> bool:
        """Whether it may be taken."""


T = TypeVar("T", bound=Judged)


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """The kept layers in order of sensitivity, their trial (the last one if none fits), and all trials made."""

    kept: tuple[str, ...]
    trial: T
    trials: tuple[tuple[tuple[str, ...], T], ...]


def keep_fewest(ranked: Sequence[str], evaluate: Callable[[tuple[str, ...]], T], *, max_trials: int) -> Found[T]:
    """Keep the most sensitive layers of ``ranked`` (worst first) until a trial is within the budget.

    Doubles the number of kept layers until it fits, halves back to the smallest that does, then gives back one layer
    after the other, the least sensitive first, where it still fits without it.
    """
    trials: list[tuple[tuple[str, ...], T]] = []

    def attempt(kept: tuple[str, ...]) -> T | None:
        known = next((trial for names, trial in trials if names == kept), None)
        if known is None and len(trials) < max_trials:
            known = evaluate(kept)
            trials.append((kept, known))
        return known

    best = _smallest_prefix(ranked, attempt)
    if best is None:
        kept, trial = trials[-1]
        return Found(kept, trial, tuple(trials))
    for layer in reversed(best[0]):
        without = tuple(name for name in best[0] if name != layer)
        trial_without = attempt(without)
        if trial_without is None:
            break
        if trial_without.within:
            best = (without, trial_without)
    return Found(*best, tuple(trials))


def _smallest_prefix(
    ranked: Sequence[str], attempt: Callable[[tuple[str, ...]], T | None]
) -> tuple[tuple[str, ...], T] | None:
    low, high, best = -1, 0, None
    while best is None:
        trial = attempt(tuple(ranked[:high]))
        if trial is None:
            return None
        if trial.within:
            best = (tuple(ranked[:high]), trial)
        elif high == len(ranked):
            return None
        else:
            low, high = high, min(len(ranked), max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        trial = attempt(tuple(ranked[:middle]))
        if trial is None:
            break
        if trial.within:
            high, best = middle, (tuple(ranked[:middle]), trial)
        else:
            low = middle
    return best


#: Writes the float32 graph in the form that is searched, by a plan, to a path.
Cast = Callable[[LayerPlan, Path], object]

#: Images on which sensitivities and ranges are measured: every intermediate value of them is held at once.
_PROBES = 16


@dataclass(frozen=True, slots=True)
class Tried:
    """A plan, its file, and what it costs."""

    layers: LayerPlan
    path: Path
    trade: Trade

    @property
    def within(self) -> bool:
        """Whether it keeps the budget."""
        return self.trade.within


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionPlan:
    """The chosen plan, every plan that was tried (the plain cast first), and why the plain cast was not enough."""

    float32: Trade
    chosen: Tried
    tried: tuple[Tried, ...]
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether the plain cast was another network."""
        return not self.tried[0].trade.noise <= COLLAPSED

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest: the layers, all trades and the place of the chosen one among them."""
        return {
            **self.chosen.layers.to_json(),
            "collapsed": self.collapsed,
            "reasons": list(self.reasons),
            "float32": _finite(self.float32),
            "trades": [_finite(tried.trade) for tried in self.tried],
            "chosen": self.tried.index(self.chosen),
        }


def find_plan(
    source: Path,
    cast: Cast,
    data: SearchImages,
    budget: SearchBudget,
    folder: Path,
    *,
    form: str,
    evaluations: int = 24,
    progress: Callable[[str], None] = lambda _: None,
) -> PrecisionPlan:
    """Plain, then equalised, then with the fewest layers kept; files are written into ``folder``.

    Deterministic but for ``latency_ms``. At most ``evaluations`` plans are cast and measured; the chosen one may then
    be outside of the budget, which ``chosen.within`` says.
    """
    trials = _Trials(cast, Judge.of(source, data, budget), folder, form, progress)
    plain = trials.make(PLAIN)
    if plain.within:
        return trials.conclude(source, plain, ())
    model, feeds = onnx.load(str(source)), {INPUT: data.images[:_PROBES]}
    reasons = tuple(explain_ranges(layer_ranges(model, feeds)))
    base = plain
    balanced = equalise(model, feeds)
    if balanced.scalings:
        equal = trials.make(LayerPlan(equalised=balanced.scalings))
        if equal.within:
            return trials.conclude(source, equal, reasons)
        if equal.trade.noise <= plain.trade.noise:
            base, model = equal, balanced.model
    found = sensitivities(model, onnx.load(str(base.path)), feeds)
    weights = {node.name: node.input[1] for node in model.graph.node if node.name in found}

    def attempt(names: tuple[str, ...]) -> Tried:
        kept = tuple(Kept(name, weights[name]) for name in names)
        return trials.make(replace(base.layers, kept=kept)) if kept else base

    ranked = sorted(found, key=lambda name: -found[name])
    # Keeping nothing is a trial of the greedy search, and has been made.
    best = keep_fewest(ranked, attempt, max_trials=evaluations - len(trials.made) + 1)
    return trials.conclude(source, best.trial, reasons)


@dataclass(frozen=True, slots=True, eq=False)
class _Trials:
    """Casts and measures plans, and remembers them."""

    cast: Cast
    judge: Judge
    folder: Path
    form: str
    progress: Callable[[str], None]
    made: list[Tried] = field(default_factory=list)

    def make(self, layers: LayerPlan) -> Tried:
        self.progress(f"{self.form}, plan {len(self.made) + 1}, {len(layers.kept)} layers in float32")
        path = self.folder / f"plan-{len(self.made)}.onnx"
        self.cast(layers, path)
        self.made.append(Tried(layers, path, self.judge.measure(path, self.form, layers)))
        return self.made[-1]

    def conclude(self, source: Path, chosen: Tried, reasons: tuple[str, ...]) -> PrecisionPlan:
        exact = self.judge.measure(source, "fp32")
        return PrecisionPlan(float32=exact, chosen=chosen, tried=tuple(self.made), reasons=reasons)


def _finite(trade: Trade) -> dict[str, Any]:
    """JSON has no number for what is not finite."""
    table = asdict(trade) | {"kept": list(trade.kept)}
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in table.items()}
