"""What `kdexport list` prints."""

import json
import subprocess
import sys
from collections.abc import Callable

from kdexport.errors import BackendUnavailableError
from kdexport.targets import BACKENDS, parse_target, target_names, unavailable

Rows = list[tuple[str, str]]


def _students() -> Rows:
    from kdexport.students import STUDENTS

    return [(name, "") for name in STUDENTS.names()]


def _targets() -> Rows:
    rows = []
    for name in target_names():
        target = parse_target(name)
        missing = unavailable(target)
        rows.append((name, BACKENDS[target.backend] + (f" (not here: {missing[0]})" if missing else "")))
    return rows


def _from_training(kind: str) -> Callable[[], Rows]:
    def ask() -> Rows:
        command = [sys.executable, "-m", "training", "names", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BackendUnavailableError(
                f"The training package does not start: {done.stderr.strip()[-300:]}",
                remedy="Install kdexport whole: pip install kdexport.",
            )
        return [(name, "") for name in json.loads(done.stdout)]

    return ask


LISTS: dict[str, Callable[[], Rows]] = {
    "students": _students,
    "targets": _targets,
    "teachers": _from_training("teachers"),
    "distillers": _from_training("distillers"),
    "recipes": _from_training("recipes"),
}
