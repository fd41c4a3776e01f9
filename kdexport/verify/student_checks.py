"""Checks of a bundle as a whole and of its student: files, golden images, weights, algebra.

They end in a ``BundleContext``, which the checks of each file and target need.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from kdexport.backends.base import Finding
from kdexport.bundle.manifest import (
    FUSED,
    GOLDEN_LOGITS,
    MODEL,
    TARGETS,
    Manifest,
    changed_files,
    irregular_entries,
    layer_plans,
    load_unfused,
    trained_weights,
)
from kdexport.checkpoint import load_strictly, load_tensors
from kdexport.errors import CheckpointError, KdexportError
from kdexport.graph.plan import PLAIN, LayerPlan, Weights
from kdexport.graph.tensor_ranges import Method
from kdexport.reparam.evaluation import in_float64
from kdexport.reparam.expected import Structure, structure_of
from kdexport.reparam.fold_student import certify_fold, fuse_student
from kdexport.targets import Target, parse_target
from kdexport.verify.check import Check, broken, check_at_most, from_finding
from kdexport.verify.parity import check_whole, rung_a, rung_b
from kdexport.verify.policy import Policy, stored_policy
from kdexport.verify.reference import Probes, Reference, make_probes, make_reference, run_torch

#: Folding in float64 and rounding once may differ between machines in the last bit, but no further.
_WEIGHT_LIMIT = 3e-7


@dataclass(frozen=True, slots=True, eq=False)
class BundleContext:
    """A bundle with everything that its files are compared with: inputs, reference, folded weights, limits."""

    folder: Path
    manifest: Manifest
    batches: tuple[int, ...]
    probes: Probes
    reference: Reference
    weights: dict[str, NDArray[np.float32]]
    policy: Policy
    #: The folded student with the stored weights, and what a graph of it contains.
    fused: nn.Module
    structure: Structure
    #: Bits of weights in int8 files for CPUs.
    weight_bits: int = 8
    #: The folded student after quantize-aware training, by int8 form.
    trained: Mapping[str, nn.Module] = field(default_factory=dict)

    def weights_in(self, form: str) -> dict[str, NDArray[np.float32]]:
        """The float32 weights that a file in ``form`` was cast from."""
        if form not in self.trained:
            return self.weights
        return {name: value.numpy() for name, value in self.trained[form].state_dict().items()}

    def plan(self, name: str) -> LayerPlan:
        """The precision plan of a target, given by its name or its ONNX file; ``PLAIN`` if it was not searched."""
        target = name.removeprefix(f"{TARGETS}/").removesuffix(f"/{MODEL}")
        return layer_plans(self.manifest).get(target, PLAIN)

    def computes_in(self, target: Target) -> str:
        """The form that ``target`` computes in: TF32 if the build allows it, although its graph holds float32."""
        return target.runtime.computes_in(target.precision, self.manifest.data["export"])


def check_integrity(folder: Path, manifest: Manifest) -> list[Check]:
    """Every file is present and has the sha256 of the manifest."""
    changes = changed_files(folder, manifest.files)
    detail = ", ".join(f"{name} {change}" for name, change in changes.items()) or f"{len(manifest.files)} files"
    targets = folder / TARGETS
    present = {path.name for path in targets.iterdir()} if targets.is_dir() else set()
    fact = f"on disk {sorted(present)}, in the manifest {sorted(manifest.targets)}"
    irregular = ", ".join(f"{name} is {kind}" for name, kind in irregular_entries(folder).items())
    return [
        check_at_most("files", "bundle", "sha256", len(changes), 0, unit="files", detail=detail),
        from_finding("bundle", Finding("regular files", not irregular, irregular or "no link, device or empty folder")),
        from_finding("bundle", Finding("targets", present == set(manifest.targets), fact)),
    ]


def check_golden(folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]) -> list[Check]:
    """The golden images, decoded and preprocessed, give the stored reference logits in float64."""
    try:
        stored = load_tensors(folder / GOLDEN_LOGITS)["logits"].numpy()
        unfused = in_float64(load_unfused(folder, manifest.spec))
    except (KeyError, CheckpointError) as error:
        return [broken("golden", GOLDEN_LOGITS, str(error))]
    images = manifest.spec.preprocessing.normalise(pixels).astype(np.float64)
    exact = run_torch(unfused, images)
    if stored.shape != exact.shape:
        return [broken("golden", GOLDEN_LOGITS, f"shape {stored.shape}, expected {exact.shape}")]
    difference = np.abs(exact - stored).max() / np.abs(stored).max()
    return [check_at_most("golden", "images", "reference logits", difference, 1e-9, unit="of max")]


def student_checks(
    folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]
) -> tuple[list[Check], BundleContext | None]:
    """Weights and rungs A and B of the student itself; the context of its files is None if the student is damaged."""
    spec = manifest.spec
    try:
        exact = fuse_student(load_unfused(folder, spec))
        fused = exact.module
        stored = load_tensors(folder / FUSED)
        weights = check_weights(stored, fused.state_dict())
        load_strictly(fused, stored, FUSED)
        arrays = {name: tensor.numpy() for name, tensor in stored.items()}
        plans = _plans(manifest, arrays)
        trained = _trained(folder, manifest, fused)
    except KdexportError as error:
        return [broken("A", "student", error.message)], None
    policy, probes = stored_policy(manifest.data), make_probes(pixels, spec.preprocessing)
    plain, forms, bits = load_unfused(folder, spec), _forms(manifest), weight_bits(manifest)
    reference = make_reference(
        plain, fused, probes, forms=forms, weight_bits=bits, plans=plans, trained=trained,
        ranges=calibrated_by(manifest),
    )  # fmt: skip
    merged = run_torch(exact.exact, probes.images.astype(np.float64))
    changed = [from_finding(name, _change(stored, trained[form])) for form, name in trained_weights(manifest).items()]
    checks = [weights, *changed, *rung_a(exact.certificate, merged, reference, probes, policy.A)]
    eager = run_torch(fused, probes.images).astype(np.float32)
    checks += rung_b("fused student, torch", eager, reference, probes, policy.B)
    export = manifest.data["export"]
    batches = (int(export["min_batch"]), int(export["opt_batch"]), 7, int(export["max_batch"]))
    sizes = tuple(dict.fromkeys(min(batch, int(export["max_batch"])) for batch in batches))
    structure = structure_of(fused)
    return checks, BundleContext(
        folder, manifest, sizes, probes, reference, arrays, policy, fused, structure, bits, trained
    )


def _trained(folder: Path, manifest: Manifest, fused: nn.Module) -> dict[str, nn.Module]:
    """The folded student with each set of weights of a quantize-aware training."""
    found = {}
    for form, name in trained_weights(manifest).items():
        found[form] = copy.deepcopy(fused)
        load_strictly(found[form], load_tensors(folder / name), name)
    return found


def _change(folded: dict[str, Tensor], trained: nn.Module) -> Finding:
    """How far a quantize-aware training moved the folded weights: stated, and not limited."""
    moved = {name: (value - folded[name]).abs().max().item() for name, value in trained.state_dict().items()}
    shares = {name: change / max(folded[name].abs().max().item(), 1e-30) for name, change in moved.items()}
    worst = max(shares, key=lambda name: shares[name])
    fact = f"{sum(map(bool, moved.values()))} of {len(moved)} tensors changed"
    fact += f", most {worst}: by {shares[worst]:.2g} of its largest value"
    return Finding("trained from the folded weights", True, fact)


def _plans(manifest: Manifest, weights: Weights) -> dict[str, LayerPlan]:
    """Precision plans by form; a build has one for each. Raises ``AuditError`` if a plan does not fit the weights."""
    found = {parse_target(name).form: plan for name, plan in layer_plans(manifest).items()}
    for plan in found.values():
        plan.scaled(weights)
    return found


def _forms(manifest: Manifest) -> list[str]:
    export, targets = manifest.data["export"], [parse_target(name) for name in manifest.targets]
    computed = (target.runtime.computes_in(target.precision, export) for target in targets)
    return list(dict.fromkeys([*(target.form for target in targets), *computed]))


def weight_bits(manifest: Manifest) -> int:
    """The bits of quantized weights in CPU targets; a build has one setting."""
    found = (
        entry["calibration"]["weight_bits"]
        for name, entry in manifest.targets.items()
        if "calibration" in entry and parse_target(name).form == "int8-u8"
    )
    return int(next(found, 8))


def calibrated_by(manifest: Manifest) -> dict[str, tuple[Method, float]]:
    """The method by which the ranges of each int8 form were found, and its percentage."""
    found: dict[str, tuple[Method, float]] = {}
    for name, entry in manifest.targets.items():
        stated = entry.get("calibration", {})
        stated = stated.get("chosen", stated)
        if "method" in stated:
            found[parse_target(name).form] = (stated["method"], float(stated["percentile"]))
    return found


def check_algebra(folder: Path, manifest: Manifest, pixels: NDArray[np.uint8]) -> list[Check]:
    """Rung A block by block: fold the stored unfused student again in float64 and compare with the stored weights.

    No exported file is run. The whole student is compared on golden images (N,S,S,3) uint8 and edge inputs.
    """
    spec = manifest.spec
    try:
        unfused = in_float64(load_unfused(folder, spec))
        module, certificate = certify_fold(unfused)
        rounded = {name: tensor.float() for name, tensor in module.state_dict().items()}
        weights = check_weights(load_tensors(folder / FUSED), rounded)
    except KdexportError as error:
        return [broken("A", "student", error.message)]
    probes = make_probes(pixels, spec.preprocessing)
    images = probes.images.astype(np.float64)
    exact, merged = run_torch(unfused, images), run_torch(module, images)
    limit = min(certificate.limit, stored_policy(manifest.data).A.relative_error)
    blocks = [
        check_at_most("A", block.name, block.kind, block.relative_error, limit, unit="of max")
        for block in certificate.blocks
    ]
    return [weights, *blocks, check_whole(merged, exact, limit, probes)]


def check_weights(stored: dict[str, Tensor], fused: dict[str, Tensor]) -> Check:
    """The stored weights equal the folded ones up to the last bit; the detail names the layer that differs most."""
    worst, where = 0.0, ""
    for name, expected in fused.items():
        tensor = stored.get(name)
        if tensor is None or tensor.shape != expected.shape:
            return broken("A", FUSED, f"layer {name} is missing or of another shape")
        scale = expected.abs().clamp(min=expected.abs().max().item() * 1e-6 + 1e-30)
        error = ((tensor - expected).abs() / scale).max().item()
        if not error <= worst and not math.isnan(worst):
            worst, where = error, f"layer {name}"
    return check_at_most("A", FUSED, "weights are the folded ones", worst, _WEIGHT_LIMIT, unit="relative", detail=where)
