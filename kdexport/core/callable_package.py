"""Packages that can also be called: ``kdexport.build`` is the folder of the stages, and what users call.

Importing a module of a package sets the package as an attribute of ``kdexport``, so that a function of the same name
would be lost as soon as that happens.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module("kdexport.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(getattr(importlib.import_module("kdexport.api"), self.__name__.rpartition(".")[2]))


def make_callable(package: str) -> None:
    """Let calls of ``package`` call the function of its name in ``kdexport.api``."""
    sys.modules[package].__class__ = _CallablePackage
