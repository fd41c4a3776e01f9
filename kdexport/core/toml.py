"""Strict TOML: unknown keys and wrong types are errors that name the key."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from kdexport.errors import ConfigError
from kdexport.registry import nearest


class Settings(BaseModel):
    """Base of all configuration: frozen, no unknown key, no conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def model_of(cls, data: Mapping[str, Any]) -> type["Settings"]:  # noqa: ARG003
        """The model that reads ``data``: this one, unless one of its keys selects another."""
        return cls


M = TypeVar("M", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; raises ``ConfigError`` with the line of a syntax error."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}.", remedy="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", remedy="Check the file and its permissions.") from error
    # A number with thousands of digits is a ValueError, very deep nesting a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}.", remedy="Correct the line that the message names."
        ) from error


def parse(model: type[M], data: Mapping[str, Any], source: str) -> M:
    """Validate ``data`` against ``model``; raises ``ConfigError`` with each wrong key and the nearest known one."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [
            _problem(model, data, item["type"], item["loc"], item["msg"], item["input"]) for item in error.errors()
        ]
        raise ConfigError(
            f"{source}: {problems[0]}" if len(problems) == 1 else f"{source}:\n  " + "\n  ".join(problems),
            remedy="Correct the file or the option, then run the same command again.",
        ) from None


def _problem(
    model: type[BaseModel], data: Any, kind: str, location: tuple[int | str, ...], text: str, value: Any
) -> str:
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        known = _fields_at(model, data, location[:-1])
        return f"unknown key {key!r}. {nearest(str(location[-1]), known)}" if known else f"unknown key {key!r}."
    if kind == "missing":
        return f"the key {key!r} is missing."
    text = text.removeprefix("Value error, ").replace("a valid tuple", "a list, such as [1, 2]")
    if isinstance(value, Mapping):
        # A rule for several keys of a table; the table itself would hide it.
        return f"{key}: {text}." if key else f"{text}."
    return f"{key} = {value!r} ({type(value).__name__}): {text[:1].lower()}{text[1:]}."


def _fields_at(model: type[BaseModel], data: Any, location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        field = current.model_fields.get(str(part)) if isinstance(part, str) else None
        if field is None:
            return []
        current = next(
            (t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)),
            None,
        )
        if current is None:
            return []
        data = data.get(part) if isinstance(data, Mapping) else None
        if issubclass(current, Settings) and isinstance(data, Mapping):
            current = current.model_of(data)
    return list(current.model_fields)


def _is_model(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
