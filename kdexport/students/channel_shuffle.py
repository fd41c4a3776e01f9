"""The channel shuffle of ShuffleNetV1 and ShuffleNetV2."""

from torch import Tensor


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave ``groups`` groups of C/groups channels of (N,C,H,W): all first channels, all second ones, and so on.

    Only the batch dimension is inferred, so that an exported graph has constant shapes and a dynamic batch.
    """
    _, channels, height, width = x.shape
    grouped = x.reshape(-1, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(-1, channels, height, width)
