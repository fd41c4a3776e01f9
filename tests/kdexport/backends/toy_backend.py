"""A backend of one file outside the package: it compiles the ONNX file into its own format and runs that.

Environment variables make it fail in ways that a real runtime may: ``TOY_FAULT`` is ``wrong`` (logits of another
network), ``half`` (it computes, and says so, in another precision) or ``gone`` (its device is not there).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS
from kdexport.backends.base import Backend, CompileRequest, Device, Execution, Finding, Missing, Runner
from kdexport.errors import AuditError

MAGIC = b"TOY1"


def fault() -> str:
    return os.environ.get("TOY_FAULT", "")


class ToyRunner(Runner):
    def __init__(self, model: Any, precision: str) -> None:
        self.model, self.precision = model, precision

    @property
    def execution(self) -> Execution:
        return Execution(runtime="toy", version="1.0", device="abacus 0", types=(self.ran_in,))

    @property
    def ran_in(self) -> str:
        return "fp16" if fault() == "half" else self.precision

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = self.model.run(None, {"input": images})[0]
        return answer[:, ::-1].copy() if fault() == "wrong" else answer

    def findings(self) -> list[Finding]:
        return [Finding(f"every bead in {self.precision}", self.ran_in == self.precision, f"beads in {self.ran_in}")]


@BACKENDS.register("toy")
class Toy(Backend):
    name = "toy"
    description = "an abacus"
    title = "the abacus"
    artifact = "model.toy"
    precisions = ("fp32",)

    def unavailable(self, precision: str) -> Missing | None:
        return None

    def not_executable(self, precision: str) -> Missing | None:
        return Missing("there is no abacus on this desk", "Buy one") if fault() == "gone" else None

    def key_material(self, precision: str) -> list[Any]:
        return ["toy 1.0"]

    def compile(self, request: CompileRequest) -> None:
        (request.folder / self.artifact).write_bytes(MAGIC + request.onnx.read_bytes())

    def describe(self, folder: Path) -> dict[str, Any]:
        return {"version": "1.0", "kernels": 1, "layers": {"bead": 1}}

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        data = (folder / self.artifact).read_bytes()
        return [Finding("format", data.startswith(MAGIC), f"{len(data):,} bytes")]

    def open(
        self, path: Path, precision: str, *, device: Device | None = None, threads: int = 0, kept: Sequence[str] = ()
    ) -> Runner:
        from kdexport.backends.ort import import_onnxruntime

        data = path.read_bytes()
        if not data.startswith(MAGIC):
            raise AuditError(f"{path.name} is not a file of the abacus.", remedy="Build it again.")
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(data.removeprefix(MAGIC), options, providers=["CPUExecutionProvider"])
        return ToyRunner(session, precision)
