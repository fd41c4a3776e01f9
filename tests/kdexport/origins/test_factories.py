"""A factory of the user gets what it can take, and whatever it does wrong becomes one clear error."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from kdexport.errors import ConfigError, UnknownNameError
from kdexport.origins.factories import call_factory

SHELF = """
import functools
from dataclasses import dataclass
from torch import nn

number = 3
built = nn.Conv2d(3, 4, 1)
given = {}

def plain(): return nn.Linear(1, 2)
def sized(num_classes=9, image_size=8):
    given.update(num_classes=num_classes, image_size=image_size)
    return nn.Linear(image_size, num_classes)
def keyword(*, num_classes): return nn.Linear(1, num_classes)
def anything(**options):
    given.update(options)
    return nn.Linear(1, 2)
def loud():
    print("a line for the reader")
    return nn.Linear(1, 2)
def raising(): raise ValueError("no luck\\nat all")
def leaving(): raise SystemExit(7)
def needing(folder): return nn.Linear(1, 2)
def positional(num_classes, /): return nn.Linear(1, 2)
def nothing(): return None
def a_class(): return nn.Linear
class Net(nn.Linear):
    def __init__(self, num_classes): super().__init__(1, num_classes)
partial = functools.partial(sized, image_size=5)
"""


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "shelf_of_nets.py").write_text(SHELF)
    (tmp_path / "broken_nets.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "leaving_nets.py").write_text("raise SystemExit('not today')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("shelf_of_nets", "broken_nets", "leaving_nets"):
        sys.modules.pop(name, None)


def test_a_factory_gets_the_offered_values_that_it_names_and_no_others() -> None:
    made = call_factory("shelf_of_nets:sized", num_classes=5, image_size=40)
    assert isinstance(made, nn.Linear)
    assert (made.in_features, made.out_features) == (40, 5)
    # None is not offered: the factory's own default stays.
    assert isinstance(own := call_factory("shelf_of_nets:sized", num_classes=5, image_size=None), nn.Linear)
    assert (own.in_features, own.out_features) == (8, 5)
    for name, outputs in (("plain", 2), ("keyword", 5), ("anything", 2), ("Net", 5), ("partial", 5)):
        found = call_factory(f"shelf_of_nets:{name}", num_classes=5)
        assert isinstance(found, nn.Linear)
        assert found.out_features == outputs, name


def test_what_a_factory_prints_does_not_reach_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    call_factory("shelf_of_nets:loud")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "a line for the reader\n")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["failed", "ValueError: no luck"]),
        ("leaving", ["failed", "SystemExit: 7"]),
        ("needing", ["failed", "'folder'"]),
        ("positional", ["failed", "num_classes"]),
        ("nothing", ["returned a NoneType, not a module"]),
        ("a_class", ["returned a type, not a module"]),
        ("number", ["int, not a factory"]),
        ("built", ["Conv2d, not a factory"]),
    ],
)
def test_a_factory_that_gives_no_module_is_refused_in_one_line(name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        call_factory(f"shelf_of_nets:{name}", num_classes=5)
    said = str(refused.value.message)
    assert not [word for word in words if word not in said], said
    assert "\n" not in said
    assert refused.value.remedy


def test_an_unknown_factory_is_answered_with_those_of_the_module_and_not_with_its_imports() -> None:
    with pytest.raises(UnknownNameError) as refused:
        call_factory("shelf_of_nets:sizd")
    assert "Did you mean sized" in refused.value.remedy
    known = refused.value.remedy.partition("Known: ")[2].strip(".").split(", ")
    assert {"sized", "Net"} <= set(known)
    assert not {"nn", "dataclass", "functools", "number"} & set(known)


@pytest.mark.parametrize("module", ["broken_nets", "leaving_nets", "no_such_module", "shelf_of_nets.deeper"])
def test_a_module_that_cannot_be_imported_is_named(module: str) -> None:
    with pytest.raises(ConfigError, match=module):
        call_factory(f"{module}:make")


def test_a_module_finds_what_ours_lacks_in_the_users_own_package_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training.losses

    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "own_layers.py").write_text(
        "from torch import nn\n\ndef layer(): return nn.Linear(2, 3)\n"
    )
    (tmp_path / "training" / "losses.py").write_text("class OwnLoss: pass\n")
    (tmp_path / "own_net.py").write_text("from training.own_layers import layer as make\n")
    (tmp_path / "own_loss.py").write_text("from training.losses import OwnLoss as make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = call_factory("own_net:make")
    monkeypatch.delitem(sys.modules, "own_net")
    monkeypatch.delitem(sys.modules, "training.own_layers")
    monkeypatch.delattr(sys.modules["training"], "own_layers")
    assert made.out_features == 3
    with pytest.raises(ConfigError, match=r"cannot import name 'OwnLoss' from 'training\.losses'") as refused:
        call_factory("own_loss:make")
    assert refused.value.remedy.startswith("kdexport has a package named training too")
    assert training.losses is sys.modules["training.losses"]
