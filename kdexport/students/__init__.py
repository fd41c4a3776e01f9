"""Students: compact classifiers to distil and export; one file per architecture family."""

from kdexport.registry import Registry
from kdexport.students.classifier import Classifier, Stage, Tap, Tapped
from kdexport.students.student import Host, Student

STUDENTS: Registry[Student] = Registry("student", "kdexport.students")

__all__ = ["STUDENTS", "Classifier", "Host", "Stage", "Student", "Tap", "Tapped"]
