"""The shipped recipes: a few files, and a table of pairs and methods that defines all others."""

import functools
import math
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from kdexport.core.toml import Settings, parse, read_toml

_Pair = Annotated[str, Field(pattern=r"^[^-/]+-[^-/]+$")]
_METHODS = "parts/"


class _Table(Settings):
    """Pairs on one data set that extend the same recipe, with their published numbers."""

    set: str
    extends: str
    #: Each pair is TEACHER-STUDENT.
    pairs: list[_Pair]
    #: The source of the published numbers, and other sources for some methods.
    source: str = ""
    sources: dict[str, str] = Field(default_factory=dict)
    #: Top-1 in percent of "teacher" and of each method, one number for each pair; nan if none was published.
    top1: dict[str, list[float]] = Field(default_factory=dict)
    #: Keys of ``[distiller]`` by pair and method.
    settings: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_a_number_for_each_pair(self) -> "_Table":
        for row, numbers in self.top1.items():
            if len(numbers) != len(self.pairs):
                raise ValueError(
                    f"top1.{row} must have {len(self.pairs)} numbers, one for each pair, but has {len(numbers)}"
                )
        unknown = sorted(set(self.settings) - set(self.pairs))
        if unknown:
            raise ValueError(f"settings has the pair {unknown[0]!r}, which is not in pairs")
        return self


class _Tables(Settings):
    methods: dict[str, dict[str, Any]]
    tables: list[_Table]

    @model_validator(mode="after")
    def _names_known_methods(self) -> "_Tables":
        for table in self.tables:
            used = {*table.sources, *table.top1, *(method for row in table.settings.values() for method in row)}
            unknown = sorted(used - {"teacher", *self.methods})
            if unknown:
                raise ValueError(f"the method {unknown[0]!r} is not in [methods]")
        return self


def shipped_names() -> list[str]:
    """The sorted names of complete recipes; tables have SET/TEACHER-STUDENT and SET/TEACHER-STUDENT/METHOD."""
    return sorted(name for name in _recipes() if not name.startswith(_METHODS))


def shipped_recipe(name: str) -> dict[str, Any] | None:
    """The tables of the recipe or part ``name``, with the names that it ``extends``; None if it does not exist."""
    found = _recipes().get(name)
    return None if found is None else dict(found)


@functools.cache
def _recipes() -> dict[str, dict[str, Any]]:
    folder = Path(str(resources.files("training"))) / "recipes"
    files = [path for path in folder.rglob("*.toml") if path != folder / "tables.toml"]
    recipes = {path.relative_to(folder).with_suffix("").as_posix(): read_toml(path) for path in files}
    recipes |= read_listed(folder / "tables.toml")
    return recipes


def read_listed(path: Path) -> dict[str, dict[str, Any]]:
    """The recipes that a file of pairs and methods defines, by name; raises ``ConfigError``."""
    listed = parse(_Tables, read_toml(path), str(path))
    recipes: dict[str, dict[str, Any]] = {
        f"{_METHODS}{method}": {"distiller": distiller} for method, distiller in listed.methods.items()
    }
    for table in listed.tables:
        for index, pair in enumerate(table.pairs):
            name = f"{table.set}/{pair}"
            recipes[name] = _pair(table, index)
            recipes |= {f"{name}/{method}": _cell(table, index, name, method) for method in listed.methods}
    return recipes


def _pair(table: _Table, index: int) -> dict[str, Any]:
    teacher, student = table.pairs[index].split("-")
    return {
        "extends": table.extends,
        "teacher": {"name": teacher},
        "student": {"name": student},
        **_published(table, index, "teacher", key="teacher"),
    }


def _cell(table: _Table, index: int, name: str, method: str) -> dict[str, Any]:
    settings = table.settings.get(table.pairs[index], {}).get(method)
    return {
        "extends": [name, f"{_METHODS}{method}"],
        **({} if settings is None else {"distiller": settings}),
        **_published(table, index, method, key="top1"),
    }


def _published(table: _Table, index: int, row: str, *, key: str) -> dict[str, Any]:
    number = table.top1[row][index] if row in table.top1 else math.nan
    if math.isnan(number):
        return {}
    return {"published": {key: number, "source": table.sources.get(row, table.source)}}
