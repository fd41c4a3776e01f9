"""What people type, read strictly: shares with their percent sign, lists of clocks and batch sizes, output files."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from kdexport.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from kdexport.gate.result import Policy

_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")


def parse_share(option: str, text: str) -> float:
    """``2%`` as 0.02, above 0 and up to 100; without the sign nobody knows whether 2 means 2 % or 200 %."""
    match = _SHARE.fullmatch(text.strip())
    value = float(match[1]) / 100 if match else 0.0
    if not 0 < value <= 1:
        raise ConfigError(
            f"{option} {text!r} is no share: a number above 0 and up to 100 with a percent sign is.",
            remedy=f"For example: {option} 2%",
        )
    return value


def parse_batches(text: str) -> tuple[int, ...]:
    """``1,8`` as batch sizes, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < len(word) < 6 and int(word) for word in words):
        raise ConfigError(f"--batch {text!r} is no list of batch sizes.", remedy="For example: --batch 1,8")
    return tuple(dict.fromkeys(int(word) for word in words))


def parse_policy(text: str | None) -> "Policy":
    """What an undecided gate exits with: 3 where nothing was asked for."""
    words: dict[str | None, Policy] = {None: "exit", "warn": "warn", "fail": "fail"}
    if text not in words:
        raise UnknownNameError(f"--on-inconclusive {text!r} is not known.", remedy="Known: fail, warn.")
    return words[text]


def _use_plugins(sources: list[str] | None) -> list[str] | None:
    from kdexport.plugins import use_plugins

    use_plugins(sources)
    return sources


#: Every command that takes names has it; what it was given is in the environment before the command starts.
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE.py|MODULE",
        help="Import students, teachers, distillers or backends of your own. Repeatable.",
        callback=_use_plugins,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

Debug = Annotated[bool, typer.Option("--debug", help="Print tracebacks of errors.")]

Clock = Annotated[str, typer.Option(help="host (session.run), serve (through the HTTP server), gpu; comma separated.")]
Batch = Annotated[str, typer.Option(help="Batch sizes, comma separated.")]
Threads = Annotated[int, typer.Option(min=1, help="onnxruntime threads, each held on a processor of its own.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order in which arms and blocks run.")]
