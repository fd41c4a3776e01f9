"""The search for the precision plan of one form: plain, equalised, or with layers kept in float32.

The first plan within the budget is taken. Layers to keep are chosen greedily by measured sensitivity, deterministically
and with a limited number of evaluations.
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
from kdexport.precision_search.costs import PlanCost, PlanEvaluator, SearchBudget, SearchImages
from kdexport.precision_search.sensitivity import sensitivities
from kdexport.stats.logits import COLLAPSED

#: Casts the float32 graph by a plan and writes it to a path.
Cast = Callable[[LayerPlan, Path], object]

#: Number of images for sensitivities and ranges; all their intermediate values are in memory at once.
_PROBES = 16


@dataclass(frozen=True, slots=True)
class EvaluatedPlan:
    """A plan, its file, and its cost."""

    layers: LayerPlan
    path: Path
    cost: PlanCost

    @property
    def within(self) -> bool:
        """Whether it is within the budget."""
        return self.cost.within


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionPlan:
    """The chosen plan, every evaluated plan (the plain cast first), and the hostile layers of the plain cast."""

    float32: PlanCost
    chosen: EvaluatedPlan
    evaluated: tuple[EvaluatedPlan, ...]
    reasons: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Whether the logits of the plain cast have little in common with those of the float32 graph."""
        return not self.evaluated[0].cost.noise <= COLLAPSED

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest: the plan, the costs of all plans, and the index of the chosen one."""
        return {
            **self.chosen.layers.to_json(),
            "collapsed": self.collapsed,
            "reasons": list(self.reasons),
            "float32": _finite(self.float32),
            "trades": [_finite(plan.cost) for plan in self.evaluated],
            "chosen": self.evaluated.index(self.chosen),
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
    """Try the plain cast, then equalisation, then as few kept layers as possible; files are written into ``folder``.

    Deterministic except for ``latency_ms``. At most ``evaluations`` plans are cast and measured. If none of them is
    within the budget, ``chosen.within`` is false.
    """
    search = _Search(cast, PlanEvaluator.of(source, data, budget), folder, form, progress)
    plain = search.evaluate(PLAIN)
    if plain.within:
        return search.conclude(source, plain, ())
    model, feeds = onnx.load(str(source)), {INPUT: data.images[:_PROBES]}
    reasons = tuple(explain_ranges(layer_ranges(model, feeds)))
    base = plain
    balanced = equalise(model, feeds)
    if balanced.scalings:
        equalised = search.evaluate(LayerPlan(equalised=balanced.scalings))
        if equalised.within:
            return search.conclude(source, equalised, reasons)
        if equalised.cost.noise <= plain.cost.noise:
            base, model = equalised, balanced.model
    sensitivity = sensitivities(model, onnx.load(str(base.path)), feeds)
    weights = {node.name: node.input[1] for node in model.graph.node if node.name in sensitivity}

    def keep(names: tuple[str, ...]) -> EvaluatedPlan:
        kept = tuple(Kept(name, weights[name]) for name in names)
        return search.evaluate(replace(base.layers, kept=kept)) if kept else base

    ranked = sorted(sensitivity, key=lambda name: -sensitivity[name])
    # The first evaluation of the greedy search, which keeps nothing, is already done.
    best = keep_fewest(ranked, keep, max_evaluations=evaluations - len(search.evaluated) + 1)
    return search.conclude(source, best.result, reasons)


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Casts, measures and records plans."""

    cast: Cast
    evaluator: PlanEvaluator
    folder: Path
    form: str
    progress: Callable[[str], None]
    evaluated: list[EvaluatedPlan] = field(default_factory=list)

    def evaluate(self, layers: LayerPlan) -> EvaluatedPlan:
        self.progress(f"{self.form}, plan {len(self.evaluated) + 1}, {len(layers.kept)} layers in float32")
        path = self.folder / f"plan-{len(self.evaluated)}.onnx"
        self.cast(layers, path)
        self.evaluated.append(EvaluatedPlan(layers, path, self.evaluator.measure(path, self.form, layers)))
        return self.evaluated[-1]

    def conclude(self, source: Path, chosen: EvaluatedPlan, reasons: tuple[str, ...]) -> PrecisionPlan:
        float32 = self.evaluator.measure(source, "fp32")
        return PrecisionPlan(float32=float32, chosen=chosen, evaluated=tuple(self.evaluated), reasons=reasons)


def _finite(cost: PlanCost) -> dict[str, Any]:
    """The cost as a JSON object; numbers that are not finite become null."""
    data = asdict(cost) | {"kept": list(cost.kept)}
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in data.items()}


class Judged(Protocol):
    """An evaluated plan of which it is known whether it is within the budget."""

    @property
    def within(self) -> bool:
        """Whether it is within the budget."""


T = TypeVar("T", bound=Judged)


@dataclass(frozen=True, slots=True)
class KeptLayers(Generic[T]):
    """The layers to keep, most sensitive first, their evaluation (the last one if none is within the budget), and all
    evaluations.
    """

    kept: tuple[str, ...]
    result: T
    evaluations: tuple[tuple[tuple[str, ...], T], ...]


def keep_fewest(
    ranked: Sequence[str], evaluate: Callable[[tuple[str, ...]], T], *, max_evaluations: int
) -> KeptLayers[T]:
    """Keep as few as possible of the layers ``ranked`` (most sensitive first) so that the plan is within the budget.

    The number of kept layers is doubled until the plan is within the budget, then bisected to the smallest number that
    is. Finally each layer, the least sensitive first, is dropped again if the plan is within the budget without it.
    """
    done: list[tuple[tuple[str, ...], T]] = []

    def attempt(kept: tuple[str, ...]) -> T | None:
        result = next((known for names, known in done if names == kept), None)
        if result is None and len(done) < max_evaluations:
            result = evaluate(kept)
            done.append((kept, result))
        return result

    best = _smallest_prefix(ranked, attempt)
    if best is None:
        kept, last = done[-1]
        return KeptLayers(kept, last, tuple(done))
    for layer in reversed(best[0]):
        without = tuple(name for name in best[0] if name != layer)
        result = attempt(without)
        if result is None:
            break
        if result.within:
            best = (without, result)
    return KeptLayers(*best, tuple(done))


def _smallest_prefix(
    ranked: Sequence[str], attempt: Callable[[tuple[str, ...]], T | None]
) -> tuple[tuple[str, ...], T] | None:
    """The shortest prefix of ``ranked`` within the budget, with its evaluation; None if none is found."""
    low, high, best = -1, 0, None
    while best is None:
        result = attempt(tuple(ranked[:high]))
        if result is None:
            return None
        if result.within:
            best = (tuple(ranked[:high]), result)
        elif high == len(ranked):
            return None
        else:
            low, high = high, min(len(ranked), max(1, 2 * high))
    while high - low > 1:
        middle = (low + high) // 2
        result = attempt(tuple(ranked[:middle]))
        if result is None:
            break
        if result.within:
            high, best = middle, (tuple(ranked[:middle]), result)
        else:
            low = middle
    return best
