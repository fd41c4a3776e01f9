"""What the stages of a build hand to each other, finished and on disk."""

from dataclasses import dataclass
from pathlib import Path

from kdexport.graph.plan import PLAIN, LayerPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedFiles:
    """The folded student's weights and its certificate on disk."""

    weights: Path
    certificate: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxModel:
    """A checked ONNX file; its graph, not the engine builder, carries the precision: one of ``targets.FORMS``.

    ``plan`` says which layers differ from ``form``, and which were scaled before the cast.
    """

    path: Path
    form: str
    plan: LayerPlan = PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """The folder of a compiled plan with the layer table of its build."""

    folder: Path
