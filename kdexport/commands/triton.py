"""``kdexport triton``: write a verified bundle into a Triton model repository."""

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer

if TYPE_CHECKING:
    from kdexport.serving.triton.variants import TritonPlan
    from kdexport.serving.triton.writer import TritonResult


class DeviceChoice(StrEnum):
    """The device on which Triton runs the model."""

    cpu = "cpu"
    gpu = "gpu"


def triton(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    repository: Annotated[Path, typer.Option(help="Triton model repository; created if it does not exist.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the folder's, as in serve.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version; default: the next free one.")] = None,
    target: Annotated[str, typer.Option(help="Target of the bundle to write: onnx-fp32, trt-fp16, ...")] = "onnx-fp32",
    device: Annotated[
        DeviceChoice | None, typer.Option(help="cpu or gpu; default: gpu for a TensorRT plan, else cpu.")
    ] = None,
    instances: Annotated[
        int,
        typer.Option(
            min=1, max=256, help="Model instances; on a CPU each has one thread, so pass the number of cores."
        ),
    ] = 1,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Largest batch; default: the fastest on this CPU, or the bundle's largest on a GPU."),
    ] = None,
    delay_us: Annotated[int, typer.Option(min=0, help="Most microseconds that a request waits to be batched.")] = 0,
    max_queue: Annotated[
        int | None, typer.Option(min=1, help="Requests that may wait; default: 2 x instances x max batch + 32.")
    ] = None,
    queue_timeout_ms: Annotated[
        int, typer.Option(min=1, help="Most milliseconds in the queue; Triton then rejects the request.")
    ] = 2000,
    keep_versions: Annotated[int, typer.Option(min=1, help="Number of latest versions that Triton serves.")] = 2,
    tensorrt_version: Annotated[
        str | None, typer.Option(help="TensorRT version of the Triton server that will load the plan, e.g. 10.13.2.6.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify a bundle and write it as a version of a model into a Triton model repository."""
    from kdexport.bundle.manifest import read_manifest
    from kdexport.core.progress import Reporter
    from kdexport.serving.batch_size import cpu_batch
    from kdexport.serving.model_names import default_name
    from kdexport.serving.triton.pbtxt import import_messages
    from kdexport.serving.triton.variants import TritonRequest, plan_export
    from kdexport.serving.triton.writer import export_triton
    from kdexport.verify.student_checks import check_integrity
    from kdexport.verify.verdict import Verdict, replay, seal

    import_messages()
    manifest = read_manifest(bundle)
    request = TritonRequest(
        repository=repository, name=name or default_name(bundle), version=version, target=target,
        device=None if device is None else device.value, instances=instances, max_batch=max_batch, delay_us=delay_us,
        max_queue=max_queue, queue_timeout_ms=queue_timeout_ms, keep_versions=keep_versions,
        tensorrt_version=tensorrt_version,
    )  # fmt: skip
    plan = plan_export(manifest, request)
    with Reporter().stage("verify") as progress:
        # Digests take a moment and the ladder a minute: a changed file is reported at once.
        Verdict(tuple(check_integrity(bundle, manifest))).require()
        verdict = replay(bundle, manifest, progress)
    if plan.schedule.device == "cpu" and max_batch is None:
        plan = plan_export(manifest, replace(request, max_batch=cpu_batch(bundle, target)))
    result = export_triton(seal(bundle, manifest, verdict), plan)
    if as_json:
        print_answer(_described(plan, result))
    else:
        sys.stdout.write(_as_text(plan, result))


def _described(plan: "TritonPlan", result: "TritonResult") -> dict[str, Any]:
    return {
        "model": str(result.model), "name": plan.name, "version": result.version,
        "up_to_date": result.up_to_date, "target": plan.target, "backend": plan.backend,
        "device": plan.schedule.device, "instances": plan.schedule.instances, "max_batch": plan.schedule.max_batch,
        "tensorrt_version": plan.contract["tensorrt"],
    }  # fmt: skip


def _as_text(plan: "TritonPlan", result: "TritonResult") -> str:
    schedule = plan.schedule
    state = "already exists; nothing was added" if result.up_to_date else "written"
    lines = [
        f"{result.model}: version {result.version} {state}",
        f"{plan.target} on {plan.backend}, {schedule.instances} x {schedule.device}, batches up to "
        f"{schedule.max_batch}, up to {schedule.max_queue} requests wait up to {schedule.queue_timeout_us // 1000} ms",
    ]
    if plan.contract["tensorrt"]:
        lines.append(f"The plan loads only in TensorRT {plan.contract['tensorrt']}.")
    lines.append(f"Next: tritonserver --model-repository={plan.repository} --disable-auto-complete-config")
    return "\n".join(lines) + "\n"
