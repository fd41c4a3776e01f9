"""Makes the folded weights and every ONNX file of a bundle again from its unfused student, and compares them.

Verification compares graphs only; here the files themselves are the result, for whoever wants to look at them or use
them instead of those in the bundle.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from kdexport.bundle.manifest import (
    EMPTY_FOLDER,
    FUSED,
    MANIFEST,
    UNFUSED,
    Manifest,
    irregular_entries,
    layer_plans,
    load_unfused,
    onnx_files,
    target_of,
)
from kdexport.bundle.slim_form import require_whole
from kdexport.checkpoint import load_tensors, save_tensors
from kdexport.core.digests import sha256_file, tool_versions
from kdexport.core.files import scratch_folder, write_folder
from kdexport.errors import BundleError, CheckpointError, OutputError, VerificationError, first_line
from kdexport.graph.equality import graph_difference
from kdexport.graph.plan import PLAIN
from kdexport.reparam.fold_student import fuse_student
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import check_weights, weight_bits

IDENTICAL, EQUAL, DIFFERENT = "byte-identical", "equal", "different"

#: What writes the bytes of an ONNX file.
_WRITERS = ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class RebuiltFile:
    """One file of the bundle beside the one that was made again; ``rebuilt_sha256`` is empty if none could be."""

    name: str
    #: ``IDENTICAL``, ``EQUAL`` or ``DIFFERENT``.
    outcome: str
    fact: str
    sha256: str
    rebuilt_sha256: str

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def rebuild_files(
    folder: Path, manifest: Manifest, out: Path | None, progress: Callable[[str], None]
) -> list[RebuiltFile]:
    """One entry for the folded weights and each ONNX file; the rebuilt files are kept in ``out`` under the same names.

    Graphs are made with the folded weights of the bundle, which must be the fold of its unfused student: another
    processor may round the last bit differently. Ranges of int8 and precision plans are those of the bundle. Raises
    ``VerificationError`` if the unfused student is not the one of the manifest, ``BundleError`` for links,
    ``OutputError`` if ``out`` has files.
    """
    if out is not None and (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out} exists and is not an empty folder.", remedy="Pass another --out.")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    require_whole(folder, manifest)
    _require_unfused(folder, manifest)
    with scratch_folder("replay") as scratch:
        rebuilt = RebuiltGraphs(folder, manifest, scratch)
        progress(FUSED)
        made = {FUSED: scratch / FUSED}
        found = [_compare_weights(folder, made[FUSED], manifest)]
        for name, form in onnx_files(manifest).items():
            progress(name)
            plan = layer_plans(manifest).get(str(target_of(name)), PLAIN)
            try:
                made[name] = rebuilt.rebuild(name, form, plan, weight_bits(manifest))
            except BundleError as error:
                found.append(_entry(folder, name, None, DIFFERENT, error.message))
            else:
                found.append(_compare(folder, name, made[name], manifest))
        if out is not None:
            write_folder(out, lambda incoming: _copy(made, incoming))
    return found


def _require_unfused(folder: Path, manifest: Manifest) -> None:
    for name, kind in irregular_entries(folder).items():
        if kind != EMPTY_FOLDER:
            raise BundleError(
                f"{folder / name} is {kind}; a bundle may have regular files only.",
                remedy=f"Copy the bundle with the contents of its links: cp -rL {folder} NEW_FOLDER",
            )
    path = folder / UNFUSED
    if not path.is_file() or sha256_file(path) != manifest.files.get(UNFUSED):
        raise VerificationError(
            f"{path} is missing or is not the file of {MANIFEST}: the graphs cannot be rebuilt from it.",
            remedy="Copy the bundle again, or build it again.",
        )


def _compare_weights(folder: Path, rebuilt: Path, manifest: Manifest) -> RebuiltFile:
    """Fold the unfused student into ``rebuilt``, and compare with the stored weights, which all graphs are made of."""
    path = folder / FUSED
    weights = fuse_student(load_unfused(folder, manifest.spec)).module.state_dict()
    save_tensors(rebuilt, weights)
    if path.is_file() and path.read_bytes() == rebuilt.read_bytes():
        return _entry(folder, FUSED, rebuilt, IDENTICAL, f"{path.stat().st_size:,} bytes")
    try:
        check = check_weights(load_tensors(path), weights)
    except CheckpointError as error:
        return _entry(folder, FUSED, rebuilt, DIFFERENT, error.message)
    fact = f"relative difference {check.measured:.3g} (up to {check.allowed:.3g} allowed) {check.detail}".rstrip()
    return _entry(folder, FUSED, rebuilt, EQUAL if check.holds else DIFFERENT, fact)


def _copy(made: dict[str, Path], folder: Path) -> None:
    folder.mkdir()
    for name, path in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _compare(folder: Path, name: str, rebuilt: Path, manifest: Manifest) -> RebuiltFile:
    path = folder / name
    if path.is_file() and path.read_bytes() == rebuilt.read_bytes():
        return _entry(folder, name, rebuilt, IDENTICAL, f"{path.stat().st_size:,} bytes")
    try:
        mine, theirs = onnx.load(str(path)), onnx.load(str(rebuilt))
        difference = graph_difference(mine, theirs)
    # A damaged file makes the reader raise errors of many types.
    except Exception as error:  # noqa: BLE001
        return _entry(folder, name, rebuilt, DIFFERENT, f"cannot be read: {type(error).__name__}: {first_line(error)}")
    if difference:
        return _entry(folder, name, rebuilt, DIFFERENT, difference)
    return _entry(
        folder, name, rebuilt, EQUAL, f"the same graph, other bytes in {_elsewhere(mine, theirs)}{_versions(manifest)}"
    )


def _entry(folder: Path, name: str, rebuilt: Path | None, outcome: str, fact: str) -> RebuiltFile:
    path = folder / name
    return RebuiltFile(
        name=name,
        outcome=outcome,
        fact=fact,
        sha256=sha256_file(path) if path.is_file() else "",
        rebuilt_sha256="" if rebuilt is None else sha256_file(rebuilt),
    )


def _elsewhere(mine: onnx.ModelProto, theirs: onnx.ModelProto) -> str:
    """Where two files with the same graph differ."""
    metadata = [sorted((entry.key, entry.value) for entry in model.metadata_props) for model in (mine, theirs)]
    writers = [(model.producer_name, model.producer_version, model.ir_version) for model in (mine, theirs)]
    places = {
        "the metadata": metadata[0] != metadata[1],
        "the producer": writers[0] != writers[1],
        "names, order or texts of the graph": mine.graph.SerializeToString() != theirs.graph.SerializeToString(),
    }
    return " and ".join(place for place, differs in places.items() if differs) or "the encoding"


def _versions(manifest: Manifest) -> str:
    """The tools whose versions here are not those of the build, for the end of a sentence."""
    built, here = manifest.data["versions"], tool_versions(*_WRITERS)
    others = [
        f"{name} {built.get(name, 'absent')} at the build, {here[name]} here"
        for name in _WRITERS
        if built.get(name, "absent") != here[name]
    ]
    return f" ({'; '.join(others)})" if others else " (the versions of the tools are the same)"
