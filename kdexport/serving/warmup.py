"""How many images run together: measured on the device at start, because it helps on some and hurts on others."""

import time

import numpy as np

from kdexport.serving.loading import LoadedModel

#: A larger batch must be at least this much faster an image, or it only adds waiting.
_WORTH = 1.1
_RUNS = 5


def measure_batches(model: LoadedModel) -> dict[int, float]:
    """Median seconds of a run by batch size: 1, 2, 4, ... up to what a request may hold."""
    times = {}
    size = model.signature.image_size
    batch = 1
    while batch <= min(64, model.signature.max_batch):
        images = np.zeros((batch, 3, size, size), np.float32)
        model.logits(images)
        samples = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            model.logits(images)
            samples.append(time.perf_counter() - started)
        times[batch] = float(np.median(samples))
        batch *= 2
    return times


def choose_batch(times: dict[int, float]) -> int:
    """The smallest batch after which doubling no longer makes an image at least 10 % cheaper; ``times`` in seconds."""
    best, *larger = sorted(times)
    for batch in larger:
        if times[best] / best < _WORTH * times[batch] / batch:
            break
        best = batch
    return best
