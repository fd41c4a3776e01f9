"""Gives merged weights their names and types, and drops the weights that they replace."""

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


def settle(module: fx.GraphModule) -> None:
    """Drop weights that nothing reads, own those that stay, and round the merged ones once, under readable names.

    Raises ``ReparamError`` for a weight that leaves the range of its type.
    """
    _drop_unused(module)
    for name, child in list(module.named_children()):
        if isinstance(child, Merged):
            _place(module, name, child)
    module.delete_all_unused_submodules()
    module.recompile()


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


def _place(module: fx.GraphModule, holder: str, merged: Merged) -> None:
    path = merged.path
    owner = _submodule(module, path)
    while "weight" in owner._parameters or "bias" in owner._parameters:
        path += ".merged"
        owner = _submodule(module, path)
    for part in ("weight", "bias"):
        value = cast(Tensor, getattr(merged, part)).to(merged.device, merged.dtype)
        if not value.isfinite().all():
            raise ReparamError(
                f"The merged {path}.{part} exceeds the range of {merged.dtype}.",
                remedy="A channel with almost no variance has a huge gain: merge in a wider type, or train it again.",
            )
        owner.register_parameter(part, nn.Parameter(value, requires_grad=False))
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(f"{holder}."):
            node.target = f"{path}.{str(node.target).rpartition('.')[2]}"
    delattr(module, holder)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = cast(nn.Module, module._modules[name])
    return module
