"""Layers and pooling in numpy and float64, for computations that are independent of torch."""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]


def array(x: Tensor | None) -> Array:
    assert x is not None
    return cast(Array, x.detach().double().numpy())


def parameter(module: nn.Module, path: str) -> Array:
    return array(dict(module.named_parameters())[path])


def averaged(x: Array, height: int, width: int) -> Array:
    """Each output pixel is the mean of the input pixels that it touches."""
    result = np.empty((*x.shape[:2], height, width))
    for i in range(height):
        rows = slice(i * x.shape[2] // height, -(-(i + 1) * x.shape[2] // height))
        for j in range(width):
            columns = slice(j * x.shape[3] // width, -(-(j + 1) * x.shape[3] // width))
            result[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return result


def peaks(x: Array, side: int) -> Array:
    bounds = [(i * x.shape[2] // side, -(-(i + 1) * x.shape[2] // side)) for i in range(side)]
    rows = [np.stack([x[:, :, a:b, c:d].max((2, 3)) for c, d in bounds], 2) for a, b in bounds]
    return cast(Array, np.stack(rows, 2))


def nearest(x: Array, height: int, width: int) -> Array:
    rows, columns = np.arange(height) * x.shape[2] // height, np.arange(width) * x.shape[3] // width
    return x[:, :, rows][:, :, :, columns]


def convolved(x: Array, weight: Array) -> Array:
    """Stride 1, the same size, zeros around."""
    reach = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width, result = x.shape[2], x.shape[3], 0.0
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            part = padded[:, :, i : i + height, j : j + width]
            result = result + np.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    return cast(Array, result)


def normalised(x: Array, module: nn.Module, path: str) -> Array:
    """Batch norm by the batch's own statistics."""
    spread = np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    weight, bias = (parameter(module, f"{path}.{key}").reshape(1, -1, 1, 1) for key in ("weight", "bias"))
    return cast(Array, (x - x.mean((0, 2, 3), keepdims=True)) / spread * weight + bias)


def bridged(x: Array, module: nn.Module, path: str) -> Array:
    return normalised(convolved(x, parameter(module, f"{path}.0.weight")), module, f"{path}.1")


def softened(logits: Array, temperature: float) -> Array:
    exponentials = np.exp(logits / temperature)
    return cast(Array, exponentials / exponentials.sum(1, keepdims=True))
