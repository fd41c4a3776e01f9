"""Methods of distillation; one file each."""

from kdexport.registry import Registry
from training.distillers.distiller import Distiller

DISTILLERS: Registry[Distiller] = Registry("distiller", "training.distillers")

__all__ = ["DISTILLERS", "Distiller"]
