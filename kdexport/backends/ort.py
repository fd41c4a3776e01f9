"""onnxruntime, strictly: the requested provider runs every node, and telemetry is off."""

import functools
import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS, nvidia
from kdexport.backends.activation_products import activation_products
from kdexport.backends.base import INPUT, LOGITS, Backend, Clock, Device, Execution, Finding, Missing, Runner
from kdexport.backends.cuda_libraries import missing_library, preload_libraries
from kdexport.backends.pixel_input import Given, PixelInput, pixel_input
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError, BackendUnavailableError, first_line

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

#: What to type where onnxruntime lacks a library of a GPU provider.
INSTALL_LIBRARIES = (
    "Run pip install 'kdexport[gpu]', or install the CUDA and cuDNN that this onnxruntime was built for, and "
    "the driver of the GPU."
)
#: With TF32, which keeps 10 bits of the mantissa, a float32 graph would not run in float32.
_OPTIONS = {CUDA: {"use_tf32": "0"}}

#: Operators of optimised graphs that multiply by weights, in integers and in float32.
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat")
_FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def import_onnxruntime() -> Any:
    """Import onnxruntime with telemetry off; recent wheels collect usage events unless it is off before the import."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


@dataclass(frozen=True, slots=True, eq=False)
class OrtModel:
    """A loaded model that runs on one provider, and the number of its nodes on each."""

    session: Any
    nodes_by_provider: dict[str, int]
    #: The pixels that the file takes; None if it takes normalised images.
    takes: PixelInput | None = None
    #: The output that holds the logits, and the input; looked up once, because timed runs call ``logits``.
    logits_name: str = LOGITS
    input_name: str = ""

    def logits(self, images: Given) -> NDArray[np.float32]:
        """(N,3,S,S) float32, or pixels in the layout of a file that takes them, to logits (N,K)."""
        return self.outputs(images, [self.logits_name])[0]

    def outputs(self, images: Given, names: Sequence[str]) -> list[NDArray[np.float32]]:
        """The named outputs for the same ``images`` as ``logits`` takes."""
        given = images if self.takes is None else self.takes.given(images)
        name = self.input_name or self.session.get_inputs()[0].name
        return list(map(np.asarray, self.session.run(names, {name: given})))


def _logits_of(session: Any) -> str:
    """The output that holds the logits: the one of that name, or the first."""
    names = [item.name for item in session.get_outputs()]
    return LOGITS if LOGITS in names else str(names[0])


def tensorrt_profile(shape: Sequence[int], batches: tuple[int, int]) -> dict[str, str]:
    """Options of the TensorRT provider: one engine for all ``batches``, least to most, of images of ``shape``.

    Without them the provider builds an engine at the first request with each larger batch, while that request waits.
    """
    least, most = ("x".join(map(str, (batch, *shape))) for batch in batches)
    names = {"min": least, "opt": least, "max": most}
    return {f"trt_profile_{name}_shapes": f"{INPUT}:{size}" for name, size in names.items()}


def load_model(
    path: Path,
    *,
    provider: str = CPU,
    threads: int = 0,
    optimise: bool = True,
    content: bytes | None = None,
    provider_options: Mapping[str, str] = MappingProxyType({}),
) -> OrtModel:
    """Open an ONNX file on exactly ``provider``; with ``threads`` 0 onnxruntime chooses their number.

    ``content`` are the bytes of the file if it was already read and checked; it is then not read a second time.
    ``provider_options`` are added to those that prevent TF32.

    Raises ``BackendUnavailableError`` if onnxruntime would fall back to another provider, and ``AuditError`` if the
    file is not a valid model.
    """
    ort = import_onnxruntime()
    if provider not in ort.get_available_providers():
        raise BackendUnavailableError(
            f"onnxruntime has no {provider} on this machine, only {', '.join(ort.get_available_providers())}.",
            remedy="Install onnxruntime-gpu with its CUDA libraries, or choose another provider.",
        )
    options = _session_options(ort, threads, optimise)
    if provider == TENSORRT:
        # The provider has no option for it, and by default TensorRT computes float32 in TF32.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    preload_libraries(provider, ort)
    try:
        source = str(path) if content is None else content
        chosen = {**_OPTIONS.get(provider, {}), **provider_options}
        session = ort.InferenceSession(source, options, providers=[(provider, chosen)])
    # onnxruntime raises a dozen exception types without a common base.
    except Exception as error:
        raise AuditError(
            f"onnxruntime cannot open {path.name}: {first_line(error)}",
            remedy="The file is damaged or not an ONNX model; build the bundle again.",
        ) from error
    session.disable_fallback()
    if session.get_providers()[0] != provider:
        library = missing_library(provider, ort)
        reason = f": {library} is missing" if library else ""
        raise BackendUnavailableError(
            f"{provider} was requested, but onnxruntime runs {session.get_providers()[0]}{reason}.",
            remedy=INSTALL_LIBRARIES,
        )
    if not session.get_inputs() or not session.get_outputs():
        raise AuditError(
            f"{path.name} has {len(session.get_inputs())} inputs and {len(session.get_outputs())} outputs.",
            remedy="The file is damaged or no classifier; build the bundle again.",
        )
    counts: Counter[str] = Counter()
    for graph in session.get_provider_graph_assignment_info():
        counts[graph.ep_name] += len(graph.get_nodes())
    name = str(session.get_inputs()[0].name)
    return OrtModel(session, dict(counts), _pixels_taken(session, path), _logits_of(session), name)


def _pixels_taken(session: Any, path: Path) -> PixelInput | None:
    found = pixel_input(session.get_modelmeta().custom_metadata_map)
    kinds = [item.type for item in session.get_inputs()]
    if (found is not None) != (kinds == ["tensor(uint8)"]):
        raise AuditError(
            f"The input of {path.name} is {', '.join(kinds)}, and its metadata say "
            f"{'float32' if found is None else found.kind}.",
            remedy="The file is damaged; build the bundle again.",
        )
    return found


def _session_options(ort: Any, threads: int, optimise: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # A worker thread that spins between runs occupies a core that the other arm of a comparison needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    _choose_int8_kernels(options)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _choose_int8_kernels(options: Any) -> None:
    """Choose kernels that do not saturate.

    Without VNNI the fast kernels add pairs of products in 16 bits. With VNNI they are exact, and with 8-bit weights
    twice as fast as the kernels that the option chooses.
    """
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")


@functools.cache
def has_vnni(path: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor reports VNNI, which adds int8 products in 32 bits; False if it reports nothing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx512_vnni" in flags or "avx_vnni" in flags


def optimised_operators(path: Path) -> dict[str, int]:
    """The operators of the optimised graph that onnxruntime's CPU provider runs for an ONNX file, by type."""
    import onnx

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    _choose_int8_kernels(options)
    # A warning says that the optimised file fits only this processor; it is read and deleted here.
    options.log_severity_level = 4
    with scratch_folder("optimised") as folder:
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=[CPU])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def integer_kernels(path: Path, kept: int) -> Finding:
    """Whether onnxruntime runs every layer with weights of an int8 file, except the ``kept``, in integers.

    Products of two activations stay float32.
    """
    import onnx

    nodes = onnx.load(str(path), load_external_data=False)
    counts, given = optimised_operators(path), Counter(node.op_type for node in nodes.graph.node)
    products = len(activation_products(nodes))
    layers = sum(given[kind] for kind in ("Conv", "Gemm", "MatMul")) - products
    real = {kind: counts.get(kind, 0) for kind in _INTEGER}
    left = {kind: counts.get(kind, 0) for kind in _FLOAT}
    moves = {kind: counts.get(kind, 0) for kind in ("QuantizeLinear", "DequantizeLinear", "Transpose")}
    facts = ", ".join(f"{count} {kind}" for kind, count in (real | left | moves).items() if count)
    facts += f"; {products} products of activations in float32" if products else ""
    # onnxruntime writes a batch norm that nothing absorbed as a convolution.
    extra = sum(left.values()) - kept - products
    whole = sum(real.values()) == layers - kept and 0 <= extra <= given["BatchNormalization"]
    return Finding("integer kernels", whole and layers > kept, facts)


@dataclass(frozen=True, slots=True, eq=False)
class OrtRunner(Runner):
    """A target on one provider of onnxruntime."""

    model: OrtModel
    path: Path
    provider: str

    @property
    def execution(self) -> Execution:
        return execution_of(self.model, self.provider)

    @property
    def takes(self) -> PixelInput | None:
        return self.model.takes

    def logits(self, images: Given) -> NDArray[np.float32]:
        return self.model.logits(images)

    def outputs(self, images: Given, names: Sequence[str]) -> list[NDArray[np.float32]]:
        return self.model.outputs(images, names)

    def findings(self) -> list[Finding]:
        return [provider_finding(self.model, self.provider)]


def execution_of(model: OrtModel, provider: str) -> Execution:
    """What ran ``model``: the providers to which onnxruntime assigned its nodes."""
    devices = " and ".join(sorted(model.nodes_by_provider)) or provider
    return Execution(runtime="onnxruntime", version=str(import_onnxruntime().__version__), device=devices)


def provider_finding(model: OrtModel, provider: str) -> Finding:
    """Whether every node runs on ``provider``."""
    elsewhere = {key: count for key, count in model.nodes_by_provider.items() if key != provider}
    fact = ", ".join(f"{count} nodes on {key}" for key, count in model.nodes_by_provider.items())
    return Finding("provider of each node", not elsewhere, fact)


@BACKENDS.register("onnx")
class OnnxRuntime(Backend):
    """onnxruntime: the CPU provider for float32 and int8, CUDA for float16."""

    name = "onnx"
    description = "onnxruntime"
    title = "onnxruntime"
    packages = ("onnxruntime-gpu", "onnxruntime")
    any_interface = True

    def unavailable(self, precision: str) -> Missing | None:
        if precision == "bf16":
            return Missing(
                "onnxruntime has no bfloat16 convolution",
                "Build openvino-bf16 for a CPU with AMX or AVX512-BF16, or trt-rtx-bf16 for a GPU",
            )
        if precision == "fp16" and not nvidia.gpu_fingerprint():
            return Missing(
                "onnxruntime computes a float16 graph in float32 on a CPU, and this machine has no GPU",
                "Build onnx-fp32 or onnx-int8 for a CPU",
            )
        return None

    def not_executable(self, precision: str) -> Missing | None:
        missing = self.unavailable(precision)
        return missing if missing is not None or self.device(precision) == "cpu" else _cuda_missing()

    def runs_as_reference(self, precision: str) -> bool:
        return self.device(precision) == "cpu"

    def device(self, precision: str) -> Device:
        return "gpu" if precision == "fp16" else "cpu"

    def repeats_bits(self, precision: str) -> bool:
        return self.device(precision) == "cpu"

    def open(
        self, path: Path, precision: str, *, device: Device | None = None, threads: int = 0, kept: Sequence[str] = ()
    ) -> Runner:
        provider = CUDA if (device or self.device(precision)) == "gpu" else CPU
        return OrtRunner(load_model(path, provider=provider, threads=threads), path, provider)

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            if precision in ("int8", "bf16"):
                return Missing(f"{CUDA} has no {precision} convolution", "Pass onnx-fp32, onnx-fp16, or a trt target")
            return _cuda_missing()
        if precision == "fp16":
            return Missing(
                "onnxruntime computes a float16 graph in float32 on a CPU", "Pass --clock gpu, or another --target"
            )
        return self.unavailable(precision)

    def capture(self, path: Path, precision: str, given: Any, stream: Any) -> tuple[Callable[[], object], Any]:
        torch: Any = importlib.import_module("torch")
        chosen = {"enable_cuda_graph": "1", "user_compute_stream": str(stream.cuda_stream)}
        model = load_model(path, provider=CUDA, provider_options=chosen)
        placed = provider_finding(model, CUDA)
        if not placed.holds:
            raise BackendUnavailableError(
                f"{path} does not run entirely on the GPU: {placed.fact}.",
                remedy="Pass --clock host, or another --target.",
            )
        if model.takes is not None:
            raise BackendUnavailableError(
                f"{path} takes pixels, which the clock gpu does not support.",
                remedy="Pass --clock host, or another --target.",
            )
        (source,), name = model.session.get_inputs(), model.logits_name
        result = next(item for item in model.session.get_outputs() if item.name == name)
        output = torch.empty((len(given), int(result.shape[-1])), dtype=torch.float32, device="cuda")
        binding = model.session.io_binding()
        binding.bind_input(source.name, "cuda", 0, np.float32, tuple(given.shape), given.data_ptr())
        binding.bind_output(result.name, "cuda", 0, np.float32, tuple(output.shape), output.data_ptr())
        options = import_onnxruntime().RunOptions()
        # Otherwise each run waits for its end, and the event behind it is recorded only after the host woke up.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # Each replay reads ``given``, so the closure keeps it alive.
        return lambda _alive=given: model.session.run_with_iobinding(binding, options), output

    def providers(self, precision: str) -> tuple[str, ...]:
        # A CPU computes a float16 graph in float32, and CUDA an int8 graph in float32 between casts.
        return {"fp32": (CPU, CUDA, TENSORRT), "fp16": (CUDA,), "int8": (CPU,)}.get(precision, ())

    def triton_platform(self, precision: str) -> str | Missing:
        return "onnxruntime"


def _cuda_missing() -> Missing | None:
    if CUDA in import_onnxruntime().get_available_providers():
        return None
    return Missing(f"onnxruntime has no {CUDA} on this machine", "Install onnxruntime-gpu with its CUDA libraries")
