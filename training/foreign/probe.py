"""One forward pass of a network that is not built from stages: which module computes what, and what reads it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kdexport.errors import ConfigError

#: Two images, so that the batch axis is recognised.
BATCH = 2

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus),
)
_ACTIVATION_NODES = frozenset(
    f"{name}Backward0"
    for name in (
        *("Relu", "LeakyRelu", "PreluKernel", "Elu", "Silu", "Gelu", "Mish", "Hardtanh", "Hardswish", "Hardsigmoid"),
        *("Sigmoid", "Tanh", "Softplus", "Threshold"),
    )
)
#: Nodes that only arrange values.
VIEWS = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Clone", "Squeeze", "Unsqueeze")
) | {"SqueezeBackward1", "SqueezeBackward2", "ViewBackward0", "AliasBackward0", "ExpandBackward0"}


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module: its first input and its output, with the nodes that computed them at that moment."""

    given: Any
    source: Node | None
    output: Any
    node: Node | None
    #: The number of changes in place of the output so far.
    version: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """Every call of every module in one forward pass in evaluation mode, in the order in which they ended."""

    network: nn.Module
    image_size: int
    calls: dict[str, list[Call]] = field(default_factory=dict)
    logits: Tensor

    def only_call(self, path: str, what: str) -> Call:
        """The call of the module ``path``; raises ``ConfigError`` unless there is exactly one."""
        if path not in self.calls:
            known = path in dict(self.network.named_modules())
            children = ", ".join(name for name, _ in self.network.named_children())
            raise ConfigError(
                f"{what} {path!r} {'is not called in a forward pass' if known else 'is not a module of the network'}.",
                remedy=f"The network consists of {children}, and of the modules in them.",
            )
        if len(self.calls[path]) > 1:
            raise ConfigError(
                f"{what} {path!r} is called {len(self.calls[path])} times in a forward pass.",
                remedy="Name a module that is called once.",
            )
        return self.calls[path][0]

    def order(self, path: str) -> int:
        """The place of the module ``path`` among all modules, by the end of its first call."""
        return list(self.calls).index(path)


def probe(network: nn.Module, image_size: int, name: str) -> Probe:
    """Run ``network`` once in evaluation mode on random images (2,3,S,S); it does not change.

    Raises ``ConfigError`` if it fails, or if its output is not one tensor (N,K).
    """
    images = torch.randn(BATCH, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    calls: dict[str, list[Call]] = {}
    with _evaluating(network), torch.enable_grad():
        handles = [
            module.register_forward_hook(partial(_note, calls, path)) for path, module in network.named_modules()
        ]
        try:
            output = network(images.requires_grad_())
        # Code of the user, or of a library on a size that it does not accept.
        except Exception as error:
            raise ConfigError(
                f"{name} fails on images of {image_size}x{image_size} pixels: {type(error).__name__}: {error}",
                remedy="Set the image size to one that the network accepts, or correct its code.",
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    require_logits(output, BATCH, name)
    return Probe(network=network, image_size=image_size, calls=calls, logits=output)


def require_logits(output: object, batch: int, name: str) -> None:
    """Raise ``ConfigError`` unless ``output`` is one tensor (batch,K)."""
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == batch:
        return
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(
        f"{name} returns {found} for {batch} images, not logits ({batch}, classes).",
        remedy="Use a factory MODULE:FACTORY whose network returns only the logits.",
    )


def trained_output(network: nn.Module, image_size: int) -> object:
    """The output of a copy of ``network`` in training mode; auxiliary heads exist only there."""
    twin = copy.deepcopy(network).train()
    with torch.no_grad():
        return twin(torch.randn(BATCH, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)))


def is_activation(node: Node | None) -> bool:
    """Whether ``node`` applies an activation function."""
    return node is not None and node.name() in _ACTIVATION_NODES


def through_views(node: Node | None) -> Node | None:
    """The node whose values ``node`` only arranges."""
    while node is not None and node.name() in VIEWS:
        node = node.next_functions[0][0]
    return node


def reader_counts(ends: list[Node]) -> dict[Node, int]:
    """How many nodes read the output of each node before ``ends``."""
    counts: dict[Node, int] = {}
    seen, pending = set(ends), list(ends)
    while pending:
        for source, _ in pending.pop().next_functions:
            if source is None:
                continue
            counts[source] = counts.get(source, 0) + 1
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return counts


def _note(calls: dict[str, list[Call]], path: str, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    given = inputs[0] if inputs else None
    calls.setdefault(path, []).append(Call(given, _node(given), output, _node(output), _version(output)))


def _node(value: Any) -> Node | None:
    return value.grad_fn if isinstance(value, Tensor) else None


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in network.modules()]
    flags = [(value, value.requires_grad) for value in network.parameters()]
    network.eval().requires_grad_(True)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for value, flag in flags:
            value.requires_grad_(flag)
