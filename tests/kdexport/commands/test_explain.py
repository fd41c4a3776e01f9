"""`kdexport explain` for error codes."""

from kdexport.errors import error_codes
from tests.conftest import Command


def test_every_error_code_is_explained_by_the_command(here: Command) -> None:
    for code in error_codes():
        assert here("explain", code).stdout.startswith(code)
