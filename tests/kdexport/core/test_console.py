import sys

import pytest

from kdexport.core.console import guarded


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(130)])
def test_an_interrupted_command_says_that_it_can_be_continued(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        # The command line library turns the one into the other.
        raise error

    with pytest.raises(SystemExit) as left:
        guarded(app)
    assert left.value.code == 130
    said = "Interrupted. Run the same command again to continue from the last finished step or epoch.\n"
    assert capsys.readouterr().err == said


def test_other_exit_codes_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        guarded(lambda: sys.exit(3))
    assert left.value.code == 3
    assert capsys.readouterr().err == ""
