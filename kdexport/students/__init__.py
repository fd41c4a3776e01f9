"""Compact classifiers that are distilled and exported; one file per architecture family."""

from kdexport.registry import Registry
from kdexport.students.student import Student, Tap

STUDENTS: Registry[Student] = Registry("student", "kdexport.students")

__all__ = ["STUDENTS", "Student", "Tap"]
