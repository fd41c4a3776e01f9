"""The finished results that the stages of a build pass on, as files on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdexport.graph.plan import PLAIN, LayerPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedFiles:
    """The folded student's weights and its certificate on disk."""

    weights: Path
    certificate: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxModel:
    """A checked ONNX file. Its graph carries the precision: ``form`` is one of ``backends.base.FORMS``.

    ``plan`` has the layers that differ from ``form``, and those that were scaled before the cast.
    """

    path: Path
    form: str
    plan: LayerPlan = PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeAwareFiles:
    """The folded student after quantize-aware training for one int8 form.

    ``weights`` has its state, ``model`` is the float32 graph with these weights and ``ranges`` the file of the ranges
    that the graph is cast with; ``described`` is the entry of the manifest.
    """

    weights: Path
    model: OnnxModel
    ranges: Path
    described: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """A folder with a compiled engine and the layer table of its build."""

    folder: Path
