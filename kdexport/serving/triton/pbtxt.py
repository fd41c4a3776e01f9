"""Write and read config.pbtxt through Triton's own protobuf message, so that every field has a valid name and type."""

from dataclasses import dataclass
from typing import Any, Literal

from kdexport.errors import BackendUnavailableError, OutputError, first_line

Device = Literal["cpu", "gpu"]

CONFIG, LABELS, WARMUP = "config.pbtxt", "labels.txt", "warmup"
#: The platform and the file name that Triton expects for each backend.
PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
_HEADER = """\
# Written by `kdexport triton` from a verified bundle; the same command rewrites it, so change its options instead.
# Fields with their default value are not printed, e.g. the queue's timeout_action REJECT.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How Triton runs a model: instances, batches, and the longest wait of a request before it is rejected."""

    device: Device
    instances: int
    max_batch: int
    delay_us: int
    max_queue: int
    queue_timeout_us: int
    keep_versions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """The tensors of a classifier without the batch dimension: one input, (3,S,S) float32 or pixels, and (K,) outputs
    float32.
    """

    input_name: str
    input_type: Literal["TYPE_FP32", "TYPE_UINT8"]
    input_dims: tuple[int, ...]
    outputs: tuple[str, ...]
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
    """The ``inference.ModelConfig`` of a model; ``warmup_file`` is a file in the model's folder ``warmup``."""
    messages = import_messages()
    platform, filename = PLATFORMS[backend]
    # With the default kind Triton would choose a GPU if it finds one.
    kind = {"cpu": messages.ModelInstanceGroup.KIND_CPU, "gpu": messages.ModelInstanceGroup.KIND_GPU}[schedule.device]
    return messages.ModelConfig(
        name=name,
        platform=platform,
        backend=backend,
        default_model_filename=filename,
        version_policy={"latest": {"num_versions": schedule.keep_versions}},
        max_batch_size=schedule.max_batch,
        input=[
            {
                "name": interface.input_name,
                "data_type": getattr(messages, interface.input_type),
                "dims": interface.input_dims,
            },
        ],
        output=[
            {
                "name": name,
                "data_type": messages.TYPE_FP32,
                "dims": interface.output_dims,
                "label_filename": LABELS,
            }
            for name in interface.outputs
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
    """A warm-up sample; Triton repeats the single image of ``file`` to fill the batch."""
    source = {
        "data_type": getattr(messages, interface.input_type),
        "dims": interface.input_dims,
        "input_data_file": file,
    }
    return messages.ModelWarmup(
        name=f"golden image, batch {batch}", batch_size=batch, count=2, inputs={interface.input_name: source}
    )


def to_pbtxt(config: Any) -> str:
    """The text form of a ``ModelConfig``, with a comment on its origin."""
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
            remedy="Nothing was changed. Repair the file, or pass another --name or --repository.",
        ) from None


def import_messages() -> Any:
    """Triton's generated messages; raises ``BackendUnavailableError`` if they or their runtime are not installed."""
    try:
        from tritonclient.grpc import model_config_pb2
    # tritonclient raises RuntimeError if grpc is missing, and protobuf its own exception for code generated by
    # another major version.
    except Exception as error:
        raise BackendUnavailableError(
            f"Triton's configuration messages cannot be imported: {first_line(error)}",
            remedy="Run pip install 'kdexport[triton]'.",
        ) from error
    return model_config_pb2
