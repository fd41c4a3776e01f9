import re
import sys
from pathlib import Path

import pytest

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.registry import Registry, nearest
from kdexport.students import STUDENTS
from tests.kdexport.orchard import tree


def test_a_new_entry_is_one_new_file(fruits: Registry[object], tmp_path: Path) -> None:
    (tmp_path / "orchard" / "damson_tree.py").write_text(tree("damson"))
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
    assert str(caught.value) == (
        "There is no fruit named 'quinze'.\n"
        "Did you mean quince? Known: medlar, quince. Pass --plugin FILE.py for a fruit of your own."
    )
    with pytest.raises(UnknownNameError):
        fruits.check("")


def test_a_name_far_from_all_others_gets_the_list_and_no_guess(fruits: Registry[object]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        fruits.check("zzzz")
    assert caught.value.remedy == "Known: medlar, quince. Pass --plugin FILE.py for a fruit of your own."


def test_a_second_entry_of_one_name_is_refused(fruits: Registry[object], tmp_path: Path) -> None:
    fruits.names()
    with pytest.raises(ConfigError) as caught:
        fruits.register("quince")(lambda: None)
    first, second = tmp_path / "orchard" / "quince_tree.py", Path(__file__)
    assert re.fullmatch(
        rf"The fruit 'quince' is registered twice: in {first}, line 4, and in {second}, line \d+\.\n"
        r"Give one of the two another name\.",
        str(caught.value),
    )


def test_nearest_offers_at_most_three_names() -> None:
    sentence = nearest("conv", ["conv1", "conv2", "conv3", "conv4", "linear"])
    assert sentence.count(" or ") == 2
    assert sentence.endswith("Known: conv1, conv2, conv3, conv4, linear.")


def test_students_are_found_by_scanning_their_package() -> None:
    assert "mobilenetv2" in STUDENTS.names()
    with pytest.raises(UnknownNameError, match="There is no student named 'mobilenet_v2'") as caught:
        STUDENTS.build("mobilenet_v2", num_classes=3, image_size=32)
    assert "Did you mean mobilenetv2" in caught.value.remedy
