"""The parity ladder: each rung isolates one cause, and each limit is a multiple of an error of the reference itself.

A  algebra: fused against unfused in float64, per block and whole.
B  fp32: the error against the float64 oracle, relative to the unfused float32 model's own error.
C  TF32, fp16, bf16, int8: the error against the oracle, relative to a simulation of that precision; for fp16 also the
   headroom of its activations.
D  the task, on the validation set: see ``task``.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdexport.backends.base import IN_ORDER, Logits
from kdexport.errors import first_line
from kdexport.graph.precision import FLOAT16_MAX
from kdexport.reparam.certificate import Certificate
from kdexport.verify.check import Check, check_at_most
from kdexport.verify.policy import AlgebraPolicy, Fp32Policy, LowPolicy
from kdexport.verify.reference import Probes, Reference

_ULP = float(np.finfo(np.float32).eps)


def rung_a(
    certificate: Certificate,
    fused: NDArray[np.float64],
    reference: Reference,
    probes: Probes,
    policy: AlgebraPolicy,
) -> list[Check]:
    """Algebra in float64: the certificate's blocks, and the whole student's logits ``fused`` (N,K) on the probes."""
    worst, limit = certificate.worst, min(certificate.limit, policy.relative_error)
    checks = []
    if worst is not None:
        detail = f"worst block {worst.name}, {worst.kind}"
        checks.append(
            check_at_most("A", "student", "blocks", worst.relative_error, limit, unit="of max", detail=detail)
        )
    return [*checks, check_whole(fused, reference.exact, limit, probes)]


def check_whole(fused: NDArray[np.float64], exact: NDArray[np.float64], limit: float, probes: Probes) -> Check:
    """float64 logits (N,K) of the folded student against those of the unfused one, relative to the largest."""
    difference = np.abs(fused - exact)
    error = _ratio(difference.max(), np.abs(exact).max())
    detail = f"worst input {probes.name(_worst(difference))}"
    return check_at_most("A", "student", "whole", error, limit, unit="of max", detail=detail)


def rung_b(
    subject: str,
    candidate: NDArray[np.float32],
    reference: Reference,
    probes: Probes,
    policy: Fp32Policy,
    *,
    form: str = "fp32",
) -> list[Check]:
    """float32 logits ``candidate`` (N,K) against the oracle, in multiples of the unfused model's own error.

    A small unfused model may be exact by chance. No float32 computation can promise less than one rounding of each
    feature and product, so the unit is at least that: 2^-23 of the sum of absolute terms of the logits, in the same
    norm (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Where an engine adds in order from the
    bias (``form`` is ``IN_ORDER``), it is at least the error of such sums, which the reference has from a simulation.
    """
    own = np.abs(reference.unfused.astype(np.float64) - reference.exact)
    own_rms = max(_rms(own), _ULP * _rms(reference.added))
    own_max = unit_error(form, reference)
    unit = "x unfused"
    if form == IN_ORDER and reference.in_order is not None:
        own_rms, unit = max(own_rms, reference.in_order.rms), "x sums in order"
    error = np.abs(candidate.astype(np.float64) - reference.exact)
    detail = f"worst input {probes.name(_worst(error))}; largest error of the unfused fp32 model {own.max():.1e}"
    return [
        check_at_most("B", subject, "rms error", _ratio(_rms(error), own_rms), policy.rms_error, unit=unit),
        check_at_most(
            "B", subject, "max error", _ratio(error.max(), own_max), policy.max_error, unit=unit, detail=detail
        ),
    ]


def rung_c(
    subject: str,
    candidate: NDArray[np.float32],
    reference: Reference,
    probes: Probes,
    *,
    form: str = "fp16",
    policy: LowPolicy,
) -> list[Check]:
    """Low-precision logits against the oracle, in multiples of the simulated error of ``form``; finite everywhere.

    float16 also needs headroom in its activations. int8 is measured on the real images only: edge inputs are outside
    the calibrated range, where its levels end.
    """
    simulated = reference.simulated[form]
    count = len(simulated.logits)
    predicted = np.abs(simulated.logits.astype(np.float64) - reference.exact[:count])
    error = np.abs(candidate.astype(np.float64)[:count] - reference.exact[:count])
    detail = f"worst input {probes.name(_worst(error))}; {form} itself has an error of {_rms(predicted):.1e} rms"
    rms, largest = _ratio(_rms(error), _rms(predicted)), _ratio(error.max(), predicted.max())
    checks = [
        check_at_most("C", subject, "rms error", rms, policy.rms_error, unit="x simulated", detail=detail),
        check_at_most("C", subject, "max error", largest, policy.max_error, unit="x simulated"),
    ]
    if form == "fp16":
        limit = FLOAT16_MAX / policy.headroom
        checks.append(check_at_most("C", subject, "largest activation", simulated.peak, limit, unit="of 65504"))
    if count < len(candidate):
        invalid = int(np.sum(~np.isfinite(candidate[count:]).all(axis=1)))
        checks.append(check_at_most("C", subject, "edge inputs not finite", invalid, 0, unit="inputs"))
    return checks


def unit_error(form: str, reference: Reference) -> float:
    """Largest error of a logit that ``form`` itself has: the unit of the largest errors of rungs B and C."""
    if form in ("fp32", IN_ORDER):
        unit = float32_unit(reference.exact, reference.added, reference.unfused)
        return unit if form == "fp32" or reference.in_order is None else max(unit, reference.in_order.largest)
    logits = reference.simulated[form].logits
    return float(np.abs(logits.astype(np.float64) - reference.exact[: len(logits)]).max())


def float32_unit(exact: NDArray[np.float64], added: NDArray[np.float64], unfused: NDArray[np.floating[Any]]) -> float:
    """The unit of rung B's largest error: the largest error of the unfused student's float32 logits (N,K).

    It is at least one float32 rounding of the sum of absolute terms of a logit. ``exact`` and ``added`` come from
    ``run_exact``.
    """
    own = float(np.abs(unfused.astype(np.float64) - exact).max())
    return max(own, _ULP * float(added.max()))


def check_batches(subject: str, logits: Logits, probes: Probes, *, one_at_a_time: bool = False) -> Check:
    """The batch is dynamic: batches of one and of three images run and give one row for each image.

    ``one_at_a_time``: the runtime takes one image, and three are three runs.
    """
    name = "one image at a time" if one_at_a_time else "dynamic batch"
    found = []
    for count in (1, 3):
        try:
            found.append(len(logits(probes.images[:count])))
        # Each runtime has its own exception type for a shape that it was not built for.
        except Exception as error:  # noqa: BLE001
            fact = f"a batch of {count}: {first_line(error)}"
            return check_at_most("audit", subject, name, 1, 0, unit="faults", detail=fact)
    fact = f"{'one run and three runs' if one_at_a_time else 'batches of 1 and 3'} gave {found[0]} and {found[1]} rows"
    return check_at_most("audit", subject, name, float(found != [1, 3]), 0, unit="faults", detail=fact)


def check_repeatable(subject: str, logits: Logits, probes: Probes, batch: int) -> list[Check]:
    """Two runs on one input give equal bits, and an input with channels-last strides gives the same logits."""
    images = probes.images[:batch]
    once = logits(images)
    again = float(np.abs(logits(images) - once).max())
    strided = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    layout = float(np.abs(logits(strided) - once).max())
    return [
        check_at_most("run", subject, "same input twice", again, 0.0, unit="abs"),
        check_at_most("run", subject, "channels-last input", layout, 0.0, unit="abs"),
    ]


def _worst(difference: NDArray[np.floating[Any]]) -> int:
    per_input = difference.max(axis=1)
    return int(np.argmax(np.where(np.isnan(per_input), np.inf, per_input)))


def _rms(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _ratio(error: float, base: float) -> float:
    # With a base of zero only an error of zero passes. With a base that is not finite every error would pass, so none
    # does.
    if 0 < base < math.inf:
        return float(error) / float(base)
    return 0.0 if base == 0 and error == 0 else math.inf
