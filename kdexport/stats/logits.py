"""Probabilities of logits, and distances between logits: noise relative to the signal, and KL divergence."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Above this noise, a third of the signal, the logits are treated as those of a different network.
COLLAPSED = 1 / 3


def logit_noise(exact: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """RMS difference of logits (N,K), relative to the RMS of ``exact`` around the mean of each image."""
    if not np.isfinite(other).all():
        return float("inf")
    # Adding one constant to all logits of an image changes no prediction, so the mean is not part of the signal.
    centred = exact - exact.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.mean(np.square(other - exact)) / np.mean(np.square(centred))))


def typical_noise(exact: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """``logit_noise`` with the median over images in place of the mean: an image that int8 cuts off does not decide.

    Another network has other logits for nearly all images.
    """
    if not np.isfinite(other).all():
        return float("inf")
    centred = exact - exact.mean(axis=1, keepdims=True)
    return float(np.sqrt(np.median(np.mean(np.square(other - exact), axis=1)) / np.mean(np.square(centred))))


def kl_divergence(reference: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(other)) per row of logits (N,K), in nats; never negative."""
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = _log_softmax(reference), _log_softmax(other)
        divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    result: NDArray[np.float64] = np.maximum(divergence, 0.0)
    return result


def probabilities_of(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(K,) or (N,K) logits to probabilities of the same shape, in float64 and without overflow."""
    values = logits.astype(np.float64)
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
