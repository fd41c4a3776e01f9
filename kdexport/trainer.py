"""Starts the training package as a child process; what comes back is a directory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kdexport.console import CHILD, end_with_parent
from kdexport.errors import ForwardedError, TrainingError

#: One child process per GPU when there are several.
_DISTRIBUTED = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def resolve_recipe(recipe: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """``{"revision": int, "recipe": {...}}``: the complete recipe after its base and ``overrides``."""
    answer = _call(["resolve", "--recipe", recipe, *_as_options(overrides)])
    return dict(json.loads(answer))


def train_teacher(recipe: str, overrides: dict[str, Any], out: Path) -> None:
    """Train the recipe's teacher into ``out``/model.safetensors, continuing what is there."""
    _call(["teacher", "--recipe", recipe, *_as_options(overrides), "--out", str(out)])


def train_student(recipe: str, overrides: dict[str, Any], out: Path, *, processes: int) -> None:
    """Distil the recipe's student into ``out``/student, continuing what is there."""
    _call(["train", "--recipe", recipe, *_as_options(overrides), "--out", str(out)], processes=processes)


def _call(arguments: list[str], *, processes: int = 1) -> str:
    launcher = ["-m"] if processes == 1 else [*_DISTRIBUTED, str(processes), "-m"]
    environment = dict(os.environ)
    if processes == 1:
        environment[CHILD] = str(os.getpid())
    command = [sys.executable, *launcher, "training", *arguments]
    # The launcher is not ours and would outlive us; what it starts ends with it.
    ending = end_with_parent if processes > 1 and sys.platform == "linux" else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False, preexec_fn=ending)
    if done.returncode == 0:
        return done.stdout
    try:
        error = json.loads(done.stdout.strip().rpartition("\n")[2])["error"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise TrainingError(
            f"The training process ended with exit code {done.returncode}.",
            remedy="Its output is above. The same command continues from the last finished epoch.",
        ) from None
    raise ForwardedError(
        error["message"], remedy=error["remedy"], code=error["code"], exit_code=done.returncode
    ) from None


def _as_options(tables: dict[str, Any], prefix: str = "") -> list[str]:
    options: list[str] = []
    for key, value in tables.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            options += _as_options(value, f"{name}.")
        else:
            # JSON scalars and arrays of them are TOML values as they are.
            options += ["--set", f"{name}={json.dumps(value)}"]
    return options
