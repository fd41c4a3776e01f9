"""Why int8 itself fails the task: layers whose channels differ so much in range that one scale cannot serve all."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx

from kdexport.backends.base import INPUT
from kdexport.bundle.manifest import MODEL, TARGETS
from kdexport.errors import AuditError
from kdexport.graph.equalise import explain_ranges, layer_ranges
from kdexport.stats.logits import COLLAPSED, logit_noise
from kdexport.targets import parse_target
from kdexport.verify.check import Check
from kdexport.verify.student_checks import BundleContext

OPTION = "--precision-search"
_COMPARE = (
    "Set method = 'auto' under [calibration], which compares ways to find the ranges. If that is not enough, build"
)
_UNSEARCHED = (
    f"with {OPTION}: it equalises the channels of these layers or keeps the layers in float32, and reports "
    "the cost. Or train it for int8 ([quantize_aware] enabled = true), or build a target of another precision."
)
_SEARCHED = (
    "The precision plan is within its budget on training images, but not on validation images. Lower flips under "
    "[precision_search] (or noise, if the network makes no errors on its training images), or build a target of "
    "another precision."
)
_TRAINED = (
    "Raise epochs under [quantize_aware], set cross_entropy, or build with --precision-search instead, which keeps "
    "layers in float32."
)
#: Checks of rung D whose limits are chosen by the user; the limits of the others follow from the error of int8 itself.
_BUDGETS = ("flips", "top-1 lost")
#: Images on which the ranges are measured: all their intermediate values are in memory at once.
_PROBES = 16


def explain_collapse(context: BundleContext, checks: Sequence[Check]) -> tuple[list[Check], str]:
    """``checks`` with the reason in the detail of each budget that int8 itself exceeds, and the remedy.

    If every other check of a file holds, the file is right and the error comes from int8 itself.
    """
    explained, remedy = list(checks), ""
    for name, entry in context.manifest.targets.items():
        own = [check for check in checks if check.subject.startswith(f"{TARGETS}/{name}/")]
        lost = [check for check in own if not check.holds]
        if entry["precision"] != "int8" or not lost or any(check.name not in _BUDGETS for check in lost):
            continue
        searched = "plan" in entry
        first = "Build again" if entry["calibration"].get("method") == "auto" else _COMPARE
        unsearched = f"{first} {_UNSEARCHED}"
        remedy = remedy or (_TRAINED if "quantize_aware" in entry else _SEARCHED if searched else unsearched)
        reason = _noise(context, parse_target(name).form) + ("" if searched else f"; {_ranges(context)}")
        explained = [
            replace(check, detail=f"{check.detail}; {reason}") if check in lost else check for check in explained
        ]
    return explained, remedy


def _noise(context: BundleContext, form: str) -> str:
    simulated = context.reference.simulated[form].logits.astype(np.float64)
    noise = logit_noise(context.reference.exact[: len(simulated)], simulated)
    effect = "collapses" if not noise <= COLLAPSED else "is the cause"
    return f"int8 {effect}: by itself it changes the logits by {noise:.0%} of their size"


def _ranges(context: BundleContext) -> str:
    try:
        model = onnx.load(str(context.folder / MODEL))
        found = layer_ranges(model, {INPUT: context.probes.images[: min(_PROBES, context.probes.real)]})
    # protobuf raises its own error for a damaged file; another check reports the damage.
    except (OSError, AuditError, ValueError) as error:
        return f"the channel ranges cannot be read ({type(error).__name__})"
    return "; ".join(explain_ranges(found)) or "no channel stands out; the error is spread over the layers"
