import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kdexport.backends import backend, ncnn
from kdexport.backends.base import Backend
from kdexport.backends.ncnn_files import WEIGHTED, Layer, read_net, write_net
from kdexport.bundle.manifest import MANIFEST, NOT_EXECUTED, VERIFIED, hash_files, read_manifest
from kdexport.errors import BackendUnavailableError, ConfigError, EngineBuildError
from kdexport.gate.arms import require_images_per_run
from kdexport.verify.verdict import replay
from tests.conftest import Built, Command, build_targets
from tests.kdexport.backends.compiled_targets import compiled, compiled_blocks
from tests.kdexport.exported_students import exported, images, small_graph, small_logits, small_weights
from tests.kdexport.graph.int8_block import SIZE, block_graph, block_tensors
from tests.kdexport.optional_packages import require_ncnn

require_ncnn()

TARGETS = ("ncnn-fp32", "ncnn-fp16", "ncnn-int8")
Edit = Callable[[list[Layer]], None]


@pytest.fixture(scope="module")
def runtime() -> Backend:
    return backend("ncnn")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The residual network of the int8 tests in each precision."""
    return compiled_blocks("ncnn", tmp_path_factory.mktemp("ncnn"))


@pytest.mark.parametrize(("batch", "size"), [(1, 16), (5, 15)])
def test_logits_are_those_of_an_independent_computation(
    batch: int, size: int, tmp_path: Path, runtime: Backend
) -> None:
    """An odd size too: ncnn pads its channels, and numpy does not."""
    source = small_graph(tmp_path / "a.onnx", small_weights(), size=size)
    path = compiled("ncnn", source, "fp32", tmp_path / "t", size=size)
    runner, x = runtime.open(path, "fp32", threads=1), images(batch, size=size)
    np.testing.assert_allclose(runner.logits(x), small_logits(x), rtol=0, atol=2e-6)
    strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(runner.logits(strided), runner.logits(x))
    assert runner.execution.to_json() == {
        "runtime": "ncnn", "version": runner.execution.version, "device": "CPU",
        "types": ["fp32", "results in 32 bits"],
    }  # fmt: skip
    assert all(finding.holds for finding in runner.findings())


def test_int8_is_the_noise_of_its_levels_and_is_added_in_integers(blocks: dict[str, Path], runtime: Backend) -> None:
    runner, x = runtime.open(blocks["int8"], "int8", threads=1), images(20, 5, size=SIZE)
    exact = block_tensors(x, None)["logits"].numpy()
    simulated = block_tensors(x, "int8-s8")["logits"].numpy()
    noise = np.sqrt(np.mean((simulated - exact) ** 2))
    assert noise / 3 < np.sqrt(np.mean((runner.logits(x) - exact) ** 2)) < 1.5 * noise
    facts = {finding.check: finding for finding in runner.findings()}
    assert facts["integer products"].holds
    assert facts["integer products"].fact == "3 of 3 layers gave whole numbers of products of levels"
    assert all(finding.holds for finding in runtime.audit(blocks["int8"].parent, "int8", ()))


def test_a_file_that_multiplies_in_float32_is_not_taken_for_int8(blocks: dict[str, Path], runtime: Backend) -> None:
    """The layers of the int8 file, and the network that a runtime without int8 would run."""
    honest = runtime.open(blocks["int8"], "int8")
    other = runtime.open(blocks["fp32"], "fp32")
    assert isinstance(honest, ncnn.NcnnRunner)
    assert isinstance(other, ncnn.NcnnRunner)
    (found,) = (f for f in replace(honest, net=other.net).findings() if f.check == "integer products")
    assert not found.holds
    assert found.fact.endswith("(stem) multiplied in float32")


def test_float16_that_ncnn_switches_on_by_itself_is_found(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ncnn, "_configured", lambda *_: ncnn.import_ncnn().Net())
    (found,) = runtime.open(blocks["fp32"], "fp32").findings()
    assert not found.holds
    assert "use_fp16_storage" in found.fact


def test_float16_is_stored_and_not_said_to_run_where_results_have_32_bits(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(finding.holds for finding in runtime.audit(blocks["fp16"].parent, "fp16", ()))
    assert {layer.storage for layer in read(blocks["fp16"]) if layer.kind in WEIGHTED} == {"fp16"}
    monkeypatch.setattr(ncnn, "stores_half", lambda: False)
    missing = runtime.not_executable("fp16")
    assert missing is not None
    assert "in float32 on this CPU" in missing.reason
    assert runtime.unavailable("fp16") is None
    with pytest.raises(BackendUnavailableError, match="multiplies float16 files in float32 on this CPU"):
        runtime.open(blocks["fp16"], "fp16")
    assert runtime.stand_in("fp16") == "fp32"
    x = images(6, 5, size=SIZE)
    found = runtime.open_stand_in(blocks["fp16"], "fp16").logits(x)
    exact = block_tensors(x, None)["logits"].numpy()
    plain = runtime.open(blocks["fp32"], "fp32").logits(x)
    # Weights of float16 are there: farther away than float32, and not farther than 11 bits are.
    assert np.abs(plain - exact).max() < np.abs(found - exact).max() < 2e-3 * np.abs(exact).max()


def read(path: Path) -> tuple[Layer, ...]:
    return read_net(path.with_suffix(".param"), path)


def weighted(layers: list[Layer], number: int) -> int:
    """The position of a layer with weights: 0 stem, 1 inner, 2 linear."""
    return [place for place, layer in enumerate(layers) if layer.kind in WEIGHTED][number]


def tensor(number: int, role: str, change: Callable[[Any], Any]) -> Edit:
    def edit(layers: list[Layer]) -> None:
        place = weighted(layers, number)
        layer = layers[place]
        layers[place] = replace(layer, tensors={**layer.tensors, role: change(layer.tensors[role].copy())})

    return edit


def params(number: int, **changes: str | None) -> Edit:
    def edit(layers: list[Layer]) -> None:
        place = weighted(layers, number)
        given = {**layers[place].params, **{int(key[1:]): value for key, value in changes.items()}}
        layers[place] = replace(layers[place], params={key: value for key, value in given.items() if value is not None})

    return edit


def swapped_classes(layers: list[Layer]) -> None:
    tensor(2, "weight", lambda w: w.reshape(5, -1)[[1, 0, 2, 3, 4]].reshape(-1))(layers)


def dropped_bias(layers: list[Layer]) -> None:
    params(0, _5="0")(layers)


def in_float32(layers: list[Layer]) -> None:
    place = weighted(layers, 1)
    layer = layers[place]
    scale = np.repeat(
        layer.tensors["weight_scales"], layer.tensors["weight"].size // len(layer.tensors["weight_scales"])
    )
    weight = (layer.tensors["weight"] / scale).astype(np.float32)
    layers[place] = replace(layer, tensors={**layer.tensors, "weight": weight})
    params(1, _8=None)(layers)


def rewired(layers: list[Layer]) -> None:
    """The linear layer reads the stem instead of the sum."""
    at = next(place for place, layer in enumerate(layers) if layer.kind in ("Reduction", "Pooling"))
    stem = layers[weighted(layers, 0)]
    split = next(layer for layer in layers if stem.tops[0] in layer.bottoms)
    layers[at] = replace(layers[at], bottoms=(split.tops[0],))


@pytest.mark.parametrize(
    ("precision", "edit", "check", "words"),
    [
        ("fp32", tensor(1, "weight", lambda w: w * np.float32(1.01)), "weights", "(inner (inner.weight)): 36 of 36"),
        ("fp32", swapped_classes, "weights", "(linear (linear.weight)): 12 of 30 values differ, first in output 0"),
        ("fp32", dropped_bias, "biases", "(stem (stem.weight)): the bias is missing"),
        ("fp32", tensor(2, "bias", lambda b: -b), "biases", "(linear (linear.weight)): 5 of 5 values"),
        ("fp16", tensor(0, "weight", lambda w: w + np.float16(2**-9)), "weights", "(stem (stem.weight))"),
        ("fp16", tensor(1, "weight", np.float32), "every weight in fp16", "(inner) is stored in fp32, expected fp16"),
        ("int8", tensor(0, "weight", lambda w: -w), "weights", "(stem (stem.weight))"),
        ("int8", tensor(1, "weight_scales", lambda s: s * np.float32(1.1)), "scales", "weight scales: 6 of 6 values"),
        ("int8", tensor(2, "input_scale", lambda s: s * np.float32(1.1)), "scales", "input scale: 1 of 1 values"),
        ("int8", in_float32, "every weight in int8", "(inner) is stored in fp32, expected int8"),
        ("fp32", params(0, _3="2", _13="2"), "each layer is one of the graph", "has the geometry"),
        ("fp32", params(0, _9=None), "each layer is one of the graph", "is followed by no activation, expected Relu"),
        ("fp32", rewired, "each layer is one of the graph", "reads the result of stem, expected"),
    ],
)  # fmt: skip
def test_a_changed_file_is_found_and_its_layer_is_named(
    precision: str, edit: Edit, check: str, words: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks[precision].parent, tmp_path / "t"))
    path = folder / ncnn.MODEL
    layers = list(read(path))
    edit(layers)
    write_net(tuple(layers), path.with_suffix(".param"), path)
    failed = {finding.check: finding for finding in runtime.audit(folder, precision, ()) if not finding.holds}
    assert check in failed
    assert words in failed[check].fact


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-8], "it ends within"),
        (lambda data: data + b"\0" * 4, "bytes, and the layers of model.ncnn.param have"),
        (lambda data: b"\1\2\3\4" + data[4:], "has the unknown storage type 0x04030201"),
        (lambda data: b"", "it ends within"),
    ],
)
def test_a_damaged_file_is_refused_before_ncnn_reads_it(
    change: Callable[[bytes], bytes], words: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks["fp32"].parent, tmp_path / "t"))
    path = folder / ncnn.MODEL
    path.write_bytes(change(path.read_bytes()))
    (found,) = runtime.audit(folder, "fp32", ())
    assert (found.check, found.holds) == ("readable", False)
    assert words in found.fact


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("7767517", "7767516", "the first line is not 7767517"),
        ("Convolution ", "Mystery     ", "is of a kind that kdexport cannot check"),
        ("in0", "in1", "the inputs are in1, expected in0"),
        (" 1 1 ", " 1 x ", "is not a layer"),
    ],
)
def test_a_damaged_list_of_layers_is_refused(
    old: str, new: str, words: str, blocks: dict[str, Path], runtime: Backend, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(blocks["fp32"].parent, tmp_path / "t"))
    param = (folder / ncnn.MODEL).with_suffix(".param")
    param.write_text(param.read_text().replace(old, new))
    failed = [finding for finding in runtime.audit(folder, "fp32", ()) if not finding.holds]
    assert words in failed[0].fact
    (folder / ncnn.TABLE).write_text("[]")
    assert [f.check for f in runtime.audit(folder, "fp32", ()) if not f.holds] == ["readable"]


def test_kept_layers_are_in_float32_and_no_others(tmp_path: Path, runtime: Backend) -> None:
    path = compiled("ncnn", block_graph(tmp_path / "a.onnx"), "int8", tmp_path / "t", kept=("inner",))
    assert all(finding.holds for finding in runtime.audit(path.parent, "int8", ("inner",)))
    assert all(finding.holds for finding in runtime.open(path, "int8", kept=("inner",)).findings())
    wrong = {finding.check for finding in runtime.audit(path.parent, "int8", ()) if not finding.holds}
    assert wrong == {"every weight in int8"}
    assert not all(finding.holds for finding in runtime.open(path, "int8").findings())


def test_files_are_written_as_they_were_read(tmp_path: Path, blocks: dict[str, Path]) -> None:
    for path in blocks.values():
        write_net(read(path), tmp_path / "a.param", tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_bytes() == path.read_bytes()
        assert (tmp_path / "a.param").read_text() == path.with_suffix(".param").read_text()


def test_a_student_with_shuffles_and_splits_is_converted(tmp_path: Path, runtime: Backend) -> None:
    source = exported("plain", "shufflenetv2").path
    path = compiled("ncnn", source, "fp32", tmp_path / "t", size=32)
    assert all(finding.holds for finding in runtime.audit(path.parent, "fp32", ()))
    kinds = runtime.describe(path.parent)["layers"]
    assert kinds["ShuffleChannel"] > 10
    from kdexport.backends.ort import load_model

    x = images(3)
    ours, theirs = runtime.open(path, "fp32").logits(x), load_model(source).logits(x)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def with_operator(path: Path, kind: str, **attributes: Any) -> Path:
    """``small_graph`` with an operator behind its convolution."""
    model = onnx.load(str(small_graph(path, small_weights())))
    conv, relu = model.graph.node[0], model.graph.node[1]
    conv.output[0] = "before"
    model.graph.node.insert(1, helper.make_node(kind, ["before"], [relu.input[0]], "odd", **attributes))
    onnx.save(model, str(path))
    return path


def test_an_operator_that_ncnn_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError) as caught:
        compiled("ncnn", with_operator(tmp_path / "a.onnx", "Erf"), "fp32", tmp_path / "t", size=16)
    assert "has the operator Erf behind conv (conv.weight)" in caught.value.message
    assert "onnx-fp32" in caught.value.remedy
    assert not (tmp_path / "t" / ncnn.MODEL).exists()


def test_int8_of_a_grouped_convolution_is_refused_where_its_outputs_have_scales_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    shapes = {"conv.weight": (6, 1, 3, 3), "conv.bias": (6,), "linear.weight": (5, 6), "linear.bias": (5,)}
    weights = {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    model = onnx.load(str(small_graph(tmp_path / "a.onnx", weights, size=SIZE)))
    model.graph.node[0].attribute.append(helper.make_attribute("group", 3))
    onnx.save(model, str(tmp_path / "a.onnx"))
    assert compiled("ncnn", tmp_path / "a.onnx", "fp32", tmp_path / "f").is_file()
    with pytest.raises(EngineBuildError, match=r"one weight scale for each group .* conv \(conv.weight\) has 2 output"):
        compiled("ncnn", tmp_path / "a.onnx", "int8", tmp_path / "t")


def test_a_graph_that_pnnx_cannot_read_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineBuildError, match="converted nothing"):
        ncnn.run_pnnx(tmp_path / "model.onnx", 16)


def test_a_batch_is_not_timed_as_if_it_were_one_run() -> None:
    require_images_per_run(["ncnn-fp32", "onnx-fp32"], (1,))
    require_images_per_run(["onnx-fp32"], (1, 8))
    with pytest.raises(ConfigError, match="ncnn runs one image at a time: a batch of 8 on ncnn-fp32 would be 8 runs"):
        require_images_per_run(["onnx-fp32", "ncnn-fp32"], (1, 8))


@pytest.fixture(scope="module")
def bundle(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of the shared bundle for ncnn."""
    return build_targets(built, TARGETS, tmp_path_factory.mktemp("ncnn") / "bundle")


def test_a_bundle_says_what_ran_what_did_not_and_that_it_takes_one_image(bundle: Path) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    half = VERIFIED if ncnn.stores_half() else NOT_EXECUTED
    assert {name: entry["status"] for name, entry in data["targets"].items()} == {
        "ncnn-fp32": VERIFIED, "ncnn-fp16": half, "ncnn-int8": VERIFIED,
    }  # fmt: skip
    assert {entry["images_per_run"] for entry in data["targets"].values()} == {1}
    assert data["targets"]["ncnn-int8"]["executed"]["types"] == ["int8", "results in 32 bits"]
    assert data["versions"]["ncnn"]
    checks = {(check["rung"], check["subject"], check["name"]): check for check in data["parity"]}
    assert checks["audit", "targets/ncnn-int8/model.ncnn.bin", "one image at a time"]["holds"]
    for rung, name in (("B", "ncnn-fp32/model.ncnn.bin"), ("C", "ncnn-int8/model.ncnn.bin")):
        assert checks[rung, f"targets/{name}", "rms error"]["holds"]
        assert checks["D", f"targets/{name}", "flips"]["holds"]
    if half == NOT_EXECUTED:
        assert checks["C", "targets/ncnn-fp16/model.ncnn.bin in fp32", "rms error"]["holds"]
        assert ("C", "targets/ncnn-fp16/model.ncnn.bin", "rms error") not in checks
        assert "in float32 on this CPU" in checks["audit", "targets/ncnn-fp16/model.ncnn.bin", "execution"]["detail"]


def test_a_bundle_is_verified_by_itself_and_timed(bundle: Path, here: Command) -> None:
    done = here("verify", bundle, "--require-executed", "ncnn-fp32,ncnn-int8")
    assert done.exit_code == 0, done.stderr
    assert "ncnn 1.0." in done.stdout
    timed = here("bench", bundle, "--arms", "ncnn-int8,ncnn-fp32", "--batch", "1,8")
    assert timed.exit_code == 2
    assert "one image at a time" in timed.stderr
    served = here("serve", bundle, "--target", "ncnn-fp32")
    assert served.exit_code == 4
    assert "docs/edge.md" in served.stderr


def test_wrong_logits_of_a_file_that_is_run_in_another_precision_are_found(bundle: Path, tmp_path: Path) -> None:
    """The weights are changed on both sides alike, in the ONNX file and in ncnn's, so that only the run can tell."""
    folder = Path(shutil.copytree(bundle, tmp_path / "b"))
    data = json.loads((folder / MANIFEST).read_text())
    for name in set(data["targets"]) - {"ncnn-fp16"}:
        del data["targets"][name]
        shutil.rmtree(folder / "targets" / name)
    path = folder / "targets" / "ncnn-fp16" / ncnn.MODEL
    layers = list(read(path))
    last = [place for place, layer in enumerate(layers) if layer.kind in WEIGHTED][-1]
    rows = layers[last].tensors["weight"].reshape(10, -1)[::-1]
    layers[last] = replace(layers[last], tensors={**layers[last].tensors, "weight": rows.reshape(-1)})
    write_net(tuple(layers), path.with_suffix(".param"), path)
    model = onnx.load(str(path.with_name("model.onnx")))
    (item,) = (i for i in model.graph.initializer if i.data_type == TensorProto.FLOAT16 and list(i.dims) == [10, 1280])
    item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item)[::-1].copy(), item.name))
    onnx.save(model, str(path.with_name("model.onnx")))
    data["files"] = hash_files(folder)
    (folder / MANIFEST).write_text(json.dumps(data))
    failed = {(c.subject, c.rung) for c in replay(folder, read_manifest(folder), lambda _: None).failures}
    assert ("targets/ncnn-fp16/model.ncnn.bin in fp32", "C") in failed


def test_the_program_for_boards_in_the_documentation_gives_the_answers_of_the_bundle(
    bundle: Path, tmp_path: Path, here: Command
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "edge.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "board.py").write_text(program)
    # Not square and larger than the network's input, so that it is resized and cropped.
    pixels = np.random.default_rng(8).integers(0, 256, (5, 7, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels).save(photo)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "board.py"), str(bundle), str(photo)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = here("predict", bundle, photo, "--json").data
    assert done.stdout.strip() == answer["predictions"][0]["label"]


def test_the_threads_of_the_environment_are_kept_where_none_are_given(
    blocks: dict[str, Path], runtime: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, default = blocks["fp32"], 0
    for given, threads, expected in (("1", 0, 1), ("3", 0, 3), ("3", 2, 2), ("4,2", 0, default), ("", 0, default)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        runner = runtime.open(path, "fp32", threads=threads)
        assert isinstance(runner, ncnn.NcnnRunner)
        found = runner.net.opt.num_threads
        assert found == expected or (expected == default and found == ncnn.import_ncnn().Net().opt.num_threads)
