"""The pages: every command is read by the command line, blocks without a reason not to are run, figures are current."""

import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from kdexport.bundle.manifest import read_manifest
from tests.answers import checked_answer
from tests.conftest import Built, Command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: Pages of results quote the commands that made them; each is about one machine and one day.
PAGES = sorted(path for path in DOCS.rglob("*.md") if "results" not in path.parts)
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")
#: Commands of other programs, which are not ours to test.
OTHERS = ("pip", "python", "python3", "curl", "jq", "docker", "openssl", "torchrun", "serve", "kubectl", "cp")
TRAINING = ("train", "teacher", "evaluate-run", "table")


@dataclass(frozen=True)
class Block:
    """Commands of a page, and why they are not run here; ``reason`` is empty if they are."""

    page: Path
    line: int
    commands: tuple[tuple[str, int], ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Blocks of shell, and indented blocks that begin with one of our commands."""
    text = page.read_text()
    fenced = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    for found in fenced:
        if found[1] == "sh":
            yield _block(page, text, found.start(), found[2])
    bare = re.sub(r"^```.*?^```$", lambda m: re.sub(r"[^\n]", "-", m[0]), text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?<=\n\n)(?: {4}[^\n]*\n(?:\n(?= {4}))?)+", bare):
        if re.search(r"^ {4}(kdexport [a-z]|pip install|python -m training|torchrun)", found[0], flags=re.MULTILINE):
            yield _block(page, text, found.start(), found[0])


def _block(page: Path, text: str, start: int, source: str) -> Block:
    joined = re.sub(r"\\\n\s*", "", source)
    lines = [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]
    reason = NOT_RUN.search(text[:start])
    return Block(page, text[:start].count("\n") + 1, tuple(map(_command, lines)), reason[1] if reason else "")


def _command(line: str) -> tuple[str, int]:
    """The command without its comment, and the exit code that the comment promises."""
    code, _, comment = line.partition(" # ")
    promised = re.match(r"\s*exit (\d)\b", comment)
    return code.strip(), int(promised[1]) if promised else 0


ALL = [block for page in [ROOT / "README.md", *PAGES] for block in blocks(page)]


def test_the_pages_have_commands() -> None:
    assert len(ALL) > 30
    assert sum(len(block.commands) for block in ALL) > 60


def test_blocks_that_are_not_run_say_why_and_name_tests_that_exist() -> None:
    """All others are run below, and the README's by test_readme.py."""
    reasons = [block.reason for block in ALL if block.reason]
    assert min(map(len, reasons)) > 15
    named = re.findall(r"tests/[\w/.]+", " ".join(reasons))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_command_exists_with_these_options(block: Block) -> None:
    """Read by the command line itself, with the values, but not started."""
    import training.__main__ as package
    from kdexport.cli import app

    known = {
        **typer.main.get_command(app).commands,  # type: ignore[attr-defined]
        **{name: each for name, each in typer.main.get_command(package.app).commands.items() if name in TRAINING},  # type: ignore[attr-defined]
    }
    for line, _ in block.commands:
        for part in re.split(r" (?:&&|\||;) |; ", line):
            words = shlex.split(re.sub(r"\s>\s*(?:\S*\$\([^)]*\))?\S+", "", part))
            while words and "=" in words[0]:
                words.pop(0)
            if not words or words[0] != "kdexport":
                assert not words or words[0] in (*OTHERS, ".", "make", "source"), line
                continue
            if "..." in words:
                continue
            command = known[words[1]]
            for parameter in command.params:
                # Plugins are imported when they are read.
                parameter.callback = None
            context = command.make_context(words[1], words[2:])
            assert context.params, line


RUN = [block for block in ALL if not block.reason and block.page.name != "README.md"]


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    """What the pages speak of: bundles below dist, photos, and labelled images of digits."""
    (tmp_path / "dist").mkdir()
    for name in ("quickstart", "mobilenetv2", "new", "old"):
        (tmp_path / "dist" / name).symlink_to(built.bundle)
    golden = [built.bundle / name for name in read_manifest(built.bundle).golden]
    (tmp_path / "photos").mkdir()
    with Image.open(golden[0]) as image:
        for name in ("photo.jpg", "one.jpg", "photos/a.jpg"):
            image.convert("RGB").resize((64, 64)).save(tmp_path / name)
    for index, label in enumerate(read_manifest(built.bundle).spec.classes):
        place = tmp_path / "data" / "val" / label
        place.mkdir(parents=True)
        shutil.copyfile(golden[index % len(golden)], place / golden[index % len(golden)].name)
    return tmp_path


@pytest.mark.parametrize("block", RUN, ids=str)
def test_a_block_runs_as_it_stands(block: Block, folder: Path, here: Command) -> None:
    for line, exit_code in block.commands:
        words = shlex.split(line)
        assert words[0] == "kdexport", f"{line}: mark the block as not run, with the reason"
        done = here(*words[1:], cwd=folder)
        assert done.exit_code == exit_code, f"{line}\n{done.stdout}{done.stderr}"


def test_every_page_is_in_the_navigation_once_and_every_entry_is_a_page() -> None:
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """Ignores the functions that mkdocs resolves."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for item in (node.values() if isinstance(node, dict) else node) for leaf in leaves(item)]

    listed = leaves(config["nav"])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    for hook in config["hooks"]:
        assert (ROOT / hook).is_file()
    for theirs in config["extra_css"]:
        assert (DOCS / theirs).is_file()


def test_the_generated_reference_names_every_command_option_code_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import site_hooks  # type: ignore[import-not-found]

    from kdexport.cli import app
    from kdexport.config import BuildConfig
    from kdexport.errors import error_codes

    commands = site_hooks.commands()
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## {name}\n" in commands
        section = commands.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert all(f"`{option}`" in section for parameter in command.params for option in parameter.opts), name
    assert "`--recipe`" in commands.partition("## train\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"## (KDX\d+)", site_hooks.errors())) == set(error_codes())
    settings = site_hooks.settings()
    for key, field in BuildConfig.model_fields.items():
        assert f"| `{key}` |" in settings
        if key in ("export", "verify", "latency", "precision_search", "calibration", "preprocessing", "card"):
            section = settings.partition(f"## `[{key}]`\n")[2].partition("\n## ")[0]
            for inner in field.annotation.model_fields:  # type: ignore[union-attr]
                assert f"| `{inner}` |" in section, (key, inner)
    page = type("Page", (), {"file": type("File", (), {"src_uri": "json.md"})})
    text = site_hooks.on_page_markdown("[changelog](../CHANGELOG.md) [ci](ci.md)", page)
    assert text == "changelog [ci](ci.md)"
    page.file.src_uri = "reference/python.md"  # type: ignore[attr-defined]
    assert site_hooks.on_page_markdown("[python](../python.md)", page) == "[python](../python.md)"


def test_python_blocks_of_the_site_are_python() -> None:
    for page in PAGES:
        for source in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            ast.parse(source)


_NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])"


def quoted(text: str) -> list[str]:
    """Numbers with decimals, outside of code and links."""
    plain = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", text))
    return re.findall(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.])", re.sub(r"goal (of|was) [\d.]+|[\d.]+ wanted", "", plain))


def is_on(number: str, page: str) -> bool:
    """Whether ``page`` has a number that rounds to ``number``, also as a percentage."""
    value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
    numbers = [float(found.replace(",", "")) for found in re.findall(_NUMBER, page)]
    candidates = [scaled for found in numbers for scaled in (found, found / 100, found * 100)]
    return any(abs(candidate - value) <= 0.5 * 10**-digits + 1e-9 for candidate in candidates)


def statements(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables."""
    return re.split(r"\n\s*\n|\n(?=- |\d+\. |\|)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_figures_beside_a_link_to_results_are_on_that_page(page: Path) -> None:
    for statement in statements(page.read_text()):
        links = re.findall(r"\]\(([^)#]*results/[\w-]+\.md)[^)]*\)", statement)
        results = "\n".join((page.parent / link).read_text() for link in links)
        stale = [number for number in quoted(statement) if links and not is_on(number, results)]
        assert stale == [], f"not in {', '.join(links)}: {statement}"


def test_a_stale_figure_is_found() -> None:
    results = (DOCS / "results" / "training.md").read_text()
    assert is_on("1.54", results)
    assert not is_on("1.21", results)
    assert quoted("1.21 times, the goal was 1.5 (`0.5`), [a](b-1.5.md), 0.9 wanted, 3 cores") == ["1.21"]


def test_the_page_on_json_shows_answers_of_that_form_and_the_result_of_every_command() -> None:
    from kdexport.cli import app

    page = (DOCS / "json.md").read_text()
    for source, code in zip(re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL), (0, 2), strict=True):
        checked_answer(json.dumps(json.loads(source)), code)
    rows = re.findall(r"^\| (`[^|]*) \|", page.partition("## The results")[2], flags=re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(documented) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
