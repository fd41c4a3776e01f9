"""A registry of fruits in a package of its own, which tests write and plugins add to."""

from pathlib import Path


def tree(name: str) -> str:
    """The source of a module that registers a fruit, in its line 4."""
    return f"""
from orchard import FRUITS

@FRUITS.register("{name}")
def build(**options):
    return ("{name}", options)
"""


def plant(folder: Path) -> None:
    """The package: a registry, and two entries in a file each."""
    package = folder / "orchard"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from kdexport.registry import Registry\nFRUITS = Registry('fruit', 'orchard')\n"
    )
    for name in ("quince", "medlar"):
        (package / f"{name}_tree.py").write_text(tree(name))
