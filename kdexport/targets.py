"""Targets, named ``<backend>-<precision>``: what they need, and whether this machine has it."""

from dataclasses import dataclass

from kdexport.backends import BACKENDS, backend
from kdexport.backends.base import Backend, Missing
from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.errors import BackendUnavailableError, ConfigError, UnknownNameError
from kdexport.registry import nearest

#: The target whose file is the exported model of every bundle.
DEFAULT_TARGET = "onnx-fp32"


@dataclass(frozen=True, slots=True)
class Target:
    """A backend and a precision, by name."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.precision}"

    @property
    def runtime(self) -> Backend:
        """The backend; raises ``UnknownNameError`` if it is not registered."""
        return backend(self.backend)

    @property
    def plugin_sha256(self) -> str:
        """sha256 of the source of the plugin that defines the backend; empty for a backend of this package."""
        return BACKENDS.plugin_digest(self.backend)

    @property
    def compiles(self) -> bool:
        """Whether the runtime opens a file that was compiled from the ONNX file."""
        return self.runtime.compiles

    @property
    def form(self) -> str:
        """The form of this target's ONNX graph, one of ``backends.base.FORMS``."""
        return self.runtime.form(self.precision)

    @property
    def artifact(self) -> str:
        """The file in the target's folder that its runtime opens."""
        return self.runtime.artifact

    @property
    def runs_as_reference(self) -> bool:
        """Whether the reference run of the ONNX file, by onnxruntime on the CPU, is this target's own run."""
        return self.runtime.runs_as_reference(self.precision)

    def unavailable(self) -> Missing | None:
        """Why the target cannot be built on this machine; None if it can."""
        return self.runtime.unavailable(self.precision)

    def not_executable(self) -> Missing | None:
        """Why the built target cannot run on this machine; None if it can."""
        return self.runtime.not_executable(self.precision)


def target_names() -> tuple[str, ...]:
    """The names of all targets of the registered backends."""
    runtimes = [backend(name) for name in BACKENDS.names()]
    return tuple(f"{runtime.name}-{precision}" for runtime in runtimes for precision in runtime.precisions)


def parse_target(name: str) -> Target:
    """``trt-rtx-fp16`` as a ``Target``; raises ``UnknownNameError`` with the nearest names."""
    if name not in target_names():
        raise UnknownNameError(
            f"There is no target named {name!r}.",
            remedy=f"{nearest(name, target_names())} Pass --plugin FILE.py for a backend of your own.",
        )
    runtime, _, precision = name.rpartition("-")
    return Target(runtime, precision)


def parse_targets(names: list[str]) -> tuple[Target, ...]:
    """Several targets, each once; raises ``ConfigError`` if there is none."""
    targets = tuple(dict.fromkeys(parse_target(name) for name in names))
    if not targets:
        raise ConfigError("No target was given.", remedy=f"Pass --target; known: {', '.join(target_names())}.")
    return targets


def require_available(targets: tuple[Target, ...]) -> None:
    """Raise ``BackendUnavailableError`` for the first target that this machine cannot build."""
    for target in targets:
        missing = target.unavailable()
        if missing is not None:
            raise BackendUnavailableError(
                f"Target {target} cannot be built: {missing.reason}.", remedy=f"{missing.remedy}."
            )


def require_interface(targets: tuple[Target, ...], interface: FileInterface) -> None:
    """Raise ``ConfigError`` for the first target whose backend has no files with ``interface``."""
    plain = PLAIN_INTERFACE
    for target in targets:
        if interface == plain or target.runtime.any_interface:
            continue
        able = " and ".join(sorted(name for name in BACKENDS.names() if backend(name).any_interface))
        pixels = interface.takes != plain.takes
        refused = f"take {interface.takes}: pixels as input" if pixels else f"give {interface.gives}: these"
        default = f'input = "{plain.takes}"' if pixels else f'output = "{plain.gives}"'
        raise ConfigError(
            f"Target {target} cannot {refused} are supported for the backends {able} only.",
            remedy=f"Set {default} under [export], or build {target} by itself with a configuration without that line.",
        )


def servable_targets(provider: str) -> tuple[str, ...]:
    """Targets that ``kdexport serve`` runs in their own precision on an onnxruntime provider."""
    return tuple(str(target) for target in map(parse_target, target_names()) if provider in providers(target))


def providers(target: Target) -> tuple[str, ...]:
    """onnxruntime providers on which ``kdexport serve`` runs ``target`` in its own precision."""
    return target.runtime.providers(target.precision)


def require_servable(name: str, provider: str) -> None:
    """Raise ``BackendUnavailableError`` unless ``provider`` runs the target ``name`` in its own precision."""
    target = parse_target(name)
    accepted = providers(target)
    if provider in accepted:
        return
    if accepted:
        raise BackendUnavailableError(
            f"{provider} would run {target} in another precision.", remedy=f"Serve it on {' or '.join(accepted)}."
        )
    served = [str(other) for other in map(parse_target, target_names()) if providers(other)]
    raise BackendUnavailableError(
        f"The server runs {', '.join(served)} with onnxruntime, not {target}.",
        remedy=f"{target.runtime.served_elsewhere()}.",
    )
