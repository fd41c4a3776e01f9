"""The command line. Nothing heavy is imported before a command needs it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport import __version__
from kdexport.blame_command import explain_failure
from kdexport.errors import ConfigError, UnknownNameError, error_codes
from kdexport.fuse_command import fuse
from kdexport.gate.command import bench, calibrate_runner, gate
from kdexport.registry import nearest
from kdexport.serving.command import serve
from kdexport.serving.triton_command import triton
from kdexport.verify_command import verify

if TYPE_CHECKING:
    from kdexport.config import BuildConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Distil compact image classifiers, fold their branches away exactly, export them, and prove what runs.",
    epilog="Exit codes: 0 pass, 1 a check failed, 2 bad configuration or input, 3 inconclusive, 4 environment.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")]


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"kdexport {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


@app.command()
def build(
    student: Annotated[str | None, typer.Option(help="Student, and name of its configuration.")] = None,
    target: Annotated[str | None, typer.Option(help="Targets, comma separated: onnx-fp32,trt-rtx-fp16.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Export configuration; default export_configs/STUDENT.toml.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Trained student folder: skips training.")] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle folder; default dist/STUDENT.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data set lies; overrides the recipe.")] = None,
    teacher_checkpoint: Annotated[str | None, typer.Option(help="Teacher weights, .pt or .safetensors.")] = None,
    workspace: Annotated[Path, typer.Option(help="Where finished stages are kept.")] = Path(".kdexport"),
    processes: Annotated[int, typer.Option(min=1, help="Training processes, one per GPU.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Forget earlier results, or use them.")] = False,
    blame: Annotated[bool, typer.Option("--blame", help="Name the node where a check fails.")] = False,
    precision_search: Annotated[
        bool, typer.Option("--precision-search", help="Keep the fewest layers of int8 targets in float32.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train or read a student, fold, export, compile, verify and package it."""
    from kdexport.pipeline import BuildRequest
    from kdexport.pipeline import build as run
    from kdexport.reporter import Reporter
    from kdexport.targets import parse_targets

    settings = _settings(student, config, precision_search=precision_search)
    names = settings.targets if target is None else [name.strip() for name in target.split(",") if name.strip()]
    request = BuildRequest(
        config=settings,
        targets=parse_targets(names),
        out=out if out is not None else Path("dist") / settings.student,
        workspace=workspace,
        checkpoint=checkpoint,
        data_root=data,
        teacher_checkpoint=teacher_checkpoint,
        processes=processes,
        fresh=fresh,
        blame=blame,
    )
    result = run(request, Reporter())
    if as_json:
        _print_json({"bundle": str(result.out), "up_to_date": result.up_to_date, **_summary(result.manifest.data)})
    else:
        from kdexport.screen import show_build

        show_build(result)


def _settings(student: str | None, config: Path | None, *, precision_search: bool) -> "BuildConfig":
    from kdexport.config import find_config, load_config

    if student is None and config is None:
        raise ConfigError("Neither --student nor --config was given.", remedy="For example: --student mobilenetv2")
    settings = load_config(config if config is not None else find_config(str(student)))
    if student is not None and student != settings.student:
        settings = settings.model_copy(update={"student": student})
    if precision_search:
        enabled = settings.precision_search.model_copy(update={"enabled": True})
        settings = settings.model_copy(update={"precision_search": enabled})
    return settings


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="A folder that `kdexport build` wrote.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a bundle says about itself, without running anything."""
    from kdexport.bundle import read_manifest

    manifest = read_manifest(bundle)
    if as_json:
        _print_json(manifest.data)
    else:
        from kdexport.screen import show_manifest

        show_manifest(bundle, manifest)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="students, teachers, distillers, targets or recipes.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List students, teachers, distillers, recipes or targets by name."""
    from kdexport.listing import LISTS

    if kind not in LISTS:
        raise UnknownNameError(f"There is no list of {kind!r}.", remedy=nearest(kind, LISTS))
    rows = LISTS[kind]()
    if as_json:
        _print_json({kind: [{"name": name, **({"note": note} if note else {})} for name, note in rows]})
    else:
        width = max(len(name) for name, _ in rows)
        sys.stdout.writelines(f"{name:<{width}}  {note}".rstrip() + "\n" for name, note in rows)


@app.command()
def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle: check that it can be served here.")] = None,
    target: Annotated[str, typer.Option(help="Target of it that would be served.")] = "onnx-fp32",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine can build and run, and what is missing; or whether it would serve BUNDLE."""
    from kdexport.doctor import examine

    if bundle is None:
        facts = examine()
    else:
        from kdexport.serving.examine import examine_bundle

        facts = examine_bundle(bundle, target=target)
    if as_json:
        _print_json({"ok": True, "facts": [{"what": f.what, "ok": f.ok, "fact": f.fact} for f in facts]})
        return
    from kdexport.screen import show_facts

    show_facts(facts)


@app.command()
def explain(
    code: Annotated[str, typer.Argument(help="An error code, such as KDX330.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain an error code."""
    codes = error_codes()
    if code.upper() not in codes:
        raise UnknownNameError(f"There is no error code {code!r}.", remedy=nearest(code.upper(), codes))
    cls = codes[code.upper()]
    if as_json:
        _print_json({"code": cls.code, "exit_code": cls.exit_code, "explanation": cls.explanation})
    else:
        sys.stdout.write(f"{cls.code} (exit {cls.exit_code}): {cls.__doc__}\n{cls.explanation}\n")


app.command()(verify)
app.command()(explain_failure)
app.command()(fuse)
app.command()(bench)
app.command()(gate)
app.command(name="calibrate-runner")(calibrate_runner)
app.command()(serve)
app.command()(triton)


def _summary(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "ok": True,
        "exit_code": 0,
        "student": data["student"]["student"],
        "metrics": data["provenance"].get("metrics", {}),
        "targets": data["targets"],
        "operators": data["operators"],
        "latency": data["latency"],
        "failed_checks": [check for check in data["parity"] if not check["holds"]],
    }


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
