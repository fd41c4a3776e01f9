"""The stages of a build, each a function from finished input to a folder of finished output."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kdexport.artifacts import EngineFile, FusedFiles, OnnxModel
from kdexport.backends.trt import EngineRequest, build_engine, require_precision
from kdexport.bundle import FUSED, LAYERS, MODEL, PLAN, RANGES
from kdexport.calibration import Calibration
from kdexport.checkpoint import StudentSpec, TrainedStudent, load_student, load_tensors, save_tensors
from kdexport.config import BuildConfig, ExportSettings
from kdexport.errors import ExportError
from kdexport.fingerprint import digest, source_digest, tool_versions
from kdexport.targets import Target, gpu_fingerprint
from kdexport.workspace import Workspace

CERTIFICATE = "certificate.json"
UNFUSED_MODEL = "unfused.onnx"
_EXPORT_TOOLS = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy")
_CAST_TOOLS = ("onnx", "onnx-ir", "ml_dtypes", "onnxruntime-gpu", "onnxruntime", "numpy")
_ENGINE_TOOLS = {"trt": ("tensorrt", "tensorrt-cu13"), "trt-rtx": ("tensorrt_rtx_cu13",)}


def fuse_key(trained: TrainedStudent) -> str:
    """Digest of all that the folded student depends on."""
    described = trained.spec.to_json()
    # How fast or how well it was trained says nothing about what is exported.
    described["provenance"] = {name: v for name, v in described["provenance"].items() if name != "metrics"}
    return digest(["fuse", trained.weights_sha256, described, source_digest(), tool_versions("torch")])


def export_key(fused: str, settings: ExportSettings) -> str:
    """Digest of all that the ONNX files depend on."""
    return digest(["export", fused, settings.opset, tool_versions(*_EXPORT_TOOLS)])


def calibrate_key(exported: str, calibration: Calibration) -> str:
    """Digest of all that the ranges of activations depend on: the graph, the training images, the method."""
    settings = calibration.settings.model_dump(mode="json", exclude={"weight_bits"})
    return digest(["calibrate", exported, calibration.dataset_sha256, settings, tool_versions(*_CAST_TOOLS)])


def cast_key(exported: str, form: str, calibration: Calibration) -> str:
    """Digest of all that a cast ONNX file depends on; float32 is the exported file itself."""
    if form == "fp32":
        return exported
    quantized = [calibrate_key(exported, calibration), weight_bits(form, calibration)] if is_int8(form) else []
    return digest(["cast", exported, form, quantized, tool_versions(*_CAST_TOOLS)])


def is_int8(form: str) -> bool:
    """Whether a form needs calibration."""
    return form.startswith("int8")


def weight_bits(form: str, calibration: Calibration) -> int:
    """Bits of a weight; only CPUs have a reason to save one."""
    return calibration.settings.weight_bits if form == "int8-u8" else 8


def compile_key(model: str, target: Target, settings: ExportSettings) -> str:
    """Digest of all that an engine depends on: the model with its weights, shapes, tools, GPU and driver."""
    gpu = [] if target.backend == "trt-rtx" else gpu_fingerprint()
    tools = tool_versions(*_ENGINE_TOOLS[target.backend])
    return digest(["compile", model, str(target), settings.model_dump(mode="json"), tools, gpu])


def timing_key(target: Target) -> str:
    """Digest of what measured kernel times hold for: the builder's version, GPU and driver."""
    return digest(["timing", tool_versions(*_ENGINE_TOOLS[target.backend]), gpu_fingerprint()])


def stage_keys(
    trained: TrainedStudent, targets: Sequence[Target], config: BuildConfig, calibration: Calibration
) -> list[tuple[str, str]]:
    """(stage, key) of every result that a build of ``targets`` makes or takes from the workspace."""
    fused = fuse_key(trained)
    exported = export_key(fused, config.export)
    keys = [("fuse", fused), ("export", exported), ("calibrate", calibrate_key(exported, calibration))]
    for target in targets:
        model = cast_key(exported, target.form, calibration)
        if target.form != "fp32":
            keys.append(("cast", model))
        if target.needs_engine:
            keys.append(("compile", compile_key(model, target, config.export)))
    return keys


def fuse(workspace: Workspace, trained: TrainedStudent) -> FusedFiles:
    """Fold the trained student; raises ``CertificateError`` where the fold is not exact."""
    from kdexport.reparam.fuse import fuse_student

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
    from kdexport.graph.export import export_onnx
    from kdexport.reparam.fuse import fuse_student

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


def model_metadata(spec: StudentSpec, checkpoint_sha256: str) -> dict[str, object]:
    """What an ONNX file says about itself in metadata_props; digests and names, no place on this machine."""
    from kdexport import __version__

    recipe = spec.provenance.get("recipe")
    return {
        "version": __version__,
        "student": spec.student,
        "classes": list(spec.classes),
        "preprocessing": spec.preprocessing.to_json(),
        "provenance": {
            "checkpoint_sha256": checkpoint_sha256,
            "recipe_sha256": digest(recipe),
            "dataset_sha256": spec.provenance.get("dataset_sha256"),
            "teacher_sha256": spec.provenance.get("teacher_sha256"),
        },
    }


def calibrate(workspace: Workspace, model: OnnxModel, calibration: Calibration) -> Path:
    """The file with the range of each tensor of the float32 ``model`` on training images."""
    from kdexport.graph.calibration import calibrate as measure

    settings = calibration.settings

    def make(folder: Path) -> None:
        batches = calibration.batches()
        measure(model.path, batches, folder / RANGES, method=settings.method, percentile=settings.percentile)

    return workspace.produce("calibrate", calibrate_key(model.key, calibration), make) / RANGES


def cast(workspace: Workspace, model: OnnxModel, form: str, calibration: Calibration) -> OnnxModel:
    """The float32 ``model`` in ``form``; float32 is the model itself. int8 has its ranges beside it."""
    if form == model.form:
        return model
    from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
    from kdexport.graph.quantize import parse_form, quantize

    def make(folder: Path) -> None:
        if not is_int8(form):
            {"fp16": cast_to_fp16, "bf16": cast_to_bf16}[form](model.path, folder / MODEL)
            return
        ranges = calibrate(workspace, model, calibration)
        bits = weight_bits(form, calibration)
        quantize(model.path, ranges, folder / MODEL, form=parse_form(form), weight_bits=bits)
        shutil.copyfile(ranges, folder / RANGES)

    key = cast_key(model.key, form, calibration)
    return OnnxModel(path=workspace.produce("cast", key, make) / MODEL, form=form, key=key)


def compile_engine(
    workspace: Workspace, model: OnnxModel, target: Target, settings: ExportSettings, image_size: int
) -> EngineFile:
    """Build the engine of ``target`` and assert the precision of each of its kernels."""

    def make(folder: Path) -> None:
        request = EngineRequest(
            backend=target.backend,
            onnx=str(model.path),
            plan=str(folder / PLAN),
            shape=(3, image_size, image_size),
            batches=(settings.min_batch, settings.opt_batch, settings.max_batch),
            compute_capabilities=tuple(settings.compute_capabilities),
            workspace_mb=settings.workspace_mb,
            tf32=settings.tf32,
            timing_cache=str(workspace.root / "timing" / f"{timing_key(target)}.cache"),
        )
        engine = build_engine(request)
        require_precision(engine, target)
        table = {"version": engine.version, "layers": [asdict(layer) for layer in engine.layers]}
        (folder / LAYERS).write_text(json.dumps(table, indent=1))

    key = compile_key(model.key, target, settings)
    return EngineFile(folder=workspace.produce("compile", key, make), target=target, key=key)
