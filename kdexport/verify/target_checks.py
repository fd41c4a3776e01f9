"""Checks on each file and target of a bundle: what its graph says, where it runs, and what it computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.base import Finding, run_in_batches
from kdexport.backends.discovery import can_execute, unavailable
from kdexport.backends.openvino import load_openvino, names_of_nodes, runtime_types_finding
from kdexport.backends.ort import CPU, OrtModel, integer_kernels, load_model
from kdexport.backends.trt import run_engine
from kdexport.backends.trt_layers import Engine, EngineLayer, require_precision
from kdexport.bundle.manifest import LAYERS, MODEL, NOT_EXECUTED, PLAN, RANGES, TARGETS, UNFUSED
from kdexport.checkpoint import sha256_file
from kdexport.errors import AuditError, KdexportError
from kdexport.graph.audit import audit_graph
from kdexport.graph.export import model_metadata, read_metadata
from kdexport.graph.precision import emulate_bf16
from kdexport.graph.tensor_ranges import Range, read_ranges
from kdexport.targets import parse_target
from kdexport.verify.check import Check, broken, from_finding
from kdexport.verify.parity import check_batches, check_repeatable, rung_b, rung_c
from kdexport.verify.student_checks import Subject

Logits = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def onnx_checks(subject: Subject, name: str, form: str) -> list[Check]:
    """Audit and rung B or C of the ONNX file ``name``, whose precision is written as ``form``."""
    path = subject.folder / name
    try:
        ranges = _ranges(path, form)
    except (OSError, ValueError, TypeError) as error:
        return [broken("audit", name, f"{RANGES}: {type(error).__name__}: {error}")]
    plan = subject.plan(name)
    findings = audit_graph(
        path,
        plan.scaled(subject.weights),
        form=form,
        opset=subject.manifest.opset,
        ranges=ranges,
        kept=plan.nodes,
    )
    checks = [from_finding(name, finding) for finding in findings]
    if not findings[0].holds:
        return checks
    checks.append(from_finding(name, _metadata(subject, path)))
    try:
        model = open_file(path, form)
        if form == "int8-u8":
            checks.append(from_finding(name, integer_kernels(path, len(plan.kept))))
    except AuditError as error:
        return [*checks, broken("audit", name, error.message)]
    elsewhere = {key: count for key, count in model.nodes_by_provider.items() if key != CPU}
    fact = ", ".join(f"{count} nodes on {key}" for key, count in model.nodes_by_provider.items())
    checks.append(from_finding(name, Finding("provider of each node", not elsewhere, fact)))
    return [*checks, *_computed(subject, f"{name} on onnxruntime CPU", model.logits, form)]


def _computed(subject: Subject, where: str, logits: Logits, form: str) -> list[Check]:
    """Batches, the rung of ``form``, and repeatability of something that runs."""
    dynamic = check_batches(where, logits, subject.probes)
    if not dynamic.holds:
        return [dynamic]
    candidate = run_in_batches(logits, subject.probes.images, subject.batches)
    return [
        dynamic,
        *_rung(subject, where, candidate, form),
        *check_repeatable(where, logits, subject.probes, min(8, subject.batches[-1])),
    ]


def _rung(subject: Subject, where: str, candidate: NDArray[np.float32], form: str) -> list[Check]:
    if form == "fp32":
        return rung_b(where, candidate, subject.reference, subject.probes, subject.policy.B)
    return rung_c(where, candidate, subject.reference, subject.probes, form=form, policy=subject.policy.C)


def _ranges(path: Path, form: str) -> dict[str, Range]:
    return read_ranges(path.with_name(RANGES)) if form.startswith("int8") else {}


def open_file(path: Path, form: str) -> OrtModel:
    """The file as what it says: where this CPU has no kernels of its precision, its own arithmetic step by step."""
    if form == "bf16":
        return load_model(path, content=emulate_bf16(path), optimise=False)
    # Q/DQ around float32 operators is what the form for TensorRT means, and what no optimisation here leaves alone.
    return load_model(path, optimise=form != "int8-s8")


def _metadata(subject: Subject, path: Path) -> Finding:
    """The file and the manifest say the same about classes, preprocessing and origin; each is read by somebody."""
    written = read_metadata(onnx.load(str(path), load_external_data=False))
    # As JSON, because that is what was written: tuples are lists there.
    expected = json.loads(json.dumps(model_metadata(subject.manifest.spec, sha256_file(subject.folder / UNFUSED))))
    wrong = [key for key in expected if key != "version" and written.get(key) != expected[key]]
    return Finding("metadata", not wrong, f"{', '.join(wrong) or 'all'} {'differ' if wrong else 'as'} in the manifest")


def openvino_checks(subject: Subject, name: str) -> list[Check]:
    """Precision of each layer as OpenVINO runs target ``name`` here, and its rung."""
    target, path = parse_target(name), subject.folder / TARGETS / name / MODEL
    where = f"{TARGETS}/{name}/{MODEL} on OpenVINO CPU"
    missing = unavailable(target)
    if missing is not None:
        return [from_finding(where, Finding("execution", True, f"not executed on this machine: {missing[0]}"))]
    try:
        model = load_openvino(path, precision=target.precision)
    except KdexportError as error:
        return [broken("audit", where, error.message)]
    precision = from_finding(
        where, runtime_types_finding(model, target, names_of_nodes(path, subject.plan(name).nodes))
    )
    return [precision, *_computed(subject, where, model.logits, target.form)]


def engine_checks(subject: Subject, name: str) -> list[Check]:
    """Precision of each kernel of the engine of target ``name``, and its rung where this machine can run it."""
    target, where = parse_target(name), f"{TARGETS}/{name}/{PLAN}"
    try:
        engine = load_engine(subject.folder / TARGETS / name)
        require_precision(engine, target, subject.plan(name).nodes)
    except AuditError as error:
        return [broken("audit", where, error.message)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [broken("audit", where, f"{LAYERS}: {type(error).__name__}: {error}")]
    fact = f"{len(engine.layers)} layers listed by the build"
    checks = [from_finding(where, Finding(f"every kernel in {target.precision}", True, fact))]
    if subject.manifest.targets[name]["status"] == NOT_EXECUTED or not can_execute(target):
        return [*checks, from_finding(where, Finding("execution", True, "not executed on this machine"))]
    try:
        candidate = run_engine(engine.plan, target, subject.probes.images, subject.batches)
    except KdexportError as error:
        return [*checks, broken("run", where, error.message)]
    return [*checks, *_rung(subject, where, candidate, subject.form(target))]


def load_engine(folder: Path) -> Engine:
    """An engine and the layer table of its build, from a target's folder."""
    data: dict[str, Any] = json.loads((folder / LAYERS).read_text())
    layers = tuple(EngineLayer.from_json(row) for row in data["layers"])
    return Engine(plan=folder / PLAN, layers=layers, version=str(data["version"]))
