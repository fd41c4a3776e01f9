"""The forms in which networks write features: maps (N,C,H,W), maps (N,H,W,C) and tokens (N,L,C)."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kdexport.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How the output of a module becomes a feature (N,C,side,side); tokens have ``prefix`` class tokens before them."""

    kind: Literal["maps", "channels last", "tokens"]
    channels: int
    side: int
    prefix: int = 0

    def feature(self, output: Tensor) -> Tensor:
        """``output`` as (N,C,side,side)."""
        if self.kind == "maps":
            return output
        if self.kind == "channels last":
            return output.permute(0, 3, 1, 2)
        tokens = output[:, self.prefix :].transpose(1, 2)
        return tokens.reshape(len(output), self.channels, self.side, self.side)

    def stride(self, image_size: int) -> int | None:
        """The stride with side = ceil(image_size / stride): a power of two if one fits; None if there is none."""
        nearest = round(image_size / self.side)
        powers = [2**exponent for exponent in range(image_size.bit_length() + 1)]
        fitting = [s for s in (*powers, nearest, nearest + 1, nearest - 1) if s and -(-image_size // s) == self.side]
        return min(fitting, key=lambda s: (s not in powers, abs(s - nearest)), default=None)


def form_of(
    output: object, batch: int, path: str, prefix: int | None = None, *, writes_maps: bool | None = None
) -> Form:
    """The form of the output of the module ``path`` for square images; ``prefix`` is the number of class tokens.

    ``writes_maps`` is whether the layer that wrote it writes (N,C,H,W), None if that is not known; it decides where as
    many channels as rows leave both forms possible.

    Raises ``ConfigError`` if it is not one tensor, or if its axes cannot be told apart.
    """
    if not isinstance(output, Tensor):
        raise _refused(path, f"returns a {type(output).__name__}, not one tensor")
    shape = tuple(output.shape)
    if shape[:1] != (batch,):
        raise _refused(path, f"returns {shape} for {batch} images: its first axis is not the batch")
    if len(shape) == 4:
        return _map_form(shape, path, writes_maps)
    if len(shape) == 3:
        return _token_form(shape, path, prefix)
    raise _refused(path, f"returns {shape}, which is neither a map nor tokens")


def _map_form(shape: tuple[int, ...], path: str, writes_maps: bool | None) -> Form:
    _, first, second, third = shape
    is_first, is_last = second == third, first == second
    if is_first and is_last and first > 1 and writes_maps is not None:
        is_first = writes_maps
    elif is_first and is_last and first > 1:
        raise _refused(path, f"returns {shape}: channels before or after the map cannot be told apart")
    if is_first:
        return Form(kind="maps", channels=first, side=second)
    if is_last:
        return Form(kind="channels last", channels=third, side=first)
    raise _refused(path, f"returns {shape}, which is not a square map")


def _token_form(shape: tuple[int, ...], path: str, prefix: int | None) -> Form:
    _, length, channels = shape
    for extra in (0, 1) if prefix is None else (prefix,):
        side = math.isqrt(max(length - extra, 0))
        if side > 0 and side * side == length - extra:
            return Form(kind="tokens", channels=channels, side=side, prefix=extra)
    raise _refused(path, f"returns {shape}: {length} tokens are not a square map, with or without one class token")


def _refused(path: str, reason: str) -> ConfigError:
    return ConfigError(f"The tap {path!r} {reason}.", remedy="Name a module that returns a feature map in taps.")
