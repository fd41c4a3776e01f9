"""The precision search as a stage of a build: which layers stay in float32 or are scaled, by training images."""

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
    # Only the values of these settings are in the keys, not the code of their classes.
    from kdexport.config import BuildConfig, SearchSettings

_FOUND = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """A form to search: the source of its training images, and the limits of a plan on them."""

    form: str
    calibration: Calibration
    settings: "SearchSettings"
    flips: float
    top1_drop: float

    @property
    def noise(self) -> float:
        """The largest noise of the logits; infinite if no limit is set."""
        return float("inf") if self.settings.noise is None else self.settings.noise


@dataclass(frozen=True, slots=True)
class Searched:
    """The plan, and its description for the manifest: images, budget, the costs of every measured plan."""

    layers: LayerPlan
    described: dict[str, Any]


def require_searchable(targets: Sequence[Target]) -> None:
    """Raise ``ConfigError`` unless one of ``targets`` is int8."""
    if not any(target.precision == "int8" for target in targets):
        raise ConfigError(
            f"The precision search needs an int8 target; the targets are {', '.join(map(str, targets))}.",
            remedy="Add one, for example onnx-int8, or omit --precision-search ([precision_search] enabled = false).",
        )


def search_requests(
    targets: Sequence[Target], config: "BuildConfig", calibration: Calibration
) -> dict[str, SearchRequest]:
    """The searches of a build by form, because targets of one form share a plan; default limits are those of rung D."""
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
    """The plan for the float32 ``model``; making it raises ``VerificationError`` if none is within the budget."""
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
    measured = calibrate(model, calibration, form)
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
