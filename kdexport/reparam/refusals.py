"""What is refused before a fold, each with its reason: an exact fold or none."""

from typing import Any, cast

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdexport.errors import ReparamError


def require_eval(module: nn.Module) -> None:
    """Every submodule is in evaluation mode."""
    for name, child in module.named_modules():
        if child.training:
            raise ReparamError(
                f"{name or type(module).__name__} is in training mode: its batch norms would use the batch's "
                "statistics.",
                remedy="Call .eval() on the module first; comparing in training mode is the commonest false alarm.",
            )


def require_same_geometry(convs: list[nn.Conv2d], path: str) -> None:
    """Branches that are summed share everything but their weights."""

    def geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
        return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, tuple(conv.weight.shape)

    for index, conv in enumerate(convs):
        if geometry(conv) != geometry(convs[0]):
            raise ReparamError(
                f"Branch {path}.branches.{index} has geometry {geometry(conv)}, branch 0 has {geometry(convs[0])}.",
                remedy="Branches are summed into one convolution and must share stride, padding, dilation and groups.",
            )


def refuse_shared(name: str, node: fx.Node, count: int) -> None:
    """The layer before a batch norm is called once and read by it alone."""
    refuse_reuse(name, count)
    if len(node.users) != 1:
        raise ReparamError(
            f"The output of {name} has {len(node.users)} users; after folding, the others would read another value.",
            remedy="Give the batch norm a layer of its own.",
        )


def refuse_reuse(name: str, count: int) -> None:
    """A module that is folded has one place in the forward pass."""
    if count > 1:
        raise ReparamError(
            f"{name} is called at {count} places of the forward pass; one set of weights cannot hold {count} folds.",
            remedy="Give each place its own module.",
        )


def refuse_parametrization(module: nn.Module, name: str) -> None:
    """A module that is folded has no parametrization that computes its weight anew."""
    if nn.utils.parametrize.is_parametrized(module):
        raise ReparamError(
            f"{name} is parametrized, so its weight is computed anew in each pass.",
            remedy="Call torch.nn.utils.parametrize.remove_parametrizations first.",
        )


def require_positional(node: fx.Node) -> None:
    """A module is called with one positional argument."""
    if len(node.args) != 1 or node.kwargs:
        raise ReparamError(
            f"{node.target} is not called with one positional argument.", remedy=f"Call {node.target}(x) in forward()."
        )


def require_statistics(batch_norm: nn.Module, name: str) -> None:
    """A batch norm keeps running statistics."""
    if cast(_BatchNorm, batch_norm).running_mean is None:
        raise ReparamError(
            f"{name} keeps no running statistics: its output depends on the other images of the batch.",
            remedy="Train with track_running_stats=True; there is no exact fold otherwise.",
        )


def require_pointwise(conv: nn.Conv2d, path: str, reader: str) -> None:
    """An adapter acts on each position alike, so that it commutes with what reads it."""
    pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
    if not pointwise or conv.padding not in ((0, 0), "valid", "same"):
        raise ReparamError(
            f"The branches of adapter {path} are no plain 1x1 convolutions: {conv}. They do not fold into {reader}.",
            remedy="Only an ungrouped, unpadded 1x1 convolution of stride 1 folds into the plain student's graph.",
        )


def refuse_hooks(module: nn.Module) -> None:
    """No submodule carries a forward hook: it would run on traced values, or be dropped with what is folded."""
    for name, child in module.named_modules():
        if child._forward_hooks or child._forward_pre_hooks:
            raise ReparamError(
                f"{name or type(module).__name__} carries a forward hook, which folding would drop or run on its own "
                "values.",
                remedy="Remove the hook first.",
            )
