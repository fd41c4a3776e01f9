"""The contract of a backend: everything that differs by runtime stands behind ``Backend``.

A backend compiles an ONNX file for one runtime (or hands it over as it is), opens the result, and says what really ran.
A new one is one file: a subclass of ``Backend``, registered with ``@BACKENDS.register("name")``, in this package, in a
module given by ``--plugin``, or in an installed package with an entry point of the group ``kdexport.backends``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdexport.core.digests import tool_versions
from kdexport.errors import BackendUnavailableError

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: The ONNX graphs that precisions are written into: int8 has two, because no runtime executes the other's.
FORMS = ("fp32", "fp16", "bf16", "int8-u8", "int8-s8")
#: A float32 graph that an engine multiplies with 10 bits of mantissa.
TF32 = "tf32"

#: The ONNX file of a target, in its folder.
ONNX_FILE = "model.onnx"

#: The interface of every exported graph: names of its input and output, and of the dimension that is free.
INPUT, LOGITS, BATCH = "input", "logits", "batch"

#: What times a target: a run in this process, a request to the server, events on a GPU.
Clock = Literal["host", "serve", "gpu"]
Device = Literal["cpu", "gpu"]

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Missing(NamedTuple):
    """Why something cannot be done on this machine, and what to type next; neither ends with a full stop."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked statement about a file: whether it holds, and the measured fact."""

    check: str
    holds: bool
    fact: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """What ran a target, read back from the runtime after it opened the file: never copied from the request.

    ``runtime`` and ``version`` name the library, ``device`` the provider or device, ``types`` the data types in which
    the layers that multiply by weights compute, empty where the runtime does not tell.
    """

    runtime: str
    version: str
    device: str
    types: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the manifest."""
        return {"runtime": self.runtime, "version": self.version, "device": self.device, "types": list(self.types)}

    def __str__(self) -> str:
        return f"{self.runtime} {self.version}, {self.device}"


class Runner(ABC):
    """A target that its own runtime has opened."""

    #: Whether each call starts a process: checks of single batches are then left to one run over all of them.
    starts_a_process: ClassVar[bool] = False

    @property
    @abstractmethod
    def execution(self) -> Execution:
        """What runs, read back from the runtime."""

    @abstractmethod
    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,3,S,S) float32 to logits (n,K), for one batch that the target was built for."""

    def run(self, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
        """(N,3,S,S) float32 to logits (N,K), in batches of the given sizes in turn."""
        return run_in_batches(self.logits, images, batches)

    def findings(self) -> list[Finding]:
        """What the runtime says of its own optimised model: precision and device of each layer."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileRequest:
    """What is compiled, and where to: ``onnx`` in ``precision`` for batches (min, opt, max) of (3,S,S) images.

    ``kept`` are nodes that stay in float32. ``options`` are the ``[export]`` settings of a build; ``cache`` is a folder
    that all compilations on this machine share.
    """

    onnx: Path
    folder: Path
    precision: str
    image_size: int
    batches: tuple[int, int, int]
    kept: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    cache: Path | None = None


class Backend(ABC):
    """One runtime. All of it is optional but ``unavailable`` and ``open``; nothing is imported before it is needed."""

    #: ``<name>-<precision>`` are the targets.
    name: ClassVar[str]
    #: What ``kdexport list targets`` says of it.
    description: ClassVar[str]
    #: The runtime as reports name it.
    title: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    #: The file in a target's folder that the runtime opens.
    artifact: ClassVar[str] = ONNX_FILE
    #: Distributions whose versions decide what is compiled and what it computes.
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def compiles(self) -> bool:
        """Whether the runtime opens something that was compiled from the ONNX file."""
        return self.artifact != ONNX_FILE

    def form(self, precision: str) -> str:
        """The ONNX graph that a precision is written into, one of ``FORMS``."""
        return "int8-u8" if precision == "int8" else precision

    def computes_in(self, precision: str, options: dict[str, Any]) -> str:
        """The form whose simulation is rung C's reference; ``options`` are the ``[export]`` settings."""
        return self.form(precision)

    @abstractmethod
    def unavailable(self, precision: str) -> Missing | None:
        """Why a target cannot be built on this machine, None where it can."""

    def not_executable(self, precision: str) -> Missing | None:
        """Why a built target cannot run on this machine, None where it can."""
        return self.unavailable(precision)

    def runs_as_reference(self, precision: str) -> bool:
        """Whether onnxruntime's CPU provider is the runtime of this target.

        Every ONNX file is run there as the reference of its graph; such a target is not run a second time.
        """
        return False

    def device(self, precision: str) -> Device:
        """Where the target runs when it is verified."""
        return "cpu"

    def key_material(self, precision: str) -> list[Any]:
        """What a compiled file depends on beside its model and settings: versions, GPU, driver."""
        return [tool_versions(*self.packages)]

    def compile(self, request: CompileRequest) -> None:
        """Write ``artifact`` and what belongs to it into ``request.folder``; raises ``KdexportError``."""
        raise NotImplementedError(f"{self.name} runs ONNX files as they are")

    def finish(self, folder: Path, *, image_size: int, num_classes: int) -> None:  # noqa: B027
        """Add files to a packaged target's folder that depend on where it is packaged."""

    def describe(self, folder: Path) -> dict[str, Any]:
        """Facts about a compiled target for the manifest: ``version``, ``kernels``, ``layers``."""
        return {}

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        """Checks of a compiled target's files that need no run. Each node of ``kept`` must be in float32."""
        return []

    @abstractmethod
    def open(
        self, path: Path, precision: str, *, device: Device | None = None, threads: int = 0, kept: Sequence[str] = ()
    ) -> Runner:
        """Open the artifact at ``path`` strictly: in ``precision``, on ``device`` (None: where it is verified).

        ``threads`` 0 leaves their number to the runtime. Raises ``BackendUnavailableError`` where this machine would
        run something else, ``AuditError`` where the file does not open.
        """

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        """Why ``clock`` cannot time the target on this machine; the clock ``serve`` is asked of ``providers``."""
        if clock == "host":
            return self.unavailable(precision)
        return Missing(f"{self.title} has no timing on a GPU here", "Pass --clock host")

    def capture(self, path: Path, precision: str, given: Any, stream: Any) -> tuple[Callable[[], object], Any]:
        """(launch, output) of one batch ``given`` on a CUDA ``stream``, for the clock ``gpu``: torch tensors both."""
        raise BackendUnavailableError(f"{self.name}-{precision} has no clock gpu.", remedy="Pass --clock host.")

    def providers(self, precision: str) -> tuple[str, ...]:
        """onnxruntime providers on which ``kdexport serve`` runs the target in its own precision; none by default."""
        return ()

    def served_elsewhere(self) -> str:
        """What serves a target that ``kdexport serve`` does not, as a remedy."""
        return "Serve another target"

    def triton_platform(self, precision: str) -> "str | Missing":
        """Triton's backend for the target, or why a model repository cannot hold it."""
        return Missing(
            f"is verified in {self.title}, and Triton repositories are written for onnxruntime and TensorRT",
            "Pass --target onnx-fp32 or onnx-int8; build the bundle with it if it is missing",
        )


def run_in_batches(logits: Logits, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits of all images, taken in batches of the given sizes in turn, so that every size is on the ladder."""
    parts, start, turn = [], 0, 0
    while start < len(images):
        size = batches[turn % len(batches)]
        parts.append(logits(images[start : start + size]))
        start, turn = start + size, turn + 1
    return np.concatenate(parts)
