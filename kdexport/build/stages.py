"""The stages of a build, each a function from finished input to a folder of finished output."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from kdexport.artifacts import EngineFile, FusedFiles, OnnxModel
from kdexport.backends.base import CompileRequest
from kdexport.bundle.manifest import FUSED, MODEL, RANGES
from kdexport.checkpoint import TrainedStudent, load_student, load_tensors, save_tensors
from kdexport.config import BuildConfig, ExportSettings
from kdexport.core.digests import digest, source_digest, tool_versions
from kdexport.data.calibration_images import Calibration
from kdexport.errors import ExportError
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.targets import Target
from kdexport.workspace import Workspace

CERTIFICATE = "certificate.json"
UNFUSED_MODEL = "unfused.onnx"
_EXPORT_TOOLS = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy")
_CAST_TOOLS = ("onnx", "onnx-ir", "ml_dtypes", "onnxruntime-gpu", "onnxruntime", "numpy")


def fuse_key(trained: TrainedStudent) -> str:
    """Digest of all that the folded student depends on."""
    described = trained.spec.to_json()
    # How fast or how well it was trained says nothing about what is exported.
    described["provenance"] = {name: v for name, v in described["provenance"].items() if name != "metrics"}
    return digest(
        ["fuse", trained.weights_sha256, described, trained.plugin_sha256, source_digest(), tool_versions("torch")]
    )


def export_key(fused: str, settings: ExportSettings) -> str:
    """Digest of all that the ONNX files depend on."""
    return digest(["export", fused, settings.opset, tool_versions(*_EXPORT_TOOLS)])


def calibrate_key(exported: str, calibration: Calibration) -> str:
    """Digest of all that the ranges of activations depend on: the graph, the training images, the method."""
    settings = calibration.settings.model_dump(mode="json", exclude={"weight_bits"})
    return digest(["calibrate", exported, calibration.dataset_sha256, settings, tool_versions(*_CAST_TOOLS)])


def equalise_key(exported: str, plan: LayerPlan) -> str:
    """Digest of all that the float32 graph of a plan depends on; without a scaling it is the exported file itself."""
    return digest(["equalise", exported, plan.to_json()["equalised"]]) if plan.equalised else exported


def cast_key(exported: str, form: str, calibration: Calibration, plan: LayerPlan = PLAIN) -> str:
    """Digest of all that a cast ONNX file depends on, its plan included; float32 is the exported file itself."""
    if form == "fp32":
        return exported
    source = equalise_key(exported, plan)
    quantized = [calibrate_key(source, calibration), weight_bits(form, calibration)] if is_int8(form) else []
    return digest(["cast", source, form, quantized, list(plan.nodes), tool_versions(*_CAST_TOOLS)])


def is_int8(form: str) -> bool:
    """Whether a form needs calibration."""
    return form.startswith("int8")


def weight_bits(form: str, calibration: Calibration) -> int:
    """Bits of a weight; only CPUs have a reason to save one."""
    return calibration.settings.weight_bits if form == "int8-u8" else 8


def compile_key(model: str, target: Target, settings: ExportSettings) -> str:
    """Digest of all that an engine depends on: the model with its weights, shapes, tools, GPU and driver."""
    made = [target.runtime.key_material(target.precision), target.plugin_sha256]
    return digest(["compile", model, str(target), settings.model_dump(mode="json"), made])


def stage_keys(
    trained: TrainedStudent,
    targets: Sequence[Target],
    config: BuildConfig,
    calibration: Calibration,
    plans: Mapping[str, LayerPlan] = MappingProxyType({}),
) -> list[tuple[str, str]]:
    """(stage, key) of every result that a build of ``targets`` makes or takes from the workspace.

    ``plans`` are the precision plans by form.
    """
    fused = fuse_key(trained)
    exported = export_key(fused, config.export)
    keys = [("fuse", fused), ("export", exported), ("calibrate", calibrate_key(exported, calibration))]
    for target in targets:
        plan = plans.get(target.form, PLAIN)
        model = cast_key(exported, target.form, calibration, plan)
        if plan.equalised:
            source = equalise_key(exported, plan)
            keys += [("equalise", source), ("calibrate", calibrate_key(source, calibration))]
        if target.form != "fp32":
            keys.append(("cast", model))
        if target.compiles:
            keys.append(("compile", compile_key(model, target, config.export)))
    return keys


def fuse(workspace: Workspace, trained: TrainedStudent) -> FusedFiles:
    """Fold the trained student; raises ``CertificateError`` where the fold is not exact."""
    from kdexport.reparam.fold_student import fuse_student

    def make(folder: Path) -> None:
        result = fuse_student(load_student(trained))
        save_tensors(folder / FUSED, result.module.state_dict())
        (folder / CERTIFICATE).write_text(json.dumps(result.certificate.to_json(), indent=2))

    key = fuse_key(trained)
    folder = workspace.produce("fuse", key, make)
    return FusedFiles(weights=folder / FUSED, certificate=folder / CERTIFICATE, key=key)


def export(workspace: Workspace, trained: TrainedStudent, fused: FusedFiles, settings: ExportSettings) -> OnnxModel:
    """Export the folded student, and beside it the unfused one that its latency is compared with."""
    from kdexport.checkpoint import load_strictly
    from kdexport.graph.audit import audit_graph
    from kdexport.graph.export import export_onnx, model_metadata
    from kdexport.reparam.fold_student import fuse_student

    def make(folder: Path) -> None:
        spec = trained.spec
        unfused = load_student(trained)
        module = fuse_student(unfused).module
        load_strictly(module, load_tensors(fused.weights), str(fused.weights))
        metadata = model_metadata(spec, trained.weights_sha256)
        size, opset = spec.image_size, settings.opset
        export_onnx(module, folder / MODEL, image_size=size, opset=opset, metadata=metadata)
        export_onnx(unfused, folder / UNFUSED_MODEL, image_size=size, opset=opset, metadata={})
        weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        faults = [f for f in audit_graph(folder / MODEL, weights, form="fp32", opset=opset) if not f.holds]
        if faults:
            raise ExportError(
                f"The exported graph is not the folded student: {faults[0].check}: {faults[0].fact}.",
                remedy="Report the student and the versions of torch and onnxscript.",
            )

    key = export_key(fused.key, settings)
    folder = workspace.produce("export", key, make)
    return OnnxModel(path=folder / MODEL, form="fp32", key=key)


def calibrate(workspace: Workspace, model: OnnxModel, calibration: Calibration) -> Path:
    """The file with the range of each tensor of the float32 ``model`` on training images."""
    from kdexport.graph.tensor_ranges import calibrate as measure

    settings = calibration.settings

    def make(folder: Path) -> None:
        batches = calibration.batches()
        measure(model.path, batches, folder / RANGES, method=settings.method, percentile=settings.percentile)

    return workspace.produce("calibrate", calibrate_key(model.key, calibration), make) / RANGES


def equalise(workspace: Workspace, model: OnnxModel, plan: LayerPlan) -> OnnxModel:
    """The float32 ``model`` with the layers of ``plan`` scaled; the same function, bit for bit."""
    if not plan.equalised:
        return model
    import onnx

    from kdexport.graph.equalise import apply_scalings

    def make(folder: Path) -> None:
        onnx.save(apply_scalings(onnx.load(str(model.path)), plan.equalised), str(folder / MODEL))

    key = equalise_key(model.key, plan)
    return OnnxModel(path=workspace.produce("equalise", key, make) / MODEL, form=model.form, key=key)


def quantize(
    workspace: Workspace, model: OnnxModel, form: str, calibration: Calibration, plan: LayerPlan, path: Path
) -> Path:
    """Write the float32 ``model`` in the int8 ``form`` by ``plan`` to ``path``; returns the file of its ranges."""
    from kdexport.graph.quantize import parse_form
    from kdexport.graph.quantize import quantize as write

    source = equalise(workspace, model, plan)
    ranges, bits = calibrate(workspace, source, calibration), weight_bits(form, calibration)
    write(source.path, ranges, path, form=parse_form(form), weight_bits=bits, keep=plan.nodes)
    return ranges


def cast(
    workspace: Workspace, model: OnnxModel, form: str, calibration: Calibration, plan: LayerPlan = PLAIN
) -> OnnxModel:
    """The float32 ``model`` in ``form`` by ``plan``; float32 is the model itself. int8 has its ranges beside it."""
    if form == model.form:
        return model
    from kdexport.graph.precision import cast_to_bf16, cast_to_fp16

    def make(folder: Path) -> None:
        if is_int8(form):
            shutil.copyfile(quantize(workspace, model, form, calibration, plan, folder / MODEL), folder / RANGES)
        else:
            {"fp16": cast_to_fp16, "bf16": cast_to_bf16}[form](model.path, folder / MODEL)

    key = cast_key(model.key, form, calibration, plan)
    return OnnxModel(path=workspace.produce("cast", key, make) / MODEL, form=form, key=key, plan=plan)


def compile_engine(
    workspace: Workspace, model: OnnxModel, target: Target, settings: ExportSettings, image_size: int
) -> EngineFile:
    """Build the engine of ``target`` and assert the precision of each of its kernels."""

    def make(folder: Path) -> None:
        target.runtime.compile(
            CompileRequest(
                onnx=model.path,
                folder=folder,
                precision=target.precision,
                image_size=image_size,
                batches=(settings.min_batch, settings.opt_batch, settings.max_batch),
                kept=tuple(model.plan.nodes),
                options=settings.model_dump(mode="json"),
                cache=workspace.root / "timing",
            )
        )

    key = compile_key(model.key, target, settings)
    return EngineFile(folder=workspace.produce("compile", key, make), target=target, key=key)
