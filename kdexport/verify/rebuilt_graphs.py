"""The graphs that a bundle must contain, made again from its unfused student by this version: fold, export, cast.

Only the ranges, the precision plans and the weights of a quantize-aware training are taken from the bundle; rungs C and
D judge their effect.
"""

from pathlib import Path
from types import MappingProxyType

import onnx
from torch import nn

from kdexport.backends.base import Finding
from kdexport.backends.file_interface import PLAIN_INTERFACE
from kdexport.bundle.manifest import (
    FUSED,
    MODEL,
    RANGES,
    UNFUSED,
    Manifest,
    interface_of,
    load_unfused,
    target_of,
    trained_weights,
)
from kdexport.checkpoint import load_strictly, load_tensors
from kdexport.core.digests import sha256_file
from kdexport.errors import BundleError, KdexportError, first_line
from kdexport.graph.equalise import apply_scalings
from kdexport.graph.equality import graph_difference
from kdexport.graph.export import export_onnx, model_metadata
from kdexport.graph.interface import with_interface
from kdexport.graph.plan import LayerPlan
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
from kdexport.graph.quantize import parse_form, quantize
from kdexport.graph.trained_weights import with_weights
from kdexport.reparam.fold_student import fuse_student

_CASTS = MappingProxyType({"fp16": cast_to_fp16, "bf16": cast_to_bf16})


class RebuiltGraphs:
    """Rebuilds the file of each form on demand, each once."""

    def __init__(self, folder: Path, manifest: Manifest, scratch: Path, fused: nn.Module | None = None) -> None:
        """``scratch`` is an empty folder for the rebuilt files; ``fused`` is the folded student with the stored
        weights, if the caller has it: folding takes longest.
        """
        self._fused = fused
        self._folder, self._manifest, self._scratch = folder, manifest, scratch
        self._float32: Path | None = None
        self._source: Path | None = None
        #: Files of weights by int8 form.
        self._trained = trained_weights(manifest)
        self._made: dict[tuple[object, ...], Path] = {}

    def finding(self, name: str, form: str, plan: LayerPlan, weight_bits: int) -> Finding:
        """Whether the ONNX file ``name`` equals the graph that this version makes from the unfused student."""
        try:
            expected = onnx.load(str(self.rebuild(name, form, plan, weight_bits)))
        except BundleError as error:
            return Finding("graph as rebuilt", False, error.message)
        difference = graph_difference(onnx.load(str(self._folder / name)), expected)
        nodes = len(expected.graph.node)
        return Finding("graph as rebuilt", not difference, difference or f"{nodes} nodes, each as rebuilt")

    def rebuild(self, name: str, form: str, plan: LayerPlan, weight_bits: int) -> Path:
        """The ONNX file ``name``, made again; raises ``BundleError`` if it cannot be made from what the bundle has."""
        return self._with_interface(name, self.cast(name, form, plan, weight_bits))

    def cast(self, name: str, form: str, plan: LayerPlan, weight_bits: int) -> Path:
        """The same without the normalisation and the softmax that the target may ask for."""
        path = self._folder / name
        try:
            return self._expected(path, form, plan, weight_bits if form == "int8-u8" else 8)
        except KdexportError as error:
            raise _impossible(error.message) from error
        # The quantizer of onnxruntime raises errors of its own for ranges that are not those of the graph.
        except Exception as error:
            raise _impossible(first_line(error)) from error

    def _expected(self, path: Path, form: str, plan: LayerPlan, weight_bits: int) -> Path:
        ranges = path.with_name(RANGES) if form.startswith("int8") else None
        key = (form, str(plan.to_json()), weight_bits, None if ranges is None else ranges.read_bytes())
        if key not in self._made:
            self._made[key] = self._make(form, plan, weight_bits, ranges)
        return self._made[key]

    def _with_interface(self, name: str, path: Path) -> Path:
        """The graph at ``path`` with the input and outputs that the manifest states for the ONNX file ``name``."""
        target = target_of(name)
        interface = PLAIN_INTERFACE if target is None else interface_of(self._manifest, str(target))
        if interface == PLAIN_INTERFACE:
            return path
        wrapped = path.with_name(f"{path.stem}-{interface.takes}-{interface.gives}.onnx")
        model = with_interface(onnx.load(str(path)), interface, self._manifest.spec.preprocessing)
        onnx.save(model, str(wrapped))
        return wrapped

    def _make(self, form: str, plan: LayerPlan, weight_bits: int, ranges: Path | None) -> Path:
        if form == "fp32" and not plan.equalised:
            return self._exported()
        source, path = self.float32(form, plan), self._scratch / f"{len(self._made)}-{form}.onnx"
        if ranges is not None:
            quantize(source, ranges, path, form=parse_form(form), weight_bits=weight_bits, keep=plan.nodes)
        elif form in _CASTS:
            _CASTS[form](source, path)
        else:
            path = source
        return path

    def float32(self, form: str, plan: LayerPlan) -> Path:
        """The float32 graph that is cast to ``form``: with the weights of its training, or scaled by ``plan``."""
        source = self._named_as_built()
        if form in self._trained:
            return self._with_trained(source, self._trained[form])
        if not plan.equalised:
            return source
        path = self._scratch / f"{len(self._made)}-equalised.onnx"
        onnx.save(apply_scalings(onnx.load(str(source)), plan.equalised), str(path))
        return path

    def _with_trained(self, source: Path, name: str) -> Path:
        path = self._scratch / f"{name}.onnx"
        if not path.is_file():
            weights = {key: value.numpy() for key, value in load_tensors(self._folder / name).items()}
            onnx.save(with_weights(onnx.load(str(source)), weights), str(path))
        return path

    def _named_as_built(self) -> Path:
        """The float32 graph with the tensor names of the build, by which ranges and plans name tensors and nodes.

        Another version of torch names tensors differently. The bundle's own file is taken if it equals the rebuilt
        graph, which this check has just shown bit by bit.
        """
        if self._source is None:
            rebuilt, built = self._exported(), self._folder / MODEL
            difference = graph_difference(onnx.load(str(built)), onnx.load(str(rebuilt)))
            self._source = rebuilt if difference else built
        return self._source

    def _exported(self) -> Path:
        """The float32 graph with the stored folded weights, which rung A compares with the fold."""
        if self._float32 is None:
            spec = self._manifest.spec
            path = self._scratch / MODEL
            # As at the build, so that the file has the same bytes if the tools are the same.
            metadata = model_metadata(spec, sha256_file(self._folder / UNFUSED))
            metadata |= {"version": str(self._manifest.data.get("kdexport", metadata["version"]))}
            size, opset = spec.image_size, self._manifest.opset
            export_onnx(self._folded(), path, image_size=size, opset=opset, metadata=metadata)
            self._float32 = path
        return self._float32

    def _folded(self) -> nn.Module:
        if self._fused is None:
            self._fused = fuse_student(load_unfused(self._folder, self._manifest.spec)).module
            load_strictly(self._fused, load_tensors(self._folder / FUSED), FUSED)
        return self._fused


def _impossible(reason: str) -> BundleError:
    return BundleError(
        f"cannot be rebuilt: {reason}",
        remedy="Run kdexport verify BUNDLE to see which files of the bundle are damaged.",
    )
