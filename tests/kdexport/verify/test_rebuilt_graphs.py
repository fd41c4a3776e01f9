"""Files of a bundle against the graphs that are rebuilt from its unfused student."""

import json
from pathlib import Path

import onnx
from onnx import helper

from kdexport.bundle.manifest import MANIFEST, hash_files
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
