"""Distillation: the training of students. This package imports kdexport; kdexport never imports it."""

#: Part of the key of every training result; increased when the same recipe would give different weights.
REVISION = 5
