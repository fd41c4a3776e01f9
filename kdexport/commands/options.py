"""Options that several commands share, and strict parsers of their values: percentages, batch sizes, policies."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from kdexport.gate.result import Policy

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
Clock = Annotated[str, typer.Option(help="host (session.run), serve (through the HTTP server), gpu; comma separated.")]
Batch = Annotated[str, typer.Option(help="Batch sizes, comma separated.")]
Threads = Annotated[int, typer.Option(min=1, help="onnxruntime threads, each pinned to its own processor.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the order in which arms and blocks run.")]


def _use_plugins(sources: list[str] | None) -> list[str] | None:
    from kdexport.plugins import use_plugins

    use_plugins(sources)
    return sources


#: An option of every command that takes names; its plugins are imported before the command starts.
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py|MODULE",
        help="Import your own students, teachers, distillers or backends. Repeatable.",
        callback=_use_plugins,
    ),
]

_PERCENTAGE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")


def parse_percentage(option: str, text: str) -> float:
    """Parse ``2%`` as 0.02. The sign is required, because 2 could mean 2 % or 200 %."""
    match = _PERCENTAGE.fullmatch(text.strip())
    value = float(match[1]) / 100 if match else 0.0
    if not 0 < value <= 1:
        raise ConfigError(
            f"{option} must be a percentage above 0% and up to 100%, e.g. 2%; got {text!r}.",
            remedy=f"For example: {option} 2%",
        )
    return value


def parse_batches(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of batch sizes such as ``1,8``; duplicates are removed."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < len(word) < 6 and int(word) for word in words):
        raise ConfigError(
            f"--batch must be positive integers separated by commas, e.g. 1,8; got {text!r}.",
            remedy="For example: --batch 1,8",
        )
    return tuple(dict.fromkeys(int(word) for word in words))


def parse_on_inconclusive(text: str | None) -> "Policy":
    """The policy for an undecided gate; exit code 3 by default."""
    policies: dict[str | None, Policy] = {None: "exit", "warn": "warn", "fail": "fail"}
    if text not in policies:
        raise UnknownNameError(
            f"--on-inconclusive must be warn or fail; got {text!r}.", remedy="For example: --on-inconclusive warn"
        )
    return policies[text]
