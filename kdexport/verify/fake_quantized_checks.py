"""The certificate of quantize-aware training: an int8 file computes what was trained.

The graph that was trained is made again from the stored weights and ranges, and run in torch. Its scales, zero points
and rounded weights must be those of the file bit by bit. Its logits cannot be: a sum in another order moves a value
across the boundary of two levels, and behind a few layers such values are as many as the levels have noise. So the
distance is measured in units of the error of int8 itself, with the limits of rung C: two graphs whose roundings are
independent of each other, but have the same cause, are about 1.4 of it apart.
"""

import math

import numpy as np
import onnx

from kdexport.backends.base import Runner
from kdexport.bundle.manifest import RANGES
from kdexport.errors import KdexportError
from kdexport.graph.tensor_ranges import read_ranges
from kdexport.verify.check import Check, broken, check_at_most
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from kdexport.verify.reference import run_torch
from kdexport.verify.simulation import EXTREMES, Simulation
from kdexport.verify.student_checks import BundleContext, calibrated_by


def check_agreement(
    context: BundleContext, name: str, form: str, runner: Runner, rebuilt: RebuiltGraphs
) -> list[Check]:
    """The int8 file ``name``, opened as ``runner``, against its fake-quantized graph on the real images."""
    from kdexport.graph.fake_quantized import FakeQuantized

    subject = f"{name} against its fake-quantized graph"
    plan, bits = context.plan(name), context.weight_bits if form == "int8-u8" else 8
    try:
        quantized = onnx.load(str(rebuilt.cast(name, form, plan, context.weight_bits)))
        float32 = onnx.load(str(rebuilt.float32(form, plan)))
        ranges = read_ranges((context.folder / name).with_name(RANGES))
        graph = FakeQuantized(quantized, float32, ranges, weight_bits=bits).eval()
    except KdexportError as error:
        return [broken("C", subject, error.message)]
    images = context.probes.images[: context.probes.real]
    expected = run_torch(graph, images)
    found = runner.run(context.probes.images, context.batches)[: len(images)].astype(np.float64)
    student = context.trained[form]
    calibrated = calibrated_by(context.manifest).get(form, EXTREMES)
    simulated = run_torch(Simulation(student, form, weight_bits=bits, ranges=calibrated), images)
    rounding = simulated - run_torch(student, images)
    difference = found - expected
    rms, own = (float(np.sqrt(np.mean(np.square(values)))) for values in (difference, rounding))
    largest, own_largest = (float(np.abs(values).max()) for values in (difference, rounding))
    policy = context.policy.C
    detail = f"scales, zero points and levels of weights equal; {form} itself has an error of {own:.1e} rms"
    return [
        check_at_most("C", subject, "rms error", _ratio(rms, own), policy.rms_error, unit="x simulated", detail=detail),
        check_at_most("C", subject, "max error", _ratio(largest, own_largest), policy.max_error, unit="x simulated"),
    ]


def _ratio(error: float, unit: float) -> float:
    return error / unit if 0 < unit < math.inf else (0.0 if error == 0 and unit == 0 else math.inf)
