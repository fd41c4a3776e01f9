"""The code that a result depends on: the import graph of kdexport, read from its files without importing them."""

import ast
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "kdexport"
#: The folder that holds the package.
ROOT = Path(__file__).parents[2]

#: Code that does not change a result: it raises errors, writes to the terminal, or stores and finds results.
_WITHOUT_RESULT = {
    f"{PACKAGE}.{name}" for name in ("errors", "core.console", "core.files", "core.import_graph", "workspace")
}

#: The package that declares the steps of a build; of its modules only the imported definitions count.
_BY_DEFINITION = f"{PACKAGE}.build."


def source_digest(*code: str, root: Path = ROOT) -> str:
    """sha256 over the source of ``code`` and of every module of kdexport that it imports, also inside functions.

    Each entry is a module (``kdexport.graph.audit``) or one definition of a module (``kdexport.build.stages:fuse``).
    Of a definition's own file, and of modules of ``kdexport.build``, only what is used counts. Comments, layout,
    docstrings and imports for type checkers do not count. Raises ``LookupError`` for code that does not exist.
    """
    return _digest(tuple(sorted(code)), root)


def source_modules(*code: str, root: Path = ROOT) -> tuple[str, ...]:
    """The modules whose source ``source_digest`` reads for ``code``, sorted."""
    return tuple(sorted({name for name, _ in _sources(code, root)}))


def modules_registering(name: str, package: str, root: Path = ROOT) -> tuple[str, ...]:
    """The modules of ``package`` that register ``name``: a registry imports them, so no import statement names them."""
    folder = root.joinpath(*package.split("."))
    found = (f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")))
    return tuple(module for module in found if name in _registered(module, root))


@functools.cache
def _digest(code: Sequence[str], root: Path) -> str:
    hasher = hashlib.sha256()
    for name, digest in sorted(_sources(code, root)):
        hasher.update(f"{name}\n{digest}\n".encode())
    _remember()
    return hasher.hexdigest()


def _sources(code: Sequence[str], root: Path) -> set[tuple[str, str]]:
    """(module, digest of the normal form of its code) of ``code`` and of all that it imports."""
    found: set[tuple[str, str]] = set()
    pending, seen = list(code), set(_WITHOUT_RESULT)
    for module in (entry.partition(":")[0] for entry in code):
        if _source(module, root) is None:
            raise LookupError(f"{module} is not a module of {PACKAGE} in {root}")
    while pending:
        entry = pending.pop()
        module, _, definition = entry.partition(":")
        # A name without a file is a class or function of the module before its last dot, which is also in the list.
        source = None if entry in seen or module in _WITHOUT_RESULT else _source(module, root)
        seen.add(entry)
        if source is not None:
            part = source.part(definition) if definition else source
            found.add((module, part.digest))
            pending += [*part.imports, *_parents(module)]
    return found


@dataclass(frozen=True, eq=False)
class _Source:
    """The statements of one module, without those that do not change a result."""

    module: str
    statements: tuple[ast.stmt, ...]

    @functools.cached_property
    def digest(self) -> str:
        words: list[str] = []
        for statement in self.statements:
            _spell(statement, words)
        return hashlib.sha256(" ".join(words).encode()).hexdigest()

    @functools.cached_property
    def imports(self) -> frozenset[str]:
        """Everything imported from the package; each name may be a module."""
        nodes = list(_all_statements(self.statements))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names |= self._imported_from(node)
        return frozenset(name for name in names if name.partition(".")[0] == PACKAGE)

    @functools.cached_property
    def _bound(self) -> list[set[str]]:
        return [_bound(statement) for statement in self.statements]

    def _imported_from(self, node: ast.ImportFrom) -> set[str]:
        if node.level or node.module is None:
            raise LookupError(f"{self.module} has a relative import, which the import graph does not follow")
        if node.module.startswith(_BY_DEFINITION):
            return {f"{node.module}:{alias.name}" for alias in node.names}
        return {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}

    def part(self, definition: str) -> "_Source":
        """``definition``, the definitions of its module that it uses, and the statements that define nothing."""
        kept: dict[int, ast.stmt] = {}
        pending = [None, definition]
        seen: set[str | None] = set()
        if not any(definition in bound for bound in self._bound):
            raise LookupError(f"{self.module} defines no {definition}")
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            for place, (statement, bound) in enumerate(zip(self.statements, self._bound, strict=True)):
                if name in bound or (name is None and not bound):
                    kept[place] = statement
                    pending += _used(statement)
        chosen = (_only(kept[place], seen) for place in sorted(kept))
        return _Source(self.module, tuple(chosen))


@dataclass(frozen=True, eq=False)
class _File:
    """A whole module. What is remembered of the same content is taken from there: parsing all files takes a second."""

    module: str
    content: bytes

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        # The name of the module is part of an error message only.
        key = hashlib.sha256(self.content).hexdigest()
        if key not in _known():
            source = self._parsed
            registered = sorted(_registrations(source))
            _known()[key] = {"digest": source.digest, "imports": sorted(source.imports), "registered": registered}
            _fresh.append(key)
        _asked.add(key)
        return _known()[key]

    @functools.cached_property
    def _parsed(self) -> _Source:
        return _Source(self.module, tuple(_stripped(ast.parse(self.content).body)))

    @property
    def digest(self) -> str:
        return str(self._facts["digest"])

    @property
    def imports(self) -> frozenset[str]:
        return frozenset(self._facts["imports"])

    @property
    def registered(self) -> frozenset[str]:
        return frozenset(self._facts["registered"])

    def part(self, definition: str) -> _Source:
        return self._parsed.part(definition)


@functools.cache
def _source(module: str, root: Path) -> _File | None:
    place = root.joinpath(*module.split("."))
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return _File(module, path.read_bytes()) if path.is_file() else None


#: Contents that this process was the first to parse, and all that it asked for.
_fresh: list[str] = []
_asked: set[str] = set()
#: Above this number, contents that were not asked for are forgotten.
_REMEMBERED = 1000


@functools.cache
def _remembered_in() -> Path:
    """The file of what is remembered, beside the compiled modules; each Python and version of this file has its own."""
    own = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()
    return Path(__file__).parent / "__pycache__" / f"import_graph-{own[:16]}.json"


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    """Digest, imports and registered names by the sha256 of a file's content."""
    try:
        found = json.loads(_remembered_in().read_text())
    except (OSError, ValueError):
        return {}
    keys = {"digest", "imports", "registered"}
    facts = found.values() if isinstance(found, dict) else [None]
    return found if all(isinstance(each, dict) and each.keys() == keys for each in facts) else {}


def _remember() -> None:
    """Write what is known, for the next process; a folder that cannot be written keeps nothing."""
    if not _fresh or sys.dont_write_bytecode:
        return
    _fresh.clear()
    path = _remembered_in()
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        known = _known()
        kept = known if len(known) <= _REMEMBERED else {key: known[key] for key in _asked}
        part.write_text(json.dumps(kept))
        part.replace(path)


def _stripped(body: list[ast.stmt]) -> list[ast.stmt]:
    """Without what does not change a result: bare strings, such as docstrings, and code for type checkers only."""
    kept: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.If) and _is_for_type_checkers(statement.test):
            kept += _stripped(statement.orelse)
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            for holder, name in _bodies(statement):
                setattr(holder, name, _stripped(getattr(holder, name)))
            kept.append(statement)
    return kept


def _is_for_type_checkers(test: ast.expr) -> bool:
    name = test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""
    return name == "TYPE_CHECKING"


def _bodies(statement: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    """Where the lists of statements below a statement are: the node that has one, and its field."""
    for name in ("body", "orelse", "finalbody"):
        if getattr(statement, name, None):
            yield statement, name
    for holder in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        yield holder, "body"


def _all_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements and all below them. An import is a statement, so that expressions need not be searched."""
    for statement in body:
        yield statement
        for holder, name in _bodies(statement):
            yield from _all_statements(getattr(holder, name))


def _spell(value: object, words: list[str]) -> None:
    """Append ``value`` as words: nodes by their type, their fields in order, lists with their length, and constants.

    What differs in more than its layout differs here, as in ``ast.dump``, which takes several times as long.
    """
    if isinstance(value, ast.AST):
        words.append(type(value).__name__)
        for name in value._fields:
            _spell(getattr(value, name, None), words)
    elif isinstance(value, list):
        words.append(f"[{len(value)}]")
        for item in value:
            _spell(item, words)
    else:
        words.append(repr(value))


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement defines in its module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(_bound_by(node))
    return names


def _bound_by(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _used(statement: ast.stmt) -> Iterator[str]:
    return (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))


def _only(statement: ast.stmt, used: set[str | None]) -> ast.stmt:
    """An import without unused names; any other statement unchanged."""
    if isinstance(statement, ast.ImportFrom):
        names = [alias for alias in statement.names if _bound_by(alias) in used]
        return ast.ImportFrom(module=statement.module, names=names, level=statement.level)
    if isinstance(statement, ast.Import):
        return ast.Import(names=[alias for alias in statement.names if _bound_by(alias) in used])
    return statement


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _registered(module: str, root: Path) -> frozenset[str]:
    source = _source(module, root)
    return frozenset() if source is None else source.registered


def _registrations(source: _Source) -> frozenset[str]:
    """Names under which the functions of a module are registered by a decorator ``....register("name")``."""
    statements = _all_statements(source.statements)
    nodes = (node for statement in statements for item in _decorators(statement) for node in ast.walk(item))
    return frozenset(
        str(node.args[0].value)
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "register"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    )


def _decorators(statement: ast.stmt) -> list[ast.expr]:
    return list(getattr(statement, "decorator_list", ()))
