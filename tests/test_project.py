"""What the repository says about itself: Dockerfile, Makefile, CI, configurations, wheel."""

import ast
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TESTS = ROOT / "tests"
#: Test modules about several modules of their folder, and what each one is about.
SPANNING = {
    "kdexport/backends/test_contract.py": "the contract of every registered backend, and of one outside the package",
    "kdexport/build/test_golden_images.py": "golden images from the file of a user to every command that reads them",
    "kdexport/build/test_target_builds.py": "every target from the command to faults in its bundle",
    "kdexport/bundle/test_bit_rot.py": "every file of a bundle, damaged, in every command that reads it",
    "kdexport/commands/test_interrupts.py": "commands that a signal stops, and what is left of them",
    "kdexport/gate/test_action.py": "the composite action that runs the gate in CI",
    "kdexport/graph/test_audit_int8.py": "the audit, on the files that the quantizer writes",
    "kdexport/graph/test_students_export.py": "export, cast and audit of every registered student",
    "kdexport/reparam/test_absorbed_pads.py": "adapters composed into padded convolutions, from structure to fold",
    "kdexport/reparam/test_timm_networks.py": "networks of timm, from export to certificate",
    "kdexport/reparam/test_mutated_merges.py": "wrong merges put into every module of the algebra",
    "kdexport/serving/processes/test_shared_port.py": "a server of two processes, from the command to its end",
    "kdexport/serving/test_error_texts.py": "no response holds the exception text of a library",
    "kdexport/serving/test_foreign_clients.py": "requests as other clients write them, recorded from them",
    "kdexport/serving/test_fuzz.py": "random requests to a running server",
    "kdexport/serving/test_hostile.py": "requests of known attacks to a running server",
    "kdexport/serving/test_lifecycle.py": "start, reload and shutdown of a running server",
    "kdexport/serving/test_pixel_bundles.py": "bundles whose targets take pixels, from the checks to the server",
    "kdexport/serving/test_scale_out.py": "manifests of Kubernetes, KServe, Ray and Triton",
    "kdexport/serving/test_telemetry.py": "no command sends telemetry",
    "kdexport/serving/test_tritonclient.py": "the client of Triton against a running server",
    "kdexport/students/test_contract.py": "the contract of every registered student",
    "kdexport/students/test_merge.py": "branches on every registered student and their merge",
    "kdexport/test_lean_import.py": "what importing the package imports",
    "kdexport/verify/test_foreign_bundles.py": "a bundle of a network of another origin, and its changes",
    "kdexport/verify/test_other_networks.py": "the ladder on networks with attention, gates and norms",
    "training/distillers/test_contract.py": "the contract of every registered method",
    "training/distillers/test_feature_distillers.py": "every method on every pair of networks",
    "training/test_foreign_students.py": "students of other origins, from the recipe to what they hand over",
    "training/runs/test_processes.py": "training by several processes",
    "training/runs/test_practices.py": "runs with every recipe key of common practice",
    "training/teachers/test_architectures.py": "published facts of every registered teacher",
    "training/teachers/test_contract.py": "the contract of every registered teacher",
}
MODULES = sorted([*(ROOT / "kdexport").rglob("*.py"), *(ROOT / "training").rglob("*.py")])


def test_the_dockerfile_has_the_three_stages_on_one_base() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert [name for _, name in stages] == ["base", "train", "build", "serve"]
    assert all(image == "base" for image, _ in stages[1:])


def test_the_dockerfile_copies_only_what_exists_and_all_that_the_wheel_needs() -> None:
    copied: set[str] = set()
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE, flags=re.MULTILINE):
        sources = line.split()[:-1]
        if sources == ["${BUNDLE}"]:
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            copied.add(source)
    assert {"pyproject.toml", "README.md", "constraints.txt", "kdexport", "training", "export_configs"} <= copied
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not copied & set(ignored)


def test_the_dockerfile_installs_extras_and_runs_commands_that_exist() -> None:
    import typer.main

    from kdexport.cli import app

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"pip install .*'\.\[([\w,-]+)\]'", DOCKERFILE):
        assert set(group.split(",")) <= set(extras)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for block in DOCKERFILE.split("FROM ")[1:]:
        entry = re.search(r"^ENTRYPOINT (.+)$", block, flags=re.MULTILINE)
        argument = re.search(r"^CMD (.+)$", block, flags=re.MULTILINE)
        if entry is None or argument is None:
            continue
        words = [*ast.literal_eval(entry[1]), *ast.literal_eval(argument[1])]
        if words[0] == "kdexport":
            assert words[1] in commands
        else:
            assert words[:3] == ["python", "-m", "training"]


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "exec make test" in script
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("config", sorted((ROOT / "export_configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_export_configuration_resolves(config: Path) -> None:
    from kdexport.build.train import resolve_recipe
    from kdexport.config import load_config
    from kdexport.targets import parse_targets

    loaded = load_config(config)
    parse_targets(loaded.targets)
    assert resolve_recipe(loaded.recipe, loaded.overrides)["recipe"]["data"]["name"]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda p: p.name)
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    places = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert [target for target in places if not (page.parent / target).exists()] == []


def test_kdexport_never_imports_training() -> None:
    for path in sorted((ROOT / "kdexport").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "training"], path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_ascii_and_say_what_their_public_functions_do(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            assert ast.get_docstring(function), function.name


def test_each_file_name_stands_once_in_kdexport() -> None:
    names = [path.name for path in (ROOT / "kdexport").rglob("*.py") if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_test_folder_mirrors_a_package_folder() -> None:
    folders = sorted({path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")})
    assert [str(folder) for folder in folders if not any((ROOT / folder).glob("*.py")) and folder != Path()] == []


def test_every_test_folder_is_collected(pytestconfig: pytest.Config) -> None:
    """By default pytest enters no folder of the name build, and no test of kdexport.build would run."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in TESTS.rglob("test_*.py")}
    skipped = {folder for folder in folders for name in patterns if any(fnmatch(part, name) for part in folder.parts)}
    assert skipped == set()


def test_every_test_module_is_named_after_the_module_that_it_tests_or_listed() -> None:
    unmatched = []
    for path in TESTS.glob("*/**/test_*.py"):
        name = path.relative_to(TESTS)
        if not (ROOT / name.with_name(name.name.removeprefix("test_"))).is_file():
            unmatched.append(str(name))
    # Both differences, so that neither a new module is left out nor an entry outlives its module.
    assert (sorted(set(unmatched) - SPANNING.keys()), sorted(SPANNING.keys() - set(unmatched))) == ([], [])


def test_no_test_imports_from_a_test_module() -> None:
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = [name for name in names if name.startswith("tests.")]
            assert not [name for name in imported if re.search(r"\.test_\w+(\.|$)", name)], path


def test_no_file_names_a_machine() -> None:
    marks = re.compile(r"/(?:home|root|Users|work)/[a-z]")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # Tests plant such paths on purpose.
    for name in (name for name in tracked if not name.startswith("tests/")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.is_file():
            assert not marks.search(path.read_text(errors="ignore")), name


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {"filelock", "hypothesis", "import-linter", "jsonschema", "mypy", "packaging", "pyyaml", "ruff", "kdexport"}
    # The site is built with current versions.
    tools |= {"latex2mathml", "mkdocs", "mkdocs-material", "mkdocstrings"}
    # Full TensorRT cannot be installed beside the tests: its libraries are not on PyPI.
    listed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    requirements = [Requirement(line) for line in listed]
    lines = [Requirement(line) for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line[0] != "#"]
    tested = {line.name: Version(next(iter(line.specifier)).version) for line in lines}
    for requirement in requirements:
        name = requirement.name
        if name in tools or name.startswith("pytest") or name == "tensorrt-cu13":
            continue
        (bound,) = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        # 1.26.4 is a version of 1.26, the bound.
        assert tested[name].release[: len(bound.release)] == bound.release, requirement
