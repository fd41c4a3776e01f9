"""The search as a stage of a build: on training images, found again by everything that its outcome depends on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport import stages
from kdexport.artifacts import OnnxModel
from kdexport.calibration import Calibration
from kdexport.checkpoint import TrainedStudent
from kdexport.config import BuildConfig, SearchSettings
from kdexport.errors import ConfigError, VerificationError
from kdexport.fingerprint import digest, source_digest
from kdexport.policy import parse_policy
from kdexport.reporter import Reporter
from kdexport.search.layers import LayerPlan
from kdexport.targets import Target
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
    limits = [request.flips, request.top1_drop, request.settings.images, request.settings.evaluations]
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
    from kdexport.search.plan import find_plan
    from kdexport.search.trade import SearchBudget, SearchImages

    images, labels = request.calibration.search_images(request.settings.images)

    def make(folder: Path) -> None:
        found = find_plan(
            model.path,
            lambda plan, path: stages.quantize(workspace, model, request.form, request.calibration, plan, path),
            SearchImages(images, labels),
            SearchBudget(flips=request.flips, top1_drop=request.top1_drop),
            folder,
            form=request.form,
            evaluations=request.settings.evaluations,
            progress=progress,
        )
        if not found.chosen.within:
            trade = found.chosen.trade
            raise VerificationError(
                f"No precision plan for {request.form} keeps the budget after {len(found.tried)} of at most "
                f"{request.settings.evaluations} evaluations: with {len(trade.kept)} layers in float32 "
                f"{trade.flips:.2%} flips and {trade.top1_drop:.2%} top-1 lost (up to {request.flips:.2%} and "
                f"{request.top1_drop:.2%} allowed, {len(labels):,} images). {' '.join(found.reasons[:1])}".rstrip(),
                remedy="Raise evaluations, flips or top1_drop under [precision_search], or build another precision.",
            )
        budget = {"flips": request.flips, "top1_drop": request.top1_drop}
        described = {**found.to_json(), "budget": budget, "images": len(labels), "split": "train"}
        (folder / _FOUND).write_text(json.dumps(described, indent=1, allow_nan=False))
        for path in folder.glob("*.onnx"):
            path.unlink()

    folder = workspace.produce("search", search_key(model.key, request), make)
    described = json.loads((folder / _FOUND).read_text())
    return Searched(LayerPlan.from_json(described), described)
