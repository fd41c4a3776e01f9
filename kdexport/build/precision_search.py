"""The search as a stage of a build: on training images, found again by everything that its outcome depends on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.artifacts import OnnxModel
from kdexport.build import stages
from kdexport.checkpoint import TrainedStudent
from kdexport.config import BuildConfig, SearchSettings
from kdexport.core.digests import digest, source_digest
from kdexport.core.progress import Reporter
from kdexport.data.calibration_images import Calibration
from kdexport.errors import ConfigError, VerificationError
from kdexport.graph.plan import LayerPlan
from kdexport.targets import Target
from kdexport.verify.policy import parse_policy
from kdexport.workspace import Workspace

_FOUND = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """One form to be searched: where its training images come from, and what a plan may cost on them."""

    form: str
    calibration: Calibration
    settings: SearchSettings
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
    targets: Sequence[Target], config: BuildConfig, calibration: Calibration
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


def stage_keys(
    trained: TrainedStudent,
    targets: Sequence[Target],
    config: BuildConfig,
    calibration: Calibration,
    workspace: Workspace | None = None,
) -> list[tuple[str, str]]:
    """``stages.stage_keys`` of plain files, and of the searches: what these find is not known before they are made.

    With a ``workspace`` also the keys of what came of the searches that are in it.
    """
    found = stages.stage_keys(trained, targets, config, calibration)
    exported, requests = dict(found)["export"], search_requests(targets, config, calibration)
    found += [("search", search_key(exported, request)) for request in requests.values()]
    if workspace is None:
        return found
    plans = _stored_plans(workspace, exported, requests)
    return [*found, *stages.stage_keys(trained, targets, config, calibration, plans)]


def search_key(exported: str, request: SearchRequest) -> str:
    """Digest of all that the outcome of a search depends on."""
    plain = stages.cast_key(exported, request.form, request.calibration)
    settings = request.settings
    limits = [request.flips, request.top1_drop, settings.noise, settings.images, settings.evaluations]
    return digest(["search", plain, limits, source_digest()])


def _stored_plans(workspace: Workspace, exported: str, requests: Mapping[str, SearchRequest]) -> dict[str, LayerPlan]:
    places = {form: workspace.path("search", search_key(exported, each)) / _FOUND for form, each in requests.items()}
    return {form: LayerPlan.from_json(json.loads(path.read_text())) for form, path in places.items() if path.is_file()}


def search_all(
    workspace: Workspace, model: OnnxModel, requests: Mapping[str, SearchRequest], reporter: Reporter
) -> dict[str, Searched]:
    """``search`` for each form."""
    found = {}
    for form, request in requests.items():
        with reporter.stage("search") as progress:
            found[form] = search(workspace, model, request, progress)
    return found


def search(workspace: Workspace, model: OnnxModel, request: SearchRequest, progress: Callable[[str], None]) -> Searched:
    """Search the float32 ``model``. Raises ``VerificationError`` where no plan that was tried keeps the budget."""
    from kdexport.precision_search.costs import SearchBudget, SearchImages
    from kdexport.precision_search.search import find_plan

    images, labels = request.calibration.search_images(request.settings.images)

    def make(folder: Path) -> None:
        found = find_plan(
            model.path,
            lambda plan, path: stages.quantize(workspace, model, request.form, request.calibration, plan, path),
            SearchImages(images, labels),
            SearchBudget(flips=request.flips, top1_drop=request.top1_drop, noise=request.noise),
            folder,
            form=request.form,
            evaluations=request.settings.evaluations,
            progress=progress,
        )
        if not found.chosen.within:
            cost = found.chosen.cost
            raise VerificationError(
                f"No precision plan for {request.form} is within the budget after {len(found.evaluated)} of at most "
                f"{request.settings.evaluations} evaluations: with {len(cost.kept)} layers in float32 "
                f"{cost.flips:.2%} flips, {cost.top1_drop:.2%} top-1 lost and noise {cost.noise:.3f} (up to "
                f"{request.flips:.2%}, {request.top1_drop:.2%} and {request.noise:g} allowed, {len(labels):,} images). "
                f"{' '.join(found.reasons[:1])}".rstrip(),
                remedy="Raise evaluations or a limit under [precision_search], or build another precision.",
            )
        budget = {"flips": request.flips, "top1_drop": request.top1_drop, "noise": request.settings.noise}
        described = {**found.to_json(), "budget": budget, "images": len(labels), "split": "train"}
        (folder / _FOUND).write_text(json.dumps(described, indent=1, allow_nan=False))
        for path in folder.glob("*.onnx"):
            path.unlink()

    folder = workspace.produce("search", search_key(model.key, request), make)
    described = json.loads((folder / _FOUND).read_text())
    return Searched(LayerPlan.from_json(described), described)
