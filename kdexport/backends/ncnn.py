"""ncnn on the CPU, strictly: no float16 unless it was requested, and the type of every result read back.

pnnx converts the ONNX file. With its defaults ncnn rounds the weights of a float32 file to float16 and reports nothing,
so every option that chooses a type is set here. ncnn runs one image at a time.
"""

import functools
import importlib.util
import json
import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdexport.backends import BACKENDS
from kdexport.backends.base import (
    ONNX_FILE,
    Backend,
    Clock,
    CompileRequest,
    Device,
    Execution,
    Finding,
    Missing,
    Runner,
)
from kdexport.backends.ncnn_content import IN, OUT, content_findings, int8_scales, pair, storage_finding
from kdexport.backends.ncnn_files import GROUPED, WEIGHTED, Layer, in_half, in_int8, read_known, read_net, write_net
from kdexport.backends.weighted_nodes import WeightedNode, float32_graph, weighted_nodes
from kdexport.core.digests import tool_versions
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError

#: The layers of the network are beside it, in ``model.ncnn.param``.
MODEL = "model.ncnn.bin"
#: The ONNX node of each layer with weights, and the side of an image.
TABLE = "layers.json"
_INSTALL = "Run pip install 'kdexport[ncnn]'"
_CONVERT_TIMEOUT_S = 600
#: Bits of a value of each result, by the type that is requested.
_BITS = {"fp32": 32, "fp16": 16, "int8": 32}
_NO_HALF = (
    "ncnn multiplies float16 files in float32 on this CPU: it stores every result in 32 bits",
    "Copy the bundle to an ARM device with float16 and run kdexport verify there",
)


def import_ncnn() -> Any:
    """Import ncnn; raises ``BackendUnavailableError`` if it is not installed."""
    try:
        import ncnn
    except ImportError:
        raise BackendUnavailableError("ncnn is not installed.", remedy=f"{_INSTALL}.") from None
    return ncnn


def convert(request: CompileRequest) -> None:
    """Write the pair of files of the ONNX file of ``request``, and the table of its layers, into its folder."""
    import onnx

    graph = onnx.load(str(request.onnx))
    nodes = weighted_nodes(graph)
    target = request.folder / MODEL
    with scratch_folder("ncnn") as scratch:
        onnx.save(float32_graph(graph), str(scratch / ONNX_FILE))
        written = run_pnnx(scratch / ONNX_FILE, request.image_size)
        layers, unknown = read_known(written.with_suffix(".param"), written)
        if unknown is not None:
            raise _unsupported(unknown, layers, nodes)
        pairs = pair(layers, nodes)
        if request.precision == "fp16":
            layers = tuple(map(in_half, layers))
        if request.precision == "int8":
            layers = _quantized(layers, {node.name: node for node in nodes}, pairs)
        write_net(layers, target.with_suffix(".param"), target)
    table = {"versions": tool_versions("pnnx", "ncnn"), "image_size": request.image_size, "layers": pairs}
    (request.folder / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def run_pnnx(onnx_file: Path, image_size: int) -> Path:
    """Convert a float32 ONNX file in its own folder; returns the `.bin`, the `.param` is beside it.

    Raises ``EngineBuildError`` with the last lines of pnnx if it writes no file.
    """
    written = onnx_file.with_name(MODEL)
    command = [
        # Its own float16 differs from the nearest one for the smallest values, so ours is written afterwards.
        str(_pnnx()), onnx_file.name, f"inputshape=[1,3,{image_size},{image_size}]", "fp16=0",
        f"ncnnbin={written.name}", f"ncnnparam={written.with_suffix('.param').name}",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=onnx_file.parent, capture_output=True, text=True, errors="replace", check=False,
            timeout=_CONVERT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineBuildError(f"pnnx did not convert the graph: {error}.", remedy=_OTHER_TARGET) from error
    if done.returncode or not written.is_file():
        said = " ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise EngineBuildError(
            f"pnnx ended with exit code {done.returncode} and converted nothing: {said[-400:]}", remedy=_OTHER_TARGET
        )
    return written


_OTHER_TARGET = "Build another target for this network, for example onnx-fp32 or openvino-fp32."


def _pnnx() -> Path:
    """The program in the package pnnx; its import would import torch."""
    found = importlib.util.find_spec("pnnx")
    if found is None or found.origin is None:
        raise BackendUnavailableError("pnnx is not installed.", remedy=f"{_INSTALL}.")
    return Path(found.origin).with_name("pnnx")


def _unsupported(layer: Layer, before: Sequence[Layer], nodes: Sequence[WeightedNode]) -> EngineBuildError:
    """The error for a layer that ncnn cannot run or kdexport cannot check, with its place in the student."""
    place = "at the beginning of the network"
    made = {name: other for other in before for name in other.tops}
    waiting, seen = list(layer.bottoms), set[str]()
    while waiting:
        other = made.get(waiting.pop(0))
        if other is None or other.name in seen:
            continue
        seen.add(other.name)
        if other.kind in WEIGHTED:
            node = next((node for node in nodes if _has_weight(other, node)), None)
            place = f"behind {other.name}" if node is None else f"behind {node}"
            break
        waiting += other.bottoms
    runs = import_ncnn().layer_to_index(layer.kind) >= 0
    problem = "kdexport cannot check its files with it" if runs else "ncnn cannot run it"
    return EngineBuildError(
        f"The network has the operator {layer.kind} {place}, and {problem}.",
        remedy="Replace it in the student by operators that ncnn has (ncnn's list of supported operators), or build "
        "another target, for example onnx-fp32.",
    )


def _has_weight(layer: Layer, node: WeightedNode) -> bool:
    return np.array_equal(layer.tensors["weight"].astype(np.float32), node.weight.reshape(-1))


def _quantized(layers: Sequence[Layer], nodes: dict[str, WeightedNode], pairs: dict[str, str]) -> tuple[Layer, ...]:
    """The float32 ``layers`` with the levels and scales of the graph."""
    found = []
    for layer in layers:
        node = nodes.get(pairs.get(layer.name, ""))
        is_float = node is None or node.levels is None
        found.append(layer if node is None or is_float else _in_int8(layer, node))
    return tuple(found)


def _in_int8(layer: Layer, node: WeightedNode) -> Layer:
    assert node.levels is not None
    return in_int8(layer, node.levels, int8_scales(layer, node))


def read_table(folder: Path) -> tuple[dict[str, str], int]:
    """The ONNX node of each layer with weights, and the side of an image in pixels. Raises ``AuditError``."""
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return {str(name): str(node) for name, node in table["layers"].items()}, int(table["image_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            f"{TABLE}: {type(error).__name__}: {error}.", remedy="The file is damaged; build the bundle again."
        ) from error


@functools.cache
def stores_half() -> bool:
    """Whether ncnn keeps results in 16 bits on this CPU if float16 is requested, read from the result of a layer."""
    net = _configured("fp16", threads=1)
    net.load_param_mem("7767517\n2 2\nInput in0 0 1 in0\nReLU r 1 1 in0 out0\n")
    net.load_model_mem(b"")
    bits = _bits(net, np.ones((16, 4, 4), np.float32), [OUT])
    return bits[OUT] == _BITS["fp16"]


def _configured(precision: str, threads: int) -> Any:
    """A network without layers and with every option that chooses a type set for ``precision``."""
    net = import_ncnn().Net()
    half = precision == "fp16"
    options = net.opt
    # Products are added in float32 also where the CPU has float16: what rung C simulates.
    options.use_fp16_arithmetic = options.use_bf16_storage = options.use_bf16_packed = False
    options.use_fp16_packed = options.use_fp16_storage = half
    options.use_int8_inference = precision == "int8"
    options.use_vulkan_compute = False
    # ncnn gives the number of its threads to OpenMP itself, past OMP_NUM_THREADS, which containers and tests set: more
    # threads than free processors wait for each other in busy loops, 20 times longer than one thread computes.
    threads = threads or _threads_of_openmp()
    if threads:
        options.num_threads = threads
    return net


def _threads_of_openmp() -> int:
    """The number in OMP_NUM_THREADS; 0 if it is not set to one number."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else 0


def _bits(net: Any, image: NDArray[np.float32], names: Sequence[str]) -> dict[str, int]:
    """The bits of one value of each named result, as ncnn keeps it."""
    extractor = _started(net, image)
    # The second argument keeps the type and the packing that the layers use between each other.
    return {name: extractor.extract(name, 1)[1].elembits() for name in names}


def _started(net: Any, image: NDArray[np.float32]) -> Any:
    extractor = net.create_extractor()
    # Otherwise results that were read are overwritten.
    extractor.set_light_mode(False)
    _give(extractor, image)
    return extractor


def _give(extractor: Any, image: NDArray[np.float32]) -> None:
    # A Mat does not keep its array alive, and the copy has the padding between channels that ncnn's kernels expect.
    given = np.ascontiguousarray(image, np.float32)
    extractor.input(IN, import_ncnn().Mat(given).clone())


@dataclass(frozen=True, slots=True, eq=False)
class NcnnRunner(Runner):
    """A pair of files, opened by ncnn on the CPU."""

    net: Any
    layers: tuple[Layer, ...]
    #: The precision of the file, and that in which it runs.
    precision: str
    runs_in: str
    image_size: int
    #: The ONNX node of each layer with weights, and those that stay float32.
    pairs: dict[str, str]
    kept: tuple[str, ...] = ()

    @property
    def execution(self) -> Execution:
        bits = sorted(set(self._bits_of_results().values()))
        types = {f"results in {size} bits" for size in bits} | {layer.storage or "" for layer in self._weighted}
        version = str(import_ncnn().__version__)
        return Execution(runtime="ncnn", version=version, device="CPU", types=tuple(sorted(types)))

    @property
    def _weighted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind in WEIGHTED]

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([self._one(image) for image in images])

    def _one(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        extractor = self.net.create_extractor()
        _give(extractor, image)
        failed, found = extractor.extract(OUT)
        if failed:
            raise AuditError(
                f"ncnn ended a run with the code {failed}.", remedy="The file is damaged; build the bundle again."
            )
        return np.array(found, np.float32)

    def findings(self) -> list[Finding]:
        found = [self._results()]
        return [*found, self._integer_products()] if self.runs_in == "int8" else found

    def _probe(self) -> NDArray[np.float32]:
        size = self.image_size
        return np.random.default_rng(5).standard_normal((3, size, size), np.float32)

    def _bits_of_results(self) -> dict[str, int]:
        return _bits(self.net, self._probe(), [name for layer in self.layers for name in layer.tops])

    def _results(self) -> Finding:
        """Whether ncnn keeps every result in the type of the precision, and has no other one switched on."""
        names = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage", "use_bf16_packed")
        on = [name for name in names if getattr(self.net.opt, name)]
        allowed = ["use_fp16_packed", "use_fp16_storage"] if self.runs_in == "fp16" else []
        bits, wanted = self._bits_of_results(), _BITS[self.runs_in]
        wrong = [name for name, size in bits.items() if size != wanted]
        if self.runs_in == "fp16":
            # The logits and what one layer alone computes in float32 are no sign of another precision of the rest.
            wrong = wrong if len(wrong) > len(bits) // 2 else []
        fact = f"{len(bits)} results, {len(bits) - len(wrong)} of {wanted} bits; options: {', '.join(on) or 'float32'}"
        return Finding(f"results in {'float16' if wanted == 16 else 'float32'}", not wrong and on == allowed, fact)

    def _integer_products(self) -> Finding:
        """Whether each int8 layer added integers: its result without the bias is a whole number of products of levels.

        A layer that multiplied in float32 has fractions between, spread evenly. Only results that its activation passed
        unchanged are read.
        """
        extractor = _started(self.net, self._probe())
        checked, wrong = 0, []
        for layer in self._weighted:
            if self.pairs.get(layer.name) in self.kept:
                continue
            if "weight_scales" not in layer.tensors:
                wrong.append(f"{layer} ({self.pairs.get(layer.name)}) has no scales")
                continue
            fractions = _fractions(layer, np.array(extractor.extract(layer.tops[0])[1], np.float64))
            checked += bool(fractions.size)
            if fractions.size and float(np.mean(fractions > _FRACTION)) > _SHARE:
                wrong.append(f"{layer} ({self.pairs.get(layer.name)}) multiplied in float32")
        fact = f"{checked} of {len(self._weighted)} layers gave whole numbers of products of levels"
        return Finding("integer products", not wrong and checked > 0, wrong[0] if wrong else fact)


#: A result of integers is this near to a whole number in float32; one of fractions is not in four of five cases.
_FRACTION, _SHARE = 0.1, 0.02
#: Sums whose fraction can be read: float32 has 24 bits, and for grouped layers ncnn multiplies the integers by a
#: reciprocal with 12 bits.
_LARGEST_SUM = 2**19
_LARGEST_PRODUCT = {GROUPED: 2**8}


def _fractions(layer: Layer, result: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distances to whole numbers of a result (O,H,W) or (O) in units of products of levels, without the bias."""
    outputs = len(result)
    scales = layer.tensors["weight_scales"].astype(np.float64)
    step = np.repeat(scales, outputs // len(scales)) * float(layer.tensors["input_scale"][0])
    bias = layer.tensors.get("bias", np.zeros(outputs, np.float32)).astype(np.float64)
    flat = result.reshape(outputs, -1)
    passed = _passed(layer, flat)
    units = (flat - bias[:, None]) * step[:, None]
    # What float32 leaves of the sum of product and bias, and what the factor leaves of the product.
    exact = passed & ((np.abs(flat) + np.abs(bias[:, None])) * step[:, None] < _LARGEST_SUM)
    exact &= np.abs(units) < _LARGEST_PRODUCT.get(layer.kind, _LARGEST_SUM)
    return np.abs(units - np.rint(units))[exact]


def _passed(layer: Layer, result: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the activation of a layer returned its input."""
    kind = layer.number(9)
    if kind == 0:
        return np.ones_like(result, np.bool_)
    if kind == 1:
        return result > 0
    if kind == 3:
        low, high = map(float, layer.params[-23310].split(",")[1:3])
        return (result > low) & (result < high)
    return np.zeros_like(result, np.bool_)


@BACKENDS.register("ncnn")
class Ncnn(Backend):
    """ncnn on a CPU: phones and Linux boards. Files are converted by pnnx."""

    name = "ncnn"
    description = "ncnn on a CPU, for phones and boards"
    title = "ncnn"
    precisions = ("fp32", "fp16", "int8")
    artifact = MODEL
    packages = ("ncnn", "pnnx")
    one_at_a_time: ClassVar[bool] = True
    repeats_files: ClassVar[bool] = True

    def form(self, precision: str) -> str:
        # ncnn's levels are symmetric, for activations too.
        return "int8-s8" if precision == "int8" else precision

    def unavailable(self, precision: str) -> Missing | None:
        for name in ("ncnn", "pnnx"):
            if importlib.util.find_spec(name) is None:
                return Missing(f"{name} is not installed", _INSTALL)
        return None

    def not_executable(self, precision: str) -> Missing | None:
        if importlib.util.find_spec("ncnn") is None:
            return Missing("ncnn is not installed", _INSTALL)
        return Missing(*_NO_HALF) if precision == "fp16" and not stores_half() else None

    def compile(self, request: CompileRequest) -> None:
        convert(request)

    def describe(self, folder: Path) -> dict[str, Any]:
        layers = read_net((folder / MODEL).with_suffix(".param"), folder / MODEL)
        return {
            "version": tool_versions("ncnn")["ncnn"],
            "kernels": sum(layer.kind in WEIGHTED for layer in layers),
            "layers": dict(sorted(Counter(layer.kind for layer in layers).items())),
        }

    def audit(self, folder: Path, precision: str, kept: Sequence[str]) -> list[Finding]:
        try:
            pairs, _ = read_table(folder)
            found = content_findings(folder, MODEL, pairs)
            if found[0].check == "readable":
                return found
            layers = read_net((folder / MODEL).with_suffix(".param"), folder / MODEL)
        except AuditError as error:
            return [Finding("readable", False, error.message)]
        return [*found, storage_finding(layers, pairs, precision, kept)]

    def open(
        self,
        path: Path,
        precision: str,
        *,
        device: Device | None = None,
        threads: int = 0,
        kept: Sequence[str] = (),
    ) -> Runner:
        if precision == "fp16" and not stores_half():
            raise BackendUnavailableError(f"{_NO_HALF[0]}.", remedy=f"{_NO_HALF[1]}.")
        return _opened(path, precision, precision, threads, kept)

    def stand_in(self, precision: str) -> str | None:
        return "fp32" if precision == "fp16" else None

    def open_stand_in(self, path: Path, precision: str, *, kept: Sequence[str] = ()) -> Runner:
        return _opened(path, precision, "fp32", 0, kept)

    def not_timed_on(self, precision: str, clock: Clock) -> Missing | None:
        if clock == "gpu":
            return Missing("ncnn targets run on the CPU", "Pass --clock host")
        return self.not_executable(precision)

    def served_elsewhere(self) -> str:
        return "Load its files in your application with ncnn (docs/edge.md), or serve onnx-fp32"


def _opened(path: Path, precision: str, runs_in: str, threads: int, kept: Sequence[str]) -> NcnnRunner:
    param = path.with_suffix(".param")
    # ncnn crashes on a damaged file, so it is read here first.
    layers = read_net(param, path)
    pairs, image_size = read_table(path.parent)
    net = _configured(runs_in, threads)
    if net.load_param(str(param)) or net.load_model(str(path)):
        raise AuditError(
            f"ncnn cannot open {path.name}.", remedy="The file is damaged or of another version; build it again."
        )
    return NcnnRunner(net, layers, precision, runs_in, image_size, pairs, tuple(kept))
