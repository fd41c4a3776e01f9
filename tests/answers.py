"""The object that a command prints with ``--json``, checked as a reader of docs/json.md would check it."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import kdexport

SCHEMA = Path(kdexport.__file__).parent / "core" / "answer.schema.json"


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def checked_answer(stdout: str, exit_code: int) -> dict[str, Any]:
    """The one object on ``stdout`` of a command that ended with ``exit_code``."""
    (line,) = stdout.splitlines()
    answer = json.loads(line, parse_constant=_refuse)
    common = {"schema", "kdexport", "command", "ok", "exit_code"}
    assert set(answer) in (common | {"result"}, common | {"error"}), set(answer)
    assert (answer["schema"], answer["kdexport"]) == ("kdexport.answer/1", kdexport.__version__)
    assert (answer["exit_code"], answer["ok"]) == (exit_code, exit_code == 0)
    assert answer["command"] is None or re.fullmatch(r"[a-z]+(-[a-z]+)*", answer["command"])
    assert isinstance(answer.get("result", {}), dict)
    # The envelope says it, and only the envelope.
    assert not answer.get("result", {}).keys() & {"ok"}
    if "error" in answer:
        assert set(answer["error"]) == {"code", "message", "remedy"}
        assert exit_code != 0
    # Of the extra dev; the assertions above need nothing.
    if importlib.util.find_spec("jsonschema"):
        validate(answer)
    return dict(answer)


def validate(answer: dict[str, Any]) -> None:
    """Raise ``jsonschema.ValidationError`` if the shipped schema refuses ``answer``."""
    import jsonschema

    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(answer)
