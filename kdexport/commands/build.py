"""`kdexport build`: from a recipe or a checkpoint to a verified bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import print_answer


def build(
    student: Annotated[
        str | None, typer.Option(help="Registered name, torchvision:NAME, timm:NAME, MODULE:FACTORY, or a .pt2 file.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Targets, separated by commas: onnx-fp32,trt-rtx-fp16.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Export configuration; default export_configs/STUDENT.toml.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a trained student; skips training.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Weights of a student of another origin: a file, DEFAULT, a name of its library's weights, or own for "
            "a factory that loads them; skips training."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, max=1024, help="Side of the images in pixels that the student takes.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Key or index of the logits, if the student returns several tensors.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle folder; default dist/STUDENT.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of the images. Without --config, photos get a recipe of their own.")
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Write the configuration for the photos of --data to this file for editing; build nothing."),
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(help="Teacher weights, .safetensors or of torch.save.")
    ] = None,
    workspace: Annotated[Path, typer.Option(help="Folder in which finished stages are kept.")] = Path(".kdexport"),
    processes: Annotated[int, typer.Option(min=1, help="Training processes, one per GPU.")] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Remove earlier results first, or reuse them.")
    ] = False,
    blame: Annotated[bool, typer.Option("--blame", help="If a check fails, find the node at fault.")] = False,
    precision_search: Annotated[
        bool, typer.Option("--precision-search", help="For int8 targets, find the fewest layers to keep in float32.")
    ] = False,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a student or read a trained one; fold, export, compile, verify and package it."""
    from kdexport.api import BuildOptions, build_request
    from kdexport.build.photos import write_proposed
    from kdexport.core.progress import Reporter
    from kdexport.pipeline import build as run

    reporter = Reporter()
    data = None if data is None else data.removeprefix("folder:")
    names = None if target is None else tuple(name.strip() for name in target.split(",") if name.strip())
    options = BuildOptions(
        student=student, targets=names, config=config, checkpoint=checkpoint, weights=weights, output=output,
        image_size=image_size, data=data, teacher_checkpoint=teacher_checkpoint, out=out, workspace=workspace,
        processes=processes, fresh=fresh, blame=blame, precision_search=precision_search,
    )  # fmt: skip
    request, is_proposed = build_request(options, reporter.say)
    if write_config is not None:
        write_proposed(write_config, request.config, is_proposed=is_proposed)
        _show_written(write_config, as_json=as_json)
        return
    result = run(request, reporter)
    if as_json:
        summary = _summary(result.manifest.data)
        exit_code = 3 if summary["undecided_checks"] else 0
        print_answer({"bundle": str(result.out), "up_to_date": result.up_to_date, **summary}, exit_code=exit_code)
        raise typer.Exit(exit_code)
    from kdexport.commands.render import show_build
    from kdexport.verify.check import require_decided

    show_build(result)
    require_decided(result.manifest.data["parity"])


def _show_written(path: Path, *, as_json: bool) -> None:
    if as_json:
        print_answer({"config": str(path)})
    else:
        typer.echo(f"Wrote {path}.\nNext:    kdexport build --config {path}")


def _summary(data: dict[str, Any]) -> dict[str, Any]:
    from kdexport.report.check_tables import beyond_checks, failed_checks

    return {
        "student": data["student"]["student"],
        "metrics": data["provenance"].get("metrics", {}),
        "targets": data["targets"],
        "operators": data["operators"],
        "latency": data["latency"],
        "failed_checks": failed_checks(data),
        "undecided_checks": beyond_checks(data),
    }
