"""The search as a stage of a build: which layers of a form stay in float32 or are scaled, by training images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdexport.build.artifacts import OnnxModel
from kdexport.build.stages import CAST_TOOLS, calibrate, weight_bits, write_int8
from kdexport.data.calibration_images import Calibration
from kdexport.errors import ConfigError, VerificationError
from kdexport.graph.plan import LayerPlan
from kdexport.targets import Target
from kdexport.verify.policy import parse_policy
from kdexport.workspace import Making, Step

if TYPE_CHECKING:
    # Values of settings are in the keys; the other tables of a configuration are nothing to a stage.
    from kdexport.config import BuildConfig, SearchSettings

_FOUND = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """One form to be searched: where its training images come from, and what a plan may cost on them."""

    form: str
    calibration: Calibration
    settings: "SearchSettings"
    flips: float
    top1_drop: float

    @property
    def noise(self) -> float:
        """The largest noise of the logits, infinite where none was set."""
        return float("inf") if self.settings.noise is None else self.settings.noise


@dataclass(frozen=True, slots=True)
class Searched:
    """The plan, and what the manifest says about it: images, budget, every trade."""

    layers: LayerPlan
    described: dict[str, Any]


def require_searchable(targets: Sequence[Target]) -> None:
    """Raise ``ConfigError`` where no target leaves anything to search."""
    if not any(target.precision == "int8" for target in targets):
        raise ConfigError(
            f"There is nothing to search: {', '.join(map(str, targets))} has no int8 target, and the precision search "
            "keeps layers of int8 targets in float32.",
            remedy="Add an int8 target, or build without --precision-search.",
        )


def search_requests(
    targets: Sequence[Target], config: "BuildConfig", calibration: Calibration
) -> dict[str, SearchRequest]:
    """What is to be searched, by form, because targets of one form share a plan. Limits left open are rung D's."""
    settings = config.precision_search
    budget = parse_policy(config.policy, "[policy]").D.int8
    flips = budget.flips if settings.flips is None else settings.flips
    drop = budget.top1_drop if settings.top1_drop is None else settings.top1_drop
    return {
        target.form: SearchRequest(
            form=target.form, calibration=calibration, settings=settings, flips=flips, top1_drop=drop
        )
        for target in targets
        if settings.enabled and target.precision == "int8"
    }


def search(model: Step[OnnxModel], request: SearchRequest) -> Step[Searched]:
    """The plan for the float32 ``model``; making it raises ``VerificationError`` where none keeps the budget."""
    settings, form, calibration = request.settings, request.form, request.calibration

    def make(making: Making) -> None:
        from kdexport.precision_search.costs import SearchBudget, SearchImages
        from kdexport.precision_search.search import find_plan

        folder = making.folder
        images, labels = calibration.search_images(settings.images)
        found = find_plan(
            model.result(making.workspace).path,
            lambda plan, path: write_int8(making.workspace, model, form, calibration, plan, path),
            SearchImages(images, labels),
            SearchBudget(flips=request.flips, top1_drop=request.top1_drop, noise=request.noise),
            folder,
            form=form,
            evaluations=settings.evaluations,
            progress=making.progress,
        )
        if not found.chosen.within:
            cost = found.chosen.cost
            raise VerificationError(
                f"No precision plan for {form} is within the budget after {len(found.evaluated)} of at most "
                f"{settings.evaluations} evaluations: with {len(cost.kept)} layers in float32 "
                f"{cost.flips:.2%} flips, {cost.top1_drop:.2%} top-1 lost and noise {cost.noise:.3f} (up to "
                f"{request.flips:.2%}, {request.top1_drop:.2%} and {request.noise:g} allowed, {len(labels):,} images). "
                f"{' '.join(found.reasons[:1])}".rstrip(),
                remedy="Raise evaluations or a limit under [precision_search], or build another precision.",
            )
        budget = {"flips": request.flips, "top1_drop": request.top1_drop, "noise": settings.noise}
        described = {**found.to_json(), "budget": budget, "images": len(labels), "split": "train"}
        (folder / _FOUND).write_text(json.dumps(described, indent=1, allow_nan=False))
        for path in folder.glob("*.onnx"):
            path.unlink()

    limits = [request.flips, request.top1_drop, settings.noise, settings.images, settings.evaluations]
    measured = calibrate(model, calibration)
    return Step(
        stage="search",
        made_of=(model, measured, form, weight_bits(form, calibration), limits),
        make=make,
        read=_read_searched,
        tools=CAST_TOOLS,
    )


def _read_searched(folder: Path) -> Searched:
    described = json.loads((folder / _FOUND).read_text())
    return Searched(LayerPlan.from_json(described), described)
