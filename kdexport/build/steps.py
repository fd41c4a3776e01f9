"""The steps of one build in order, up to the bundle, which are made, reused and removed together."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kdexport.build.artifacts import EngineFile, FusedFiles, OnnxModel, QuantizeAwareFiles
from kdexport.build.precision_search import Searched, search, search_requests
from kdexport.build.quantize_aware import Lesson, cast_trained, int8_forms, quantize_aware
from kdexport.build.stages import (
    BUNDLE_TOOLS,
    backend_modules,
    cast,
    compile_engine,
    export,
    fuse,
    is_int8,
    with_interface,
)
from kdexport.bundle.manifest import Manifest, read_manifest
from kdexport.checkpoint import TrainedStudent
from kdexport.config import BuildConfig
from kdexport.data.calibration_images import Calibration
from kdexport.data.datasets import DatasetSpec, open_dataset
from kdexport.errors import StorageError, VerificationError
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.targets import Target
from kdexport.workspace import Making, Step, Workspace

if TYPE_CHECKING:
    from kdexport.build.package import Parts


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildInputs:
    """The inputs of a bundle: the student, the data set with its digest, the targets and all settings."""

    trained: TrainedStudent
    dataset: DatasetSpec
    dataset_sha256: str
    targets: tuple[Target, ...]
    config: BuildConfig
    #: What int8 targets are trained with; None if they are only calibrated.
    lesson: Lesson | None = None

    @property
    def calibration(self) -> Calibration:
        """The training images that int8 is calibrated and searched on."""
        return Calibration(
            settings=self.config.calibration,
            dataset=self.dataset,
            dataset_sha256=self.dataset_sha256,
            preprocessing=self.trained.spec.preprocessing,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Every step of a build except the bundle; targets of one form share a search and a cast."""

    fused: Step[FusedFiles]
    exported: Step[OnnxModel]
    searches: dict[str, Step[Searched]]
    #: By form.
    quantize_aware: dict[str, Step[QuantizeAwareFiles]]
    casts: dict[Target, Step[OnnxModel]]
    engines: dict[Target, Step[EngineFile]]

    def all(self) -> tuple[Step[Any], ...]:
        """These steps and the steps that they depend on, each once."""
        named: tuple[Step[Any], ...] = (
            self.fused,
            self.exported,
            *self.searches.values(),
            *self.quantize_aware.values(),
            *self.casts.values(),
            *self.engines.values(),
        )
        return tuple({each.key: each for step in named for each in step.steps()}.values())


def declare(inputs: BuildInputs, plans: Mapping[str, LayerPlan] = MappingProxyType({})) -> Steps:
    """The steps of ``inputs``; ``plans`` are the results of the searches by form, empty before these are made."""
    config, calibration = inputs.config, inputs.calibration
    fused = fuse(inputs.trained)
    exported = export(inputs.trained, fused, opset=config.export.opset)
    interface, preprocessing = config.export.interface, inputs.trained.spec.preprocessing
    trained = {
        form: quantize_aware(inputs.trained, fused, exported, form, calibration, lesson)
        for lesson in ([] if inputs.lesson is None else [inputs.lesson])
        for form in int8_forms(inputs.targets)
    }

    def in_form(form: str) -> Step[OnnxModel]:
        if form in trained:
            return cast_trained(trained[form], form, calibration)
        return cast(exported, form, calibration, plans.get(form, PLAIN))

    casts = {target: with_interface(in_form(target.form), interface, preprocessing) for target in inputs.targets}
    requests = search_requests(inputs.targets, config, calibration)
    size = inputs.trained.spec.image_size
    return Steps(
        fused=fused,
        exported=exported,
        searches={form: search(exported, request) for form, request in requests.items()},
        quantize_aware=trained,
        casts=casts,
        engines={
            target: compile_engine(model, target, config.export, size)
            for target, model in casts.items()
            if target.compiles
        },
    )


def known_steps(inputs: BuildInputs, workspace: Workspace) -> tuple[Step[Any], ...]:
    """Every step whose key is known now: not the steps after a search that has no readable result in ``workspace``."""
    found: dict[str, LayerPlan] = {}
    for form, step in declare(inputs).searches.items():
        # A damaged result is about to be removed.
        with contextlib.suppress(StorageError):
            if workspace.has(step.stage, step.key):
                found[form] = step.result(workspace).layers
    steps = declare(inputs, found)
    unknown = steps.searches.keys() - found.keys()
    return replace(
        steps,
        casts={target: step for target, step in steps.casts.items() if target.form not in unknown},
        engines={target: step for target, step in steps.engines.items() if target.form not in unknown},
    ).all()


def bundle(inputs: BuildInputs, on_failure: Callable[[VerificationError, Making], VerificationError]) -> Step[Manifest]:
    """The verified bundle; if its verification fails, the error that ``on_failure`` returns is raised."""
    config, spec = inputs.config, inputs.trained.spec

    def make(making: Making) -> None:
        from kdexport.build.package import package

        try:
            package(making.folder, _parts(inputs, making), making.progress)
        except VerificationError as error:
            raise on_failure(error, making) from error

    settings = [table.model_dump(mode="json") for table in (config.export, config.verify, config.latency, config.card)]
    # The manifest records which targets ran on this machine, and how int8 targets were calibrated.
    ran = [(str(target), target.plugin_sha256, target.not_executable() is None) for target in inputs.targets]
    calibrated = inputs.calibration.to_json() if any(is_int8(target.form) for target in inputs.targets) else None
    return Step(
        stage="bundle",
        made_of=(
            *declare(inputs).all(), config.student, spec.to_json(), inputs.dataset_sha256, settings, config.policy, ran,
            calibrated,
        ),
        make=make,
        read=read_manifest,
        tools=(*BUNDLE_TOOLS, *(name for target in inputs.targets for name in target.runtime.packages)),
        modules=tuple(module for target in inputs.targets for module in backend_modules(target)),
    )  # fmt: skip


def _parts(inputs: BuildInputs, making: Making) -> "Parts":
    from kdexport.build.package import Parts

    workspace = making.workspace
    searched = {form: step.result(workspace) for form, step in declare(inputs).searches.items()}
    steps = declare(inputs, {form: found.layers for form, found in searched.items()})
    return Parts(
        config=inputs.config,
        trained=inputs.trained,
        fused=steps.fused.result(workspace),
        model=steps.exported.result(workspace),
        casts={target: step.result(workspace) for target, step in steps.casts.items()},
        engines={target: step.result(workspace) for target, step in steps.engines.items()},
        validation=open_dataset(inputs.dataset, "test"),
        calibration=inputs.calibration.to_json(),
        searched={form: found.described for form, found in searched.items()},
        quantize_aware={form: step.result(workspace) for form, step in steps.quantize_aware.items()},
        build_key=making.key,
    )
