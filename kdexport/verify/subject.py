"""What all files of a bundle are compared with, and how a finding becomes a check."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.bundle import MODEL, TARGETS, Manifest, layer_plans
from kdexport.graph.findings import Finding
from kdexport.policy import DEFAULT, Policy
from kdexport.search.layers import PLAIN, LayerPlan
from kdexport.targets import Target
from kdexport.verify.parity import Check
from kdexport.verify.reference import Probes, Reference
from kdexport.verify.simulation import TF32


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What all files of a bundle are compared with."""

    folder: Path
    manifest: Manifest
    batches: tuple[int, ...]
    probes: Probes
    reference: Reference
    weights: dict[str, NDArray[np.float32]]
    policy: Policy = DEFAULT

    def plan(self, name: str) -> LayerPlan:
        """The precision plan of a target or of the ONNX file of one; without a search there is none."""
        target = name.removeprefix(f"{TARGETS}/").removesuffix(f"/{MODEL}")
        return layer_plans(self.manifest).get(target, PLAIN)

    def form(self, target: Target) -> str:
        """What ``target`` computes in: TF32 is a form of its own, though its graph says float32."""
        tf32 = target.needs_engine and target.precision == "fp32" and self.manifest.data["export"].get("tf32", False)
        return TF32 if tf32 else target.form


def from_finding(subject: str, finding: Finding, *, rung: str = "audit") -> Check:
    """A finding as a check that counts faults."""
    return Check(
        rung=rung,
        subject=subject,
        name=finding.check,
        holds=finding.holds,
        measured=float(not finding.holds),
        allowed=0.0,
        unit="faults",
        detail=finding.fact,
    )


def broken(rung: str, subject: str, fact: str) -> Check:
    """The failed check of something that cannot be read or run."""
    return from_finding(subject, Finding("readable", False, fact), rung=rung)
