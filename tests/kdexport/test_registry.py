import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdexport.errors import UnknownNameError
from kdexport.registry import Registry, nearest
from kdexport.students import STUDENTS

MODULE = """
from {package} import FRUITS

@FRUITS.register("{name}")
def build(**options):
    return ("{name}", options)
"""


@pytest.fixture
def fruits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[object]]:
    """A package with a registry and two entries, each in a file of its own."""
    package = tmp_path / "orchard"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from kdexport.registry import Registry\nFRUITS = Registry('fruit', 'orchard')\n"
    )
    for name in ("quince", "medlar"):
        (package / f"{name}_tree.py").write_text(MODULE.format(package="orchard", name=name))
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("orchard")
    yield module.FRUITS
    for name in [name for name in sys.modules if name.split(".")[0] == "orchard"]:
        del sys.modules[name]


def test_a_new_entry_is_one_new_file(fruits: Registry[object], tmp_path: Path) -> None:
    (tmp_path / "orchard" / "damson_tree.py").write_text(MODULE.format(package="orchard", name="damson"))
    assert fruits.names() == ("damson", "medlar", "quince")


def test_the_package_is_scanned_on_first_use_and_not_on_import(fruits: Registry[object]) -> None:
    assert "orchard.quince_tree" not in sys.modules
    fruits.check("quince")
    assert "orchard.quince_tree" in sys.modules


def test_build_passes_the_options_on(fruits: Registry[object]) -> None:
    assert fruits.build("medlar", size=3, colour="brown") == ("medlar", {"size": 3, "colour": "brown"})


def test_an_unknown_name_points_to_the_nearest(fruits: Registry[object]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        fruits.build("quinze", size=3)
    assert str(caught.value) == "There is no fruit named 'quinze'.\nDid you mean quince? Known: medlar, quince."
    with pytest.raises(UnknownNameError):
        fruits.check("")


def test_a_name_far_from_all_others_gets_the_list_and_no_guess(fruits: Registry[object]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        fruits.check("zzzz")
    assert caught.value.remedy == "Known: medlar, quince."


def test_a_second_entry_of_one_name_is_refused(fruits: Registry[object]) -> None:
    fruits.names()
    with pytest.raises(ValueError, match="fruit 'quince' is registered twice"):
        fruits.register("quince")(lambda: None)


def test_nearest_offers_at_most_three_names() -> None:
    sentence = nearest("conv", ["conv1", "conv2", "conv3", "conv4", "linear"])
    assert sentence.count(" or ") == 2
    assert sentence.endswith("Known: conv1, conv2, conv3, conv4, linear.")


def test_students_are_found_by_scanning_their_package() -> None:
    assert "mobilenetv2" in STUDENTS.names()
    with pytest.raises(UnknownNameError, match="There is no student named 'mobilenet_v2'") as caught:
        STUDENTS.build("mobilenet_v2", num_classes=3, image_size=32)
    assert "Did you mean mobilenetv2" in caught.value.remedy
