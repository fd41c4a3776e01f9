"""Compiles the ONNX file of a target again and compares: a compiled file may have nothing that is not in its graph.

Checks of layers, weights and logits can be passed by a file that has more than its graph, or runs something else and
carries the graph's weights unread. The file that the same tools make again from the same graph has no room for either.
"""

from pathlib import Path
from typing import Any

from kdexport import __version__
from kdexport.backends.base import ONNX_FILE, CompileRequest, Finding, unchecked
from kdexport.bundle.manifest import Manifest
from kdexport.core.digests import tool_versions
from kdexport.core.files import scratch_folder
from kdexport.errors import AuditError, BackendUnavailableError, EngineBuildError
from kdexport.targets import Target

CHECK = "file as compiled again"


def check_compiled_again(folder: Path, target: Target, manifest: Manifest, kept: tuple[str, ...]) -> Finding | None:
    """Whether the files of ``target`` in ``folder`` are those that its backend makes from the ONNX file there.

    It did not run if this machine lacks the backend's tools, or if a file differs and the tools are of other versions
    than those of the build. None for a backend whose tools write other bytes each time.
    """
    runtime = target.runtime
    if not runtime.repeats_files:
        return None
    missing = target.unavailable()
    if missing is not None:
        return unchecked(CHECK, missing.reason)
    export: dict[str, Any] = manifest.data["export"]
    with scratch_folder("compiled-again") as scratch:
        request = CompileRequest(
            onnx=folder / ONNX_FILE,
            folder=scratch,
            precision=target.precision,
            image_size=manifest.spec.image_size,
            batches=(export["min_batch"], export["opt_batch"], export["max_batch"]),
            kept=kept,
            options=export,
        )
        try:
            runtime.compile(request)
        # A library that is installed and cannot be imported shows nothing about the file either.
        except (EngineBuildError, BackendUnavailableError) as error:
            return unchecked(CHECK, f"{ONNX_FILE} could not be compiled here: {error.message.rstrip('.')}")
        names = sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
        differences = (_difference(folder / name, scratch / name, name, target) for name in names)
        difference = next(filter(None, differences), "")
        size = sum((scratch / name).stat().st_size for name in names)
    if not difference:
        return Finding(CHECK, True, f"{size:,} bytes in {len(names)} files" if len(names) > 1 else f"{size:,} bytes")
    others = _other_versions(target, manifest)
    if others:
        return unchecked(CHECK, f"it was compiled by other versions: {others}; {difference}")
    return Finding(CHECK, False, difference)


def _difference(found: Path, expected: Path, name: str, target: Target) -> str:
    if not found.is_file():
        return f"{name} is missing"
    if found.read_bytes() == expected.read_bytes():
        return ""
    try:
        difference = target.runtime.difference(found, expected)
    except AuditError as error:
        difference = error.message
    return f"{name}: {difference}" if difference else ""


def _other_versions(target: Target, manifest: Manifest) -> str:
    """The tools whose versions here are not those of the build."""
    built = {**manifest.data["versions"], "kdexport": manifest.data.get("kdexport")}
    here = {**tool_versions(*target.runtime.packages), "kdexport": __version__}
    return ", ".join(
        f"{name} {built.get(name) or 'not recorded'} at the build, {version} here"
        for name, version in here.items()
        if built.get(name) != version
    )
