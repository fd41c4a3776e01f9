from pathlib import Path
from typing import Any

import pytest

from kdexport.config import BuildConfig, find_config, load_config, shipped_config
from kdexport.core.toml import Settings, parse, read_toml
from kdexport.errors import ConfigError, KdexportError

MINIMAL = 'student = "mobilenetv2"\nrecipe = "digits"\n'


def config_file(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(folder, text))
    assert "mine.toml" in caught.value.message
    assert caught.value.remedy
    return caught.value.message


def test_a_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(config_file(tmp_path, MINIMAL))
    assert config.targets == ["onnx-fp32"]
    assert (config.export.opset, config.export.min_batch, config.export.max_batch) == (20, 1, 64)
    assert (config.verify.images, config.verify.golden) == (512, 64)
    assert config.latency.max_slowdown == 0.02


def test_every_value_of_a_file_is_read(tmp_path: Path) -> None:
    text = (
        'student = "s"\nrecipe = "r.toml"\ntargets = ["trt-fp16", "onnx-fp32"]\n'
        "[overrides.train]\nepochs = 3\n[export]\nopset = 21\nmin_batch = 2\nopt_batch = 3\nmax_batch = 5\n"
        "[verify]\nimages = 9\ngolden = 7\n[latency]\nmax_slowdown = 0.5\n"
        "sessions = 4\npairs = 11\nbatch = 2\nthreads = 3\n"
    )
    config = load_config(config_file(tmp_path, text))
    assert config.overrides == {"train": {"epochs": 3}}
    assert config.targets == ["trt-fp16", "onnx-fp32"]
    assert (config.export.opset, config.export.min_batch, config.export.opt_batch, config.export.max_batch) == (
        21,
        2,
        3,
        5,
    )
    assert (config.latency.sessions, config.latency.pairs, config.latency.batch, config.latency.threads) == (
        4,
        11,
        2,
        3,
    )


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ('studnet = "x"\n', "studnet", "student"),
        ("[exprot]\nopset = 20\n", "exprot", "export"),
        ("[export]\nopsett = 20\n", "export.opsett", "opset"),
        ("[latency]\nsession = 6\n", "latency.session", "sessions"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path, text: str, key: str, near: str) -> None:
    message = refusal(tmp_path, MINIMAL + text)
    assert f"unknown key {key!r}. Did you mean {near}" in message
    assert "Known: " in message


@pytest.mark.parametrize(
    ("text", "key", "value", "kind"),
    [
        ('[export]\nopset = "20"\n', "export.opset", "'20'", "str"),
        ("[export]\nopset = 20.0\n", "export.opset", "20.0", "float"),
        ("[export]\nmin_batch = true\n", "export.min_batch", "True", "bool"),
        ('targets = "onnx-fp32"\n', "targets", "'onnx-fp32'", "str"),
        ("targets = [1]\n", "targets.0", "1", "int"),
        ('[latency]\nmax_slowdown = "2%"\n', "latency.max_slowdown", "'2%'", "str"),
        ("export = 3\n", "export", "3", "int"),
        ("overrides = []\n", "overrides", "[]", "list"),
    ],
)
def test_a_wrong_type_is_named_with_its_value_and_its_type(
    tmp_path: Path, text: str, key: str, value: str, kind: str
) -> None:
    assert f"{key} = {value} ({kind}): " in refusal(tmp_path, MINIMAL + text)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("export", "opset", "17"),
        ("export", "opset", "25"),
        ("export", "min_batch", "0"),
        ("export", "max_batch", "4097"),
        ("verify", "images", "7"),
        ("verify", "golden", "-1"),
        ("latency", "max_slowdown", "0.0"),
        ("latency", "max_slowdown", "1.0"),
        ("latency", "max_slowdown", "nan"),
        ("latency", "sessions", "2"),
        ("latency", "threads", "-1"),
    ],
)
def test_a_value_out_of_range_is_named(tmp_path: Path, table: str, key: str, value: str) -> None:
    assert f"{table}.{key} = {value}" in refusal(tmp_path, f"{MINIMAL}[{table}]\n{key} = {value}\n")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "the key 'recipe' is missing" in refusal(tmp_path, 'student = "mobilenetv2"\n')


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "student = 3\n[export]\nopsett = 1\nmin_batch = 0\n")
    for fact in ("student = 3 (int)", "'export.opsett'", "export.min_batch = 0"):
        assert fact in message


@pytest.mark.parametrize("sizes", [(2, 1, 4), (1, 8, 4), (5, 5, 4)])
def test_batch_sizes_out_of_order_are_refused_with_the_three(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    keys = "".join(
        f"{name} = {size}\n" for name, size in zip(("min_batch", "opt_batch", "max_batch"), sizes, strict=True)
    )
    assert "got {}, {}, {}".format(*sizes) in refusal(tmp_path, f"{MINIMAL}[export]\n{keys}")


def test_equal_batch_sizes_are_in_order(tmp_path: Path) -> None:
    text = f"{MINIMAL}[export]\nmin_batch = 3\nopt_batch = 3\nmax_batch = 3\n"
    assert load_config(config_file(tmp_path, text)).export.max_batch == 3


@pytest.mark.parametrize(("text", "line"), [('student = "a\n', 1), ("a = 1\nb = = 2\n", 2), ("a = 1\na = 2\n", 2)])
def test_a_syntax_error_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    message = refusal(tmp_path, text)
    assert "is not valid TOML" in message
    assert f"line {line}" in message


def test_a_missing_file_a_folder_and_binary_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no file .*none\.toml\."):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ConfigError, match=r"mine\.toml cannot be read"):
        read_toml(tmp_path / "mine.toml")


def test_unknown_keys_are_explained_for_any_nesting_of_settings() -> None:
    class Inner(Settings):
        rate: float = 0.5

    class Outer(Settings):
        inner: Inner | None = None

    with pytest.raises(ConfigError, match=r"unknown key 'inner\.rat'\. Did you mean rate"):
        parse(Outer, {"inner": {"rat": 1.0}}, "source")


def test_settings_cannot_be_changed() -> None:
    config: Any = BuildConfig(student="s", recipe="r")
    with pytest.raises(ValueError, match="frozen"):
        config.student = "other"


def test_a_configuration_here_comes_before_the_one_that_ships(tmp_path: Path) -> None:
    (tmp_path / "mobilenetv2.toml").write_text(MINIMAL)
    assert find_config("mobilenetv2", tmp_path) == tmp_path / "mobilenetv2.toml"
    shipped = find_config("mobilenetv2", tmp_path / "nowhere")
    assert shipped is not None
    assert shipped.parent.name == "export_configs"
    assert shipped != tmp_path / "mobilenetv2.toml"


def test_an_unknown_student_points_to_the_configurations_there_are(tmp_path: Path) -> None:
    (tmp_path / "teapot.toml").write_text(MINIMAL)
    with pytest.raises(KdexportError, match="'teepot'") as caught:
        find_config("teepot", tmp_path)
    assert caught.value.exit_code == 2
    assert "Did you mean teapot" in caught.value.remedy
    assert "mobilenetv2" in caught.value.remedy
    assert caught.value.remedy.endswith("Pass --plugin FILE.py for a student of your own.")


@pytest.mark.parametrize("name", ["mobilenetv2", "quickstart"])
def test_the_configurations_that_ship_are_valid(name: str, tmp_path: Path) -> None:
    path = find_config(name, tmp_path)
    assert path is not None
    assert load_config(path).student == "mobilenetv2"


def test_a_shipped_configuration_is_found_by_the_path_that_a_checkout_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = Path("export_configs/quickstart.toml")
    assert load_config(shipped_config(given)).recipe == "digits"
    assert shipped_config(Path("export_configs/nothing.toml")) == Path("export_configs/nothing.toml")
    assert shipped_config(Path("quickstart.toml")) == Path("quickstart.toml")
    given.parent.mkdir()
    given.touch()
    assert shipped_config(given) == given
