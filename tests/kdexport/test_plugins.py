"""What lies outside the package and registers students, teachers, methods or backends."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdexport.build import train
from kdexport.errors import ConfigError, UnknownNameError
from kdexport.plugins import PLUGINS, active_plugins, use_plugins
from kdexport.registry import Registry
from tests.conftest import Command, Outcome, made_once, run_command
from tests.kdexport.orchard import tree

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test sets is gone after it."""
    monkeypatch.setenv(PLUGINS, "")


def plugin(folder: Path, text: str, name: str = "mine.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def refused(registry: Registry[object]) -> str:
    with pytest.raises(ConfigError) as caught:
        registry.names()
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_file_adds_its_entries_even_after_the_first_question(fruits: Registry[object], tmp_path: Path) -> None:
    assert fruits.names() == ("medlar", "quince")
    use_plugins([plugin(tmp_path, tree("damson"))])
    assert fruits.names() == ("damson", "medlar", "quince")
    assert fruits.build("damson", size=2) == ("damson", {"size": 2})
    use_plugins(["../elsewhere/mine.py"], Path(plugin(tmp_path / "elsewhere", tree("sloe"))).parent)
    assert "sloe" in fruits.names()


def test_a_module_adds_its_entries(fruits: Registry[object], tmp_path: Path) -> None:
    plugin(tmp_path / "grove", "from grove import damson", "__init__.py")
    plugin(tmp_path / "grove", tree("damson"), "damson.py")
    use_plugins(["grove.damson"])
    assert "damson" in fruits.names()
    # The whole package is its source.
    before = fruits.plugin_digest("damson")
    plugin(tmp_path / "grove", "RIPE = True", "sun.py")
    assert fruits.plugin_digest("damson") != before


def test_a_plugin_is_imported_once_however_it_is_spelled(
    fruits: Registry[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = plugin(tmp_path, tree("damson"))
    monkeypatch.chdir(tmp_path)
    use_plugins(["mine.py", source, "./orchard/../mine.py"])
    use_plugins(None)
    use_plugins(["mine.py"])
    assert active_plugins() == [source]
    assert fruits.names() == fruits.names() == ("damson", "medlar", "quince")


def test_the_digest_is_that_of_the_source_and_not_of_the_place(fruits: Registry[object], tmp_path: Path) -> None:
    one, two = plugin(tmp_path / "a", tree("damson")), plugin(tmp_path / "b", tree("sloe"), "other.py")
    use_plugins([one, two])
    assert len(fruits.plugin_digest("damson")) == 64
    assert fruits.plugin_digest("damson") != fruits.plugin_digest("sloe")
    Path(two).write_text(Path(one).read_text())
    assert fruits.plugin_digest("damson") == fruits.plugin_digest("sloe")
    with pytest.raises(UnknownNameError):
        fruits.plugin_digest("cherry")


def test_an_entry_of_ours_has_no_plugin() -> None:
    from kdexport.students import STUDENTS

    assert {STUDENTS.plugin_digest(name) for name in ("mobilenetv2", "resnet18")} == {""}


def test_two_plugins_of_one_name_are_named_with_their_places(fruits: Registry[object], tmp_path: Path) -> None:
    one, two = plugin(tmp_path / "a", tree("damson")), plugin(tmp_path / "b", "\n" + tree("damson"))
    use_plugins([one, two])
    assert refused(fruits) == (
        f"The fruit 'damson' is registered twice: in {one}, line 4, and in {two}, line 5.\n"
        "Give one of the two another name."
    )
    # Asking again does not hide it.
    assert "registered twice" in refused(fruits)


def test_a_plugin_does_not_replace_what_ships(fruits: Registry[object], tmp_path: Path) -> None:
    use_plugins([plugin(tmp_path, tree("quince"))])
    assert "The fruit 'quince' is registered twice: in " in refused(fruits)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nonsense_of_mine", "(line 1): ModuleNotFoundError: No module named 'nonsense_of_mine'"),
        ("x = 1\nx.y", "(line 2): AttributeError: 'int' object has no attribute 'y'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit('gone')", "(line 1): SystemExit: gone"),
        ("raise ValueError('first\\nsecond')", "(line 1): ValueError: first"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_plugin_that_cannot_be_imported_says_why(
    source: str, reason: str, fruits: Registry[object], tmp_path: Path
) -> None:
    path = plugin(tmp_path, source)
    use_plugins([path])
    message = refused(fruits)
    assert message.startswith(f"The plugin {path} cannot be imported")
    assert reason in message
    assert "second" not in message
    assert message.endswith(f"\nCorrect it, or omit --plugin {path}.")


@pytest.mark.parametrize("source", ["", "import kdexport.students", "from orchard import FRUITS\nFRUITS.names()"])
def test_a_plugin_that_registers_nothing_is_refused(source: str, fruits: Registry[object], tmp_path: Path) -> None:
    fruits.names()
    path = plugin(tmp_path, source)
    use_plugins([path])
    assert refused(fruits) == (
        f"The plugin {path} registers no student, teacher, distiller or backend.\n"
        'Register a factory in it, for example with @STUDENTS.register("mynet").'
    )


def test_an_edited_file_is_compiled_again(tmp_path: Path) -> None:
    """A cached compilation of the same size and second would run the old code under the digest of the new one."""
    code = "from kdexport.students import STUDENTS\nSTUDENTS.register('{}')(dict)\n"
    found = []
    for name in ("aaaa", "bbbb"):
        path = plugin(tmp_path, code.format(name))
        os.utime(path, (1e9, 1e9))
        done = run_command("list", "students", "--plugin", path)
        found.append([word for word in done.stdout.split() if word in ("aaaa", "bbbb")])
    assert found == [["aaaa"], ["bbbb"]]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("absent.py", "There is no plugin file"),
        ("some/folder", "There is no plugin file"),
        ("absent_module", "There is no plugin module 'absent_module'."),
        ("not-a-module", "There is no plugin module 'not-a-module'."),
        ("", "There is no plugin module ''."),
    ],
)
def test_a_plugin_that_is_not_there_is_refused_at_once(source: str, problem: str, here: Command) -> None:
    done = here("explain-failure", "nothing", "--plugin", source)
    assert done.exit_code == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_the_environment_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = plugin(tmp_path / f"a{os.pathsep}b", tree("damson"))
    with pytest.raises(ConfigError, match="which separates plugins in KDEXPORT_PLUGINS"):
        use_plugins([path])


def install(folder: Path, group: str, module: str, source: str) -> None:
    """What pip leaves of a package that has one module and names it as an entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / "orchard_extras-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: orchard-extras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nany-name = {module}\n")


def test_an_installed_package_adds_its_entries(fruits: Registry[object], tmp_path: Path) -> None:
    install(tmp_path, "kdexport.fruits", "damson_extra", tree("damson"))
    assert fruits.names() == ("damson", "medlar", "quince")


def test_an_installed_package_that_is_broken_is_named(fruits: Registry[object], tmp_path: Path) -> None:
    install(tmp_path, "kdexport.fruits", "broken_extra", "1 / 0")
    assert refused(fruits) == (
        "The plugin broken_extra (entry point 'any-name' of the installed package orchard-extras) cannot be imported: "
        "ZeroDivisionError: division by zero\nUpdate or uninstall the package: pip uninstall orchard-extras."
    )


def test_entry_points_of_another_kind_are_not_imported(fruits: Registry[object], tmp_path: Path) -> None:
    install(tmp_path, "kdexport.vegetables", "leek_extra", "raise RuntimeError")
    assert fruits.names() == ("medlar", "quince")


def test_an_installed_student_is_listed_without_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "kdexport.students", "my_student",
        "from kdexport.students import STUDENTS\nSTUDENTS.register('installed')(dict)\n",
    )  # fmt: skip
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert "installed" in run_command("list", "students").stdout.split()


# The example of the documentation, a student, a teacher and a method in one file, goes the whole way.


def example() -> tuple[str, str]:
    text = (ROOT / "docs" / "bring-your-own.md").read_text()
    (source,) = re.findall(r"```python\n# mynet\.py\n(.*?)```", text, flags=re.DOTALL)
    (config,) = re.findall(r"```toml\n# mynet\.toml\n(.*?)```", text, flags=re.DOTALL)
    return source, config


SHORT = """
[overrides.data]
image_size = 16

[overrides.train]
epochs = 1
batch_size = 256
warmup_epochs = 0.5

[verify]
images = 64
golden = 8

[latency]
sessions = 3
pairs = 10
max_slowdown = 0.9
"""


@dataclass(frozen=True)
class Example:
    folder: Path
    said: Outcome

    @property
    def file(self) -> Path:
        return self.folder / "mynet.py"

    @property
    def bundle(self) -> Path:
        return self.folder / "dist" / "mynet"


@pytest.fixture(scope="module")
def built_example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """The bundle of ``mynet``, taught by ``myteacher`` with ``mymethod``."""
    pytest.importorskip("sklearn")

    def make(root: Path) -> None:
        source, config = example()
        (root / "mynet.py").write_text(source)
        teacher = 'name = "myteacher"\nepochs = 1\nplausibility = "reported"'
        (root / "mynet.toml").write_text(config.replace('name = "myteacher"', teacher) + SHORT)
        elsewhere = root / "elsewhere"
        elsewhere.mkdir()
        done = run_command("build", "--config", "../mynet.toml", "--out", "../dist/mynet", cwd=elsewhere)
        assert done.exit_code == 0, done.stderr
        (root / "said.json").write_text(json.dumps([done.stdout, done.stderr]))

    folder = made_once(tmp_path_factory, "plugin", make)
    out, err = json.loads((folder / "said.json").read_text())
    return Example(folder, Outcome(0, out, err))


def test_a_student_a_teacher_and_a_method_of_a_plugin_are_built_into_a_bundle(built_example: Example) -> None:
    assert "teacher myteacher: epoch 1/1" in built_example.said.stderr
    assert re.search(r"student mynet: epoch 1/1 .* mymethod \d", built_example.said.stderr)
    assert f"verify ../dist/mynet --plugin {built_example.file}" in built_example.said.stdout
    (run,) = (built_example.folder / "elsewhere" / ".kdexport" / "train").glob("[!.]*/recipe.json")
    kept = json.loads(run.read_text())
    assert kept["recipe"]["distiller"] == {
        "name": "mymethod", "cross_entropy": 1.0, "weight": 1.0, "ramp_epochs": 0.0, "gain": 0.5,
    }  # fmt: skip
    assert set(kept["plugins"]) == {"student", "teacher", "distiller"}


def test_its_bundle_verifies_with_the_plugin_only(built_example: Example, plugged: Command) -> None:
    without = plugged("verify", built_example.bundle)
    assert without.exit_code == 2
    assert "There is no student named 'mynet'." in without.stderr
    assert without.stderr.endswith("Pass --plugin FILE.py for a student of your own.\n")
    done = plugged("verify", built_example.bundle, "--plugin", built_example.file)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "name"), [("students", "mynet"), ("teachers", "myteacher"), ("distillers", "mymethod")]
)
def test_its_entries_are_listed(kind: str, name: str, plugged: Command, tmp_path: Path) -> None:
    path = plugin(tmp_path, example()[0])
    assert name in plugged("list", kind, "--plugin", path).stdout.split()


def test_a_student_without_a_configuration_is_told_what_to_write(plugged: Command, tmp_path: Path) -> None:
    path = plugin(tmp_path, example()[0])
    done = plugged("build", "--student", "mynet", "--plugin", path, cwd=tmp_path)
    assert done.exit_code == 2
    assert done.stderr == (
        "error KDX100: The student 'mynet' has no export configuration.\n"
        'Write mynet.toml with two lines, student = "mynet" and recipe = "digits" (`kdexport list recipes` prints all '
        "recipes), and pass --config mynet.toml.\n"
    )


def resolved(path: str, *settings: str) -> dict[str, object]:
    options = [part for text in ("student.name=mynet", *settings) for part in ("--set", text)]
    done = run_command("resolve", "--recipe", "digits", "--plugin", path, *options, module="training")
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_what_a_plugin_made_is_not_reused_for_another_source(tmp_path: Path) -> None:
    path = plugin(tmp_path, example()[0])
    first = resolved(path)
    assert set(first["plugins"]) == {"student"}  # type: ignore[call-overload]
    Path(path).write_text(example()[0].replace("block(8, 16)", "block(8, 24)", 1))
    second = resolved(path)
    assert first["recipe"] == second["recipe"]

    def keys(answer: dict[str, object]) -> tuple[str, str]:
        recipe, plugins = dict(answer["recipe"]), dict(answer["plugins"])  # type: ignore[call-overload]
        student = train.student_key(recipe, "data", "teacher", 1, plugins)
        return student, train.teacher_key(recipe, "data", 1, plugins)

    assert keys(first)[0] != keys(second)[0]
    # The teacher is one of ours.
    assert keys(first)[1] == keys(second)[1]


RUN = """
from pathlib import Path
from training.recipe import load_recipe
from training.runs.record import claim
from training.study.cells import Cell, teacher_directory

recipe = load_recipe("digits", {"teacher": {"name": "myteacher"}})
claim(Path("run"), recipe, "student")
print(teacher_directory(Cell(name="digits", recipe=recipe, seed=0, directory=Path("run")), Path("runs")))
"""


def test_a_run_is_not_continued_with_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plugin(tmp_path, example()[0])
    monkeypatch.setenv(PLUGINS, path)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    assert run().stdout == first.stdout
    Path(path).write_text(example()[0] + "# Another source.\n")
    assert "run belongs to another run: plugins.teacher is '" in run().stderr
    (tmp_path / "run" / "recipe.json").unlink()
    # Nor is a teacher that runs share.
    other = run().stdout
    assert other.startswith("runs/teachers/myteacher-")
    assert other != first.stdout


def test_a_wrong_key_of_a_plugins_method_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = plugin(tmp_path, example()[0])
    command = ["resolve", "--recipe", "digits", "--plugin", path, "--set", "distiller.name=mymethod"]
    done = run_command(*command, "--set", "distiller.gian=2.0", module="training")
    assert done.exit_code == 2
    assert "unknown key 'distiller.gian'. Did you mean gain" in done.stderr


def test_without_plugins_a_recipe_is_resolved_without_importing_torch() -> None:
    code = (
        "import sys; from training.recipe import load_recipe, plugin_digests\n"
        "print(plugin_digests(load_recipe('digits')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{} False\n"


def test_an_error_of_a_plugin_in_a_child_process_is_that_of_the_command(tmp_path: Path) -> None:
    path = plugin(tmp_path, "import nonsense_of_mine")
    done = run_command("list", "teachers", "--plugin", path)
    assert done.exit_code == 2
    assert done.stderr == (
        f"error KDX100: The plugin {path} cannot be imported (line 1): ModuleNotFoundError: No module named "
        f"'nonsense_of_mine'\nCorrect it, or omit --plugin {path}.\n"
    )


BACKEND = """
from kdexport.backends import BACKENDS
from kdexport.backends.ort import OnnxRuntime

@BACKENDS.register("mine")
class Mine(OnnxRuntime):
    name, description, precisions = "mine", "onnxruntime, of my own", ("fp32",)
"""


def test_a_backend_of_a_plugin_gives_targets(plugged: Command, tmp_path: Path) -> None:
    without = plugged("build", "--student", "mobilenetv2", "--target", "mine-fp32")
    assert without.exit_code == 2
    assert "There is no target named 'mine-fp32'." in without.stderr
    done = plugged("list", "targets", "--plugin", plugin(tmp_path, BACKEND))
    assert re.search(r"^mine-fp32 +onnxruntime, of my own$", done.stdout, flags=re.MULTILINE)
