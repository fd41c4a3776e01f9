"""TensorRT 10 and 11 and TensorRT-RTX through their common builder API; the graph carries the precision.

Each engine is built (``trt_build``) and run in a child process.
"""

import importlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS, nvidia
from kdexport.backends.activation_products import activation_products
from kdexport.backends.base import (
    ONNX_FILE,
    TF32,
    Backend,
    Clock,
    CompileRequest,
    Device,
    Execution,
    Finding,
    Missing,
    Runner,
    run_in_batches,
    unchecked,
)  # fmt: skip
from kdexport.backends.cuda_libraries import runtime_path
from kdexport.backends.plan_content import built_from, weights_in_plan, whole
from kdexport.backends.trt_build import MODULES, EngineRequest
from kdexport.backends.trt_layers import Engine, EngineLayer, require_precision
from kdexport.core.child import ChildDiedError, ChildTimeoutError, call
from kdexport.core.console import print_json
from kdexport.core.digests import digest, sha256_bytes, sha256_file, tool_versions
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError

#: The compiled engine, as the builder wrote it, and the table of its layers.
PLAN = "model.plan"
LAYERS = "layers.json"
_TIMEOUT_S = 1800
_BUILD_HERE = (
    "Build the bundle again on this machine: an engine runs only on the GPU generation and with the TensorRT version "
    "that it was built for."
)


def build_engine(request: EngineRequest) -> Engine:
    """Build in a child process; raises ``EngineBuildError`` with the messages of the builder."""
    failure = f"{MODULES[request.backend]} did not build {Path(request.onnx).name}"
    remedy = (
        "If the builder does not support an operator in this precision, build another target. To build the ONNX file "
        f"with more output: trtexec --verbose --onnx={request.onnx}"
    )
    try:
        answer = _call("kdexport.backends.trt_build", [json.dumps(asdict(request))], failure)
    except ChildDiedError as error:
        raise EngineBuildError(
            f"{failure}: the builder ended with exit code {error.exit_code}: {error.stderr}", remedy=remedy
        ) from None
    if "refused" in answer:
        raise EngineBuildError(f"{failure}: {answer['refused']}", remedy=remedy)
    layers = tuple(EngineLayer.from_json(row) for row in answer["layers"])
    return Engine(plan=Path(request.plan), layers=layers, version=str(answer["version"]))


def run_engine(
    plan: Path, backend: str, images: NDArray[np.float32], batches: tuple[int, ...]
) -> tuple[NDArray[np.float32], Execution]:
    """Logits (N,K) of an engine on this machine's GPU, in batches of the given sizes in turn, and what ran it.

    The engine runs in a child process.
    """
    with scratch_folder("engine") as exchange:
        np.save(exchange / "images.npy", images)
        # Polygraphy chooses between TensorRT and TensorRT-RTX when it is imported.
        environment = {"POLYGRAPHY_USE_TENSORRT_RTX": str(int(MODULES[backend] != MODULES["trt"])), **runtime_path()}
        arguments = [str(plan), backend, str(exchange), json.dumps(batches)]
        try:
            facts = _call("kdexport.backends.trt", arguments, f"The engine {plan} gave no result", environment)
        except ChildDiedError as error:
            raise EngineBuildError(
                f"The engine {plan} cannot be run: {error.stderr}",
                remedy=_BUILD_HERE,
            ) from None
        logits: NDArray[np.float32] = np.load(exchange / "logits.npy")
    return logits, Execution(runtime=facts["runtime"], version=facts["version"], device=facts["device"])


def _call(module: str, arguments: list[str], failure: str, environment: dict[str, str] | None = None) -> Any:
    try:
        return call(module, arguments, timeout_s=_TIMEOUT_S, environment=environment)
    except ChildTimeoutError as error:
        raise EngineBuildError(
            f"{failure} within {error.seconds:g} s.",
            remedy="Name fewer GPU generations in compute_capabilities under [export], or use a faster machine.",
        ) from None


def _run(plan: str, backend: str, folder: str, batches: list[int]) -> None:
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    images = np.load(Path(folder) / "images.npy")
    with TrtRunner(EngineFromBytes(BytesFromPath(plan))) as runner:
        logits = run_in_batches(
            lambda chunk: np.array(runner.infer({"input": chunk})["logits"]), images, tuple(batches)
        )
    np.save(Path(folder) / "logits.npy", logits)
    module: Any = importlib.import_module(MODULES[backend])
    models = [line.removeprefix("Model:").strip() for line in nvidia.gpu_fingerprint()[1:]]
    facts = {"runtime": module.__name__, "version": str(module.__version__), "device": ", ".join(models) or "GPU"}
    print_json(facts)


def load_engine(folder: Path) -> Engine:
    """An engine and the layer table of its build, from a target's folder."""
    data: dict[str, Any] = json.loads((folder / LAYERS).read_text())
    layers = tuple(EngineLayer.from_json(row) for row in data["layers"])
    return Engine(plan=folder / PLAN, layers=layers, version=str(data["version"]))


def _products(path: Path, precision: str) -> tuple[str, ...]:
    """The products of activations in an int8 file, which are float32; every other precision has none."""
    if precision != "int8" or not path.is_file():
        return ()
    import onnx

    return activation_products(onnx.load(str(path), load_external_data=False))


def _plan_findings(folder: Path, engine: Engine) -> list[Finding]:
    """Whether the plan is whole, and is the one of the layer table and the ONNX file in ``folder``."""
    plan = engine.plan.read_bytes()
    length = whole(plan)
    if length.ran and not length.holds:
        return [length]
    table: dict[str, Any] = json.loads((folder / LAYERS).read_text())
    if "plan_sha256" not in table:
        return [length, unchecked("plan is that of its layers", f"not bound: {LAYERS} of an earlier version")]
    found = {"plan_sha256": sha256_bytes(plan), "onnx_sha256": sha256_file(folder / ONNX_FILE)}
    wrong = [
        f"{key} is {value[:12]}, and {str(table[key])[:12]} in {LAYERS}"
        for key, value in found.items()
        if table[key] != value
    ]
    fact = "; ".join(wrong) or f"digests of {PLAN} and {ONNX_FILE} as in {LAYERS}"
    nodes = frozenset(node for layer in engine.layers for node in layer.nodes)
    content = built_from(plan, folder / ONNX_FILE, [str(name) for name in table["weights_in_plan"]], nodes)
    return [length, Finding("plan is that of its layers", not wrong, fact), content]


class EngineRunner(Runner):
    """An engine; each call runs it in a child process."""

    starts_a_process = True

    def __init__(self, plan: Path, backend: str) -> None:
        self._plan, self._backend = plan, backend
        self._execution: Execution | None = None

    @property
    def execution(self) -> Execution:
        if self._execution is None:
            raise RuntimeError(f"{self._plan} has not run yet")
        return self._execution

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.run(images, (len(images),))

    def run(self, images: NDArray[np.float32], batches: tuple[int, ...]) -> NDArray[np.float32]:
        logits, self._execution = run_engine(self._plan, self._backend, images, batches)
        return logits


class _Engines(Backend):
    """The common part of TensorRT and TensorRT-RTX: the builder API, a plan, and the table of its layers."""

    artifact = PLAN

    def form(self, precision: str) -> str:
        return "int8-s8" if precision == "int8" else precision

    def computes_in(self, precision: str, options: dict[str, Any]) -> str:
        return TF32 if precision == "fp32" and options.get("tf32", False) else self.form(precision)

    def not_executable(self, precision: str) -> Missing | None:
        missing = self.unavailable(precision)
        if missing is None and not nvidia.gpu_fingerprint():
            return Missing("this machine has no NVIDIA GPU", "Verify the bundle on a machine with a GPU")
        return missing

    def device(self, precision: str) -> Device:
        return "gpu"

    def timing_key(self) -> str:
        """Digest of what measured kernel times depend on: the builder's version, GPU and driver."""
        return digest(["timing", tool_versions(*self.packages), nvidia.gpu_fingerprint()])

    def compile(self, request: CompileRequest) -> None:
        engine = build_engine(
            EngineRequest(
                backend=self.name,
                onnx=str(request.onnx),
                plan=str(request.folder / PLAN),
                shape=(3, request.image_size, request.image_size),
                batches=request.batches,
                compute_capabilities=tuple(request.options.get("compute_capabilities", ())),
                workspace_mb=request.options.get("workspace_mb", 0),
                tf32=request.options.get("tf32", False),
                timing_cache="" if request.cache is None else str(request.cache / f"{self.timing_key()}.cache"),
            )
        )
        products = _products(request.onnx, request.precision)
        require_precision(engine, f"{self.name}-{request.precision}", request.kept, products)
        plan = engine.plan.read_bytes()
        table = {
            "version": engine.version,
            "plan_sha256": sha256_bytes(plan),
            "onnx_sha256": sha256_file(request.onnx),
            "weights_in_plan": weights_in_plan(plan, request.onnx),
            "compute_capabilities": list(request.options.get("compute_capabilities", ())),
            "layers": [asdict(layer) for layer in engine.layers],
        }
        (request.folder / LAYERS).write_text(json.dumps(table, indent=1))

    def describe(self, folder: Path) -> dict[str, Any]:
        engine = load_engine(folder)
        kinds = Counter(layer.kind for layer in engine.layers)
        return {
            "version": engine.version,
            "kernels": sum(bool(layer.datatypes) for layer in engine.layers),
            "layers": dict(sorted(kinds.items())),
        }

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        try:
            engine = load_engine(folder)
            require_precision(engine, f"{self.name}-{precision}", kept, _products(folder / ONNX_FILE, precision))
        except AuditError as error:
            return [Finding("readable", False, error.message)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [Finding("readable", False, f"{LAYERS}: {type(error).__name__}: {error}")]
        checked = Finding(f"every kernel in {precision}", True, f"{len(engine.layers)} layers listed by the build")
        return [checked, *_plan_findings(folder, engine)]

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        return EngineRunner(path, self.name)

    def capture(self, path: Path, precision: str, given: Any, stream: Any) -> tuple[Callable[[], object], Any]:
        torch: Any = importlib.import_module("torch")
        trt: Any = importlib.import_module(MODULES[self.name])
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise EngineBuildError(
                f"TensorRT {trt.__version__} cannot open {path}.",
                remedy=_BUILD_HERE,
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        (source,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        (result,) = (name for name in names if name != source)
        accepted = context.set_input_shape(source, tuple(given.shape))
        output = torch.empty(tuple(context.get_tensor_shape(result)), dtype=torch.float32, device="cuda")
        context.set_tensor_address(source, given.data_ptr())
        context.set_tensor_address(result, output.data_ptr())
        # The first run of a shape allocates resources and cannot be captured.
        if not accepted or not context.execute_async_v3(stream.cuda_stream):
            raise EngineBuildError(
                f"{path} cannot run a batch of {len(given)}.",
                remedy="Pass a batch size between min_batch and max_batch of the build.",
            )
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = context.execute_async_v3(stream.cuda_stream)
        if not captured:
            raise EngineBuildError(
                f"TensorRT {trt.__version__} cannot run {path} in a captured CUDA graph.",
                remedy="Build the bundle again on this machine, or pass --clock host and a target for the CPU.",
            )

        def launch(_alive: tuple[Any, ...] = (runtime, engine, context, given)) -> None:
            # ``replay`` uses the current stream.
            with torch.cuda.stream(stream):
                graph.replay()

        return launch, output

    def served_elsewhere(self) -> str:
        return "Run kdexport triton to write a Triton model repository with the engine"


@BACKENDS.register("trt")
class TensorRT(_Engines):
    """TensorRT 10.13 to 11, on the GPU that the engine is built for."""

    name = "trt"
    description = "TensorRT, needs a GPU"
    title = "TensorRT"
    packages = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")

    def unavailable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("tensorrt") is None:
            return Missing(
                "TensorRT is not installed",
                "Install it from NVIDIA's package index (the packages tensorrt-cu13 or tensorrt, 10.13 to 11), or "
                "build for trt-rtx instead, which needs no GPU at build time",
            )
        if not nvidia.gpu_fingerprint():
            return Missing(
                "TensorRT builds engines on a GPU, and this machine has none", "Run on a machine with an NVIDIA GPU"
            )
        return None

    def key_material(self, precision: str) -> list[Any]:
        return [tool_versions(*self.packages), nvidia.gpu_fingerprint()]

    def finish(self, folder: Path, *, image_size: int, num_classes: int) -> None:
        from kdexport.backends.epcontext import SERVED, wrap_plan

        version = load_engine(folder).version
        reason = wrap_plan(folder, built_with=version, image_size=image_size, classes=num_classes)
        if reason:
            # The plan itself is right: trtexec, Polygraphy and Triton can open it.
            (folder / "served.txt").write_text(f"{SERVED} was not written. {reason}\n", encoding="utf-8")

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "host":
            return _NOT_ON_HOST
        if importlib.util.find_spec("tensorrt") is None:
            return Missing("TensorRT is not installed", "Install the TensorRT version that the engine was built with")
        return None

    def triton_platform(self, precision: str) -> str | Missing:
        return "tensorrt"


@BACKENDS.register("trt-rtx")
class TensorRTRTX(_Engines):
    """TensorRT-RTX: builds for many GPU generations without a GPU, and compiles its kernels while it runs."""

    name = "trt-rtx"
    description = "TensorRT-RTX, builds without a GPU"
    title = "TensorRT-RTX"
    packages = ("tensorrt_rtx_cu13",)

    def unavailable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return Missing("TensorRT-RTX is not installed", "Run pip install 'kdexport[trt-rtx]'")
        return None

    def not_executable(self, precision: str) -> Missing | None:
        missing = super().not_executable(precision)
        if missing is not None:
            return missing
        here = nvidia.compute_capabilities()
        if here and not any(map(_runs_rtx, here)):
            return Missing(
                "TensorRT-RTX runs on GPUs of compute capability 7.5, 8.0, 8.6, 8.9 and 12.0 or later; this machine "
                f"has {_listed(here)}",
                "Verify the bundle on a machine with such a GPU, or build a trt target for this one",
            )
        return None

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        built_for, here = _built_for(path.with_name(LAYERS)), nvidia.compute_capabilities()
        if built_for and here and not set(here) & set(built_for):
            raise BackendUnavailableError(
                f"The engine was built for GPUs of compute capability {_listed(built_for)}, and this machine has "
                f"{_listed(here)}.",
                remedy="Verify the bundle on such a machine, or add the GPU to compute_capabilities under [export].",
            )
        return super().open(path, precision, device=device, threads=threads, kept=kept)

    def key_material(self, precision: str) -> list[Any]:
        return [tool_versions(*self.packages), []]

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "host":
            return _NOT_ON_HOST
        # A captured graph may keep the slow kernels that run first.
        return Missing(
            "TensorRT-RTX compiles while it runs, so the time of a captured graph is not that of later runs",
            "Pass a trt or onnx target",
        )

    def triton_platform(self, precision: str) -> str | Missing:
        return Missing(
            "is a TensorRT-RTX plan, but Triton's TensorRT backend loads only plans of TensorRT",
            "Pass --target onnx-fp32, or build the bundle with a trt-... target on a machine with a GPU",
        )


def _runs_rtx(capability: tuple[int, int]) -> bool:
    """Whether TensorRT-RTX 1.7 has kernels for it: not for Hopper (9.0) and the data centre's Blackwell (10.x)."""
    return capability in ((7, 5), (8, 0), (8, 6), (8, 9)) or capability >= (12, 0)


def _built_for(layers: Path) -> list[tuple[int, int]]:
    """The compute capabilities that an engine was built for; empty if for all, or by an earlier version."""
    try:
        names = json.loads(layers.read_text()).get("compute_capabilities", ())
        return [(int(name[2:-1]), int(name[-1])) for name in names if name.startswith("SM")]
    # The audit reports a damaged table.
    except (OSError, ValueError, AttributeError):
        return []


def _listed(capabilities: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in capabilities)


_NOT_ON_HOST = Missing(
    "it is an engine, but the clock host times the CPU", "Pass --clock gpu on a machine with an NVIDIA GPU"
)


if __name__ == "__main__":
    _run(sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
