"""`kdexport fuse`: merge what somebody else built, prove it, write it as a program and as ONNX."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.console import new_console, print_answer, verdict_style
from kdexport.errors import OutputError

if TYPE_CHECKING:
    from kdexport.reparam.program import FusedProgram

PROGRAM, MODEL, CERTIFICATE = "fused.pt2", "model.onnx", "certificate.json"
_SCHEMA = "kdexport.fuse/1"
_OPSET = 20


def fuse(
    source: Annotated[str, typer.Argument(help="MODULE.pt2 of torch.export.save, or package.module:factory.")],
    out: Annotated[Path, typer.Option(help="Folder for fused.pt2, model.onnx and certificate.json.")],
    shapes: Annotated[
        list[str] | None, typer.Option("--input", help="Shape of an input, for a factory: 1,3,224,224. Repeatable.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge parallel branches, sequences and batch norms of any PyTorch module, with a certificate."""
    from kdexport.core.files import require_replaceable, require_writable
    from kdexport.origins.sources import load_source, parse_shapes

    sizes = parse_shapes(shapes or [])
    try:
        require_replaceable(out, _is_ours)
    except OutputError as error:
        raise OutputError(f"{out} exists and was not written by `kdexport fuse`.", remedy=error.remedy) from None
    require_writable(out)
    module, examples = load_source(source, sizes)

    import kdexport

    fused = kdexport.fuse(module, examples)
    described = write(fused, out, source)
    if as_json:
        print_answer({"out": str(out), **described})
    else:
        show(fused, out)


def write(fused: "FusedProgram", out: Path, source: str) -> dict[str, Any]:
    """Put the three files into ``out``, all or none; what certificate.json says."""
    import torch

    from kdexport.core.console import quiet
    from kdexport.core.digests import sha256_file
    from kdexport.core.files import replace_folder, scratch_folder
    from kdexport.graph.export import export_program

    name = Path(source).name if source.endswith(".pt2") else source
    with scratch_folder("fuse") as folder:
        place = folder / "fused"
        place.mkdir()
        with quiet():
            torch.export.save(fused.program, place / PROGRAM)
        metadata = {"source": name, "certificate": fused.certificate.whole_relative_error}
        export_program(fused.program, place / MODEL, opset=_OPSET, metadata=metadata, weights=fused.weights)
        described = describe(fused, name)
        described["files"] = {item: sha256_file(place / item) for item in (PROGRAM, MODEL)}
        text = json.dumps(described, indent=1, sort_keys=True) + "\n"
        (place / CERTIFICATE).write_text(text, encoding="utf-8")
        replace_folder(place, out)
    return described


def describe(fused: "FusedProgram", source: str) -> dict[str, Any]:
    """The certificate as a JSON object: blocks and errors, what was left alone and why, cost before and after."""
    from dataclasses import asdict

    from kdexport.core.digests import tool_versions

    return {
        "schema": _SCHEMA,
        "source": source,
        "certificate": fused.certificate.to_json(),
        "left_alone": [asdict(item) for item in fused.left_alone],
        "before": asdict(fused.before),
        "after": asdict(fused.after),
        "versions": tool_versions("torch", "onnx", "onnxscript"),
    }


def show(fused: "FusedProgram", out: Path) -> None:
    """Tables of what was merged and what it saves, on stdout."""
    from kdexport.core.tables import Table, terminal_table

    console = new_console()
    blocks = tuple((block.name, block.kind, f"{block.relative_error:.1e}") for block in fused.certificate.blocks)
    if blocks:
        console.print(terminal_table(Table(header=("block", "merged", "error in float64"), rows=blocks)))
    else:
        console.print("Nothing to merge: no batch norm and no parallel linear branches were found.")
    if fused.left_alone:
        console.print()
        stays = tuple((item.place, item.reason) for item in fused.left_alone)
        console.print(terminal_table(Table(header=("left alone", "because"), rows=stays)))
    console.print()
    before, after = fused.before, fused.after
    costs = (
        ("operators", str(sum(before.operators.values())), str(sum(after.operators.values()))),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("multiply-accumulates", f"{before.multiply_accumulates:,}", f"{after.multiply_accumulates:,}"),
    )
    console.print(terminal_table(Table(header=("", "before", "after"), rows=costs)))
    console.print()
    for hazard in fused.certificate.hazards:
        console.print(f"Warning: {hazard}", soft_wrap=True)
    error, limit = fused.certificate.whole_relative_error, fused.certificate.limit
    verdict = f"Verdict: the whole differs by {error:.1e} of its largest output in float64 (up to {limit:.0e})."
    console.print(verdict, style=verdict_style(0))
    console.print(f"Written: {out}  ({PROGRAM}, {MODEL}, {CERTIFICATE})", soft_wrap=True)


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))["schema"] == _SCHEMA)
    except (OSError, ValueError, KeyError, TypeError):
        return False
