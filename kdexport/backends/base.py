"""The contract of a backend: everything that differs between runtimes is behind ``Backend``.

A backend compiles an ONNX file for one runtime (or uses the file itself), opens the result, and reports what ran. A new
backend is one file: a subclass of ``Backend``, registered with ``@BACKENDS.register("name")``, in this package, in a
module given by ``--plugin``, or in an installed package with an entry point of the group ``kdexport.backends``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.pixel_input import PixelInput
from kdexport.core.digests import tool_versions
from kdexport.errors import BackendUnavailableError

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
#: The kinds of ONNX graphs: one for each precision, two for int8, because no runtime executes both of these.
FORMS = ("fp32", "fp16", "bf16", "int8-u8", "int8-s8")
#: The form of a float32 graph whose products an engine computes with 10 bits of mantissa.
TF32 = "tf32"
#: The form of a float32 graph whose engine starts each sum with the bias, adds one product after another to it, and
#: rounds every time.
IN_ORDER = "fp32-in-order"

#: The ONNX file of a target, in its folder.
ONNX_FILE = "model.onnx"

#: The interface of every exported graph: the names of its input, its output and its dynamic dimension.
INPUT, LOGITS, BATCH = "input", "logits", "batch"

#: What times a target: a run in this process, a request to the server, events on a GPU.
Clock = Literal["host", "serve", "gpu"]
Device = Literal["cpu", "gpu"]

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Missing(NamedTuple):
    """Why this machine cannot do something, and what to type next; neither ends with a full stop."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked statement about a file: its name, whether it holds, and what was measured."""

    check: str
    holds: bool
    fact: str
    #: False if it was not checked; it then neither holds nor fails, and the fact is the reason.
    ran: bool = True


def unchecked(check: str, reason: str) -> Finding:
    """The finding of a statement that was not checked."""
    return Finding(check, False, reason, ran=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """What ran a target, read from the runtime after it opened the file, never copied from the request.

    ``runtime`` and ``version`` name the library, ``device`` the provider or device. ``types`` are the data types of the
    layers that multiply by weights; it is empty if the runtime does not report them.
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
    """A target, opened in its own runtime."""

    #: Whether each call starts a process; single batches are then not checked one by one, but in one run over all.
    starts_a_process: ClassVar[bool] = False

    @property
    @abstractmethod
    def execution(self) -> Execution:
        """What runs the target, read from the runtime."""

    @property
    def takes(self) -> PixelInput | None:
        """The pixels that the opened file takes; None if it takes normalised images."""
        return None

    @abstractmethod
    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n,3,S,S) float32 to logits (n,K), for one batch that the target was built for.

        A runner whose ``takes`` is not None also accepts pixels, uint8 in the layout of its file.
        """

    def outputs(self, images: NDArray[np.float32], names: Sequence[str]) -> list[NDArray[np.float32]]:
        """The named outputs for one batch; only backends with ``any_interface`` have others than logits."""
        raise NotImplementedError

    def run(self, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
        """(N,3,S,S) float32 to logits (N,K), in batches of the given sizes in turn."""
        return run_in_batches(self.logits, images, batches)

    def findings(self) -> list[Finding]:
        """Checks of the runtime's own optimised model: precision and device of each layer."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileRequest:
    """Compile ``onnx`` in ``precision`` into ``folder``, for batches (min, opt, max) of (3,S,S) images.

    ``kept`` are nodes that stay in float32. ``options`` are the ``[export]`` settings of a build. ``cache`` is a folder
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
    """One runtime. Only ``unavailable`` and ``open`` are required; they import the runtime's library when needed."""

    #: Targets are named ``<name>-<precision>``.
    name: ClassVar[str]
    #: The description in ``kdexport list targets``.
    description: ClassVar[str]
    #: The name of the runtime in reports.
    title: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    #: The file in a target's folder that the runtime opens.
    artifact: ClassVar[str] = ONNX_FILE
    #: Python packages whose versions change what is compiled or computed.
    packages: ClassVar[tuple[str, ...]] = ()
    #: Whether its targets can take pixels and give probabilities: ``[export] input`` and ``output``.
    any_interface: ClassVar[bool] = False
    #: Whether the runtime takes one image a run; a batch is then run image by image, and times of batches are refused.
    one_at_a_time: ClassVar[bool] = False
    #: Whether ``compile`` makes the same files again from the same ONNX file and settings with the same ``packages``.
    repeats_files: ClassVar[bool] = False

    @property
    def compiles(self) -> bool:
        """Whether the runtime opens a file that was compiled from the ONNX file."""
        return self.artifact != ONNX_FILE

    def form(self, precision: str) -> str:
        """The form of the ONNX graph of a precision, one of ``FORMS``."""
        return "int8-u8" if precision == "int8" else precision

    def computes_in(self, precision: str, options: dict[str, Any]) -> str:
        """The form whose simulation rung C compares with; ``options`` are the ``[export]`` settings."""
        return self.form(precision)

    @abstractmethod
    def unavailable(self, precision: str) -> Missing | None:
        """Why a target cannot be built on this machine; None if it can."""

    def not_executable(self, precision: str) -> Missing | None:
        """Why a built target cannot run on this machine; None if it can."""
        return self.unavailable(precision)

    def runs_as_reference(self, precision: str) -> bool:
        """Whether this target's runtime is onnxruntime's CPU provider.

        Every ONNX file runs there as the reference of its graph, so such a target is not run a second time.
        """
        return False

    def device(self, precision: str) -> Device:
        """The device on which the target is verified."""
        return "cpu"

    def repeats_bits(self, precision: str) -> bool:
        """Whether one version on one processor gives the same bits each time, for single images on one thread."""
        return False

    def key_material(self, precision: str) -> list[Any]:
        """What a compiled file depends on besides its model and settings: versions, GPU, driver."""
        return [tool_versions(*self.packages)]

    def compile(self, request: CompileRequest) -> None:
        """Write ``artifact`` and its other files into ``request.folder``; raises ``KdexportError``."""
        raise NotImplementedError(f"{self.name} runs ONNX files without compiling them")

    def difference(self, found: Path, expected: Path) -> str:
        """What a file of ``compile`` contains that ``expected`` does not, or the other way round; empty if nothing.

        Both files can be read and their bytes differ.
        """
        return first_difference(found.read_bytes(), expected.read_bytes())

    def finish(self, folder: Path, *, image_size: int, num_classes: int) -> None:  # noqa: B027
        """Add files to the folder of a packaged target that depend on its other files there."""

    def describe(self, folder: Path) -> dict[str, Any]:
        """Facts about a compiled target for the manifest: ``version``, ``kernels``, ``layers``."""
        return {}

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        """Checks of a compiled target's files without a run; each node of ``kept`` must be in float32.

        Raises ``BackendUnavailableError`` if this machine lacks what reads the files.
        """
        return []

    @abstractmethod
    def open(
        self, path: Path, precision: str, *, device: Device | None = None, threads: int = 0, kept: Sequence[str] = ()
    ) -> Runner:
        """Open the artifact at ``path`` strictly: in ``precision``, on ``device`` (None: the device of ``device()``).

        With ``threads`` 0 the runtime chooses their number. Raises ``BackendUnavailableError`` if this machine would
        run it differently, ``AuditError`` if the file cannot be opened.
        """

    def stand_in(self, precision: str) -> str | None:
        """Another precision in which this machine runs the target's file where it cannot run it in its own.

        Such a run proves the content of the file (weights, layers, order of the classes); it never makes a target
        "verified". None by default.
        """
        return None

    def open_stand_in(self, path: Path, precision: str, *, kept: Sequence[str] = ()) -> Runner:
        """Open the artifact at ``path`` in the precision of ``stand_in``; raises as ``open`` does."""
        raise NotImplementedError(f"{self.name} runs {precision} in no other precision")

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        """Why ``clock`` cannot time the target on this machine; ``providers`` decides for the clock ``serve``."""
        if clock == "host":
            return self.unavailable(precision)
        return Missing(f"{self.title} targets cannot be timed by the clock gpu", "Pass --clock host")

    def capture(self, path: Path, precision: str, given: Any, stream: Any) -> tuple[Callable[[], object], Any]:
        """(launch, output) of the batch ``given`` on a CUDA ``stream``, for the clock ``gpu``; tensors are torch's."""
        raise BackendUnavailableError(
            f"{self.name}-{precision} cannot be timed by the clock gpu.", remedy="Pass --clock host."
        )

    def providers(self, precision: str) -> tuple[str, ...]:
        """onnxruntime providers on which ``kdexport serve`` runs the target in its own precision; empty by default."""
        return ()

    def served_elsewhere(self) -> str:
        """How to serve a target that ``kdexport serve`` cannot run, as a remedy."""
        return "Serve another target"

    def triton_platform(self, precision: str) -> "str | Missing":
        """Triton's backend for the target, or why a model repository cannot contain it."""
        return Missing(
            f"is verified in {self.title}, but Triton repositories are written for onnxruntime and TensorRT only",
            "Pass --target onnx-fp32 or onnx-int8; build the bundle with it if it is missing",
        )


def first_difference(found: bytes, expected: bytes) -> str:
    """The first line of two texts that differs, or the first byte."""
    try:
        texts = [data.decode().splitlines() for data in (found, expected)]
    except UnicodeDecodeError:
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((at for at, (one, other) in pairs if one != other), min(len(found), len(expected)))
        return f"differs from byte {place:,} on; {len(found):,} bytes, expected {len(expected):,}"
    for number, (line, wanted) in enumerate(zip_longest(*texts, fillvalue=""), 1):
        if line != wanted:
            return f"line {number} is {line[:100]!r}, expected {wanted[:100]!r}"
    return "the ends of lines differ"


def run_in_batches(logits: Logits, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits (N,K) of all images, in batches of the given sizes in turn, so that every size is verified."""
    parts, start, turn = [], 0, 0
    while start < len(images):
        size = batches[turn % len(batches)]
        parts.append(logits(images[start : start + size]))
        start, turn = start + size, turn + 1
    return np.concatenate(parts)
