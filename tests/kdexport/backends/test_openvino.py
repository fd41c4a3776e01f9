import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdexport.backends.openvino import RUNTIME_TYPES, capabilities, load_openvino
from kdexport.errors import AuditError, BackendUnavailableError
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from tests.kdexport.exported_students import images, small_graph, small_logits, small_weights
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph, block_tensors
from tests.kdexport.optional_packages import require_openvino

require_openvino()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_graph(tmp_path_factory.mktemp("openvino") / "small.onnx", small_weights())


@pytest.mark.parametrize("batch", [1, 5])
def test_logits_are_those_of_an_independent_computation(model: Path, batch: int) -> None:
    x = images(batch, size=16)
    loaded = load_openvino(model, precision="fp32", threads=1)
    np.testing.assert_allclose(loaded.logits(x), small_logits(x), rtol=0, atol=2e-6)
    assert {layer.runtime_type for layer in loaded.computing} == {"f32"}
    assert [layer.kind for layer in loaded.computing].count("Convolution") == 1
    assert loaded.kinds["Convolution"] == 1
    assert "Const" not in loaded.kinds


def test_an_int8_file_runs_by_integer_kernels(tmp_path: Path) -> None:
    source = block_graph(tmp_path / "a.onnx")
    calibrate(source, [CALIBRATION], tmp_path / "r.json", method="minmax", percentile=99.9)
    quantize(source, tmp_path / "r.json", tmp_path / "q.onnx", form="int8-u8", weight_bits=7)
    loaded = load_openvino(tmp_path / "q.onnx", precision="int8", threads=1)
    assert {layer.runtime_type for layer in loaded.computing} <= {"u8", "i8"}
    assert len(loaded.computing) == 3
    x = images(20, 5, size=SIZE)
    exact = block_tensors(x, None)["logits"].numpy()
    simulated = block_tensors(x, "int8-u8")["logits"].numpy()
    noise = np.sqrt(np.mean((simulated - exact) ** 2))
    # Weights of 7 bits against 8 of the simulation.
    assert np.sqrt(np.mean((loaded.logits(x) - exact) ** 2)) < 3 * noise


def test_a_precision_that_the_processor_lacks_runs_in_another_one_and_is_detected(model: Path) -> None:
    missing = [name for name in ("bf16", "fp16") if name.upper() not in capabilities()]
    if not missing:
        pytest.skip("this processor has every precision")
    loaded = load_openvino(model, precision=missing[0])
    # OpenVINO takes float32, or for float16 bfloat16 on a processor that has it.
    found = {layer.runtime_type for layer in loaded.computing}
    assert found == ({"bf16"} if "BF16" in capabilities() else {"f32"})
    assert not found & set(RUNTIME_TYPES[missing[0]])


def test_every_processor_has_float32() -> None:
    assert "FP32" in capabilities()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "absent"])
def test_a_damaged_file_is_refused_by_name(model: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "bad.onnx"
    if damage != "absent":
        clean = model.read_bytes()
        path.write_bytes(clean[:-40] if damage == "truncated" else b"\x93NUMPY\xff" * 99)
    with pytest.raises(AuditError, match=r"OpenVINO cannot open bad\.onnx: ") as caught:
        load_openvino(path, precision="fp32")
    assert "\n" not in caught.value.message


def test_a_missing_package_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendUnavailableError, match="OpenVINO is not installed") as caught:
        load_openvino(model, precision="fp32")
    assert "kdexport[openvino]" in caught.value.remedy


def test_importing_the_backend_imports_no_openvino_and_running_it_writes_nothing_at_home(
    model: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, pathlib, numpy; from kdexport.backends.openvino import load_openvino\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'openvino'])\n"
        "load_openvino(pathlib.Path(sys.argv[1]), precision='fp32').logits(numpy.ones((1, 3, 16, 16), numpy.float32))"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
    assert list(home.rglob("*")) == []
