import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kdexport.core.extras import EXTRAS, install, missing_package

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
#: Modules whose distribution has another name, where it need not be installed here.
DISTRIBUTIONS = {
    "tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13", "onnxruntime": "onnxruntime", "grpc": "grpcio",
    "sklearn": "scikit-learn", "cyclonedx": "cyclonedx-python-lib",
    "opentelemetry": "opentelemetry-sdk",
}  # fmt: skip


def asked(extra: str) -> list[Requirement]:
    """What an extra installs, also by other extras."""
    wanted = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    inner = [found for each in wanted if each.name == "kdexport" for other in each.extras for found in asked(other)]
    return [*wanted, *inner]


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_the_extra_of_a_module_installs_it_and_the_base_does_not(module: str) -> None:
    name = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    assert name in {wanted.name for wanted in asked(EXTRAS[module])}
    assert name not in {Requirement(line).name for line in PROJECT["dependencies"]}


def test_every_package_of_an_extra_that_users_choose_is_explained_when_it_is_missing() -> None:
    explained = {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in EXTRAS}
    # Tested by the tests, or part of a package that is explained.
    other = {"kdexport", "nvidia-ml-py", "onnxruntime-gpu", "ml-dtypes", "packaging", "pyopenssl", "protobuf"}
    other |= {"opentelemetry-exporter-otlp-proto-http", "opentelemetry-instrumentation-asgi"}
    for extra, lines in PROJECT["optional-dependencies"].items():
        if extra not in ("dev", "docs"):
            assert {Requirement(line).name for line in lines} <= explained | other, extra


def onnxruntimes(extra: str) -> set[str]:
    """The onnxruntimes that an extra installs on this machine."""
    named = [each for each in asked(extra) if each.name.startswith("onnxruntime")]
    return {each.name for each in named if each.marker is None or each.marker.evaluate()}


def test_no_extra_installs_both_onnxruntimes_and_those_of_users_install_one() -> None:
    """They write the same files, so that the second one breaks the first."""
    for extra in PROJECT["optional-dependencies"]:
        expected = {"cpu": 1, "gpu": 1, "serve": 1, "serve-gpu": 1, "build": 1, "build-gpu": 1, "dev": 1}.get(extra, 0)
        assert len(onnxruntimes(extra)) == expected, extra
    assert onnxruntimes("build") == onnxruntimes("serve") == {"onnxruntime"}


@pytest.mark.parametrize(
    ("gpu", "cpu", "typed"), [("1.31", "absent", "build-gpu"), ("absent", "1.31", "build"), ("1.31", "1.31", "build")]
)
def test_an_extra_that_would_install_a_second_onnxruntime_is_not_proposed(
    gpu: str, cpu: str, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"onnxruntime-gpu": gpu, "onnxruntime": cpu}
    monkeypatch.setattr("kdexport.core.extras.tool_versions", lambda *names: {name: found[name] for name in names})
    assert install("torch") == f"Run pip install 'kdexport[{typed}]'."
    assert install("scipy") == "Run pip install 'kdexport[stats]'."


@pytest.mark.parametrize("name", ["torch", "torch.nn.functional", "scipy.special"])
def test_a_missing_module_becomes_the_command_that_installs_it(name: str) -> None:
    top = name.partition(".")[0]
    found = missing_package(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert found is not None
    assert found.exit_code == 4
    assert found.message == f"This needs the package {top}, which is not installed."
    assert found.remedy == install(top)
    assert EXTRAS[top] in found.remedy


def test_one_of_two_onnxruntimes_is_offered_and_none_is_chosen() -> None:
    assert "'kdexport[cpu]'" in install("onnxruntime")
    assert "'kdexport[gpu]'" in install("onnxruntime")
    assert "not both" in install("onnxruntime")


def test_a_module_that_was_missing_below_another_error_is_found() -> None:
    outer = RuntimeError("cannot load")
    outer.__cause__ = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert missing_package(outer) is not None


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'mynet'", name="mynet"),
        ModuleNotFoundError("no name"),
        ImportError("cannot import name 'x' from 'torch'", name="torch"),
        ValueError("torch"),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert missing_package(error) is None
