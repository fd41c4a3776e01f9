"""config.pbtxt through Triton's own protobuf message, so that no unknown or mistyped field can be written."""

from dataclasses import dataclass
from typing import Any, Literal

from kdexport.errors import BackendUnavailableError, OutputError, first_line

Device = Literal["cpu", "gpu"]

CONFIG, LABELS, WARMUP = "config.pbtxt", "labels.txt", "warmup"
#: Backend to the platform and the file name that Triton expects of it.
PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
_HEADER = """\
# Written by `kdexport triton` from a verified bundle; the same command rewrites it, so change its options instead.
# Fields at their default are not printed: the queue's timeout_action is REJECT.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How Triton runs a model: instances, batches, and how long a request may wait before it is rejected."""

    device: Device
    instances: int
    max_batch: int
    delay_us: int
    max_queue: int
    queue_timeout_us: int
    keep_versions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """The tensors of a classifier without the batch dimension: one (3,S,S) input, one (K,) output, both float32."""

    input_name: str
    input_dims: tuple[int, ...]
    output_name: str
    output_dims: tuple[int, ...]


def model_config(
    name: str,
    backend: str,
    interface: Interface,
    schedule: Schedule,
    *,
    warmup_file: str,
    parameters: dict[str, str],
) -> Any:
    """The ``inference.ModelConfig`` of a model. ``warmup_file`` lies in the model's folder ``warmup``."""
    messages = import_messages()
    platform, filename = PLATFORMS[backend]
    # A kind has to be said: with the default Triton chooses a GPU wherever it finds one.
    kind = {"cpu": messages.ModelInstanceGroup.KIND_CPU, "gpu": messages.ModelInstanceGroup.KIND_GPU}[schedule.device]
    return messages.ModelConfig(
        name=name,
        platform=platform,
        backend=backend,
        default_model_filename=filename,
        version_policy={"latest": {"num_versions": schedule.keep_versions}},
        max_batch_size=schedule.max_batch,
        input=[
            {"name": interface.input_name, "data_type": messages.TYPE_FP32, "dims": interface.input_dims},
        ],
        output=[
            {
                "name": interface.output_name,
                "data_type": messages.TYPE_FP32,
                "dims": interface.output_dims,
                "label_filename": LABELS,
            },
        ],
        dynamic_batching={
            "max_queue_delay_microseconds": schedule.delay_us,
            "default_queue_policy": {
                "timeout_action": messages.ModelQueuePolicy.REJECT,
                "default_timeout_microseconds": schedule.queue_timeout_us,
                "allow_timeout_override": True,
                "max_queue_size": schedule.max_queue,
            },
        },
        instance_group=[{"name": f"{name}_{schedule.device}", "kind": kind, "count": schedule.instances}],
        parameters={key: {"string_value": value} for key, value in sorted(parameters.items())},
        model_warmup=[_warmup(messages, interface, warmup_file, batch) for batch in sorted({1, schedule.max_batch})],
    )


def _warmup(messages: Any, interface: Interface, file: str, batch: int) -> Any:
    """One sample: Triton repeats the single image of ``file`` to fill the batch."""
    source = {"data_type": messages.TYPE_FP32, "dims": interface.input_dims, "input_data_file": file}
    return messages.ModelWarmup(
        name=f"golden image, batch {batch}", batch_size=batch, count=2, inputs={interface.input_name: source}
    )


def to_pbtxt(config: Any) -> str:
    """The text form of a ``ModelConfig``, with a comment on where it comes from."""
    from google.protobuf import text_format

    return _HEADER + str(text_format.MessageToString(config))


def from_pbtxt(text: str, source: str) -> Any:
    """Parse a config.pbtxt; raises ``OutputError`` for an unknown field, a wrong type or damaged text."""
    from google.protobuf import text_format

    messages = import_messages()
    try:
        return text_format.Parse(text, messages.ModelConfig())
    except text_format.ParseError as error:
        raise OutputError(
            f"{source} is not a Triton model configuration: {first_line(error)}.",
            remedy="Repair it, or pass another --name or --repository; nothing was changed.",
        ) from None


def import_messages() -> Any:
    """Triton's generated messages; raises ``BackendUnavailableError`` where they or their runtime are missing."""
    try:
        from tritonclient.grpc import model_config_pb2
    # tritonclient answers a missing grpc with RuntimeError; protobuf refuses generated code of another major version
    # with an exception of its own.
    except Exception as error:
        raise BackendUnavailableError(
            f"Triton's configuration messages cannot be imported: {first_line(error)}",
            remedy="pip install 'kdexport[triton]'",
        ) from error
    return model_config_pb2
