"""`kdexport explain`: explain an error code."""

import sys
from typing import Annotated

import typer

from kdexport.commands.options import Debug, Json
from kdexport.core.console import print_answer
from kdexport.errors import UnknownNameError, error_codes
from kdexport.registry import nearest


def explain(
    code: Annotated[str, typer.Argument(help="An error code, such as KDX330.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Explain an error code."""
    codes = error_codes()
    if code.upper() not in codes:
        raise UnknownNameError(f"There is no error code {code!r}.", remedy=nearest(code.upper(), codes))
    cls = codes[code.upper()]
    if as_json:
        print_answer({"code": cls.code, "exit_code": cls.exit_code, "explanation": cls.explanation})
    else:
        sys.stdout.write(f"{cls.code} (exit {cls.exit_code}): {cls.__doc__}\n{cls.explanation}\n")
