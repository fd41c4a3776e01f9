"""Teachers: the networks that students learn from; one file for each architecture family."""

from kdexport.registry import Registry
from training.teachers.teacher import Teacher

TEACHERS: Registry[Teacher] = Registry("teacher", "training.teachers")

__all__ = ["TEACHERS", "Teacher"]
