"""Core ML: packages for Apple's devices, written on any machine and run on a Mac alone."""

import importlib.util
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS
from kdexport.backends.base import INPUT, LOGITS, Backend, Clock, CompileRequest, Device, Execution, Finding, Missing
from kdexport.backends.base import Runner as BaseRunner
from kdexport.backends.coreml_content import INSTALL, STORED_AS, WEIGHTED, content_findings, read_program
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import quiet
from kdexport.core.digests import tool_versions
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError, first_line

PACKAGE = "model.mlpackage"
#: The program of a package; the bundle's files are this one and those beside it.
PROGRAM = f"{PACKAGE}/Data/com.apple.CoreML/model.mlmodel"
_BUILD_TIMEOUT_S = 1800
_NO_MAC = (
    "Core ML runs on macOS only",
    "Copy the bundle to a Mac, run pip install 'kdexport[build,coreml]' and kdexport verify there",
)


@dataclass(frozen=True, slots=True, eq=False)
class CoremlRunner(BaseRunner):
    """An opened package, on the CPU of a Mac."""

    model: Any
    types: tuple[str, ...]

    @property
    def execution(self) -> Execution:
        return Execution(runtime="Core ML", version=f"macOS {platform.mac_ver()[0]}", device="CPU", types=self.types)

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        given = np.ascontiguousarray(images, np.float32)
        return np.concatenate([np.asarray(self.model.predict({INPUT: one[None]})[LOGITS], np.float32) for one in given])


@BACKENDS.register("coreml")
class CoreML(Backend):
    """Core ML: iPhones, iPads and Macs."""

    name = "coreml"
    description = "Core ML, for Apple's devices; built anywhere, run on macOS"
    title = "Core ML"
    precisions = ("fp32", "fp16")
    artifact = PROGRAM
    packages = ("coremltools",)
    one_at_a_time: ClassVar[bool] = True
    repeats_files: ClassVar[bool] = True

    def unavailable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("coremltools") is None:
            return Missing("coremltools is not installed", INSTALL)
        return None

    def not_executable(self, precision: str) -> Missing | None:
        return self.unavailable(precision) or (None if sys.platform == "darwin" else Missing(*_NO_MAC))

    def compile(self, request: CompileRequest) -> None:
        arguments = [str(request.onnx), str(request.folder / PACKAGE), str(request.image_size), request.precision]
        try:
            answer = call("kdexport.backends.coreml_build", arguments, timeout_s=_BUILD_TIMEOUT_S)
        except (ChildDiedError, ChildTimeoutError) as error:
            raise EngineBuildError(
                f"The build of the package ended without an answer: {error}.",
                remedy="Run it again on a machine with more memory, or build another target, for example onnx-fp32.",
            ) from error
        if "refused" in answer:
            remedy = answer.get("remedy", "Build another target for this network, for example onnx-fp32.")
            raise EngineBuildError(answer["refused"], remedy=remedy)

    def describe(self, folder: Path) -> dict[str, Any]:
        program = read_program(folder / PROGRAM)
        return {
            "version": tool_versions("coremltools")["coremltools"],
            "kernels": sum(operator.kind in WEIGHTED for operator in program.operators),
            "layers": dict(sorted(Counter(operator.kind for operator in program.operators).items())),
        }

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        return content_findings(folder / PROGRAM, folder, precision)

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> BaseRunner:
        missing = self.not_executable(precision)
        if missing is not None:
            raise BackendUnavailableError(f"{missing.reason}.", remedy=f"{missing.remedy}.")
        with quiet():
            import coremltools as ct
        try:
            with quiet():
                model = ct.models.MLModel(str(path.parents[2]), compute_units=ct.ComputeUnit.CPU_ONLY)
        # Core ML raises its own errors, of types that only a Mac has.
        except Exception as error:
            raise AuditError(
                f"Core ML cannot open {PACKAGE}: {first_line(error)}.",
                remedy="The package is damaged, or this macOS is older than 13; build the bundle again.",
            ) from error
        return CoremlRunner(model, (STORED_AS[precision].lower(),))

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            return Missing("Core ML targets run on the CPU", "Pass --clock host")
        return self.not_executable(precision)

    def served_elsewhere(self) -> str:
        return "Load its package in your application with Core ML (docs/edge.md), or serve onnx-fp32"
