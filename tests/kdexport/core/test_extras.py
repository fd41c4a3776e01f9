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


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_the_extra_of_a_module_installs_it_and_the_base_does_not(module: str) -> None:
    name = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    asked = {Requirement(line).name for line in PROJECT["optional-dependencies"][EXTRAS[module]]}
    assert name in asked
    assert name not in {Requirement(line).name for line in PROJECT["dependencies"]}


def test_every_package_of_an_extra_that_users_choose_is_explained_when_it_is_missing() -> None:
    explained = {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in EXTRAS}
    # Tested by the tests, or part of a package that is explained.
    other = {"kdexport", "nvidia-ml-py", "onnxruntime-gpu", "ml-dtypes", "pyopenssl", "protobuf"}
    other |= {"opentelemetry-exporter-otlp-proto-http", "opentelemetry-instrumentation-asgi"}
    for extra, lines in PROJECT["optional-dependencies"].items():
        if extra != "dev":
            assert {Requirement(line).name for line in lines} <= explained | other, extra


def test_no_extra_installs_both_onnxruntimes() -> None:
    """They write the same files, so that the second one breaks the first."""
    for extra, lines in PROJECT["optional-dependencies"].items():
        wanted = [Requirement(line) for line in lines]
        chosen = [r for r in wanted if r.name.startswith("onnxruntime") and (r.marker is None or r.marker.evaluate())]
        assert len(chosen) == (extra in ("cpu", "gpu")), extra


@pytest.mark.parametrize("name", ["torch", "torch.nn.functional", "scipy.special"])
def test_a_missing_module_becomes_the_command_that_installs_it(name: str) -> None:
    top = name.partition(".")[0]
    found = missing_package(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert found is not None
    assert found.exit_code == 4
    assert found.message == f"This needs the package {top}, which is not installed."
    assert found.remedy == f"Run pip install 'kdexport[{EXTRAS[top]}]'."


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
