"""Calls a factory ``package.module:function`` of the user, which returns a network."""

import contextlib
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kdexport.errors import ConfigError, UnknownNameError, first_line
from kdexport.plugins import name_collision, share_name
from kdexport.registry import nearest


def call_factory(source: str, **offered: object) -> nn.Module:
    """The module that the factory ``source`` returns; it gets those of ``offered`` that are among its parameters.

    Importing and calling a factory runs its code, which is the user's own. Raises ``ConfigError`` for a factory that
    cannot be imported, that fails, or that returns something else.
    """
    name, _, attribute = source.rpartition(":")
    # Standard output belongs to the results of a command, for example with --json.
    with contextlib.redirect_stdout(sys.stderr):
        return _call(source, _find(name, attribute), offered)


def _find(name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    share_name()
    try:
        module = importlib.import_module(name)
    # Importing runs the user's code, which may raise or exit.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{name!r} cannot be imported from {here}: {type(error).__name__}: {first_line(error)}",
            remedy=name_collision(error)
            or "Run the command in the folder that contains the package, or install it; --debug shows the traceback.",
        ) from error
    if not hasattr(module, attribute):
        raise UnknownNameError(
            f"{name} has no {attribute!r}.",
            remedy=nearest(attribute, _factories(module)),
        )
    return getattr(module, attribute)


def _factories(module: ModuleType) -> list[str]:
    """The public functions and classes that ``module`` defines itself, or all that it has if it defines none."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    own = [name for name, value in public.items() if getattr(value, "__module__", "") == module.__name__]
    return own or list(public)


def _call(source: str, factory: Any, offered: dict[str, object]) -> nn.Module:
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ConfigError(
            f"{source} is a {type(factory).__name__}, not a factory.",
            remedy="Name a function that returns a module; it may take num_classes and image_size.",
        )
    given: dict[str, object] = {}
    try:
        given = _accepted(factory, offered)
        inspect.signature(factory).bind(**given)
        module = factory(**given)
    except (Exception, SystemExit) as error:
        called = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(
            f"{source}({called}) failed: {type(error).__name__}: {first_line(error)}",
            remedy=f"It is called with {called or 'no arguments'}; --debug shows the traceback.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{source}() returned a {type(module).__name__}, not a module.", remedy="Return a torch.nn.Module."
        )
    return module


def _accepted(factory: Any, offered: dict[str, object]) -> dict[str, object]:
    """Those of ``offered`` that are not None and that the factory takes by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(factory).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind in kinds}
    return {name: value for name, value in offered.items() if value is not None and name in named}
