"""The stages of a build up to the files of a target, each declared once: what its result depends on, and how."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.backends.base import ONNX_FILE as MODEL
from kdexport.backends.base import CompileRequest
from kdexport.backends.file_interface import PLAIN_INTERFACE, FileInterface
from kdexport.build.artifacts import EngineFile, FusedFiles, OnnxModel
from kdexport.bundle.layout import CALIBRATED, FUSED, RANGES
from kdexport.checkpoint import TrainedStudent, load_strictly, load_student, load_tensors, save_tensors
from kdexport.core.import_graph import modules_registering
from kdexport.data.calibration_images import Calibration
from kdexport.data.preprocessing import Preprocessing
from kdexport.errors import ExportError
from kdexport.graph.plan import PLAIN, LayerPlan
from kdexport.targets import Target
from kdexport.workspace import Making, Step, Workspace

if TYPE_CHECKING:
    # Values of settings are in the keys; the other tables of a configuration are nothing to a stage.
    from kdexport.config import ExportSettings

CERTIFICATE = "certificate.json"
UNFUSED_MODEL = "unfused.onnx"
#: What was cast, beside a file with another input.
_CAST = "cast.json"
_EXPORT_TOOLS = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy")
CAST_TOOLS = ("onnx", "onnx-ir", "ml_dtypes", "onnxruntime-gpu", "onnxruntime", "numpy")
#: Packages whose versions are in the manifest of a bundle, because its verification runs them or its report is theirs.
BUNDLE_TOOLS = (
    "torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "tensorrt_rtx_cu13",
    "tensorrt", "openvino", "ncnn", "pnnx", "executorch", "torchao", "ai-edge-litert", "coremltools",
    "polygraphy", "matplotlib", "jinja2",
)  # fmt: skip


def fuse(trained: TrainedStudent) -> Step[FusedFiles]:
    """The folded student; making it raises ``CertificateError`` if the fold is not exact."""

    def make(making: Making) -> None:
        from kdexport.reparam.fold_student import fuse_student

        result = fuse_student(load_student(trained))
        save_tensors(making.folder / FUSED, result.module.state_dict())
        (making.folder / CERTIFICATE).write_text(json.dumps(result.certificate.to_json(), indent=2))

    described = trained.spec.to_json()
    # Metrics of the training do not change what is exported.
    described["provenance"] = {name: v for name, v in described["provenance"].items() if name != "metrics"}
    return Step(
        stage="fuse",
        made_of=(trained.weights_sha256, trained.plugin_sha256, described),
        make=make,
        read=lambda folder: FusedFiles(weights=folder / FUSED, certificate=folder / CERTIFICATE),
        tools=("torch", "torchvision", "numpy"),
        modules=modules_registering(trained.spec.student, "kdexport.students"),
    )


def export(trained: TrainedStudent, fused: Step[FusedFiles], *, opset: int) -> Step[OnnxModel]:
    """The folded student as ONNX, and the unfused one for the comparison of latency."""

    def make(making: Making) -> None:
        from kdexport.graph.audit import audit_graph
        from kdexport.graph.export import export_onnx, model_metadata
        from kdexport.reparam.expected import structure_of
        from kdexport.reparam.fold_student import fuse_student

        folder, spec = making.folder, trained.spec
        weights_file = fused.result(making.workspace).weights
        unfused = load_student(trained)
        module = fuse_student(unfused).module
        load_strictly(module, load_tensors(weights_file), str(weights_file))
        metadata = model_metadata(spec, trained.weights_sha256)
        size = spec.image_size
        export_onnx(module, folder / MODEL, image_size=size, opset=opset, metadata=metadata)
        export_onnx(unfused, folder / UNFUSED_MODEL, image_size=size, opset=opset, metadata={})
        weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        found = audit_graph(folder / MODEL, weights, form="fp32", opset=opset, structure=structure_of(module))
        faults = [finding for finding in found if not finding.holds]
        if faults:
            raise ExportError(
                f"The exported graph differs from the folded student: {faults[0].check}: {faults[0].fact}.",
                remedy="Open an issue in kdexport's repository with this message, the student's name and the output of "
                "kdexport doctor, which has the versions of torch and onnxscript.",
            )

    return Step(
        stage="export",
        made_of=(fused, opset),
        make=make,
        read=lambda folder: OnnxModel(path=folder / MODEL, form="fp32"),
        tools=_EXPORT_TOOLS,
        modules=modules_registering(trained.spec.student, "kdexport.students"),
    )


def calibrate(model: Step[OnnxModel], calibration: Calibration, form: str) -> Step[Path]:
    """The file with the range of each tensor of the float32 ``model`` on training images, for the int8 ``form``."""

    def make(making: Making) -> None:
        write_ranges(model.result(making.workspace).path, calibration, form, making.folder / RANGES)

    settings = calibration.settings.model_dump(mode="json", exclude={"weight_bits"})
    # Other methods do not depend on the form.
    compared = [form, weight_bits(form, calibration)] if settings["method"] == "auto" else []
    return Step(
        stage="calibrate",
        made_of=(model, calibration.dataset_sha256, calibration.preprocessing.to_json(), settings, *compared),
        make=make,
        read=lambda folder: folder / RANGES,
        tools=(*CAST_TOOLS, "pillow"),
    )


def write_ranges(source: Path, calibration: Calibration, form: str, path: Path) -> None:
    """Write the ranges of the float32 file ``source`` to ``path``; beside it the method, if it had to be chosen."""
    from kdexport.graph.calibration_choice import choose_ranges
    from kdexport.graph.quantize import parse_form
    from kdexport.graph.tensor_ranges import calibrate as measure

    settings = calibration.settings
    if settings.method == "auto":
        bits = weight_bits(form, calibration)
        chosen = choose_ranges(source, calibration.batches, path, form=parse_form(form), weight_bits=bits)
        path.with_name(CALIBRATED).write_text(json.dumps(chosen.to_json(), indent=1))
    else:
        measure(source, calibration.batches(), path, method=settings.method, percentile=settings.percentile)


def copy_ranges(ranges: Path, folder: Path) -> None:
    """Copy what ``write_ranges`` wrote into ``folder``."""
    shutil.copyfile(ranges, folder / RANGES)
    if ranges.with_name(CALIBRATED).is_file():
        shutil.copyfile(ranges.with_name(CALIBRATED), folder / CALIBRATED)


def chosen_ranges(model: OnnxModel) -> str:
    """A line on the calibration of a file in int8 whose method had to be chosen; empty for any other."""
    path = model.path.with_name(CALIBRATED)
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())["divergence"]
    measured = sorted(found.items(), key=lambda item: float("inf") if item[1] is None else item[1])
    listed = ", ".join(f"{name} {'not finite' if value is None else f'{value:.3g}'}" for name, value in measured)
    return f"{model.form}: calibrated by {measured[0][0]}; mean divergence from float32 in nats: {listed}"


def equalise(model: Step[OnnxModel], plan: LayerPlan) -> Step[OnnxModel]:
    """The float32 ``model`` with the layers of ``plan`` scaled; it computes the same function, bit for bit."""
    if not plan.equalised:
        return model

    def make(making: Making) -> None:
        import onnx

        from kdexport.graph.equalise import apply_scalings

        given = onnx.load(str(model.result(making.workspace).path))
        onnx.save(apply_scalings(given, plan.equalised), str(making.folder / MODEL))

    return Step(
        stage="equalise",
        made_of=(model, plan.to_json()["equalised"]),
        make=make,
        read=lambda folder: OnnxModel(path=folder / MODEL, form="fp32"),
        tools=("onnx", "numpy"),
    )


def cast(model: Step[OnnxModel], form: str, calibration: Calibration, plan: LayerPlan = PLAIN) -> Step[OnnxModel]:
    """The float32 ``model`` in ``form`` by ``plan``; float32 is the model itself, int8 has its ranges in the folder."""
    if form == "fp32":
        return model
    return _cast_int8(model, form, calibration, plan) if is_int8(form) else _cast_float(model, form)


def _cast_float(model: Step[OnnxModel], form: str) -> Step[OnnxModel]:
    def make(making: Making) -> None:
        from kdexport.graph.precision import cast_to_bf16, cast_to_fp16

        path = model.result(making.workspace).path
        {"fp16": cast_to_fp16, "bf16": cast_to_bf16}[form](path, making.folder / MODEL)

    return Step(
        stage="cast",
        made_of=(model, form),
        make=make,
        read=lambda folder: OnnxModel(path=folder / MODEL, form=form),
        tools=CAST_TOOLS,
    )


def _cast_int8(model: Step[OnnxModel], form: str, calibration: Calibration, plan: LayerPlan) -> Step[OnnxModel]:
    def make(making: Making) -> None:
        ranges = write_int8(making.workspace, model, form, calibration, plan, making.folder / MODEL)
        copy_ranges(ranges, making.folder)

    source = equalise(model, plan)
    return Step(
        stage="cast",
        made_of=(source, calibrate(source, calibration, form), form, weight_bits(form, calibration), list(plan.nodes)),
        make=make,
        read=lambda folder: OnnxModel(path=folder / MODEL, form=form, plan=plan),
        tools=CAST_TOOLS,
    )


def with_interface(model: Step[OnnxModel], interface: FileInterface, preprocessing: Preprocessing) -> Step[OnnxModel]:
    """The cast ``model`` with ``interface``; the plain one is the model itself, int8 has its ranges in the folder."""
    if interface == PLAIN_INTERFACE:
        return model

    def make(making: Making) -> None:
        import onnx

        from kdexport.graph import interface as written

        given, path = model.result(making.workspace), making.folder / MODEL
        onnx.save(written.with_interface(onnx.load(str(given.path)), interface, preprocessing), str(path))
        if is_int8(given.form):
            copy_ranges(given.path.with_name(RANGES), making.folder)
        (making.folder / _CAST).write_text(json.dumps({"form": given.form, "plan": given.plan.to_json()}))

    def read(folder: Path) -> OnnxModel:
        cast = json.loads((folder / _CAST).read_text())
        return OnnxModel(path=folder / MODEL, form=cast["form"], plan=LayerPlan.from_json(cast["plan"]))

    return Step(
        stage="interface",
        made_of=(
            model,
            interface.takes,
            interface.gives,
            preprocessing.image_size,
            list(preprocessing.mean),
            list(preprocessing.std),
        ),
        make=make,
        read=read,
        tools=("onnx", "numpy"),
    )


def write_int8(
    workspace: Workspace, model: Step[OnnxModel], form: str, calibration: Calibration, plan: LayerPlan, path: Path
) -> Path:
    """Write the float32 ``model`` in the int8 ``form`` by ``plan`` to ``path``; return the file of its ranges."""
    from kdexport.graph.quantize import parse_form, quantize

    source = equalise(model, plan)
    ranges, bits = calibrate(source, calibration, form).result(workspace), weight_bits(form, calibration)
    given = source.result(workspace).path
    quantize(given, ranges, path, form=parse_form(form), weight_bits=bits, keep=plan.nodes)
    return ranges


def is_int8(form: str) -> bool:
    """Whether a form needs calibration."""
    return form.startswith("int8")


def weight_bits(form: str, calibration: Calibration) -> int:
    """Bits of a quantized weight; fewer than 8 help only on CPUs, where sums of products can saturate."""
    return calibration.settings.weight_bits if form == "int8-u8" else 8


def compile_engine(
    model: Step[OnnxModel], target: Target, settings: "ExportSettings", image_size: int
) -> Step[EngineFile]:
    """The engine of ``target``; the backend raises ``AuditError`` if a kernel runs in another precision."""

    def make(making: Making) -> None:
        given = model.result(making.workspace)
        target.runtime.compile(
            CompileRequest(
                onnx=given.path,
                folder=making.folder,
                precision=target.precision,
                image_size=image_size,
                batches=(settings.min_batch, settings.opt_batch, settings.max_batch),
                kept=tuple(given.plan.nodes),
                options=settings.model_dump(mode="json"),
                cache=making.workspace.root / "timing",
            )
        )

    runtime = [str(target), target.plugin_sha256, target.runtime.key_material(target.precision)]
    return Step(
        stage="compile",
        made_of=(model, runtime, image_size, settings.model_dump(mode="json")),
        make=make,
        read=lambda folder: EngineFile(folder=folder),
        modules=backend_modules(target),
    )


def backend_modules(target: Target) -> tuple[str, ...]:
    """The modules of kdexport that compile and run ``target``; a plugin has a digest instead."""
    return modules_registering(target.backend, "kdexport.backends")
