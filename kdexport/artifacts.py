"""What the stages of a build hand to each other: frozen, each knowing the digest of everything it came from."""

from dataclasses import dataclass
from pathlib import Path

from kdexport.checkpoint import TrainedStudent
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.targets import Target

__all__ = ["EngineFile", "FusedFiles", "OnnxModel", "TrainedStudent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedFiles:
    """The folded student's weights and its certificate on disk."""

    weights: Path
    certificate: Path
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxModel:
    """A checked ONNX file; its graph, not the engine builder, carries the precision: one of ``targets.FORMS``.

    ``plan`` says which layers differ from ``form``, and which were scaled before the cast.
    """

    path: Path
    form: str
    key: str
    plan: LayerPlan = PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """A compiled plan with the layer table of its build."""

    folder: Path
    target: Target
    key: str
