"""Hooks of mkdocs: pages that are made from code, and links that lead out of this folder."""

import inspect
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Pages with this line get what the code says in its place.
_COMMANDS, _ERRORS, _SETTINGS = "<!-- commands -->", "<!-- error codes -->", "<!-- settings -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in generated parts; links to files of the repository that are no pages become their names."""
    if _COMMANDS in markdown:
        markdown = markdown.replace(_COMMANDS, commands())
    if _SETTINGS in markdown:
        markdown = markdown.replace(_SETTINGS, settings())
    if _ERRORS in markdown:
        markdown = markdown.replace(_ERRORS, errors())
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:[\w.-]+/)*[\w.-]+\.(?:md|py|toml|yml|yaml)\)",
                  lambda link: link[0] if _is_page(link[0], page) else link[1], markdown)  # fmt: skip


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def inline(found: "re.Match[str]") -> str:
        return convert(_known(found[1]))

    def block(found: "re.Match[str]") -> str:
        return f'<div class="formula">{convert(_known(found[1]), display="block")}</div>'

    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, html, flags=re.DOTALL)


def _known(formula: str) -> str:
    """A formula without sizes of delimiters, which the converter does not know and browsers choose themselves."""
    return re.sub(r"\\[Bb]igg?[lr]?(?![a-z])", "", unescape(formula))


def _is_page(link: str, page: Any) -> bool:
    target = link[link.index("](") + 2 : -1]
    place = (ROOT / "docs" / page.file.src_uri).parent / target
    return place.resolve().is_relative_to(ROOT / "docs")


def commands() -> str:
    """Every command with its arguments and options, as its help has them."""
    import typer.main

    from kdexport.cli import app
    from training.__main__ import app as training

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    passed_on = typer.main.get_command(training).commands  # type: ignore[attr-defined]
    # A command of the training package with the name of another one of ours is not offered.
    named = {name: passed_on[name] if not command.params else command for name, command in known.items()}
    return "\n\n".join(_command(name, command) for name, command in named.items())


def _command(name: str, command: Any) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
        rows.append(f"| {names} | {_default(parameter)} | {_cell(parameter.help or '')} |")
    text = " ".join((command.help or "").split("\n\n")[0].split())
    table = "\n".join(["| | default | |", "|---|---|---|", *rows])
    return f"## {name}\n\n{_cell(text)}\n\n{table}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, (), []) or callable(value) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def errors() -> str:
    """The error codes, with their exit codes and explanations."""
    from kdexport.errors import error_codes

    return "\n\n".join(
        f"## {code}\n\n{cls.__doc__} Exit code {cls.exit_code}.\n\n{_cell(cls.explanation)}"
        for code, cls in error_codes().items()
    )


def settings() -> str:
    """Every table of an export configuration: keys, defaults, ranges, and the comment beside each."""
    from kdexport import config
    from kdexport.data.calibration_images import CalibrationSettings
    from kdexport.data.preprocessing_settings import PreprocessingSettings

    tables = (
        config.BuildConfig, config.ExportSettings, CalibrationSettings, PreprocessingSettings, config.SearchSettings,
        config.VerifySettings, config.LatencySettings, config.CardSettings,
    )  # fmt: skip
    return "\n\n".join(map(_table, tables))


def _table(model: Any) -> str:
    text = " ".join((model.__doc__ or "").split())
    found = re.match(r"``(\[\w+\])``: (.*)", text)
    title, text = (f"`{found[1]}`", found[2][:1].upper() + found[2][1:]) if found else ("Keys at the top", text)
    schema, comments = model.model_json_schema()["properties"], _comments(model)
    rows = []
    for key, field in model.model_fields.items():
        if "$ref" in schema[key] or key in ("overrides", "policy"):
            value, kind = "", "table"
        else:
            value = "required" if field.is_required() else f"`{_toml(field.get_default(call_default_factory=True))}`"
            kind = _kind(schema[key])
        rows.append(f"| `{key}` | {kind} | {value.replace('``', '')} | {_cell(comments.get(key, ''))} |")
    return "\n".join([f"## {title}", "", _cell(text), "", "| key | | default | |", "|---|---|---|---|", *rows])


def _toml(value: Any) -> str:
    """A default as TOML writes it; none for a key that is not set."""
    return "" if value is None or value in ([], {}) else json.dumps(value)


def _kind(schema: dict[str, Any]) -> str:
    """The type of a key and its range, in words."""
    options = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    words = []
    for part in options:
        if "enum" in part:
            words.append(", ".join(f"`{json.dumps(item)}`" for item in part["enum"]))
            continue
        low = part.get("minimum", part.get("exclusiveMinimum"))
        high = part.get("maximum", part.get("exclusiveMaximum"))
        span = "" if low is None and high is None else f" {low} to {high}" if high is not None else f" from {low}"
        words.append(f"{part.get('type', part.get('const', ''))}{span}")
    return " or ".join(words)


def _comments(model: Any) -> dict[str, str]:
    """The lines ``#:`` above each field of a class, by field."""
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in inspect.getsource(model).splitlines():
        stripped = line.strip()
        if stripped.startswith("#:"):
            lines.append(stripped.removeprefix("#:").strip())
            continue
        field = re.match(r"(\w+):", stripped)
        if field and lines:
            found[field[1]] = " ".join(lines)
        lines = []
    return found
