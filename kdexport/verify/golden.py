"""The golden images of a bundle, their reference logits, and the largest errors that a server accepts on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdexport.backends.base import ONNX_FILE, Execution, Logits, run_in_batches
from kdexport.backends.ort import load_model
from kdexport.bundle.layout import GOLDEN_INDICES, OWN_DISTANCE, OWN_LOGITS
from kdexport.bundle.manifest import GOLDEN_LOGITS, UNIT_ERROR, write_golden
from kdexport.checkpoint import TrainedStudent, load_student, save_tensors
from kdexport.data.datasets import ImageSet
from kdexport.data.image_metadata import without_metadata
from kdexport.errors import KdexportError
from kdexport.targets import Target
from kdexport.verify.golden_limits import allowed_distance, place_of
from kdexport.verify.parity import float32_unit
from kdexport.verify.policy import Policy
from kdexport.verify.reference import run_exact, run_torch
from kdexport.verify.target_checks import open_file


@dataclass(frozen=True, slots=True)
class OwnRun:
    """A target that this machine can run: its logits and what computed them, and the plain run of its ONNX file."""

    target: Target
    logits: Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], Execution]]
    plain: Logits


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """The names of the golden images, and where each target computed its own logits of them.

    ``described`` are fields of the manifest: which images they are, and how many the server would refuse.
    """

    names: list[str]
    places: dict[str, dict[str, str]]
    described: dict[str, Any] = field(default_factory=dict)


def write_golden_set(
    folder: Path,
    trained: TrainedStudent,
    images: ImageSet,
    chosen: Sequence[int],
    low: Mapping[str, Logits],
    own: Sequence[OwnRun],
    *,
    policy: Policy,
    is_synthetic: bool = False,
) -> GoldenSet:
    """Write the ``chosen`` images and their float64 logits (N,K), and those of each run of ``own`` in its runtime.

    The images are written without metadata. ``is_synthetic``: they are not of the validation split, and have no labels.
    The same file holds the largest error of a logit that a server accepts under ``policy``, so that the server needs
    no torch: for float32 the limit of rung B; for each target of ``low`` (a function that runs its file) the limit of
    rung C times the error of the file on this machine.
    """
    preprocessing = trained.spec.preprocessing
    bare = (without_metadata(*images.original(index), preprocessing) for index in chosen)
    names = write_golden(folder, bare)
    given = preprocessing.normalise(images.read(chosen, preprocessing))
    exact, added = run_exact(load_student(trained), given)
    unit = float32_unit(exact, added, run_torch(load_student(trained), given))
    allowed = {UNIT_ERROR: unit, "allowed_error": policy.B.max_error * unit}
    allowed |= {
        f"allowed_error.{target}": low_precision_error(exact, logits(given), policy.C.max_error)
        for target, logits in low.items()
    }
    tensors = {"logits": torch.from_numpy(exact)}
    if not is_synthetic:
        tensors["labels"] = torch.from_numpy(images.labels[list(chosen)])
        tensors[GOLDEN_INDICES] = torch.tensor(list(chosen), dtype=torch.int64)
    tensors |= {name: torch.tensor(value, dtype=torch.float64) for name, value in allowed.items()}
    places = {}
    for run in own:
        try:
            logits, execution = run.logits(given)
            distance = allowed_distance(run.target.precision, logits, run.plain(given))
        except KdexportError:
            # The verification runs the target again and reports the error.
            continue
        tensors[OWN_LOGITS + str(run.target)] = torch.from_numpy(logits)
        tensors[OWN_DISTANCE + str(run.target)] = torch.tensor(distance, dtype=torch.float64)
        places[str(run.target)] = place_of(execution)
    save_tensors(folder / GOLDEN_LOGITS, tensors)
    return GoldenSet(names, places)


def own_run(path: Path, target: Target, kept: Sequence[str]) -> OwnRun | None:
    """How to run the artifact at ``path`` in its own runtime, and its ONNX file beside it as it stands; None if this
    machine cannot run it.
    """
    if target.not_executable() is not None:
        return None
    graph = path.with_name(ONNX_FILE)

    def logits(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], Execution]:
        runner = target.runtime.open(path, target.precision, threads=1, kept=kept)
        return runner.run(images, (1,)), runner.execution

    def plain(images: NDArray[np.float32]) -> NDArray[np.float32]:
        # onnxruntime has no bfloat16 convolution on the CPU; such a graph is emulated.
        emulated = target.form == "bf16"
        model = open_file(graph, target.form) if emulated else load_model(graph, optimise=False)
        return run_in_batches(model.logits, images, (1,))

    return OwnRun(target, logits, plain)


def low_precision_error(exact: NDArray[np.float64], logits: NDArray[np.floating[Any]], factor: float) -> float:
    """Largest absolute error of a logit that a low-precision file may have on another machine.

    It is ``factor`` times the largest error of ``logits``, those of the file when the bundle was built; rung C judges
    whether that error is what the precision costs.
    """
    return float(factor * np.abs(logits.astype(np.float64) - exact).max())
