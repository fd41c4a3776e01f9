from pathlib import Path

import pytest

from kdexport.core.digests import digest
from kdexport.errors import ConfigError
from kdexport.students import STUDENTS
from training.recipe import load_recipe, read_tables
from training.shipped_recipes import read_listed, shipped_names, shipped_recipe


def test_the_shipped_recipes_are_whole() -> None:
    names = shipped_names()
    assert [name for name in names if "/" not in name] == ["cifar100", "digits"]
    assert not [name for name in names if name.startswith("parts")]
    cifar100, digits = load_recipe("cifar100"), load_recipe("digits")
    assert (cifar100.teacher.name, cifar100.student.name, cifar100.distiller.name) == (
        "resnet56",
        "mobilenetv2",
        "kdiffusion",
    )
    # The protocol of the literature for mobile students, as printed with its results.
    train = cifar100.train
    assert (train.epochs, train.batch_size, train.learning_rate, train.milestones) == (240, 64, 0.01, (150, 180, 210))
    assert (train.momentum, train.weight_decay, train.nesterov, train.schedule) == (0.9, 5e-4, False, "step")
    assert cifar100.data.mean == (0.5071, 0.4867, 0.4408)
    assert cifar100.teacher.mean == (0.5070, 0.4865, 0.4409)
    assert digits.data.flip is False


YAO = "Yao et al., 2024"
DIGEST = "65687aa8bb4d340c75b96f5a853cdd592e8badd2f43580e08f0ba943c6623865"
METHODS = (
    *("plain", "kd", "dkd", "dist", "at", "vid", "crd", "ofd", "reviewkd", "norm", "average"),
    *("kdiffusion-single", "kdiffusion-multi", "kdiffusion-multi-guide"),
)
PAIRS = {
    "cifar100": "resnet32x4-shufflenetv1 wrn40_2-shufflenetv1 vgg13-mobilenetv2 resnet50-mobilenetv2 "
    "resnet32x4-shufflenetv2 resnet56-mobilenetv2",
    "imagenet100": "swin_t-mobilenetv2 swin_t-mobilenetv3 swin_t-resnet18 swin_t-shufflenetv1 swin_t-shufflenetv2",
}
PAIR_NAMES = [f"{table}/{pair}" for table, pairs in PAIRS.items() for pair in pairs.split()]
NAMES = sorted(["cifar100", "digits", *PAIR_NAMES, *(f"{pair}/{method}" for pair in PAIR_NAMES for method in METHODS)])


def test_there_is_a_recipe_for_every_cell_of_both_tables() -> None:
    assert shipped_names() == NAMES


def test_the_tables_give_what_a_file_for_each_cell_gave() -> None:
    # Before any default of the code, so that a new key of a method changes nothing here. The digest was taken when
    # each of these names was a file of its own.
    parts = ["parts/cifar100", "parts/imagenet100", *(f"parts/{method}" for method in METHODS)]
    assert digest({name: read_tables(name) for name in [*NAMES, *parts]}) == DIGEST


def test_keys_that_came_later_leave_every_shipped_recipe_as_it_was() -> None:
    # The digest was taken before these keys, so that each run folder stays that of the same recipe.
    complete = [load_recipe(name).model_dump(mode="json") for name in NAMES]
    assert digest(complete) == "422abebb316d1267a29897d6ba84e310a0a5c5ec7d8f6276b2809026b0ce3d53"


@pytest.mark.parametrize(("table", "pair"), [(t, p) for t, pairs in PAIRS.items() for p in pairs.split()])
def test_a_cell_is_its_pair_with_its_method(table: str, pair: str) -> None:
    base = load_recipe(f"{table}/{pair}")
    assert f"{base.teacher.name}-{base.student.name}" == pair
    assert base.data.image_size == (32 if table == "cifar100" else 224)
    for method in METHODS:
        cell = load_recipe(f"{table}/{pair}/{method}")
        assert cell.distiller.name == method.partition("-")[0]
        assert (cell.data, cell.teacher, cell.student, cell.train) == (
            base.data,
            base.teacher,
            base.student,
            base.train,
        )


def test_the_published_numbers_are_those_of_the_papers() -> None:
    def row(table: str, method: str) -> list[float | None]:
        names = [pair for pair in PAIRS[table].split() if pair != "resnet56-mobilenetv2"]
        return [load_recipe(f"{table}/{pair}/{method}").published.top1 for pair in names]

    assert row("cifar100", "kdiffusion-multi-guide") == [78.14, 77.26, 70.49, 71.14, 77.84]
    assert row("cifar100", "kdiffusion-single") == [76.62, 75.83, 69.14, 69.2, 76.87]
    assert row("cifar100", "average") == [75.01, 75.32, 66.45, 67.56, 75.46]
    assert row("cifar100", "plain") == [70.5, 70.5, 64.6, 64.6, 71.82]
    assert row("imagenet100", "kdiffusion-multi") == [86.2, 87.88, 86.3, 78.04, 80.68]
    assert row("imagenet100", "crd") == [83.72, None, 84.26, None, 77.88]
    assert row("imagenet100", "kdiffusion-multi-guide") == [None] * 5


def test_what_the_recipes_name_is_there() -> None:
    from training.distillers import DISTILLERS
    from training.teachers import TEACHERS

    recipes = [load_recipe(name) for name in shipped_names()]
    assert {recipe.distiller.name for recipe in recipes} == set(DISTILLERS.names())
    assert {recipe.teacher.name for recipe in recipes} <= set(TEACHERS.names())
    assert {recipe.student.name for recipe in recipes} == set(STUDENTS.names())


def test_the_rows_of_kdiffusion_differ_in_what_they_are_named_after() -> None:
    rows = {name: load_recipe(f"cifar100/vgg13-mobilenetv2/kdiffusion-{name}").distiller.model_dump() for name in
            ("single", "multi", "multi-guide")}  # fmt: skip
    assert (rows["single"]["layers"], rows["single"]["target_guide"]) == ("single", 0.0)
    assert rows["multi"] == {**rows["single"], "layers": "multi"}
    assert rows["multi-guide"] == {**rows["multi"], "target_guide": 1.0}


def test_a_number_is_credited_to_whoever_published_it() -> None:
    def sources(pair: str) -> dict[str, str]:
        return {method: load_recipe(f"{pair}/{method}").published.source for method in METHODS}

    others = {
        "kd": "Tian et al., 2020",
        "crd": "Tian et al., 2020",
        "dist": "Huang et al., 2022",
        "dkd": "Zhao et al., 2022",
        "norm": "Liu et al., 2023",
    }
    assert sources("cifar100/vgg13-mobilenetv2") == {method: others.get(method, YAO) for method in METHODS}
    assert sources("imagenet100/swin_t-resnet18") == dict.fromkeys(METHODS, YAO)
    assert sources("cifar100/resnet56-mobilenetv2") == dict.fromkeys(METHODS, "")


def test_a_cell_may_set_keys_of_its_own() -> None:
    pairs = [pair for pair in PAIR_NAMES if load_recipe(f"{pair}/reviewkd").distiller.weight != 5.0]
    assert pairs == ["cifar100/resnet50-mobilenetv2", "cifar100/resnet32x4-shufflenetv2"]
    assert [load_recipe(f"{pair}/reviewkd").distiller.weight for pair in pairs] == [30.0, 8.0]


def test_a_recipe_cannot_be_changed_through_what_was_read() -> None:
    read = shipped_recipe("cifar100/vgg13-mobilenetv2/kd")
    assert read is not None
    read.clear()
    assert load_recipe("cifar100/vgg13-mobilenetv2/kd").distiller.name == "kd"
    assert shipped_recipe("cifar100/vgg13-mobilenetv2/none") is None
    # A name is not a path.
    assert shipped_recipe("parts/../digits") is None


LISTED = """
[methods]
plain = { name = "plain" }
[[tables]]
set = "sky"
extends = "digits"
pairs = ["sun-moon", "sun-mars"]
source = "Us"
[tables.top1]
plain = [1.5, nan]
"""


def test_a_new_method_is_one_row(tmp_path: Path) -> None:
    listed = tmp_path / "tables.toml"
    listed.write_text(LISTED)
    before = read_listed(listed)
    listed.write_text(LISTED.replace("[[tables]]", 'mine = { name = "mine", weight = 2.0 }\n[[tables]]'))
    after = read_listed(listed)
    assert after.keys() - before.keys() == {"parts/mine", "sky/sun-moon/mine", "sky/sun-mars/mine"}
    assert {name: after[name] for name in before} == before
    assert after["sky/sun-mars/mine"] == {"extends": ["sky/sun-mars", "parts/mine"]}
    assert after["parts/mine"] == {"distiller": {"name": "mine", "weight": 2.0}}
    assert before["sky/sun-moon/plain"]["published"] == {"top1": 1.5, "source": "Us"}
    assert "published" not in before["sky/sun-mars/plain"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[1.5, nan]", "[1.5]", "top1.plain must have 2 numbers, one for each pair, but has 1"),
        ("plain = [", "plane = [", "the method 'plane' is not in [methods]"),
        ('"sun-mars"', '"mars"', "should match pattern"),
        (
            "[tables.top1]",
            "settings.sun-pluto.plain = { weight = 1.0 }\n[tables.top1]",
            "settings has the pair 'sun-pluto', which is not in pairs",
        ),
        ("extends", "extend", "unknown key 'tables.0.extend'"),
    ],
)
def test_a_mistake_in_the_tables_is_named(old: str, new: str, problem: str, tmp_path: Path) -> None:
    listed = tmp_path / "tables.toml"
    listed.write_text(LISTED.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_listed(listed)
    assert problem in str(caught.value)
