"""Methods of distillation; one file for each."""

from typing import TYPE_CHECKING

from kdexport.registry import Registry

if TYPE_CHECKING:
    # Recipes import the settings in this package, and reading a recipe must not import torch.
    from training.distillers.distiller import Distiller

DISTILLERS: "Registry[Distiller]" = Registry("distiller", "training.distillers")
