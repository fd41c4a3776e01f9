"""`kdexport build`: from a recipe or a checkpoint to a verified bundle; finished stages are reused."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kdexport.build import train as trainer
from kdexport.build.imported import OWN_WEIGHTS, ImportRequest, import_student, judge_student
from kdexport.build.precision_search import require_searchable
from kdexport.build.quantize_aware import Lesson, require_trainable
from kdexport.build.stages import chosen_ranges, is_int8
from kdexport.build.steps import BuildInputs, bundle, declare, known_steps
from kdexport.bundle.manifest import FUSED, MANIFEST, UNFUSED, Manifest, changed_files, read_manifest
from kdexport.checkpoint import TrainedStudent, open_checkpoint
from kdexport.config import BuildConfig, is_trained_elsewhere
from kdexport.core.digests import sha256_file
from kdexport.core.files import replace_folder, require_replaceable, require_writable
from kdexport.core.progress import Reporter
from kdexport.data.datasets import DatasetSpec, dataset_digest, dataset_spec, open_dataset
from kdexport.diagnose.failed_build import keep_failed
from kdexport.errors import BundleError, CheckpointError, ConfigError, VerificationError
from kdexport.origins.references import parse_reference
from kdexport.targets import Target, require_available, require_interface
from kdexport.workspace import Making, Step, Workspace


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """The options of `kdexport build`. ``checkpoint`` and ``weights`` skip training; ``fresh`` removes earlier results.

    With ``blame`` a bundle whose verification fails is bisected to the node at fault.
    """

    config: BuildConfig
    targets: tuple[Target, ...]
    out: Path
    workspace: Path
    checkpoint: Path | None = None
    #: Weights of a student of another origin: a file, a name of its library's weights, or "own".
    weights: str | None = None
    data_root: str | None = None
    teacher_checkpoint: str | None = None
    processes: int = 1
    fresh: bool = False
    blame: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """The bundle at ``out``; ``up_to_date`` if it existed and nothing was done."""

    out: Path
    manifest: Manifest
    up_to_date: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """The resolved recipe and the digests of what it reads."""

    recipe: dict[str, Any]
    plugins: dict[str, str]
    overrides: dict[str, Any]
    revision: int
    dataset: DatasetSpec
    dataset_sha256: str


def build(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Train (or read) the student, fuse, export, compile, verify and package it; finished stages are not run again.

    The bundle at ``request.out`` is replaced only by a complete, verified one.
    """
    workspace = Workspace(request.workspace)
    if request.config.precision_search.enabled:
        require_searchable(request.targets)
    if request.config.quantize_aware.enabled:
        require_trainable(request.targets, request.config)
    require_interface(request.targets, request.config.export.interface)
    require_available(request.targets)
    require_replaceable(request.out, _is_bundle)
    require_writable(request.out)
    if not (request.out / MANIFEST).is_file():
        _require_student(request.config.student)
    plan = _plan(request, workspace, reporter)
    trained = replace(_trained(request, plan, workspace, reporter), plugin_sha256=plan.plugins.get("student", ""))
    inputs = BuildInputs(
        trained=trained,
        dataset=plan.dataset,
        dataset_sha256=plan.dataset_sha256,
        targets=request.targets,
        config=request.config,
        lesson=_lesson(request, plan, workspace) if request.config.quantize_aware.enabled else None,
    )
    made = bundle(inputs, lambda error, making: _failed(error, making, blame=request.blame))
    if request.fresh:
        for step in (*known_steps(inputs, workspace), made):
            workspace.forget(step.stage, step.key)
    elif _is_up_to_date(request.out, made.key):
        return BuildResult(out=request.out, manifest=read_manifest(request.out), up_to_date=True)
    if is_trained_elsewhere(request.config.student, request.weights) and not workspace.has(made.stage, made.key):
        judge_student(trained, open_dataset(plan.dataset, "test"), reporter.say)
    _make_bundle(inputs, made, workspace, reporter)
    replace_folder(workspace.path("bundle", made.key), request.out)
    return BuildResult(out=request.out, manifest=read_manifest(request.out), up_to_date=False)


def _is_bundle(folder: Path) -> bool:
    try:
        manifest = read_manifest(folder)
    except BundleError:
        # A folder with a damaged manifest is still ours if the other files of a bundle are present.
        return all((folder / name).is_file() for name in (MANIFEST, UNFUSED, FUSED))
    return len(manifest.build_key) == 64


def _require_student(name: str) -> None:
    if parse_reference(name) is None:
        from kdexport.students import STUDENTS

        STUDENTS.check(name)


def _plan(request: BuildRequest, workspace: Workspace, reporter: Reporter) -> _Plan:
    given = request.checkpoint is not None and not request.config.recipe
    if given or is_trained_elsewhere(request.config.student, request.weights):
        return _plan_without_recipe(request, workspace, reporter)
    _require_recipe(request)
    overrides: dict[str, Any] = {key: dict(table) for key, table in request.config.overrides.items()}
    overrides.setdefault("student", {})["name"] = request.config.student
    if request.data_root is not None:
        overrides.setdefault("data", {})["root"] = request.data_root
    if request.teacher_checkpoint is not None:
        overrides.setdefault("teacher", {})["checkpoint"] = request.teacher_checkpoint
    resolved = trainer.resolve_recipe(request.config.recipe, overrides)
    recipe = resolved["recipe"]
    teacher = recipe["teacher"]["checkpoint"]
    if request.checkpoint is None and teacher and not Path(teacher).is_file():
        raise CheckpointError(
            f"There is no teacher checkpoint {teacher}.",
            remedy="Pass --teacher-checkpoint FILE. Or remove checkpoint under [overrides.teacher] of the export "
            "configuration to train the teacher first.",
        )
    dataset = dataset_spec(recipe["data"]["name"], recipe["data"]["root"])
    trains = request.checkpoint is None or _reads_training_images(request)
    with reporter.stage("data"):
        dataset_sha256 = dataset_digest(dataset, workspace.root / "dataset", reporter.say, trains=trains)
    return _Plan(
        recipe=recipe,
        plugins=resolved["plugins"],
        overrides=overrides,
        revision=resolved["revision"],
        dataset=dataset,
        dataset_sha256=dataset_sha256,
    )


def _require_recipe(request: BuildRequest) -> None:
    if not request.config.recipe:
        student = request.config.student
        raise ConfigError(
            f"{student} has neither weights nor a recipe to train it with.",
            remedy="If it is trained, pass --weights with a file of weights, DEFAULT or another name of its library's "
            "weights, or own for a factory that returns it trained. To train it on images, pass --data with their "
            f'folder, or --config with an export configuration with student = "{student}" and recipe = "digits" '
            "(`kdexport list recipes` prints all).",
        )


def _plan_without_recipe(request: BuildRequest, workspace: Workspace, reporter: Reporter) -> _Plan:
    overrides = request.config.overrides.get("data", {})
    root = request.data_root or str(overrides.get("root", ""))
    if not root and "name" not in overrides:
        raise ConfigError(
            "There is no data set: images are needed to verify a network.",
            remedy="Pass --data DIR with train/<class>/* and val/<class>/*.",
        )
    dataset = dataset_spec(str(overrides.get("name", f"folder:{root}")), root)
    trains = _reads_training_images(request)
    with reporter.stage("data"):
        dataset_sha256 = dataset_digest(dataset, workspace.root / "dataset", reporter.say, trains=trains)
    return _Plan(recipe={}, plugins={}, overrides={}, revision=0, dataset=dataset, dataset_sha256=dataset_sha256)


def _reads_training_images(request: BuildRequest) -> bool:
    """Whether a build of a trained student reads training images: int8 is calibrated and searched on them."""
    return request.config.precision_search.enabled or any(is_int8(target.form) for target in request.targets)


def _imported(request: BuildRequest, plan: _Plan, workspace: Workspace, reporter: Reporter) -> TrainedStudent:
    reference = parse_reference(request.config.student)
    assert reference is not None
    test = open_dataset(plan.dataset, "test")
    wanted = ImportRequest(
        reference=reference,
        weights=request.weights or OWN_WEIGHTS,
        classes=test.classes,
        preprocessing=request.config.preprocessing,
        output=request.config.output,
        provenance={
            "dataset_sha256": plan.dataset_sha256,
            **({"dataset_split": test.drawn} if test.drawn else {}),
        },
    )
    with reporter.stage("import"):
        return import_student(wanted, workspace, reporter.say, fresh=request.fresh)


def _trained(request: BuildRequest, plan: _Plan, workspace: Workspace, reporter: Reporter) -> TrainedStudent:
    if request.checkpoint is not None:
        return open_checkpoint(request.checkpoint)
    if is_trained_elsewhere(request.config.student, request.weights):
        return _imported(request, plan, workspace, reporter)
    teacher = plan.recipe["teacher"]["checkpoint"]
    # Weights of a library are named in the recipe, and nothing is trained.
    named = not teacher and bool(plan.recipe["teacher"].get("weights"))
    if named:
        teacher_sha256 = ""
    else:
        teacher_sha256 = sha256_file(Path(teacher)) if teacher else _train_teacher(request, plan, workspace, reporter)
    key = trainer.student_key(plan.recipe, plan.dataset_sha256, teacher_sha256, plan.revision, plan.plugins)
    if request.fresh:
        workspace.forget("train", key)
    if not workspace.has("train", key):
        weights = teacher or str(workspace.finished("teacher", _teacher_key(plan), "model.safetensors"))
        given = {} if named else {"checkpoint": weights}
        overrides = {**plan.overrides, "teacher": {**plan.overrides.get("teacher", {}), **given}}
        recipe, processes = request.config.recipe, request.processes
        with reporter.stage("train", live=False):
            workspace.resume(
                "train", key, lambda folder: trainer.train_student(recipe, overrides, folder, processes=processes)
            )
    return open_checkpoint(workspace.finished("train", key, "student"))


def _train_teacher(request: BuildRequest, plan: _Plan, workspace: Workspace, reporter: Reporter) -> str:
    key = _teacher_key(plan)
    if request.fresh:
        workspace.forget("teacher", key)
    if not workspace.has("teacher", key):
        with reporter.stage("teacher", live=False):
            workspace.resume(
                "teacher",
                key,
                lambda folder: trainer.train_teacher(
                    request.config.recipe, plan.overrides, folder, processes=request.processes
                ),
            )
    return sha256_file(workspace.finished("teacher", key, "model.safetensors"))


def _teacher_key(plan: _Plan) -> str:
    return trainer.teacher_key(plan.recipe, plan.dataset_sha256, plan.revision, plan.plugins)


def _lesson(request: BuildRequest, plan: _Plan, workspace: Workspace) -> Lesson:
    """What int8 targets are trained with; the teacher of the recipe is one that exists."""
    settings, overrides = request.config.quantize_aware, dict(plan.overrides)
    material: list[Any] = []
    if settings.teacher == "recipe":
        checkpoint, named = plan.recipe["teacher"]["checkpoint"], plan.recipe["teacher"].get("weights")
        if not checkpoint and not named:
            key = _teacher_key(plan)
            if not workspace.has("teacher", key):
                raise CheckpointError(
                    "Quantize-aware training has no weights of the teacher: the student was passed with --checkpoint, "
                    f"and the teacher {plan.recipe['teacher']['name']} of its recipe was not trained in this "
                    "workspace.",
                    remedy='Pass --teacher-checkpoint FILE, or set teacher = "student" under [quantize_aware].',
                )
            checkpoint = str(workspace.finished("teacher", key, "model.safetensors"))
        if checkpoint:
            overrides["teacher"] = {**overrides.get("teacher", {}), "checkpoint": checkpoint}
            if not Path(checkpoint).is_file():
                raise CheckpointError(
                    f"There is no teacher checkpoint {checkpoint}.",
                    remedy='Pass --teacher-checkpoint FILE, or set teacher = "student" under [quantize_aware].',
                )
            material.append(sha256_file(Path(checkpoint)))
    if plan.recipe:
        material += [trainer.portable(plan.recipe), plan.revision, sorted(plan.plugins.items())]
    return Lesson(
        settings=settings,
        recipe=request.config.recipe if plan.recipe else "",
        overrides=overrides,
        material=tuple(material),
        train=partial(trainer.train_quantize_aware, processes=request.processes),
    )


def _is_up_to_date(out: Path, key: str) -> bool:
    try:
        manifest = read_manifest(out)
    except BundleError:
        return False
    return manifest.build_key == key and not changed_files(out, manifest.files)


def _failed(error: VerificationError, making: Making, *, blame: bool) -> VerificationError:
    failed = making.workspace.path("failed", making.key)
    return keep_failed(error, making.folder, failed, blame=blame, progress=making.progress)


def _make_bundle(inputs: BuildInputs, made: Step[Manifest], workspace: Workspace, reporter: Reporter) -> None:
    """Make every step under its name on the screen; the bundle takes its parts from the workspace."""
    if _is_up_to_date(workspace.path("bundle", made.key), made.key):
        return
    workspace.forget("bundle", made.key)
    from kdexport.build.package import require_matching

    require_matching(inputs.trained.spec, inputs.config.student, open_dataset(inputs.dataset, "test"))
    steps = declare(inputs)
    with reporter.stage("fuse") as progress:
        steps.fused.result(workspace, progress)
    with reporter.stage("export") as progress:
        steps.exported.result(workspace, progress)
    plans = {}
    for form, search in steps.searches.items():
        with reporter.stage("search") as progress:
            plans[form] = search.result(workspace, progress).layers
    steps = declare(inputs, plans)
    for step in steps.quantize_aware.values():
        if not workspace.has(step.stage, step.key):
            with reporter.stage("quantize-aware", live=False):
                step.result(workspace)
    with reporter.stage("cast") as progress:
        casts = [cast.result(workspace, progress) for cast in steps.casts.values()]
    for line in filter(None, dict.fromkeys(map(chosen_ranges, casts))):
        reporter.say(line)
    for target, engine in steps.engines.items():
        with reporter.stage(f"compile {target}") as progress:
            engine.result(workspace, progress)
    with reporter.stage("verify") as progress:
        made.result(workspace, progress)
