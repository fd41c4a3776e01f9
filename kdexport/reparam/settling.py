"""Gives merged weights their names and types, and drops the weights that they replace."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from kdexport.errors import ReparamError
from kdexport.reparam.convolution import Convolution


class Merged(nn.Module):
    """Weights of one merged block in float64, and the path, device and type that they will have."""

    def __init__(self, conv: Convolution, path: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight, requires_grad=False)
        self.bias = nn.Parameter(conv.bias, requires_grad=False)
        self.path, self.device, self.dtype = path, device, dtype


@dataclass(frozen=True, slots=True)
class Rounding:
    """A merged weight by name, and the device and type it is to have."""

    name: str
    device: torch.device
    dtype: torch.dtype


def settle(module: fx.GraphModule) -> list[Rounding]:
    """Drop weights that nothing reads, own those that stay, and give the merged ones readable names.

    The merged ones stay float64, so that what is certified is what will be written; ``round_merged`` comes last.
    """
    _drop_unused(module)
    roundings = []
    for name, child in list(module.named_children()):
        if isinstance(child, Merged):
            path = _place(module, name, child)
            roundings += [Rounding(f"{path}.{part}", child.device, child.dtype) for part in ("weight", "bias")]
    module.delete_all_unused_submodules()
    module.recompile()
    return roundings


def round_merged(module: fx.GraphModule, roundings: list[Rounding]) -> None:
    """Round the merged weights once. Raises ``ReparamError`` for one that leaves the range of its type."""
    for item in roundings:
        value = module.get_parameter(item.name).to(item.device, item.dtype)
        if not value.isfinite().all():
            raise ReparamError(
                f"The merged {item.name} exceeds the range of {item.dtype}.",
                remedy="A channel with almost no variance has a huge gain: merge in a wider type, or train it again.",
            )
        path, _, part = item.name.rpartition(".")
        setattr(module.get_submodule(path), part, nn.Parameter(value, requires_grad=False))


def _drop_unused(module: fx.GraphModule) -> None:
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    own: dict[int, Tensor] = {}
    for name, value in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        if name not in used:
            delattr(owner, attribute)
        elif not isinstance(owner, Merged):
            # The tensors of the original are not shared: what is done to the result must not reach it.
            fresh = own.setdefault(id(value), value.detach().clone())
            is_parameter = isinstance(value, nn.Parameter)
            setattr(owner, attribute, nn.Parameter(fresh, requires_grad=False) if is_parameter else fresh)


def _place(module: fx.GraphModule, holder: str, merged: Merged) -> str:
    path = merged.path
    owner = _submodule(module, path)
    while "weight" in owner._parameters or "bias" in owner._parameters:
        path += ".merged"
        owner = _submodule(module, path)
    owner.weight, owner.bias = merged.weight, merged.bias
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(f"{holder}."):
            node.target = f"{path}.{str(node.target).rpartition('.')[2]}"
    delattr(module, holder)
    return path


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = cast(nn.Module, module._modules[name])
    return module
