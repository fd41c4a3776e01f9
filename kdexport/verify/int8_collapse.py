"""Why int8 itself fails the task: layers whose channels differ so much that one scale leaves most of them no levels."""

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
from kdexport.verify.student_checks import Subject

OPTION = "--precision-search"
_UNSEARCHED = (
    f"Build again with {OPTION}: it equalises the channels of the offending layers or keeps these layers in float32, "
    "and shows what that costs. Another precision is the other way."
)
_SEARCHED = (
    "The precision plan kept its budget on training images and not here: lower flips, or noise where training "
    "images are known by heart, under [precision_search], or build another precision."
)
#: Checks of rung D whose limits are a choice; the others follow from what int8 costs by itself.
_BUDGETS = ("flips", "top-1 lost")
#: Images on which the ranges are read: every intermediate value of them is held at once.
_PROBES = 16


def explain_collapse(subject: Subject, checks: Sequence[Check]) -> tuple[list[Check], str]:
    """The checks, budgets that int8 by itself breaks with the reason in their detail, and what to do about it.

    Where every other check of a file holds, it is what int8 makes of this student, and int8 is to blame.
    """
    explained, remedy = list(checks), ""
    for name, entry in subject.manifest.targets.items():
        own = [check for check in checks if check.subject.startswith(f"{TARGETS}/{name}/")]
        lost = [check for check in own if not check.holds]
        if entry["precision"] != "int8" or not lost or any(check.name not in _BUDGETS for check in lost):
            continue
        searched = "plan" in entry
        remedy = remedy or (_SEARCHED if searched else _UNSEARCHED)
        reason = _noise(subject, parse_target(name).form) + ("" if searched else f"; {_ranges(subject)}")
        explained = [
            replace(check, detail=f"{check.detail}; {reason}") if check in lost else check for check in explained
        ]
    return explained, remedy


def _noise(subject: Subject, form: str) -> str:
    simulated = subject.reference.simulated[form].logits.astype(np.float64)
    noise = logit_noise(subject.reference.exact[: len(simulated)], simulated)
    word = "collapses" if not noise <= COLLAPSED else "is what costs this"
    return f"int8 {word}: by itself it moves the logits by {noise:.0%} of their size"


def _ranges(subject: Subject) -> str:
    try:
        model = onnx.load(str(subject.folder / MODEL))
        found = layer_ranges(model, {INPUT: subject.probes.images[: min(_PROBES, subject.probes.real)]})
    # protobuf raises its own error on a damaged file, which another check names.
    except (OSError, AuditError, ValueError) as error:
        return f"channel ranges are not readable ({type(error).__name__})"
    return "; ".join(explain_ranges(found)) or "no channel is out of proportion, the error is spread over the layers"
