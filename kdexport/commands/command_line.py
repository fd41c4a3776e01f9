"""How a command line is run: a wrong one is an error like any other, with a code and a remedy."""

import sys
from typing import cast

import typer

from kdexport.errors import UsageError

#: What the command line library raises for a wrong command line; it exports only classes below this one.
_WRONG = cast(type[Exception], typer.BadParameter.__mro__[2])


def run(app: typer.Typer, program: str | None = None) -> None:
    """Run ``app`` with ``sys.argv`` and exit with its code; ``program`` is its name in help.

    Raises ``UsageError`` if the command line is wrong.
    """
    try:
        code = app(prog_name=program, standalone_mode=False)
    except _WRONG as error:
        raise _described(error) from None
    sys.exit(code or 0)


def _described(error: Exception) -> UsageError:
    context: typer.Context | None = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        assert context is not None
        sys.stderr.write(f"{context.get_help()}\n")
        sys.exit(UsageError.exit_code)
    message: str = error.format_message()  # type: ignore[attr-defined]
    path = "kdexport" if context is None else context.command_path
    return UsageError(message, remedy=f"Run {path} --help to see what it takes.")
