"""`kdexport list`: the names of students, teachers, distillers, recipes or targets."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json, Plugins
from kdexport.core.child import ChildDiedError, call
from kdexport.core.console import print_answer
from kdexport.core.training_process import training_environment
from kdexport.errors import BackendUnavailableError, UnknownNameError
from kdexport.registry import nearest

Rows = list[tuple[str, str]]


def _students() -> Rows:
    from kdexport.students import STUDENTS

    return [(name, "") for name in STUDENTS.names()]


def _targets() -> Rows:
    from kdexport.targets import parse_target, target_names

    rows = []
    for name in target_names():
        target = parse_target(name)
        missing = target.unavailable()
        rows.append((name, target.runtime.description + (f" (not on this machine: {missing[0]})" if missing else "")))
    return rows


def _from_training(kind: str) -> Callable[[], Rows]:
    def rows() -> Rows:
        try:
            names = call("training", ["names", kind], timeout_s=None, environment=training_environment())
        except ChildDiedError as error:
            raise BackendUnavailableError(
                f"The training package cannot be started: {error.stderr}",
                remedy="Reinstall kdexport with its training package: pip install --force-reinstall kdexport.",
            ) from None
        return [(name, "") for name in names]

    return rows


LISTS: dict[str, Callable[[], Rows]] = {
    "students": _students,
    "targets": _targets,
    "teachers": _from_training("teachers"),
    "distillers": _from_training("distillers"),
    "recipes": _from_training("recipes"),
}


def list_(
    kind: Annotated[str, typer.Argument(help="students, teachers, distillers, targets or recipes.")],
    plugin: Plugins = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List students, teachers, distillers, recipes or targets by name."""
    if kind not in LISTS:
        raise UnknownNameError(f"{kind!r} cannot be listed.", remedy=nearest(kind, LISTS))
    rows = LISTS[kind]()
    if as_json:
        print_answer({kind: [{"name": name, **({"note": note} if note else {})} for name, note in rows]})
    else:
        width = max(len(name) for name, _ in rows)
        sys.stdout.writelines(f"{name:<{width}}  {note}".rstrip() + "\n" for name, note in rows)
