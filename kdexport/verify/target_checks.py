"""Checks of each ONNX file and each target of a bundle: its graph, the runtime that ran it, and its logits."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.base import IN_ORDER, Execution, Finding, Missing, Runner, unchecked
from kdexport.backends.file_interface import PLAIN_INTERFACE, PROBABILITIES, FileInterface
from kdexport.backends.ort import CPU, OrtModel, execution_of, integer_kernels, load_model, provider_finding
from kdexport.bundle.manifest import RANGES, TARGETS, UNFUSED, interface_of, target_of
from kdexport.core.digests import sha256_file
from kdexport.errors import AuditError, BackendUnavailableError, KdexportError
from kdexport.graph.audit import audit_graph
from kdexport.graph.export import model_metadata, read_metadata
from kdexport.graph.precision import emulate_bf16
from kdexport.graph.tensor_ranges import Range, read_ranges
from kdexport.targets import Target, parse_target
from kdexport.verify.check import Check, broken, from_finding
from kdexport.verify.compiled_again import check_compiled_again
from kdexport.verify.fake_quantized_checks import check_agreement
from kdexport.verify.parity import check_batches, check_repeatable, rung_b, rung_c
from kdexport.verify.probabilities import check_probabilities
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.student_checks import BundleContext

#: The checks that are in a verdict as not run where this machine cannot read the files of a target, or not run them.
CONTENT, EXECUTION = "content", "execution"


@dataclass(frozen=True, slots=True)
class FileResult:
    """The checks of one file or target, and what ran it; None if it did not run."""

    checks: tuple[Check, ...]
    execution: Execution | None = None


def graph_checks(context: BundleContext, name: str, form: str, rebuilt: RebuiltGraphs) -> FileResult:
    """Audit of the ONNX file ``name``, and rung B or C of its reference run by onnxruntime on the CPU.

    ``form`` is the form of the file's precision, one of ``FORMS``; ``rebuilt`` makes the graph that it must equal.
    """
    path = context.folder / name
    try:
        ranges = _ranges(path, form)
    except (OSError, ValueError, TypeError) as error:
        return FileResult((broken("audit", name, f"{RANGES}: {type(error).__name__}: {error}"),))
    plan, target = context.plan(name), target_of(name)
    interface = PLAIN_INTERFACE if target is None else interface_of(context.manifest, str(target))
    findings = audit_graph(
        path,
        plan.scaled(context.weights_in(form)),
        form=form,
        opset=context.manifest.opset,
        structure=context.structure,
        ranges=ranges,
        kept=plan.nodes,
        interface=interface,
    )
    checks = [from_finding(name, finding) for finding in findings]
    if not findings[0].holds:
        return FileResult(tuple(checks))
    checks.append(from_finding(name, rebuilt.finding(name, form, plan, context.weight_bits)))
    checks.append(from_finding(name, _metadata(context, path, interface)))
    try:
        model = open_file(path, form)
        if form == "int8-u8":
            checks.append(from_finding(name, integer_kernels(path, len(plan.kept))))
    except AuditError as error:
        return FileResult((*checks, broken("audit", name, error.message)))
    checks.append(from_finding(name, provider_finding(model, CPU)))
    checks += _computed(context, f"{name} on onnxruntime CPU", _Reference(model), form)
    if form in context.trained:
        checks += check_agreement(context, name, form, _Reference(model), rebuilt)
    if interface.gives == PROBABILITIES:
        checks.append(check_probabilities(name, _Reference(model), context.probes.images, "fp32"))
    return FileResult(tuple(checks), execution_of(model, CPU))


def target_checks(context: BundleContext, name: str) -> FileResult:
    """Audit of target ``name``, and its rung in its own runtime if this machine can run it.

    The execution is None unless the runtime opened the file on this machine, ran every image and reported its device.
    """
    target = parse_target(name)
    folder, kept = context.folder / TARGETS / name, context.plan(name).nodes
    where = f"{TARGETS}/{name}/{target.artifact}"
    checks = [from_finding(where, finding) for finding in _content(target, folder, kept)]
    if any(check.failed for check in checks):
        return FileResult(tuple(checks))
    again = check_compiled_again(folder, target, context.manifest, tuple(kept))
    if again is not None:
        checks.append(from_finding(where, again))
        if checks[-1].failed:
            return FileResult(tuple(checks))
    missing = target.not_executable()
    if missing is not None:
        return FileResult((*checks, _not_executed(run_label(target), missing), *_stand_in(context, target, kept)))
    try:
        runner = target.runtime.open(folder / target.artifact, target.precision, kept=kept)
        label = run_label(target)
        checks += [from_finding(label, finding) for finding in runner.findings()]
        one = target.runtime.one_at_a_time
        checks += _computed(context, label, runner, context.computes_in(target), one_at_a_time=one)
        if interface_of(context.manifest, name).gives == PROBABILITIES:
            checks.append(check_probabilities(label, runner, context.probes.images, target.precision))
        return FileResult(tuple(checks), runner.execution)
    except BackendUnavailableError as error:
        return FileResult((*checks, _not_executed(run_label(target), Missing(error.message.rstrip("."), error.remedy))))
    except AuditError as error:
        return FileResult((*checks, broken("audit", run_label(target), error.message)))
    except KdexportError as error:
        return FileResult((*checks, broken("run", run_label(target), error.message)))


def _content(target: Target, folder: Path, kept: Sequence[str]) -> list[Finding]:
    """What the files of a target contain; unchecked if this machine cannot read them."""
    try:
        return target.runtime.audit(folder, target.precision, kept)
    except BackendUnavailableError as error:
        return [unchecked(CONTENT, f"not read on this machine: {error.message.rstrip('.')}")]


def run_label(target: Target) -> str:
    """The name of a target's run in its own runtime, in reports and stored results."""
    where = f"{TARGETS}/{target}/{target.artifact}"
    device = target.runtime.device(target.precision).upper()
    return where if target.compiles else f"{where} on {target.runtime.title} {device}"


def _not_executed(where: str, missing: Missing) -> Check:
    return from_finding(where, unchecked(EXECUTION, f"not executed on this machine: {missing.reason}"))


def _stand_in(context: BundleContext, target: Target, kept: Sequence[str]) -> list[Check]:
    """The rung of a file that this machine runs in another precision only: what it contains, not how it runs."""
    other = target.runtime.stand_in(target.precision)
    if other is None:
        return []
    where = f"{run_label(target)} in {other}"
    path = context.folder / TARGETS / str(target) / target.artifact
    try:
        runner = target.runtime.open_stand_in(path, target.precision, kept=kept)
        candidate = runner.run(context.probes.images, context.batches)
    except BackendUnavailableError as error:
        return [from_finding(where, unchecked(EXECUTION, f"not executed on this machine: {error.message.rstrip('.')}"))]
    except KdexportError as error:
        return [broken("run", where, error.message)]
    return _rung(context, where, candidate, context.computes_in(target))


class _Reference(Runner):
    """The reference run of an ONNX file."""

    def __init__(self, model: OrtModel) -> None:
        self._model = model

    @property
    def execution(self) -> Execution:
        return execution_of(self._model, CPU)

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._model.logits(images)

    def outputs(self, images: NDArray[np.float32], names: Sequence[str]) -> list[NDArray[np.float32]]:
        return self._model.outputs(images, names)


def _computed(
    context: BundleContext, where: str, runner: Runner, form: str, *, one_at_a_time: bool = False
) -> list[Check]:
    """Dynamic batches, the rung of ``form``, and repeatability of an opened target."""
    if runner.starts_a_process:
        return _rung(context, where, runner.run(context.probes.images, context.batches), form)
    dynamic = check_batches(where, runner.logits, context.probes, one_at_a_time=one_at_a_time)
    if not dynamic.holds:
        return [dynamic]
    candidate = runner.run(context.probes.images, context.batches)
    return [
        dynamic,
        *_rung(context, where, candidate, form),
        *check_repeatable(where, runner.logits, context.probes, min(8, context.batches[-1])),
    ]


def _rung(context: BundleContext, where: str, candidate: NDArray[np.float32], form: str) -> list[Check]:
    if form in ("fp32", IN_ORDER):
        return rung_b(where, candidate, context.reference, context.probes, context.policy.B, form=form)
    return rung_c(where, candidate, context.reference, context.probes, form=form, policy=context.policy.C)


def _ranges(path: Path, form: str) -> dict[str, Range]:
    return read_ranges(path.with_name(RANGES)) if form.startswith("int8") else {}


def open_file(path: Path, form: str) -> OrtModel:
    """The reference run of an ONNX file, by onnxruntime on the CPU.

    onnxruntime has no bf16 convolutions on the CPU; a bf16 file is emulated, with every result rounded.
    """
    if form == "bf16":
        return load_model(path, content=emulate_bf16(path), optimise=False)
    # The form for TensorRT has Q/DQ pairs around float32 operators; onnxruntime's optimisation would change results.
    return load_model(path, optimise=form != "int8-s8")


def _metadata(context: BundleContext, path: Path, interface: FileInterface) -> Finding:
    """The metadata in the file equals the manifest: classes, preprocessing, origin, input and output."""
    written = read_metadata(onnx.load(str(path), load_external_data=False))
    # Through JSON, as the metadata was written: tuples become lists.
    expected = json.loads(json.dumps(model_metadata(context.manifest.spec, sha256_file(context.folder / UNFUSED))))
    written = {"input": PLAIN_INTERFACE.takes, "output": PLAIN_INTERFACE.gives, **written}
    expected = {**expected, "input": interface.takes, "output": interface.gives}
    wrong = [key for key in expected if key != "version" and written.get(key) != expected[key]]
    fact = f"differs from the manifest in {', '.join(wrong)}" if wrong else "equal to the manifest"
    return Finding("metadata", not wrong, fact)
