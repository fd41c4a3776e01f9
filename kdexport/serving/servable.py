"""Which targets of a bundle the server runs, and the providers on which each is what it says."""

from kdexport.backends.ort import CPU, CUDA, TENSORRT
from kdexport.bundle import MODEL, TARGETS, VERIFIED, Manifest
from kdexport.errors import BackendUnavailableError, BundleError
from kdexport.targets import parse_target

DEFAULT_TARGET = "onnx-fp32"
#: A float16 graph on a CPU would be computed in float32, and an int8 one on CUDA in float32 between casts.
_PROVIDERS = {DEFAULT_TARGET: (CPU, CUDA, TENSORRT), "onnx-fp16": (CUDA,), "onnx-int8": (CPU,)}


def require_servable(target: str, provider: str) -> None:
    """Raise ``BackendUnavailableError`` where ``target`` would run as something else, or not at all."""
    wanted = parse_target(target)
    providers = _PROVIDERS.get(target, ())
    if provider in providers:
        return
    if providers:
        raise BackendUnavailableError(
            f"{provider} does not run {target} as what it says.", remedy=f"Serve it on {' or '.join(providers)}."
        )
    elsewhere = (
        "`kdexport triton` writes a model repository with an engine"
        if wanted.needs_engine
        else "OpenVINO's own model server takes its file"
        if wanted.backend == "openvino"
        else "Serve another target"
    )
    raise BackendUnavailableError(
        f"The server runs {', '.join(_PROVIDERS)} by onnxruntime, not {target}.", remedy=f"{elsewhere}."
    )


def servable_on(provider: str) -> tuple[str, ...]:
    """Targets that the server runs on ``provider``."""
    return tuple(target for target, providers in _PROVIDERS.items() if provider in providers)


def served_file(manifest: Manifest, target: str) -> str:
    """The file of ``target`` in its bundle; raises ``BundleError`` where it was not built or not verified."""
    if target == DEFAULT_TARGET:
        return MODEL
    entry = manifest.targets.get(target)
    if entry is None or entry["status"] != VERIFIED:
        state = "was not built" if entry is None else f"is {entry['status']!r}, not verified"
        raise BundleError(
            f"{target} {state}; the bundle has {', '.join(sorted(manifest.targets)) or 'no target'}.",
            remedy=f"Build it with --target {target}.",
        )
    return f"{TARGETS}/{target}/{MODEL}"
