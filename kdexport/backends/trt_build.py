"""The child process that builds one engine: `python -m kdexport.backends.trt_build REQUEST`.

A crash of the native builder becomes an error message, and builds do not change each other's bytes.
"""

import contextlib
import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdexport.backends.trt_layers import EngineLayer, parse_inspector, parse_layer_table
from kdexport.core.console import print_json

MODULES = {"trt": "tensorrt", "trt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """An engine to build: the ONNX file, its batch sizes (min, opt, max) and the GPU generations that it must run on.

    With ``workspace_mb`` 0 the builder may use all memory of the GPU. ``timing_cache`` is a file shared by all builds
    with one GPU and TensorRT version; TensorRT-RTX has none.
    """

    backend: str
    onnx: str
    plan: str
    shape: tuple[int, int, int]
    batches: tuple[int, int, int]
    compute_capabilities: tuple[str, ...]
    workspace_mb: int = 0
    tf32: bool = False
    timing_cache: str = ""


def build(request: EngineRequest) -> dict[str, Any]:
    """Build and write the plan; return ``version`` and ``layers``, or the builder's errors under ``refused``."""
    trt = importlib.import_module(MODULES[request.backend])
    messages: list[tuple[str, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            messages.append((severity.name, text))

    builder = trt.Builder(Log())
    # Required by TensorRT 10, ignored by 11 and RTX, where every network is strongly typed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(request.onnx):
        faults = [parser.get_error(i) for i in range(parser.num_errors)]
        return {"refused": "; ".join(f"{fault.node_name()}: {fault.desc()}" for fault in faults)}
    if (network.num_inputs, network.num_outputs) != (1, 1):
        counts = f"{network.num_inputs} inputs and {network.num_outputs} outputs"
        return {"refused": f"the graph has {counts}, expected one of each"}
    interface = {network.get_input(0).name, network.get_output(0).name}
    config = _configure(trt, builder, network, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"refused": "; ".join(text for kind, text in messages if kind in ("ERROR", "INTERNAL_ERROR"))}
    Path(request.plan).write_bytes(bytes(plan))
    if request.backend == "trt":
        if request.timing_cache:
            _save_timing_cache(config, Path(request.timing_cache))
        layers = _inspect(trt, bytes(plan), request, interface)
    else:
        # Without a GPU an engine cannot be opened; its build log has the same table.
        layers = parse_layer_table([text for _, text in messages], interface)
    return {"version": trt.__version__, "layers": [asdict(layer) for layer in layers]}


def _configure(trt: Any, builder: Any, network: Any, request: EngineRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # On by default, and float32 would then run with 10 bits of mantissa.
    (config.set_flag if request.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if request.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb * 2**20)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *[(batch, *request.shape) for batch in request.batches])
    config.add_optimization_profile(profile)
    if request.backend == "trt-rtx" and request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, name in enumerate(request.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if request.backend == "trt" and request.timing_cache:
        config.set_timing_cache(config.create_timing_cache(_read(Path(request.timing_cache))), False)
    return config


def _read(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def _save_timing_cache(config: Any, path: Path) -> None:
    """Add the times of this build to the shared file, together with those that other builds added meanwhile."""
    from kdexport.core.files import exclusive, write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_suffix(".lock")):
        cache, others = config.get_timing_cache(), _read(path)
        if others:
            cache.combine(config.create_timing_cache(others), False)
        write_bytes(path, bytes(cache.serialize()))


def _inspect(trt: Any, plan: bytes, request: EngineRequest, interface: set[str]) -> list[EngineLayer]:
    """The layers that the finished engine reports, at the shape that it was optimised for."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    inspector = engine.create_engine_inspector()
    name = next(n for n in map(engine.get_tensor_name, range(engine.num_io_tensors)) if _is_input(trt, engine, n))
    # The inspector keeps no reference to the context, so this variable must. Without a shape a dynamic engine does not
    # report its types.
    context = engine.create_execution_context()
    context.set_input_shape(name, (request.batches[1], *request.shape))
    inspector.execution_context = context
    return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), interface)


def _is_input(trt: Any, engine: Any, name: str) -> bool:
    return bool(engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)


def _main() -> None:
    data = json.loads(sys.argv[1])
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    try:
        answer = build(EngineRequest(**data))
    # Native bindings raise RuntimeError, AttributeError and their own types; the parent quotes the message.
    except Exception as error:  # noqa: BLE001
        answer = {"refused": f"{type(error).__name__}: {error}"}
    print_json(answer)


if __name__ == "__main__":
    _main()
