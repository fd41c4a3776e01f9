"""Distillation: everything that happens before a student is frozen. Imports kdexport, never the other way round."""

#: Part of the key of every training result: raised when the same recipe would give other weights.
REVISION = 4
