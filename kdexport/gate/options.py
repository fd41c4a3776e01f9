"""What people type, read strictly: shares with their percent sign, lists of clocks and batch sizes, output files."""

import os
import re
from pathlib import Path

from kdexport.errors import ConfigError, OutputError, UnknownNameError
from kdexport.gate.result import Policy
from kdexport.gate.session import CLOCKS
from kdexport.registry import nearest

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


def parse_clocks(text: str) -> tuple[str, ...]:
    """``host,serve`` as clocks, each once."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in CLOCKS:
            raise UnknownNameError(f"There is no clock {name!r}.", remedy=nearest(name, CLOCKS))
    return names


def parse_policy(text: str | None) -> Policy:
    """What an undecided gate exits with: 3 where nothing was asked for."""
    words: dict[str | None, Policy] = {None: "exit", "warn": "warn", "fail": "fail"}
    if text not in words:
        raise UnknownNameError(f"--on-inconclusive {text!r} is not known.", remedy="Known: fail, warn.")
    return words[text]


def require_writable_file(path: Path | None) -> None:
    """Raise ``OutputError`` before anything is timed where a report could not be written after it."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(
            f"{path} cannot be written: it is a folder, or its folder is missing or read-only.",
            remedy="Pass a file in a folder that exists; nothing was timed.",
        )


def write_file(path: Path, text: str) -> None:
    """Write whole or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
