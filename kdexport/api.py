"""What ``import kdexport`` offers: ``load``, ``build``, ``gate`` and ``fuse``. The commands are a thin skin over it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from kdexport.config import BuildConfig
    from kdexport.gate.result import GateResult, Policy
    from kdexport.inference.loaded_bundle import LoadedBundle
    from kdexport.pipeline import BuildRequest
    from kdexport.reparam.program import FusedProgram

Progress = Callable[[str], None]


def load(folder: str | Path, *, target: str | None = None, threads: int = 0) -> "LoadedBundle":
    """Open a bundle to ``predict``, ``evaluate`` and ``verify``; see ``LoadedBundle``.

    Example: ``kdexport.load("dist/mobilenetv2").predict("photo.jpg")[0].label``.
    """
    from kdexport.inference.loaded_bundle import LoadedBundle

    return LoadedBundle(folder, target=target, threads=threads)


def build(
    student: str | None = None,
    *,
    data: str | Path | None = None,
    targets: Sequence[str] | None = None,
    config: str | Path | None = None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    output: str | None = None,
    image_size: int | None = None,
    teacher_checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    workspace: str | Path = ".kdexport",
    processes: int = 1,
    fresh: bool = False,
    precision_search: bool = False,
    quiet: bool = False,
) -> "LoadedBundle":
    """Train a student or read a trained one; fold, export, verify and package it, as ``kdexport build``.

    The arguments are the options of the command. Training runs in a child process. Finished stages are kept in
    ``workspace``; a second call does nothing. Raises ``KdexportError``; the bundle at ``out`` is then as it was.
    """
    from kdexport.core.progress import Reporter
    from kdexport.pipeline import build as run

    reporter = Reporter(quiet=quiet)
    options = BuildOptions(
        student=student, targets=None if targets is None else tuple(targets), config=_path(config),
        checkpoint=_path(checkpoint), weights=weights, output=output, image_size=image_size, out=_path(out),
        data=None if data is None else str(data), workspace=Path(workspace), processes=processes, fresh=fresh,
        teacher_checkpoint=None if teacher_checkpoint is None else str(teacher_checkpoint),
        precision_search=precision_search,
    )  # fmt: skip
    request, _ = build_request(options, reporter.say)
    return load(run(request, reporter).out)


def gate(
    candidate: str | Path,
    baseline: str | Path | None = None,
    *,
    max_slowdown: float = 0.02,
    max_flips: float | None = None,
    max_top1_drop: float | None = None,
    slo_p99_ms: float | None = None,
    data: str | Path | None = None,
    clocks: Sequence[str] = ("host",),
    batches: Sequence[int] = (1,),
    target: str | None = None,
    against: str | None = None,
    threads: int = 1,
    on_inconclusive: "Policy" = "exit",
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> "GateResult":
    """Compare a bundle with ``baseline``, or fused with unfused, as ``kdexport gate``; needs the extra ``stats``.

    Limits are fractions: 0.02 is 2 %. Measures in child processes for minutes. Raises ``KdexportError`` if the two
    cannot be compared; the verdict, also a failure, is in the result.
    """
    from kdexport.gate.compare import GateRequest, Limits, run_gate

    limits = Limits(slowdown=max_slowdown, flips=max_flips, top1_drop=max_top1_drop, p99_ms=slo_p99_ms)
    request = GateRequest(
        bundle=Path(candidate), baseline=_path(baseline), limits=limits, data=None if data is None else str(data),
        clocks=tuple(clocks), batches=tuple(batches), target=target, against=against, threads=threads,
        policy=on_inconclusive, seed=seed,
    )  # fmt: skip
    return run_gate(request, progress)


def fuse(module: "nn.Module | ExportedProgram", inputs: "Sequence[Tensor] | None" = None) -> "FusedProgram":
    """Merge parallel branches, sequences and batch norms of a module in evaluation mode, with a certificate.

    ``inputs`` are example inputs; an exported program needs none. Nothing is written and ``module`` stays as it is.
    Raises ``ReparamError``. Needs the extra ``build``.
    """
    from kdexport.reparam.program import fuse_module

    return fuse_module(module, inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """The options of ``kdexport build`` as they were given; None is not given."""

    student: str | None = None
    targets: tuple[str, ...] | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    weights: str | None = None
    output: str | None = None
    image_size: int | None = None
    data: str | None = None
    teacher_checkpoint: str | None = None
    out: Path | None = None
    workspace: Path = Path(".kdexport")
    processes: int = 1
    fresh: bool = False
    blame: bool = False
    precision_search: bool = False


def build_request(options: BuildOptions, say: Progress) -> "tuple[BuildRequest, bool]":
    """The request of a build, and whether a recipe for photos was proposed; ``say`` gets one line on that.

    Raises ``ConfigError``, and ``DataError`` for images without folders of classes.
    """
    from kdexport.build.photos import GivenImages, for_images
    from kdexport.config import default_out
    from kdexport.pipeline import BuildRequest
    from kdexport.targets import parse_targets

    settings = _with_network(_settings(options), options)
    name = options.student if options.student is not None and options.config is None else settings.student
    images = GivenImages(
        data=options.data, image_size=options.image_size, has_config=options.config is not None,
        has_checkpoint=options.checkpoint is not None,
    )  # fmt: skip
    settings, is_proposed = for_images(settings, images, say)
    names = settings.targets if options.targets is None else list(options.targets)
    request = BuildRequest(
        config=settings,
        targets=parse_targets(names),
        out=options.out if options.out is not None else default_out(name),
        workspace=options.workspace,
        checkpoint=options.checkpoint,
        weights=settings.weights or None,
        data_root=options.data,
        teacher_checkpoint=options.teacher_checkpoint,
        processes=options.processes,
        fresh=options.fresh,
        blame=options.blame,
    )
    return request, is_proposed


def _settings(options: BuildOptions) -> "BuildConfig":
    from kdexport.config import default_config, find_config, load_config, shipped_config
    from kdexport.origins.references import parse_reference
    from kdexport.plugins import use_plugins

    student, config = options.student, options.config
    if student is None and config is None:
        raise ConfigError(
            "Neither --student nor --config was given.", remedy="Pass one of them, for example --student mobilenetv2."
        )
    path = shipped_config(config) if config is not None else find_config(str(student))
    settings = load_config(path) if path is not None else default_config(str(student))
    use_plugins(settings.plugins, Path() if path is None else path.parent)
    # A configuration that was found by its name says which student it is for: quickstart is none itself.
    if student is not None and student != settings.student and (config is not None or parse_reference(student)):
        settings = settings.model_copy(update={"student": student})
    if options.precision_search:
        enabled = settings.precision_search.model_copy(update={"enabled": True})
        settings = settings.model_copy(update={"precision_search": enabled})
    return settings


def _with_network(settings: "BuildConfig", options: BuildOptions) -> "BuildConfig":
    """``settings`` with the options for students of another origin; ``ConfigError`` for any other student."""
    from kdexport.config import require_reference

    for option, value in {"--weights": options.weights, "--output": options.output}.items():
        if value is not None:
            require_reference(settings.student, option)
    given = {"weights": options.weights, "output": options.output}
    return settings.model_copy(update={key: value for key, value in given.items() if value is not None})


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)
