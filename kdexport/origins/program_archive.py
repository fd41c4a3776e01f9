"""Reads archives of ``torch.export.save`` (.pt2) without running code that they contain.

``torch.export.load`` unpickles tensors that are marked so, opaque constants and example inputs, loads compiled code,
and evaluates strings: symbolic sizes, and guards once the program is run. Everything of that kind is looked at first,
and an archive that needs it is refused.
"""

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from kdexport.core.console import quiet
from kdexport.errors import CheckpointError, first_line

_TARGETS = re.compile(r"torch\.ops\.[A-Za-z_]\w*\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")

_EXPRESSION = {
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Eq", "Ne", "Lt", "Le", "Gt",
    "Ge",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not",
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "IntTrueDiv",
    "FloatTrueDiv", "PowByNatural", "positive", "nonnegative", "integer", "true", "false", "precision",
}  # fmt: skip

_GUARD = {
    "L", "size", "stride", "storage_offset", "math", "isnan", "float", "int", "len", "torch", "sym_float", "sym_int",
    "sym_max", "sym_min", "sym_not", "max", "min",
}  # fmt: skip

_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.operator, ast.Compare,
    ast.cmpop, ast.Call, ast.Subscript, ast.Attribute, ast.Name, ast.Load, ast.Constant, ast.keyword,
)  # fmt: skip


def open_archive(path: Path) -> ExportedProgram:
    """The exported program of a .pt2 file. Raises ``CheckpointError`` for a missing, damaged, foreign or unsafe one."""
    require_archive(path)
    _require_plain(path)
    try:
        with quiet():
            return torch.export.load(path)
    # The reader raises whatever its own parts raise.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read by torch {torch.__version__}: {type(error).__name__}: {first_line(error)}",
            remedy="Save it again with torch.export.save, of this version of torch.",
        ) from error


#: What files of trained weights are called; older ones are no archives.
_WEIGHT_FILES = (".pth", ".pt", ".ckpt", ".tar", ".bin")

_OTHER_FILES = {
    "weights": (
        "holds weights and no program",
        "Write a factory that builds the network, loads these weights and returns it in evaluation mode, and pass "
        "package.module:factory.",
    ),
    "TorchScript": (
        "is a TorchScript file, which torch.export does not read",
        "Pass package.module:factory of the Python module that it was made from.",
    ),
    "ONNX": (
        "is an ONNX file, and fuse merges PyTorch programs",
        "Pass package.module:factory of the network that it was exported from; the merged ONNX file is written for it.",
    ),
}


def require_archive(path: Path) -> None:
    """Raise ``CheckpointError`` that says what ``path`` is, unless it may be an archive."""
    if not path.is_file():
        raise CheckpointError(
            f"There is no file {path}.", remedy="Pass a .pt2 file of torch.export.save, or package.module:factory."
        )
    if path.suffix in (".onnx", ".safetensors"):
        raise _no_program(path, "ONNX" if path.suffix == ".onnx" else "weights")
    if path.suffix in _WEIGHT_FILES and not zipfile.is_zipfile(path):
        raise _no_program(path, "weights")


def _no_program(path: Path, kind: str) -> CheckpointError:
    fact, remedy = _OTHER_FILES[kind]
    return CheckpointError(f"{path} {fact}.", remedy=remedy)


def _require_plain(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
            files = {name.partition("/")[2]: name for name in names}
            # A truncated .pt2 can end in a whole archive of tensors.
            if "data.pkl" in files and path.suffix != ".pt2":
                raise _no_program(path, "TorchScript" if any(n.startswith("code/") for n in files) else "weights")
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} does not have its checksum")
            if not any(name.startswith("models/") for name in files):
                raise zipfile.BadZipFile("there is no models/ in it")
            for name, full in files.items():
                problem = _problem(name, archive.read(full))
                if problem:
                    raise CheckpointError(
                        f"{path} is refused: {name} {problem}.",
                        remedy="Export the module again with torch.export.save and torch 2.9 or later, or pass "
                        "package.module:factory if you trust its source.",
                    )
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a complete archive of torch.export.save: {first_line(error)}.",
            remedy="Copy it again, or save it again with torch.export.save.",
        ) from error


def _problem(name: str, content: bytes) -> str | None:
    """Why the reader would run something of this file; None if it would not."""
    if name.startswith("data/aotinductor/"):
        return "is compiled code"
    if name.startswith(("data/weights/", "data/constants/")):
        if name.endswith(".pt"):
            return "is a pickle of an old format"
        if name.endswith("_config.json"):
            return _pickled(name, content)
    if name.startswith("data/sample_inputs/") and content:
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception:  # noqa: BLE001, any failure means that more than tensors is in it
            return "holds more than tensors"
    if name.startswith("models/"):
        return _suspicious(json.loads(content))
    return None


def _pickled(name: str, content: bytes) -> str | None:
    """Which tensor of a list of tensors is a pickle; raises ``ValueError`` if it is no such list."""
    try:
        for key, entry in json.loads(content)["config"].items():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                return f"holds {key} as a pickle"
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{name} is not a list of tensors") from error
    return None


def _suspicious(program: dict[str, Any]) -> str | None:
    for key, value in _strings(program, ""):
        if key == "target" and not _TARGETS.fullmatch(value):
            return f"calls {value[:80]!r}"
        if key == "expr_str" and not _is_harmless(value, _EXPRESSION):
            return f"holds a size that is not a plain expression: {value[:80]!r}"
        if key == "guards_code" and not _is_harmless(value, _GUARD):
            return f"holds a guard that is not a plain comparison: {value[:80]!r}"
    return None


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, str):
        yield key, value


def _is_harmless(text: str, known: set[str]) -> bool:
    """Whether ``text`` is one expression of numbers, symbols, ``known`` names and nothing else."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (
        all(isinstance(node, _NODES) for node in ast.walk(tree))
        and all(name in known or re.fullmatch(r"[a-z]\d+", name) for name in names)
        and all(re.fullmatch(r"\w*", item) and "__" not in item for item in texts)
    )
