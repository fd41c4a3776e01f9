"""The check that a target computes the golden logits that its own runtime computed at the build."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import Finding, unchecked
from kdexport.bundle.manifest import TARGETS, Manifest, layer_plans
from kdexport.errors import BackendUnavailableError
from kdexport.targets import parse_target
from kdexport.verify.check import Check, from_finding
from kdexport.verify.golden_limits import compare_own, own_logits

_NAME = "own golden logits"


def check_own_logits(folder: Path, manifest: Manifest, name: str, pixels: NDArray[np.uint8]) -> list[Check]:
    """Run the golden images (N,S,S,3) uint8 in the runtime of target ``name``, one by one on one thread.

    Without a check for a target that this machine cannot run, or that did not run at the build.
    """
    target = parse_target(name)
    if target.not_executable() is not None:
        return []
    own = own_logits(folder, manifest, name)
    if own is None:
        fact = "not recorded: the target did not run at the build, or the bundle is of an earlier version"
        return [from_finding(name, unchecked(_NAME, fact), rung="golden")]
    plan = layer_plans(manifest).get(name)
    place = folder / TARGETS / name / target.artifact
    try:
        runner = target.runtime.open(place, target.precision, threads=1, kept=() if plan is None else plan.nodes)
        logits = runner.run(manifest.spec.preprocessing.normalise(pixels), (1,))
    except BackendUnavailableError:
        # The checks of the target report why it was not executed.
        return []
    distance = compare_own(own, logits, runner.execution)
    return [from_finding(name, Finding(_NAME, distance.holds, str(distance)), rung="golden")]
