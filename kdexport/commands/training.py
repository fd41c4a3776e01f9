"""`kdexport train`, `teacher`, `evaluate-run` and `table`: the commands of the training package."""

import typer

from kdexport.core.training_process import become_training

#: Options are read, and help is printed, by the training package.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Distil the student of a recipe."""
    become_training("train", context.args)


def teacher(context: typer.Context) -> None:
    """Train the teacher of a recipe."""
    become_training("teacher", context.args)


def evaluate_run(context: typer.Context) -> None:
    """Top-1 of a trained student or teacher of a recipe."""
    become_training("evaluate-run", context.args)


def table(context: typer.Context) -> None:
    """Run every cell of a table of results, and write it."""
    become_training("table", context.args)
