"""How a model runs best on this machine, measured when it is loaded."""

import time

import numpy as np

from kdexport.backends.ort import CPU, OrtModel
from kdexport.serving.batching import UNKNOWN_PACE, Pace
from kdexport.serving.tensors import Signature

#: A larger batch must be at least this much faster an image, or it only adds waiting.
_WORTH = 1.1
_RUNS = 5
_MOST = 64


def measure_pace(model: OrtModel, provider: str, signature: Signature) -> Pace:
    """Time single images on a CPU, where a batch costs more an image, and batches of 1, 2, 4, ... elsewhere."""
    if provider == CPU:
        return Pace(seconds=_median_seconds(model, 1, signature.image_size), together=1)
    sizes = [2**power for power in range(_MOST.bit_length()) if 2**power <= min(_MOST, signature.max_batch)]
    times = {batch: _median_seconds(model, batch, signature.image_size) for batch in sizes}
    # Work for a device never runs on the event loop, which would wait for the device.
    return Pace(seconds=UNKNOWN_PACE.seconds, together=choose_batch(times))


def _median_seconds(model: OrtModel, batch: int, image_size: int) -> float:
    images = np.zeros((batch, 3, image_size, image_size), np.float32)
    model.logits(images)
    samples = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        model.logits(images)
        samples.append(time.perf_counter() - started)
    return float(np.median(samples))


def choose_batch(times: dict[int, float]) -> int:
    """The smallest batch after which doubling no longer makes an image at least 10 % cheaper; ``times`` in seconds."""
    best, *larger = sorted(times)
    for batch in larger:
        if times[best] / best < _WORTH * times[batch] / batch:
            break
        best = batch
    return best
