"""Which code a digest covers: what is imported, also inside functions, and nothing that changes no result."""

import ast
import json
import sys
from pathlib import Path

import pytest

from kdexport.core import import_graph
from kdexport.core.import_graph import modules_registering, source_digest, source_modules

FILES = {
    "__init__.py": "",
    "build/__init__.py": "",
    "build/steps.py": '''"""Two steps."""
from typing import TYPE_CHECKING

from kdexport.build.parts import helper, other
from kdexport.errors import Problem
from kdexport.lower import low, unused

if TYPE_CHECKING:
    from kdexport.types import Kind

LIMIT = 3
OTHER = 4


def first(kind: "Kind") -> int:
    """Doc."""
    from kdexport.lazy import late

    return _inner() + LIMIT


def _inner() -> int:
    if helper():
        raise Problem
    return low()


def second() -> int:
    return OTHER + other() + unused()
''',
    "build/parts.py": "import kdexport.far.deep\n\n\ndef helper():\n    return 1\n\n\ndef other():\n    return 2\n",
    "errors.py": "class Problem(Exception):\n    text = 'a'\n",
    "lower.py": "from kdexport.chain import link\n\n\ndef low():\n    return link\n\n\ndef unused():\n    return 0\n",
    "chain.py": "link = 1\n",
    "lazy.py": "def late():\n    return 1\n",
    "types.py": "class Kind: ...\n",
    "far/__init__.py": "import kdexport.chain\n",
    "far/deep.py": "x = 1\n",
    "alone.py": "x = 1\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return written(tmp_path / "before", FILES)


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "kdexport" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def changed(tmp_path: Path, code: str, name: str, old: str, new: str) -> bool:
    """Whether the digest of ``code`` is another one after a change of one file."""
    assert FILES[name].count(old) == 1
    after = written(tmp_path / "after", {**FILES, name: FILES[name].replace(old, new)})
    return source_digest(code, root=written(tmp_path / "before", FILES)) != source_digest(code, root=after)


def test_a_digest_is_a_sha256_and_the_same_each_time_and_everywhere(root: Path, tmp_path: Path) -> None:
    found = source_digest("kdexport.alone", "kdexport.lower", root=root)
    assert len(bytes.fromhex(found)) == 32
    assert found == source_digest("kdexport.lower", "kdexport.alone", root=written(tmp_path / "elsewhere", FILES))
    assert found != source_digest("kdexport.lower", root=root)


def test_a_module_counts_with_its_packages_and_all_that_it_imports(root: Path) -> None:
    assert source_modules("kdexport.far.deep", root=root) == (
        "kdexport", "kdexport.chain", "kdexport.far", "kdexport.far.deep",
    )  # fmt: skip
    assert source_modules("kdexport.lower", root=root) == ("kdexport", "kdexport.chain", "kdexport.lower")


def test_a_definition_counts_with_what_it_uses_and_imports_late_but_not_with_types_and_errors(root: Path) -> None:
    assert source_modules("kdexport.build.steps:first", root=root) == (
        "kdexport", "kdexport.build", "kdexport.build.parts", "kdexport.build.steps", "kdexport.chain", "kdexport.lazy",
        "kdexport.lower",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("build/steps.py", "+ LIMIT", "- LIMIT", True),
        ("build/steps.py", "LIMIT = 3", "LIMIT = 5", True),
        ("build/steps.py", "if helper()", "if not helper()", True),
        ("build/steps.py", "OTHER = 4", "OTHER = 5", False),
        ("build/steps.py", "OTHER + ", "OTHER - ", False),
        ("build/steps.py", '"""Two steps."""', '"""Two steps, reworded."""\n# And a comment.', False),
        ("build/steps.py", '"""Doc."""', '"""Another text."""', False),
        ("build/steps.py", "import Kind", "import Other", False),
        ("build/steps.py", "import low, unused", "import low as unused, unused as low", True),
        ("build/steps.py", "LIMIT = 3\n", "LIMIT = 3\nprint(LIMIT)\n", True),
        ("build/parts.py", "return 1", "return 11", True),
        ("build/parts.py", "return 2", "return 22", False),
        ("lower.py", "return link", "return -link", True),
        # Other modules count as a whole.
        ("lower.py", "return 0", "return 1", True),
        ("chain.py", "1", "2", True),
        ("lazy.py", "1", "2", True),
        ("__init__.py", "", "x = 1", True),
        ("build/__init__.py", "", "x = 1", True),
        ("types.py", "...", "x = 1", False),
        ("errors.py", "'a'", "'b'", False),
        ("alone.py", "1", "2", False),
        ("far/deep.py", "1", "2", False),
    ],
)
def test_a_change_counts_where_the_result_can_depend_on_it(
    name: str, old: str, new: str, counts: bool, tmp_path: Path
) -> None:
    assert changed(tmp_path, "kdexport.build.steps:first", name, old, new) is counts


def test_code_that_is_not_there_is_an_error(root: Path, tmp_path: Path) -> None:
    for code, words in (
        ("kdexport.gone", "kdexport.gone is not a module"),
        ("kdexport.build.steps:gone", "defines no gone"),
    ):
        with pytest.raises(LookupError, match=words):
            source_digest(code, root=root)
    relative = written(tmp_path / "relative", {**FILES, "alone.py": "from . import chain\n"})
    with pytest.raises(LookupError, match="alone has a relative import"):
        source_digest("kdexport.alone", root=relative)


def test_a_registered_name_is_found_in_the_module_that_registers_it(tmp_path: Path) -> None:
    entry = "from kdexport.many import REGISTRY\n\n\n@REGISTRY.register('{}')\ndef build():\n    return 1\n"
    names = {"many/one.py": entry.format("first"), "many/two.py": entry.format("second"), "many/__init__.py": ""}
    root = written(tmp_path, names)
    assert modules_registering("second", "kdexport.many", root) == ("kdexport.many.two",)
    assert modules_registering("third", "kdexport.many", root) == ()


def test_what_is_remembered_of_a_content_gives_the_same_digest_and_is_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "remembered" / "graph.json"

    def digest() -> str:
        for function in (import_graph._digest, import_graph._source, import_graph._known):
            function.cache_clear()
        return source_digest("kdexport.lower", root=root)

    monkeypatch.setattr(import_graph, "_remembered_in", lambda: place)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    first, parse = digest(), ast.parse
    assert json.loads(place.read_text())
    monkeypatch.setattr(ast, "parse", lambda *_: pytest.fail("parsed again"))
    assert digest() == first
    # Damaged, of another form, or in a folder that cannot be written: everything is read again.
    monkeypatch.setattr(ast, "parse", parse)
    for damaged in ("{", "[]", '{"x": 1}', '{"x": {"digest": ""}}'):
        place.write_text(damaged)
        assert digest() == first
    place.unlink()
    place.parent.rmdir()
    place.parent.write_text("a file where the folder should be")
    assert digest() == first
    # Code that changes has another content, whatever its time and size.
    path = root / "kdexport" / "lower.py"
    path.write_text(path.read_text() + "changed = 1\n")
    assert digest() != first
