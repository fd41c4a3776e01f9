"""ExecuTorch on the CPU, through its XNNPACK delegate: a program for one image, built from the ONNX file."""

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS
from kdexport.backends.base import (
    IN_ORDER,
    Backend,
    Clock,
    CompileRequest,
    Device,
    Execution,
    Finding,
    Missing,
    Runner,
)
from kdexport.backends.executorch_content import INSTALL, ProgramContent, program_findings, read_program
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import quiet
from kdexport.core.digests import tool_versions
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError, first_line

PROGRAM = "model.pte"
_BUILD_TIMEOUT_S = 3600


@dataclass(frozen=True, slots=True, eq=False)
class ExecutorchRunner(Runner):
    """A loaded program."""

    method: Any
    content: ProgramContent
    precision: str
    #: What ``method`` reads its operators from; it must live as long.
    program: Any

    @property
    def execution(self) -> Execution:
        version = tool_versions("executorch")["executorch"]
        device = " and ".join(sorted(set(self.content.delegates))) or "portable kernels"
        return Execution(runtime="ExecuTorch", version=version, device=device, types=(self.precision,))

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        given = torch.from_numpy(np.ascontiguousarray(images, np.float32))
        # The output is memory of the method, which the next run overwrites.
        return np.concatenate([self.method.execute([image[None]])[0].numpy().copy() for image in given])


@functools.cache
def _runtime() -> Any:
    try:
        with quiet():
            from executorch.runtime import Runtime

            return Runtime.get()
    except ImportError as error:
        raise BackendUnavailableError(
            f"ExecuTorch is not installed, or not whole: {first_line(error)}.", remedy=f"{INSTALL}."
        ) from error


@BACKENDS.register("executorch")
class ExecuTorch(Backend):
    """ExecuTorch with XNNPACK: phones with the runtime of PyTorch."""

    name = "executorch"
    description = "ExecuTorch with XNNPACK on a CPU, for phones"
    title = "ExecuTorch"
    precisions = ("fp32", "int8")
    artifact = PROGRAM
    packages = ("executorch", "torchao", "torch")
    one_at_a_time: ClassVar[bool] = True
    repeats_files: ClassVar[bool] = True

    def computes_in(self, precision: str, options: dict[str, Any]) -> str:
        # XNNPACK's float32 kernels: one accumulator for each result, which is the bias at the start.
        return IN_ORDER if precision == "fp32" else self.form(precision)

    def unavailable(self, precision: str) -> Missing | None:
        for name in ("executorch", "torchao"):
            if importlib.util.find_spec(name) is None:
                return Missing(f"{name} is not installed", INSTALL)
        return None

    def compile(self, request: CompileRequest) -> None:
        arguments = [str(request.onnx), str(request.folder / PROGRAM), str(request.image_size)]
        try:
            answer = call("kdexport.backends.executorch_build", arguments, timeout_s=_BUILD_TIMEOUT_S)
        except (ChildDiedError, ChildTimeoutError) as error:
            raise EngineBuildError(
                f"The build of the program ended without an answer: {error}.",
                remedy="Run it again on a machine with more memory, or build another target, for example onnx-fp32.",
            ) from error
        if "refused" in answer:
            remedy = answer.get("remedy", "Build another target for this network, for example onnx-fp32.")
            raise EngineBuildError(answer["refused"], remedy=remedy)

    def describe(self, folder: Path) -> dict[str, Any]:
        content = read_program((folder / PROGRAM).read_bytes())
        outside = {f"outside: {name}": content.outside.count(name) for name in sorted(set(content.outside))}
        return {
            "version": tool_versions("executorch")["executorch"],
            "kernels": content.calls + len(content.outside),
            "layers": {"calls of XNNPACK": content.calls, **outside},
        }

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        try:
            return program_findings(folder, PROGRAM, precision, kept)
        except OSError as error:
            return [Finding("readable", False, f"{PROGRAM}: {error.strerror}")]

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        runtime, content = _runtime(), read_program(path.read_bytes())
        if threads:
            from executorch.extension.pybindings import portable_lib

            portable_lib._unsafe_reset_threadpool(threads)
        try:
            with quiet():
                program = runtime.load_program(path)
                method = program.load_method("forward")
        except RuntimeError as error:
            raise AuditError(
                f"ExecuTorch cannot open {path.name}: {first_line(error)}.",
                remedy="The file is damaged or of another version; build the bundle again.",
            ) from error
        return ExecutorchRunner(method, content, precision, program)

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            return Missing("ExecuTorch targets run on the CPU", "Pass --clock host")
        return self.unavailable(precision)

    def served_elsewhere(self) -> str:
        return "Load its program in your application with ExecuTorch (docs/edge.md), or serve onnx-fp32"
