"""Checks on each file of a bundle: its weights, its graph, and what it computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kdexport.backends.ort import CPU, load_model
from kdexport.backends.trt import Engine, EngineLayer, can_execute, require_precision, run_engine
from kdexport.bundle import (
    FUSED,
    LAYERS,
    MODEL,
    NOT_EXECUTED,
    PLAN,
    TARGETS,
    UNFUSED,
    Manifest,
)
from kdexport.checkpoint import load_strictly, load_tensors, sha256_file
from kdexport.errors import AuditError, KdexportError
from kdexport.graph.audit import Finding, audit_graph
from kdexport.graph.export import read_metadata
from kdexport.policy import Policy, stored_policy
from kdexport.reparam.fuse import fuse_student
from kdexport.stages import model_metadata
from kdexport.targets import parse_target
from kdexport.verify.findings import broken, from_finding
from kdexport.verify.parity import (
    Check,
    check_repeatable,
    run_in_batches,
    rung_a,
    rung_b,
    rung_c,
)
from kdexport.verify.reference import Probes, Reference, make_probes, make_reference, run_torch
from kdexport.verify.simulation import SIMULATED, Simulation
from kdexport.verify.stored import check_weights, load_unfused


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What all files of a bundle are compared with."""

    folder: Path
    manifest: Manifest
    batches: tuple[int, ...]
    probes: Probes
    reference: Reference
    weights: dict[str, NDArray[np.float32]]
    policy: Policy

    def simulation(self, name: str, precision: str) -> Simulation | None:
        """What ``precision`` alone makes of the student; None for float32. int8 takes its scales from file ``name``."""
        if precision == "int8":
            logits = run_in_batches(load_model(self.folder / name, optimise=False).logits, self.probes.images, (64,))
            return Simulation(logits=logits, peak=0.0)
        return None if precision == "fp32" else self.reference.simulated[precision]


def student_checks(folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]) -> tuple[list[Check], Subject | None]:
    """Weights and rungs A and B of the student itself, and what its files are compared with, None if it is damaged."""
    spec = manifest.spec
    try:
        unfused = load_unfused(folder, spec)
        exact = fuse_student(unfused.double())
        fused = fuse_student(load_unfused(folder, spec)).module
        stored = load_tensors(folder / FUSED)
        weights = check_weights(stored, fused.state_dict())
        load_strictly(fused, stored, FUSED)
    except KdexportError as error:
        return [broken("A", "student", error.message)], None
    probes = make_probes(pixels, spec.preprocessing)
    policy = stored_policy(manifest.data)
    asked = {str(entry["precision"]) for entry in manifest.targets.values()}
    precisions = [precision for precision in SIMULATED if precision in asked]
    reference = make_reference(load_unfused(folder, spec), fused, probes, precisions=precisions)
    merged = run_torch(exact.module, probes.images.astype(np.float64))
    checks = [weights, *rung_a(exact.certificate, merged, reference, probes, policy.A)]
    eager = run_torch(fused, probes.images).astype(np.float32)
    checks += rung_b("fused student, torch", eager, reference, probes, policy.B)
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    export = manifest.data["export"]
    batches = (int(export["min_batch"]), int(export["opt_batch"]), 7, int(export["max_batch"]))
    sizes = tuple(dict.fromkeys(min(batch, int(export["max_batch"])) for batch in batches))
    return checks, Subject(folder, manifest, sizes, probes, reference, arrays, policy)


def onnx_checks(subject: Subject, name: str, precision: str) -> list[Check]:
    """Audit and rung B or C of the ONNX file ``name``."""
    path = subject.folder / name
    findings = audit_graph(path, subject.weights, precision=precision, opset=subject.manifest.opset)
    checks = [from_finding(name, finding) for finding in findings]
    if not findings[0].holds:
        return checks
    checks.append(from_finding(name, _metadata(subject, path)))
    try:
        model = load_model(path)
    except AuditError as error:
        return [*checks, broken("audit", name, error.message)]
    elsewhere = {key: count for key, count in model.nodes_by_provider.items() if key != CPU}
    fact = ", ".join(f"{count} nodes on {key}" for key, count in model.nodes_by_provider.items())
    checks.append(from_finding(name, Finding("provider of each node", not elsewhere, fact)))
    candidate = run_in_batches(model.logits, subject.probes.images, subject.batches)
    where = f"{name} on onnxruntime CPU"
    checks += _parity(subject, where, candidate, subject.simulation(name, precision), precision)
    return [*checks, *check_repeatable(where, model.logits, subject.probes, min(8, subject.batches[-1]))]


def _metadata(subject: Subject, path: Path) -> Finding:
    """The file and the manifest say the same about classes, preprocessing and origin; each is read by somebody."""
    written = read_metadata(onnx.load(str(path), load_external_data=False))
    # As JSON, because that is what was written: tuples are lists there.
    expected = json.loads(json.dumps(model_metadata(subject.manifest.spec, sha256_file(subject.folder / UNFUSED))))
    wrong = [key for key in expected if key != "version" and written.get(key) != expected[key]]
    return Finding("metadata", not wrong, f"{', '.join(wrong) or 'all'} {'differ' if wrong else 'as'} in the manifest")


def engine_checks(subject: Subject, name: str) -> list[Check]:
    """Precision of each kernel of the engine of target ``name``, and its rung where this machine can run it."""
    target, where = parse_target(name), f"{TARGETS}/{name}/{PLAN}"
    try:
        engine = load_engine(subject.folder / TARGETS / name)
        require_precision(engine, target)
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
    simulation = subject.simulation(f"{TARGETS}/{name}/{MODEL}", target.precision)
    return [*checks, *_parity(subject, where, candidate, simulation, target.precision)]


def _parity(
    subject: Subject, where: str, candidate: NDArray[np.float32], simulation: Simulation | None, precision: str
) -> list[Check]:
    reference, probes, policy = subject.reference, subject.probes, subject.policy
    if simulation is None:
        return rung_b(where, candidate, reference, probes, policy.B)
    return rung_c(where, candidate, simulation, reference, probes, precision=precision, policy=policy.C)


def load_engine(folder: Path) -> Engine:
    """An engine and the layer table of its build, from a target's folder."""
    data: dict[str, Any] = json.loads((folder / LAYERS).read_text())
    layers = tuple(
        EngineLayer(name=row["name"], kind=row["kind"], datatypes=tuple(row["datatypes"])) for row in data["layers"]
    )
    return Engine(plan=folder / PLAN, layers=layers, version=str(data["version"]))
