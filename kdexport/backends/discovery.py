"""Which backends there are, and what each can do on this machine."""

from kdexport.backends.openvino import _openvino_lacks
from kdexport.backends.ort import _onnx_lacks
from kdexport.backends.trt import _rtx_lacks, _trt_lacks
from kdexport.errors import BackendUnavailableError
from kdexport.targets import Target


def can_execute(target: Target) -> bool:
    """Whether an engine of ``target`` can run on this machine."""
    from kdexport.targets import gpu_fingerprint

    return unavailable(target) is None and bool(gpu_fingerprint())


def unavailable(target: Target) -> tuple[str, str] | None:
    """(what is missing, what to do) where ``target`` cannot be built on this machine, else None."""
    return {"onnx": _onnx_lacks, "openvino": _openvino_lacks, "trt": _trt_lacks, "trt-rtx": _rtx_lacks}[target.backend](
        target
    )


def require_available(targets: tuple[Target, ...]) -> None:
    """Raise ``BackendUnavailableError`` for the first target that this machine cannot build."""
    for target in targets:
        missing = unavailable(target)
        if missing is not None:
            raise BackendUnavailableError(f"Target {target} cannot be built: {missing[0]}.", remedy=f"{missing[1]}.")
