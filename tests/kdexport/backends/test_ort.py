import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from kdexport.backends.ort import CPU, _session_options, has_vnni, import_onnxruntime, load_model
from kdexport.errors import AuditError, BackendUnavailableError
from tests.kdexport.exported_students import images, small_graph, small_logits, small_weights

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_graph(tmp_path / "small.onnx", small_weights())


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("batch", [1, 5])
def test_logits_are_those_of_an_independent_computation(model: Path, batch: int, optimise: bool) -> None:
    x = images(batch, size=16)
    logits = load_model(model, optimise=optimise).logits(x)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, small_logits(x), rtol=0, atol=2e-6)


def test_an_unknown_provider_is_refused_with_the_list_of_available_ones(model: Path) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        load_model(model, provider="AbacusExecutionProvider")
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith("onnxruntime has no AbacusExecutionProvider on this machine, only ")
    assert CPU in caught.value.message


def test_a_provider_whose_libraries_are_missing_is_refused_and_not_replaced(model: Path) -> None:
    # The wheel may list CUDA as available where no driver is: onnxruntime would then run on the CPU.
    if Path("/proc/driver/nvidia/version").is_file():
        pytest.skip("this machine has an NVIDIA driver")
    with pytest.raises(BackendUnavailableError, match=CUDA) as caught:
        load_model(model, provider=CUDA)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "absent"])
def test_a_damaged_file_is_refused_by_name(model: Path, damage: str) -> None:
    clean = model.read_bytes()
    if damage == "absent":
        model.unlink()
    else:
        model.write_bytes({"truncated": clean[:-40], "garbage": b"\x93NUMPY\xff" * 99, "empty": b""}[damage])
    with pytest.raises(AuditError) as caught:
        load_model(model)
    assert caught.value.message.startswith("onnxruntime cannot open small.onnx: ")
    assert "\n" not in caught.value.message
    assert str(model.parent) not in caught.value.message.partition(":")[0]


def test_every_node_is_assigned_to_the_provider(model: Path) -> None:
    loaded = load_model(model, optimise=False)
    assert loaded.nodes_by_provider == {CPU: len(onnx.load(str(model)).graph.node)}
    assert load_model(model).nodes_by_provider.keys() == {CPU}


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_the_session_has_the_requested_number_of_threads_and_none_spins(model: Path, threads: int) -> None:
    options = load_model(model, threads=threads).session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_optimisation_can_be_switched_off(model: Path) -> None:
    ort = import_onnxruntime()
    levels = [
        load_model(model, optimise=optimise).session.get_session_options().graph_optimization_level
        for optimise in (True, False)
    ]
    assert levels == [ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL]


def test_importing_and_running_leaves_the_home_folder_empty(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    script = (
        "import sys, pathlib, numpy\n"
        "from kdexport.backends.ort import import_onnxruntime, load_model\n"
        "import_onnxruntime()\n"
        "load_model(pathlib.Path(sys.argv[1])).logits(numpy.ones((2, 3, 16, 16), numpy.float32))\n"
    )
    # Without what this very process, or the caller, may already have switched off.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_"))}
    command = [sys.executable, "-c", script, str(model)]
    environment = {**kept, "HOME": str(home), "USERPROFILE": str(home), "LOCALAPPDATA": str(home)}
    subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True, timeout=300)
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni amx_int8", True),
        ("fpu avx2 avx_vnni", True),
        # A processor may compute int8 in other units, and names that only look alike.
        ("fpu avx2 avx512f avx512vbmi", False),
        ("fpu avx512_vnni_like", False),
        (None, False),
    ],
)
def test_vnni_is_read_from_the_flags_of_the_processor(flags: str | None, expected: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"processor\t: 0\nmodel name\t: avx512_vnni\nflags\t\t: {flags}\nbogomips\t: 1\n")
    assert has_vnni(path) is expected


@pytest.mark.parametrize("vnni", [True, False])
def test_only_a_processor_without_vnni_is_given_slower_int8_kernels(
    vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdexport.backends.ort.has_vnni", lambda: vnni)
    options = _session_options(import_onnxruntime(), 1, True)
    if vnni:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


@pytest.mark.parametrize("inputs", [0, 1])
def test_a_file_without_inputs_is_refused(tmp_path: Path, inputs: int) -> None:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    made = helper.make_node("Constant", [], ["y"], value_float=1.0)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    graph = helper.make_graph([made], "g", [given] * inputs, [result])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(tmp_path / "a.onnx"))
    if inputs:
        assert load_model(tmp_path / "a.onnx").input_name == "x"
        return
    with pytest.raises(AuditError, match=r"a\.onnx has 0 inputs and 1 outputs\."):
        load_model(tmp_path / "a.onnx")
