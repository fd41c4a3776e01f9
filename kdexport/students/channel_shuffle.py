"""The channel shuffle of both ShuffleNets."""

from torch import Tensor


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """(N,C,H,W) seen as ``groups`` groups of C/groups channels, to their first channels, then their second, and so on.

    Only the batch is left to be inferred, so that an exported graph has constant shapes and still takes any batch.
    """
    _, channels, height, width = x.shape
    grouped = x.reshape(-1, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(-1, channels, height, width)
