"""A graph that takes pixels computes the logits of the normalised images, and faults in its normalisation show."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from kdexport.backends.file_interface import FileInterface
from kdexport.backends.ort import load_model
from kdexport.backends.pixel_input import InputKind
from kdexport.errors import AuditError
from kdexport.graph.audit import audit_graph
from kdexport.graph.equality import graph_difference
from kdexport.graph.pixel_prologue import take_pixels, without_prologue
from kdexport.graph.precision import cast_to_fp16
from tests.kdexport.graph.int8_block import SIZE, block_graph, block_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS: tuple[InputKind, ...] = ("uint8-nhwc", "uint8-nchw")
PIXELS = np.random.default_rng(2).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)


def normalised() -> NDArray[np.float32]:
    planes = [
        (PIXELS[..., channel].astype(np.float32) / np.float32(255) - np.float32(MEAN[channel]))
        / np.float32(STD[channel])
        for channel in range(3)
    ]
    return np.stack(planes, 1)


def given(kind: InputKind) -> NDArray[np.uint8]:
    return PIXELS if kind == "uint8-nhwc" else np.ascontiguousarray(np.moveaxis(PIXELS, 3, 1))


def described(path: Path) -> onnx.ModelProto:
    model = onnx.load(str(path))
    model.metadata_props.add(key="kdexport.preprocessing", value=f'{{"mean": {list(MEAN)}, "std": {list(STD)}}}')
    return model


def wrapped(path: Path, kind: InputKind) -> onnx.ModelProto:
    return take_pixels(described(path), kind, image_size=SIZE, mean=MEAN, std=STD)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_give_the_logits_of_the_normalised_images_bit_for_bit(kind: InputKind, tmp_path: Path) -> None:
    plain = block_graph(tmp_path / "plain.onnx")
    onnx.save(wrapped(plain, kind), str(tmp_path / "pixels.onnx"))
    expected = load_model(plain, optimise=False).logits(normalised())
    model = load_model(tmp_path / "pixels.onnx", optimise=False)
    np.testing.assert_array_equal(model.session.run(["logits"], {"input": given(kind)})[0], expected)
    # The same through normalised images, which the ladder works on, and in the order of the kernels that are served.
    np.testing.assert_array_equal(model.logits(normalised()), expected)
    np.testing.assert_allclose(load_model(tmp_path / "pixels.onnx").logits(given(kind)), expected, rtol=1e-5, atol=1e-6)


def test_the_prologue_of_a_float16_file_computes_in_float32(tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    cast_to_fp16(block_graph(tmp_path / "plain.onnx"), half)
    onnx.save(wrapped(half, "uint8-nhwc"), str(tmp_path / "pixels.onnx"))
    expected = load_model(half, optimise=False).logits(normalised())
    np.testing.assert_array_equal(load_model(tmp_path / "pixels.onnx", optimise=False).logits(PIXELS), expected)


def constant(
    name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        item = next(item for item in model.graph.initializer if item.name == name)
        item.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(item))), name))

    return edit


def confuse_layout(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Transpose")
    node.attribute[0].ints[:] = [0, 3, 2, 1]


FAULTS = {
    "another mean": constant("pixels_mean", lambda values: values + np.float32(0.01)),
    "another std": constant("pixels_std", lambda values: values * np.float32(1.02)),
    "BGR in place of RGB": constant("pixels_mean", lambda values: np.ascontiguousarray(values[:, ::-1])),
    "no division by 255": constant("pixels_largest", lambda values: values / np.float32(255)),
    "width and height swapped": confuse_layout,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_prologue_changes_logits_and_is_a_difference(fault: str, tmp_path: Path) -> None:
    plain = block_graph(tmp_path / "plain.onnx")
    right, wrong = wrapped(plain, "uint8-nhwc"), wrapped(plain, "uint8-nhwc")
    assert graph_difference(wrong, right) == ""
    FAULTS[fault](wrong)
    assert graph_difference(wrong, right) != ""
    onnx.save(wrong, str(tmp_path / "wrong.onnx"))
    expected = load_model(plain, optimise=False).logits(normalised())
    found = load_model(tmp_path / "wrong.onnx", optimise=False).logits(normalised())
    # Rounding alone is below 1e-6 of these logits.
    assert np.abs(found - expected).max() > 1e-4


def test_the_two_layouts_are_different_graphs_and_refuse_the_pixels_of_each_other(tmp_path: Path) -> None:
    plain = block_graph(tmp_path / "plain.onnx")
    nhwc, nchw = (wrapped(plain, kind) for kind in KINDS)
    assert "inputs are" in graph_difference(nhwc, nchw)
    onnx.save(nhwc, str(tmp_path / "nhwc.onnx"))
    session = load_model(tmp_path / "nhwc.onnx").session
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"input": given("uint8-nchw")})


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_behind_the_prologue_is_the_float32_one(kind: InputKind, tmp_path: Path) -> None:
    plain = block_graph(tmp_path / "plain.onnx")
    model = wrapped(plain, kind)
    assert graph_difference(without_prologue(model), onnx.load(str(plain))) == ""
    assert without_prologue(model).metadata_props == described(plain).metadata_props
    assert without_prologue(onnx.load(str(plain))) == onnx.load(str(plain))


def test_the_audit_requires_the_input_that_it_is_told(tmp_path: Path) -> None:
    plain, path = block_graph(tmp_path / "plain.onnx"), tmp_path / "pixels.onnx"
    onnx.save(wrapped(plain, "uint8-nhwc"), str(path))

    def wrong(file: Path, takes: InputKind) -> list[str]:
        findings = audit_graph(file, block_weights(), form="fp32", opset=20, interface=FileInterface(takes))
        return [finding.check for finding in findings if not finding.holds]

    assert wrong(path, "uint8-nhwc") == wrong(plain, "float32") == []
    assert wrong(path, "uint8-nchw") == ["dynamic uint8-nchw input and logits"]
    assert wrong(path, "float32") == ["dynamic float32 input and logits"]
    assert wrong(plain, "uint8-nhwc") == ["dynamic uint8-nhwc input and logits"]


def test_a_file_whose_metadata_contradict_its_input_is_not_opened(tmp_path: Path) -> None:
    plain, path = block_graph(tmp_path / "plain.onnx"), tmp_path / "pixels.onnx"
    model = wrapped(plain, "uint8-nhwc")
    del model.metadata_props[-1]
    onnx.save(model, str(path))
    with pytest.raises(AuditError, match=r"tensor\(uint8\), and its metadata say float32"):
        load_model(path)
    model = described(plain)
    model.metadata_props.add(key="kdexport.input", value='"uint8-nhwc"')
    onnx.save(model, str(path))
    with pytest.raises(AuditError, match=r"tensor\(float\), and its metadata say uint8-nhwc"):
        load_model(path)
