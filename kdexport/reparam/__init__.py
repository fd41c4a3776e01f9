"""Exact algebra that removes training-time branches and batch norms.

All but ``BranchSpec`` is imported on first use, so that reading a checkpoint's description does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from kdexport.reparam.spec import BranchSpec

if TYPE_CHECKING:
    from kdexport.reparam.algebra import fold_batch_norm, merge_branches
    from kdexport.reparam.blocks import attach_branches
    from kdexport.reparam.fold_student import FusedStudent, fuse_student
    from kdexport.reparam.program import FusedProgram, fuse_module

__all__ = [
    "BranchSpec",
    "FusedProgram",
    "FusedStudent",
    "attach_branches",
    "fold_batch_norm",
    "fuse_module",
    "fuse_student",
    "merge_branches",
]

_HOMES = {
    "fold_batch_norm": "algebra",
    "merge_branches": "algebra",
    "attach_branches": "blocks",
    "FusedStudent": "fold_student",
    "fuse_student": "fold_student",
    "FusedProgram": "program",
    "fuse_module": "program",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
