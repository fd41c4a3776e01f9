"""What an engine file says of itself, and that a plan of another graph, precision or length is found without a GPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kdexport.backends.base import CompileRequest, Finding
from kdexport.backends.plan_content import built_from, read_plan, weights_in_plan, whole
from kdexport.core.digests import sha256_file
from kdexport.graph.precision import cast_to_bf16, cast_to_fp16
from kdexport.graph.quantize import quantize
from kdexport.graph.tensor_ranges import calibrate
from kdexport.targets import parse_target
from tests.conftest import made_once
from tests.kdexport.graph.int8_block import CALIBRATION, SIZE, block_graph

PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each precision: the ONNX file, its plan and the layer table."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return made_once(tmp_path_factory, "plans", _make)


def _make(root: Path) -> None:
    source = block_graph(root / "source.onnx")
    for precision in PRECISIONS:
        folder = root / precision
        folder.mkdir()
        model = folder / "model.onnx"
        if precision == "fp16":
            cast_to_fp16(source, model)
        elif precision == "bf16":
            cast_to_bf16(source, model)
        elif precision == "int8":
            calibrate(source, [CALIBRATION], root / "r.json", method="minmax", percentile=99.9)
            quantize(source, root / "r.json", model, form="int8-s8")
        else:
            shutil.copyfile(source, model)
        target = parse_target(f"trt-rtx-{precision}")
        target.runtime.compile(
            CompileRequest(
                onnx=model, folder=folder, precision=precision, image_size=SIZE, batches=(1, 2, 4),
                options={"compute_capabilities": ["SM89"]},
            )
        )  # fmt: skip


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``copy("fp16")``: the files of that precision, to be changed."""
    return lambda precision: Path(shutil.copytree(made / precision, tmp_path / f"{precision} copy"))


def audit(folder: Path, precision: str) -> list[Finding]:
    return parse_target(f"trt-rtx-{precision}").runtime.audit(folder, precision, ())


def faults(folder: Path, precision: str) -> dict[str, str]:
    return {finding.check: finding.fact for finding in audit(folder, precision) if finding.ran and not finding.holds}


def bind_again(folder: Path) -> None:
    """Write the digests of changed files into the layer table."""
    path = folder / "layers.json"
    table = json.loads(path.read_text())
    table["plan_sha256"], table["onnx_sha256"] = sha256_file(folder / "model.plan"), sha256_file(folder / "model.onnx")
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_plan_as_it_was_built_holds_the_nodes_types_and_weights_of_its_onnx_file(made: Path, precision: str) -> None:
    folder = made / precision
    found = audit(folder, precision)
    assert [finding.check for finding in found if not finding.holds] == []
    plan = (folder / "model.plan").read_bytes()
    content = read_plan(plan)
    assert content.stated_length == len(plan)
    assert {"stem", "inner"} <= content.nodes
    kind = {"fp32": "float", "fp16": "half", "bf16": "bf16", "int8": "int8"}[precision]
    assert max(content.constants, key=lambda name: content.constants[name]) == kind
    weights = weights_in_plan(plan, folder / "model.onnx")
    # The builder stores int8 weights of few channels in another order.
    assert weights or precision == "int8"
    assert json.loads((folder / "layers.json").read_text())["weights_in_plan"] == weights


def test_an_empty_a_truncated_and_an_extended_plan_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("fp16")
    plan = (folder / "model.plan").read_bytes()
    for content, words in (
        (b"", "the plan is empty"),
        (plan[:9], "9 bytes; the plan states no length"),
        (plan[:-1], f"truncated: {len(plan) - 1:,} bytes, and the plan states {len(plan):,}"),
        (plan + b"\0", f"{len(plan) + 1:,} bytes, and the plan states {len(plan):,}"),
    ):
        (folder / "model.plan").write_bytes(content)
        assert whole(content).fact == words
        bind_again(folder)
        assert faults(folder, "fp16")


@pytest.mark.parametrize("rebound", [False, True])
def test_a_flipped_bit_of_a_weight_is_found_even_if_the_digests_were_written_again(
    copy: Callable[[str], Path], rebound: bool
) -> None:
    folder = copy("fp16")
    plan = bytearray((folder / "model.plan").read_bytes())
    name = weights_in_plan(bytes(plan), folder / "model.onnx")[0]
    graph = onnx.load(str(folder / "model.onnx")).graph
    weight = next(numpy_helper.to_array(item) for item in graph.initializer if item.name == name).tobytes()
    plan[plan.index(weight) + 7] ^= 1
    (folder / "model.plan").write_bytes(plan)
    if rebound:
        bind_again(folder)
    found = faults(folder, "fp16")
    assert ("plan is that of its layers" in found) is not rebound
    assert f"weights are not in the plan as in the ONNX file: {name}" in found["plan has the content of its ONNX file"]


@pytest.mark.parametrize(
    ("inside", "outside"), [("int8", "fp16"), ("fp16", "int8"), ("fp32", "fp16"), ("fp16", "bf16")]
)
def test_the_plan_of_another_precision_is_found_even_if_the_digests_were_written_again(
    copy: Callable[[str], Path], made: Path, inside: str, outside: str
) -> None:
    folder = copy(outside)
    shutil.copyfile(made / inside / "model.plan", folder / "model.plan")
    assert "plan is that of its layers" in faults(folder, outside)
    bind_again(folder)
    fact = faults(folder, outside)["plan has the content of its ONNX file"]
    assert ("weights" if outside != "int8" else "nodes of the layer table") + " are not in the plan" in fact
    assert f"bytes of constants in {'half' if outside == 'fp16' else outside}, the ONNX file" in fact


def test_the_plan_of_other_weights_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("fp32")
    model = onnx.load(str(folder / "model.onnx"))
    plan = (folder / "model.plan").read_bytes()
    name = weights_in_plan(plan, folder / "model.onnx")[-1]
    tensor = next(item for item in model.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), name))
    onnx.save(model, str(folder / "model.onnx"))
    bind_again(folder)
    assert name in faults(folder, "fp32")["plan has the content of its ONNX file"]


def test_a_layer_table_of_another_graph_is_found(copy: Callable[[str], Path]) -> None:
    folder = copy("fp16")
    found = built_from((folder / "model.plan").read_bytes(), folder / "model.onnx", [], frozenset({"inner", "foreign"}))
    assert not found.holds
    assert found.fact == "1 nodes of the layer table are not in the plan: foreign"


def test_a_table_of_an_earlier_version_is_not_bound_and_says_so(copy: Callable[[str], Path]) -> None:
    folder = copy("fp16")
    table = json.loads((folder / "layers.json").read_text())
    for key in ("plan_sha256", "onnx_sha256", "weights_in_plan"):
        del table[key]
    (folder / "layers.json").write_text(json.dumps(table))
    facts = {finding.check: finding.fact for finding in audit(folder, "fp16") if not finding.ran}
    assert facts["plan is that of its layers"] == "not bound: layers.json of an earlier version"
    (folder / "model.plan").write_bytes(b"")
    assert faults(folder, "fp16") == {"plan is whole": "the plan is empty"}
