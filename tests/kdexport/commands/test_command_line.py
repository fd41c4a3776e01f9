"""Wrong command lines, with and without --json, and help on a narrow terminal."""

import re
import subprocess
import sys
from typing import Any

import pytest
import typer.main

from kdexport.cli import app
from tests.answers import SCHEMA, checked_answer, validate
from tests.conftest import Command

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TRAINING = ("train", "teacher", "evaluate-run", "table")
OWN = sorted(set(COMMANDS) - set(TRAINING))


@pytest.mark.parametrize("command", OWN)
def test_every_command_answers_an_unknown_option_in_json(command: str, here: Command) -> None:
    done = here(command, "--nope", "--json")
    assert (done.exit_code, done.answer["command"]) == (2, command)
    assert done.error["code"] == "KDX102"
    assert "--nope" in done.error["message"]
    assert done.error["remedy"].endswith(f"kdexport {command} --help to see what it takes.")
    assert done.stderr == f"error KDX102: {done.error['message']}\n{done.error['remedy']}\n"


@pytest.mark.parametrize(
    ("arguments", "command", "words"),
    [
        (("--json",), None, "No such option"),
        (("frobnicate", "--json"), None, "No such command 'frobnicate'."),
        (("verfy", "--json"), None, "Did you mean 'verify'?"),
        (("serve", "x", "--port", "99999", "--json"), "serve", "'--port'"),
        (("serve", "x", "--json", "--port"), "serve", "requires an argument"),
        (("gate", "x", "--threads", "two", "--json"), "gate", "'--threads'"),
        (("triton", "x", "--json"), "triton", "--repository"),
        (("inspect", "--json"), "inspect", "Missing argument"),
        (("inspect", "a", "b", "--json"), "inspect", "b"),
    ],
)
def test_a_wrong_command_line_is_one_json_object(
    arguments: tuple[str, ...], command: str | None, words: str, here: Command
) -> None:
    done = here(*arguments)
    assert (done.exit_code, done.answer["command"], done.error["code"]) == (2, command, "KDX102")
    assert words in done.error["message"]


def test_without_json_a_wrong_command_line_prints_nothing_on_stdout(here: Command) -> None:
    done = here("serve", "x", "--port", "99999")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error KDX102: ")
    # After -- it is the name of a file.
    done = here("predict", "nowhere", "--", "--json")
    assert (done.exit_code, done.stdout) == (2, "")


def test_the_commands_of_the_training_package_answer_too(kdexport: Command) -> None:
    done = kdexport("train", "--recipe", "digitz", "--out", "x", "--json")
    assert (done.exit_code, done.answer["command"], done.error["code"]) == (2, "train", "KDX100")
    done = kdexport("evaluate-run", "--nope", "--json")
    assert (done.exit_code, done.answer["command"], done.error["code"]) == (2, "evaluate-run", "KDX102")
    assert done.error["remedy"] == "Run kdexport evaluate-run --help to see what it takes."


def test_no_arguments_print_the_help_and_exit_with_2(here: Command) -> None:
    done = here()
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Commands:" in done.stderr


def test_the_schema_refuses_other_objects() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is of the extra dev")
    good = {
        "schema": "kdexport.answer/1",
        "kdexport": "0.1.0",
        "command": "list",
        "ok": True,
        "exit_code": 0,
        "result": {},
    }
    error = {"code": "KDX100", "message": "m", "remedy": ""}
    validate(good)
    failed = {**good, "ok": False, "exit_code": 1}
    validate(failed)
    for bad in (
        {**good, "schema": "kdexport.answer/2"},
        {**good, "ok": False},
        {**good, "exit_code": 1},
        {**good, "error": error},
        {**failed, "error": error},
        {key: value for key, value in good.items() if key != "result"},
        {key: value for key, value in good.items() if key != "command"},
        {**{key: value for key, value in good.items() if key != "result"}, "error": error},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(bad)
    assert SCHEMA.is_file()


def words(text: str) -> list[str]:
    """Without where lines end, also within a word after its hyphen."""
    return re.sub(r"\s+", "", text).split()


@pytest.mark.parametrize("command", [None, *OWN])
def test_help_is_whole_on_80_columns(command: str | None, here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = here(*([command] if command else []), "--help", columns=80)
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    (shown,) = words(done.stdout)
    if command is None:
        for name, each in COMMANDS.items():
            assert words(name + each.short_help)[0] in shown, name
        return
    for parameter in COMMANDS[command].params:
        assert not parameter.help or words(parameter.help)[0] in shown, parameter.name
        assert all(option in shown for option in parameter.opts if option.startswith("--"))


def test_help_of_the_training_package_is_whole_too() -> None:
    import training.__main__ as package

    for name, command in typer.main.get_command(package.app).commands.items():  # type: ignore[attr-defined]
        text = command.get_help(typer.Context(command, info_name=name, terminal_width=80))
        for parameter in command.params:
            assert not parameter.help or words(parameter.help)[0] in words(text)[0], (name, parameter.name)


def test_an_answer_is_read_from_one_line_that_is_strictly_json() -> None:
    code = "from kdexport.core.console import print_answer; print_answer({'a': [float('nan'), (float('inf'), 1.5)]})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert checked_answer(done.stdout, 0)["result"] == {"a": [None, [None, 1.5]]}
