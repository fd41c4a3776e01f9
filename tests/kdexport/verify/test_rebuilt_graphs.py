"""Files of a bundle against the graphs that are rebuilt from its unfused student."""

import json
from pathlib import Path

import onnx
from onnx import helper

from kdexport.bundle.manifest import MANIFEST, hash_files, read_manifest
from kdexport.graph.plan import PLAIN
from kdexport.verify.rebuilt_graphs import RebuiltGraphs
from tests.conftest import Built, Command


def change_operator(path: Path, operator: str, **attributes: float) -> str:
    """Make the first ReLU-like node of a file another one that gives the same labels; returns its name."""
    model = onnx.load(str(path))
    node = next(node for node in model.graph.node if node.op_type in ("Relu", "Clip"))
    del node.attribute[:]
    node.input[:] = node.input[:1]
    node.op_type = operator
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    onnx.save(model, str(path))
    return str(node.name)


def test_files_whose_digests_were_made_consistent_are_caught_by_their_graphs(
    built: Built, bundle_copy: Path, here: Command
) -> None:
    names = ("model.onnx", "targets/trt-rtx-fp16/model.onnx")
    nodes = [change_operator(bundle_copy / name, "LeakyRelu", alpha=1e-7) for name in names]
    data = json.loads((bundle_copy / MANIFEST).read_text())
    data["files"] = hash_files(bundle_copy)
    (bundle_copy / MANIFEST).write_text(json.dumps(data))
    done = here("verify", bundle_copy, "--json")
    assert done.exit_code == 1
    caught = {check["subject"]: check["detail"] for check in done.data["checks"] if not check["holds"]}
    for name, node in zip(names, nodes, strict=True):
        assert f"node {node} is a LeakyRelu, expected a" in caught[name]
    assert "targets/onnx-fp32/model.onnx" not in caught


def rename(path: Path) -> None:
    """Give every tensor and node another name, as another version of the exporter does."""
    model = onnx.load(str(path))
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}

    def other(name: str) -> str:
        return name if not name or name in kept else f"other_{name}"

    for node in model.graph.node:
        node.name = f"other_{node.name}"
        node.input[:] = [other(name) for name in node.input]
        node.output[:] = [other(name) for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = other(tensor.name)
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def test_the_names_of_another_exporter_make_no_difference(bundle_copy: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "targets/trt-rtx-fp16/model.onnx"):
        rename(bundle_copy / name)
    rebuilt = RebuiltGraphs(bundle_copy, read_manifest(bundle_copy), tmp_path)
    for name, form in (("model.onnx", "fp32"), ("targets/trt-rtx-fp16/model.onnx", "fp16")):
        finding = rebuilt.finding(name, form, PLAIN, 8)
        assert finding.holds, finding.fact
    change_operator(bundle_copy / "targets/trt-rtx-fp16/model.onnx", "LeakyRelu", alpha=1e-7)
    assert "is a LeakyRelu" in rebuilt.finding("targets/trt-rtx-fp16/model.onnx", "fp16", PLAIN, 8).fact


def test_ranges_of_another_graph_are_a_finding_and_no_crash(bundle_copy: Path, tmp_path: Path) -> None:
    place = bundle_copy / "targets" / "onnx-fp32"
    (place / "ranges.json").write_text('{"ranges": {"nothing": [0.0, 1.0]}}')
    finding = RebuiltGraphs(bundle_copy, read_manifest(bundle_copy), tmp_path).finding(
        "targets/onnx-fp32/model.onnx", "int8-u8", PLAIN, 8
    )
    assert not finding.holds
    assert finding.fact.startswith("cannot be rebuilt: ")
