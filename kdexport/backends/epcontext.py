"""A TensorRT plan in onnxruntime: a model with one node, which passes the plan to the TensorRT provider."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from kdexport.backends.base import BATCH, INPUT, LOGITS
from kdexport.errors import AuditError, BackendUnavailableError, BundleError

if TYPE_CHECKING:
    import onnx

#: A TensorRT plan as a model that onnxruntime opens.
SERVED = "served.onnx"

_PLAN = "model.plan"
_SOURCES = {"trt": "TensorrtExecutionProvider", "trt-rtx": "NvTensorRTRTXExecutionProvider"}

_DOMAIN = "com.microsoft"


def write_context(
    plan: Path, path: Path, *, backend: str, image_size: int, classes: int, built_with: str
) -> "onnx.ModelProto":
    """Write the model ``path`` that runs ``plan``: input (batch,3,S,S) to logits (batch,K), both float32.

    The plan remains a separate file, named relative to ``path``. ``built_with`` is the TensorRT version that it needs.
    """
    import onnx
    from onnx import TensorProto, helper

    if plan.parent != path.parent:
        raise BundleError(
            f"{plan} and {path} are in different folders.",
            remedy="Pass a path in the folder of the plan: onnxruntime reads a plan only from the folder of its model.",
        )
    node = helper.make_node(
        "EPContext",
        [INPUT],
        [LOGITS],
        "plan",
        domain=_DOMAIN,
        main_context=1,
        embed_mode=0,
        ep_cache_context=plan.name,
        ep_sdk_version=built_with,
        source=_SOURCES[backend],
    )
    shapes: dict[str, list[str | int | None]] = {INPUT: [BATCH, 3, image_size, image_size], LOGITS: [BATCH, classes]}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([node], "student", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="kdexport")
    onnx.save(model, str(path))
    return model


def provider_tensorrt_major() -> int | None:
    """The major version of TensorRT that onnxruntime's provider is linked with; None if it has no such provider."""
    from kdexport.backends.ort import import_onnxruntime

    library = Path(import_onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not library.is_file():
        return None
    found = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
    return None if found is None else int(found[1])


def require_servable(built_with: str, provider_major: int | None) -> None:
    """Raise if onnxruntime's provider cannot open a plan of TensorRT ``built_with`` (such as 10.16.1.11).

    The provider opens only plans of the TensorRT version that it loads, whose major version it was linked with.
    ``BackendUnavailableError`` if there is no provider, ``AuditError`` for another major version.
    """
    if provider_major is None:
        raise BackendUnavailableError(
            "This onnxruntime has no TensorRT provider.",
            remedy="Run pip install onnxruntime-gpu, or serve the ONNX file with kdexport serve BUNDLE.",
        )
    major = int(built_with.partition(".")[0])
    if major != provider_major:
        raise AuditError(
            f"The plan was built with TensorRT {built_with}, but onnxruntime's provider loads TensorRT "
            f"{provider_major}, and a plan opens only in the version that built it.",
            remedy=f"Build with TensorRT {provider_major} to serve behind onnxruntime, or serve the plan with Triton's "
            f"TensorRT {major} backend.",
        )


def wrap_plan(folder: Path, *, built_with: str, image_size: int, classes: int) -> str:
    """Write ``served.onnx`` for the TensorRT plan in ``folder``; return why not if onnxruntime could not open it."""
    try:
        require_servable(built_with, provider_tensorrt_major())
    except (AuditError, BackendUnavailableError) as error:
        return error.message
    write_context(
        folder / _PLAN, folder / SERVED, backend="trt", image_size=image_size, classes=classes, built_with=built_with
    )
    return ""
