"""Finds the logits among the outputs of a network."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from kdexport.errors import ConfigError
from kdexport.registry import nearest


class OneOutput(nn.Module):
    """A network of which only one output is returned; ``path`` leads to it by keys and indices."""

    def __init__(self, network: nn.Module, path: tuple[str | int, ...]) -> None:
        super().__init__()
        self.network, self._path = network, path

    def forward(self, images: Tensor) -> Any:
        """(N,3,H,W) images to the chosen output."""
        found: Any = self.network(images)
        for part in self._path:
            found = getattr(found, str(part)) if is_dataclass(found) else found[part]
        return found


def choose_output(found: Any, name: str, label: str) -> tuple[str | int, ...]:
    """The path to the output ``name`` in what a network returned; empty if it returned one tensor.

    ``name`` is a key or an index, empty if none was chosen: then there must be one tensor only. Raises ``ConfigError``
    that lists the outputs.
    """
    tensors = {_text(path): path for path, _ in _tensors(found, ())}
    if name:
        if name not in tensors:
            raise ConfigError(
                f"{label} has no output {name!r}.", remedy=nearest(name, tensors or ["one tensor without a name"])
            )
        return tensors[name]
    if len(tensors) != 1:
        shapes = ", ".join(f"{_text(path)} {tuple(value.shape)}" for path, value in _tensors(found, ()))
        raise ConfigError(
            f"{label} returns {len(tensors)} tensors: {shapes or type(found).__name__}.",
            remedy='Name the one with the logits: output = "..." in the export configuration, or --output.',
        )
    return next(iter(tensors.values()))


def _tensors(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, (*path, index))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), (*path, field.name))


def _text(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))
