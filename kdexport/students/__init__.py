"""Compact classifiers that are distilled and exported; one file per architecture family."""

from kdexport.registry import Registry
from kdexport.students.classifier import Classifier, Stage, Tap, Tapped
from kdexport.students.student import Host, Student

STUDENTS: Registry[Student] = Registry("student", "kdexport.students")

__all__ = ["STUDENTS", "Classifier", "Host", "Stage", "Student", "Tap", "Tapped"]
