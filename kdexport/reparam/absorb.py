"""Finds the layer into which adapters fold, or says what stands in the way."""

from collections import Counter
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import ReparamError
from kdexport.reparam.refusals import refuse_parametrization, refuse_reuse, require_pointwise, require_positional

_POOLING = {functional.adaptive_avg_pool2d}
_TRANSPARENT = {torch.flatten, functional.dropout}
_MOVES_CHANNELS = {"view", "reshape", "transpose", "permute", "chunk", "split", "channel_shuffle", "pixel_shuffle"}
_USE_R1 = "Let branches take the place of this stage's own convolution instead (placement R1)."


def absorbing_layer(module: nn.Module, node: fx.Node, conv: nn.Conv2d, calls: Counter[int]) -> fx.Node:
    """The call of the layer that alone reads the adapters called at ``node``, whose branches look like ``conv``.

    That is the linear layer after global average pooling, or an ungrouped convolution directly after them that reads
    no padded zeros. Raises ``ReparamError`` that names what lies between, or why the reader cannot take them in.
    """
    path, pooled, current = str(node.target), False, node
    while True:
        current = _only_user(path, current)
        layer = module.get_submodule(str(current.target)) if current.op == "call_module" else None
        if isinstance(layer, nn.Linear) and pooled:
            require_pointwise(conv, path, "the pooling after it")
            break
        if isinstance(layer, nn.Conv2d) and not pooled:
            require_pointwise(conv, path, f"convolution {current.target}, whose kernel would grow")
            _require_takes_in(path, str(current.target), layer)
            break
        is_pool = isinstance(layer, nn.AdaptiveAvgPool2d) or current.target in _POOLING
        if is_pool and _pools_to_one(current, layer):
            pooled = True
        elif not isinstance(layer, nn.Dropout | nn.Identity | nn.Flatten) and current.target not in _TRANSPARENT:
            _refuse_between(path, current, layer)
    name = str(current.target)
    require_positional(current)
    refuse_reuse(name, calls[id(layer)])
    refuse_parametrization(cast(nn.Module, layer), name)
    return current


def batch_norm_of(module: nn.Module, layer: fx.Node) -> str | None:
    """The path of the batch norm that alone reads the output of ``layer``, None where there is none."""
    users = list(layer.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    name = str(users[0].target)
    return name if isinstance(module.get_submodule(name), _BatchNorm) else None


def _only_user(path: str, node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) == 1:
        return users[0]
    names = ", ".join(str(user.target) if user.op == "call_module" else user.name for user in users) or "none"
    raise ReparamError(
        f"The output of adapter {path} has {len(users)} users ({names}); adapters fold into exactly one layer.",
        remedy=_USE_R1,
    )


def _require_takes_in(path: str, name: str, reader: nn.Conv2d) -> None:
    if reader.groups != 1:
        raise ReparamError(
            f"Adapter {path} is read by {name}, which has {reader.groups} groups and the adapter has one: the fold "
            f"would be an ungrouped convolution with {reader.groups} times the operations.",
            remedy=_USE_R1,
        )
    pads = any(reader.kernel_size[d] > 1 for d in (0, 1)) if reader.padding == "same" else _nonzero(reader.padding)
    if pads and reader.padding_mode == "zeros":
        raise ReparamError(
            f"Adapter {path} is read by {name}, which pads zeros around the adapter's output: the shift of the "
            "adapter's batch norms is missing at the border, and no single convolution has such a border.",
            remedy=_USE_R1,
        )


def _nonzero(padding: Any) -> bool:
    return padding != "valid" and any(size > 0 for size in padding)


def _refuse_between(path: str, node: fx.Node, layer: nn.Module | None) -> None:
    what = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", str(node.target))
    shuffles = what in _MOVES_CHANNELS or isinstance(layer, nn.ChannelShuffle)
    reason = "which moves channels or positions" if shuffles else "which does not commute with a linear map"
    raise ReparamError(
        f"Between adapter {path} and the layer that reads it lies {what}, {reason}.",
        remedy="R2 adapters need a 1x1 convolution, or global average pooling and a linear classifier, directly after "
        "them; use R1.",
    )


def _pools_to_one(node: fx.Node, layer: nn.Module | None) -> bool:
    size: Any = layer.output_size if isinstance(layer, nn.AdaptiveAvgPool2d) else node.args[1]
    return size in (1, (1, 1))
