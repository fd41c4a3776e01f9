"""The servers that are measured, each with the same ONNX file and one onnxruntime session of one thread."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving_bench.bundles import Model
from serving_bench.payloads import (
    KDEXPORT,
    Payload,
    jpeg,
    multipart,
    oip_base64_jpeg,
    oip_json,
    tensor,
)
from serving_bench.process import Command

ROOT = Path(__file__).parents[2]
_PEERS = Path(__file__).parent / "peers"
#: The same for every server: no telemetry and no threads of numpy.
ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class Arm:
    """A server and its request for each kind of payload."""

    name: str
    command: Command
    payloads: dict[str, Callable[[], Payload]]


def kdexport_arm(model: Model, bundle: Path, source: Path, *, instances: int, options: tuple[str, ...] = ()) -> Arm:
    """``kdexport serve`` from the working tree ``source``."""
    # Any free port for the metrics, because several servers may run at the same time.
    arguments = (
        sys.executable, "-m", "kdexport", "serve", f"{model.name}={bundle}", "--port", "{port}", "--metrics-port", "0",
        "--instances", str(instances), *options,
    )  # fmt: skip
    # Packages that the caller added, such as simplejpeg, stay visible.
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(source), *filter(None, added)])}
    command = Command("kdexport", arguments, "/v2/health/ready", environment, source)
    kinds = {kind: _bound(make, model) for kind, make in KDEXPORT.items()}
    return Arm("kdexport" if instances == 1 else f"kdexport, {instances} instances", command, kinds)


def _bound(make: Callable[[str, int], Payload], model: Model) -> Callable[[], Payload]:
    return lambda: make(model.name, model.image_size)


def least_arm(model: Model, bundle: Path) -> Arm:
    """The least that answers the same bytes, without checks: what no server in Python can be faster than."""
    arguments = (sys.executable, str(_PEERS / "least_server.py"), str(bundle), "{port}")
    command = Command("least", arguments, "/", ENVIRONMENT, ROOT)
    return Arm("the least, without checks", command, {"FP32 binary": _bound(KDEXPORT["FP32 binary"], model)})


def litserve_arm(model: Model, bundle: Path, python: str, *, mode: str) -> Arm:
    """LitServe with one API; ``mode`` is ``tensor`` or ``image``. It takes raw data only as a multipart form."""
    data = tensor(model.image_size).tobytes() if mode == "tensor" else jpeg(model.image_size)
    kind = "FP32 binary" if mode == "tensor" else "JPEG"
    arguments = (python, str(_PEERS / "litserve_server.py"), str(bundle), mode, "{port}")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = Command(f"LitServe {mode}", arguments, "/health", environment, ROOT)
    return Arm("LitServe", command, {kind: lambda: multipart(kind, "/predict", data)})


def mlserver_arm(model: Model, bundle: Path, python: str, folder: Path) -> Arm:
    """MLServer with a custom runtime and without worker processes; it reads only JSON."""
    settings = {"http_port": "{port}", "grpc_port": 0, "metrics_port": 0, "parallel_workers": 0, "debug": False}
    parameters = {"uri": str(bundle), "version": "1"}
    runtime = {"name": model.name, "implementation": "mlserver_runtime.OnnxClassifier", "parameters": parameters}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-settings.json").write_text(json.dumps(runtime))
    arguments = (python, str(_PEERS / "mlserver_server.py"), str(folder), "{port}", json.dumps(settings))
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{_PEERS}"}
    command = Command("MLServer", arguments, f"/v2/models/{model.name}/ready", environment, folder)
    return Arm(
        "MLServer",
        command,
        {
            "FP32 binary": lambda: oip_json(model.name, model.image_size),
            "FP32 JSON": lambda: oip_json(model.name, model.image_size),
            "JPEG": lambda: oip_base64_jpeg(model.name, model.image_size),
        },
    )
