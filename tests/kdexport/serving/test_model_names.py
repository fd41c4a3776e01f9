"""A model has the same name in the server and in a Triton repository."""

from pathlib import Path

import pytest

from kdexport.errors import ConfigError
from kdexport.serving.model_names import default_name, require_name
from kdexport.serving.repository import parse_source


@pytest.mark.parametrize("name", ["a", "9", "mobilenetv2", "A.b_c-1", "x" * 128])
def test_a_name_of_letters_digits_dots_dashes_and_underscores_is_valid(name: str) -> None:
    require_name(name, "")
    assert parse_source(f"{name}=dist/x").name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-x", "a b", "a\n", "timm:x", "\u00e4", "x" * 129])
def test_any_other_name_is_refused_with_what_to_type(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid model name") as refused:
        require_name(name, "Do that.")
    assert refused.value.remedy == "Do that."


def test_the_name_is_that_of_the_folder_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    for folder in (Path(), Path("../birds"), tmp_path / "birds", Path("../birds/.")):
        assert default_name(folder) == "birds"
        assert parse_source(str(folder)).name == "birds"
