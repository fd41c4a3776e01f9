import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from kdexport.students import Tapped
from tests.training.small_distillation import assemble, batch
from training.channel_moments import ChannelMoments


def hostile_features(count: int, seed: int) -> Tensor:
    """Channels whose mean is up to a million times their deviation, one that is constant, one with a single outlier."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 5, 3, 4, generator=generator)
    features *= torch.tensor([1e-3, 1.0, 30.0, 0.0, 0.0]).reshape(1, 5, 1, 1)
    features += torch.tensor([1e3, -7.0, 0.1, 4.25, 0.0]).reshape(1, 5, 1, 1)
    features[seed % count, 4, 1, 2] = 1e4
    return features


@pytest.mark.parametrize("sizes", [(70,), (1, 40, 2, 27), (16, 16, 16, 22)])
def test_moments_of_parts_are_those_of_the_whole_to_the_last_bits(sizes: tuple[int, ...]) -> None:
    parts = [hostile_features(count, seed) for seed, count in enumerate(sizes)]
    moments = ChannelMoments()
    for part in parts:
        moments.add(part)
    mean, variance = moments.over_all_processes()
    whole = np.concatenate([part.double().numpy() for part in parts]).transpose(1, 0, 2, 3).reshape(5, -1)
    # With 80 bits the reference has no rounding of its own here.
    exact = whole.astype(np.longdouble)
    np.testing.assert_allclose(mean.numpy(), exact.mean(1).astype(float), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(variance.numpy(), exact.var(1, ddof=1).astype(float), rtol=1e-9, atol=1e-14)
    assert variance[3] == 0


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no features"):
        ChannelMoments().over_all_processes()


def test_a_calibration_keeps_the_features_of_one_batch() -> None:
    parts = assemble("kdiffusion", layers="multi", target_guide=1.0)
    living: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def outputs() -> Iterator[Tapped]:
        for seed in range(5):
            gc.collect()
            living.append(sum(reference() is not None for reference in references))
            taps = parts.frozen(batch(seed)[0])
            tensors = (*taps.features.values(), *taps.preactivations.values())
            references.extend(weakref.ref(tensor) for tensor in tensors)
            del tensors
            yield taps
            del taps

    parts.distiller.calibrate(outputs())
    # When a batch is computed, nothing is left of those before it.
    assert living == [0] * 5
