"""Bisection of a failed bundle: over its stages, then over the nodes of the first file that is wrong.

Files are compared with a trusted graph, which is made again from the bundle's unfused weights: folded in float64,
checked against the unfused student, exported. Nothing else in the bundle is trusted.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.base import INPUT
from kdexport.backends.file_interface import PLAIN_INTERFACE
from kdexport.bundle.manifest import (
    FUSED,
    MODEL,
    UNFUSED,
    Manifest,
    interface_of,
    layer_plans,
    listed_changes,
    load_unfused,
    onnx_files,
    read_golden,
    target_of,
    trained_weights,
)
from kdexport.checkpoint import load_tensors
from kdexport.core.files import scratch_folder
from kdexport.diagnose.differences import overflow, stored_difference
from kdexport.diagnose.reproduction import write_reproduction
from kdexport.errors import AuditError, KdexportError
from kdexport.graph.equalise import apply_scalings
from kdexport.graph.equality import graph_difference
from kdexport.graph.export import export_onnx
from kdexport.graph.interface import with_interface, without_interface
from kdexport.graph.plan import PLAIN
from kdexport.graph.trace import LIMITS, NodeError, Trace, computing_nodes, first_faulty, results, trace
from kdexport.graph.trained_weights import with_weights
from kdexport.reparam.fold_student import fuse_student
from kdexport.verify.check import has_failed
from kdexport.verify.parity import rung_b
from kdexport.verify.policy import stored_policy
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.reference import Probes, make_probes, make_reference, run_torch
from kdexport.verify.student_checks import check_golden, check_weights, weight_bits

Progress = Callable[[str], None]

#: Real images that are run, in addition to the edge inputs.
_IMAGES = 8
REPORT, REPRODUCTION = "blame.json", "reproduction"


@dataclass(frozen=True, kw_only=True, slots=True)
class Blame:
    """The first place where a bundle differs from its unfused student.

    ``stage`` is files, unfused, fold, export, cast or engine. ``file`` is the first wrong file, ``node`` the first
    wrong node in it, and ``words`` describes the difference. ``reproduction`` is the folder with the node as a program
    of its own; it is empty if no node could be extracted.
    """

    stage: str
    file: str
    node: str
    operator: str
    error: float
    allowed: float
    words: str
    reproduction: str = ""

    def sentence(self) -> str:
        """One sentence for people."""
        where = f"{self.operator} node {self.node} of {self.file}" if self.node else self.file
        return f"stage {self.stage}: {where} {self.words}"

    def moved(self, out: Path) -> "Blame":
        """The same finding with its reproduction below ``out``."""
        return replace(self, reproduction=str(out / REPRODUCTION)) if self.reproduction else self

    def to_json(self) -> dict[str, Any]:
        """A JSON object; an error that is not finite becomes null."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True, eq=False)
class Trusted:
    """What files are compared with: the trusted graph, and the inputs that both are run on."""

    model: onnx.ModelProto
    probes: Probes


def explain(folder: Path, manifest: Manifest, out: Path, progress: Progress) -> Blame | None:
    """Find the first fault of a bundle and write its reproduction below ``out``; None if every stage is right."""
    progress("golden images")
    pixels = read_golden(folder, manifest)
    wrong = [check for check in check_golden(folder, manifest, pixels) if not check.holds]
    if wrong:
        words = "does not give the reference logits of the golden images: the trained weights were changed"
        return _without_node("unfused", UNFUSED, wrong[0].measured, wrong[0].allowed, words)
    progress("fold and export again")
    trusted = _trust(folder, manifest, pixels[:_IMAGES])
    if isinstance(trusted, Blame):
        return trusted
    folded = _fold_fault(folder, manifest)
    for name, form in onnx_files(manifest).items():
        precision = form.partition("-")[0]
        progress(name)
        if form in trained_weights(manifest) and _is_as_rebuilt(folder, manifest, name, form):
            continue
        found = file_fault(folder / name, name, precision, _scaled(trusted, folder, manifest, name), out)
        if found is not None:
            stage = "fold" if folded is not None else "export" if name == MODEL else "cast"
            return replace(found, stage=stage if precision == "fp32" else "cast")
        around = _interface_fault(folder / name, name, manifest)
        if around is not None:
            return around
    return folded or _engine_fault(manifest)


def _is_as_rebuilt(folder: Path, manifest: Manifest, name: str, form: str) -> bool:
    """Whether the int8 file of a quantize-aware training is the graph of its weights and ranges, with its interface.

    Values beyond the ends of trained ranges are cut off on purpose, so that no limit of rounding holds for them.
    """
    with scratch_folder("explain") as place:
        rebuilt = RebuiltGraphs(folder, manifest, place)
        return rebuilt.finding(name, form, PLAIN, weight_bits(manifest)).holds


def _interface_fault(path: Path, name: str, manifest: Manifest) -> Blame | None:
    """The fault of the normalisation or the softmax around a graph that is right."""
    target = target_of(name)
    interface = PLAIN_INTERFACE if target is None else interface_of(manifest, str(target))
    if interface == PLAIN_INTERFACE:
        return None
    found = onnx.load(str(path))
    expected = with_interface(without_interface(found), interface, manifest.spec.preprocessing)
    difference = graph_difference(found, expected)
    if not difference:
        return None
    words = f"has another normalisation or softmax than {interface} with the preprocessing: {difference}"
    return _without_node("cast", name, 1.0, 0.0, words)


def _scaled(trusted: Trusted, folder: Path, manifest: Manifest, name: str) -> Trusted:
    """The trusted graph of a file: scaled by its precision plan, or with the weights of its quantize-aware training."""
    plan = layer_plans(manifest).get(Path(name).parent.name, PLAIN)
    target, trained = target_of(name), trained_weights(manifest)
    if target is not None and target.form in trained:
        # What a quantize-aware training changed is no fault of the file.
        weights = {key: value.numpy() for key, value in load_tensors(folder / trained[target.form]).items()}
        return replace(trusted, model=with_weights(trusted.model, weights))
    return replace(trusted, model=apply_scalings(trusted.model, plan.equalised)) if plan.equalised else trusted


def write_blame(out: Path, blame: Blame) -> None:
    """The finding as JSON beside its reproduction."""
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text(json.dumps(blame.to_json(), indent=1) + "\n", encoding="utf-8")


def _trust(folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]) -> "Trusted | Blame":
    spec = manifest.spec
    try:
        fused = fuse_student(load_unfused(folder, spec)).module
    except KdexportError as error:
        return _without_node("fold", UNFUSED, 1.0, 0.0, error.message)
    with scratch_folder("explain") as place:
        path = place / MODEL
        model = export_onnx(fused, path, image_size=spec.image_size, opset=manifest.opset, metadata={})
        probes = make_probes(pixels, spec.preprocessing)
        reference = make_reference(load_unfused(folder, spec), fused, probes, forms=())
        from kdexport.backends.ort import load_model

        limits = stored_policy(manifest.data).B
        checks = rung_b(MODEL, load_model(path).logits(probes.images), reference, probes, limits)
        eager = rung_b(FUSED, run_torch(fused, probes.images).astype(np.float32), reference, probes, limits)
    for stage, rung in (("fold", eager), ("export", checks)):
        wrong = [check for check in rung if not check.holds]
        if wrong:
            words = (
                f"is wrong when this version makes it again: {wrong[0].name} {wrong[0].measured:.3g} {wrong[0].unit}"
            )
            return _without_node(stage, wrong[0].subject, wrong[0].measured, wrong[0].allowed, words)
    return Trusted(model, probes)


def _fold_fault(folder: Path, manifest: Manifest) -> Blame | None:
    fused = fuse_student(load_unfused(folder, manifest.spec)).module
    try:
        check = check_weights(load_tensors(folder / FUSED), fused.state_dict())
    except KdexportError as error:
        return _without_node("fold", FUSED, 1.0, 0.0, error.message)
    if check.holds:
        return None
    return _without_node(
        "fold", FUSED, check.measured, check.allowed, f"differs from the folded student: {check.detail}"
    )


def _engine_fault(manifest: Manifest) -> Blame | None:
    """If every graph is right, the fault of a failed check of an engine is in its builder."""
    for check in manifest.data["parity"]:
        if has_failed(check) and str(check["subject"]).endswith(".plan"):
            words = f"fails {check['name']} although its ONNX file is right: the engine builder changed it"
            measured = float("inf") if check["measured"] is None else float(check["measured"])
            return _without_node("engine", str(check["subject"]), measured, float(check["allowed"]), words)
    return None


def file_fault(path: Path, name: str, precision: str, trusted: Trusted, out: Path) -> Blame | None:
    """The first fault of the ONNX file ``name`` at ``path``, reproduced below ``out``; the caller sets its stage."""
    try:
        suspect = without_interface(onnx.load(str(path)))
        found = trace(suspect, trusted.model, {INPUT: trusted.probes.images})
    except AuditError as error:
        static = None if precision != "bf16" else _stored_fault(suspect, trusted.model, precision, {})
        if static is not None:
            return _named(static[0], name, precision, static[1])
        # onnxruntime has no bfloat16 convolution on the CPU: only stored values can be compared.
        return None if precision == "bf16" else _without_node("export", name, 1.0, 0.0, error.message)
    # protobuf raises its own error for a damaged file.
    except Exception as error:  # noqa: BLE001
        return _without_node("export", name, 1.0, 0.0, f"cannot be read: {type(error).__name__}: {error}")
    rows = {row.tensor: row for row in found.nodes}
    numeric = first_faulty(found.nodes, precision)
    stored = _stored_fault(suspect, trusted.model, precision, rows)
    order = [row.tensor for row in found.nodes]
    if stored is not None and (numeric is None or order.index(stored[0].tensor) <= order.index(numeric.tensor)):
        numeric, words = stored
    elif numeric is not None:
        words = _numeric_words(numeric, found, precision)
    else:
        return None
    blame = _named(numeric, name, precision, words)
    return _reproduced(blame, suspect, numeric, found, trusted.probes, out)


def _stored_fault(
    suspect: onnx.ModelProto, trusted: onnx.ModelProto, precision: str, rows: dict[str, NodeError]
) -> tuple[NodeError, str] | None:
    expected, mine = computing_nodes(trusted), computing_nodes(suspect)
    for tensor in results(suspect):
        if tensor not in expected or (rows and tensor not in rows):
            continue
        node = mine[tensor]
        words = stored_difference(suspect, trusted, node, expected[tensor], precision)
        if words:
            blank = NodeError(node=node.name, operator=node.op_type, tensor=tensor, error=float("nan"), worst=0)
            return rows.get(tensor, blank), words
    return None


def _numeric_words(node: NodeError, found: Trace, precision: str) -> str:
    too_large = overflow(found.trusted[node.tensor], found.own[node.tensor])
    if too_large:
        return too_large
    return (
        f"has an error of {node.error:.2g} of its result (rms, with trusted inputs; up to {LIMITS[precision]:.0e} "
        f"allowed in {precision})"
    )


def _reproduced(
    blame: Blame, suspect: onnx.ModelProto, node: NodeError, found: Trace, probes: Probes, out: Path
) -> Blame:
    given = {name: value for name, value in found.given.items() if name != node.tensor}
    folder = out / REPRODUCTION
    # A stored difference may be below the limit of rounding on these inputs; the script must detect it even then.
    limit = min(blame.allowed, node.error / 2) if np.isfinite(node.error) else blame.allowed
    write_reproduction(
        folder,
        suspect,
        node.tensor,
        given,
        found.trusted[node.tensor],
        image=node.worst,
        limit=limit,
        title=f"{blame.sentence()} (on {probes.name(node.worst)}).",
    )
    return replace(blame, reproduction=str(folder))


def _named(node: NodeError, file: str, precision: str, words: str) -> Blame:
    return Blame(
        stage="export",
        file=file,
        node=node.node,
        operator=node.operator,
        error=node.error,
        allowed=LIMITS[precision],
        words=words,
    )


def changed_file(changes: dict[str, str]) -> Blame:
    """The finding for files that differ from the manifest: the first of ``changed_files``, with all in ``words``."""
    words = f"differs from the manifest ({listed_changes(changes)}): copy the bundle again, or build it again"
    return _without_node("files", next(iter(changes)), float(len(changes)), 0.0, words)


def _without_node(stage: str, file: str, error: float, allowed: float, words: str) -> Blame:
    return Blame(stage=stage, file=file, node="", operator="", error=error, allowed=allowed, words=words)
