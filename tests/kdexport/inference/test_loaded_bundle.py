import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import kdexport
from kdexport.errors import BackendUnavailableError, BundleError, DataError, MismatchError, UnknownNameError
from kdexport.inference.loaded_bundle import LoadedBundle, RefusedImage
from tests.conftest import Built


@pytest.fixture(scope="module")
def loaded(built: Built) -> LoadedBundle:
    return kdexport.load(built.bundle)


def test_the_golden_images_get_the_golden_logits_and_their_probabilities(loaded: LoadedBundle, built: Built) -> None:
    golden = load_file(built.bundle / "golden" / "logits.safetensors")
    found = loaded.predict(built.bundle / "golden")
    assert [Path(item.source).name for item in found] == [f"{index:03d}.png" for index in range(9)]
    for item, exact in zip(found, golden["logits"], strict=True):
        assert np.abs(item.logits - exact).max() <= golden["allowed_error"]
        powers = np.exp(exact - exact.max())
        assert item.probability == pytest.approx(float(powers.max() / powers.sum()), abs=1e-4)
        assert len(item.ranking) == 5
        assert [probability for _, probability in item.ranking] == sorted((p for _, p in item.ranking), reverse=True)
        assert item.label in loaded.classes


def test_an_answer_does_not_depend_on_the_images_beside_it_or_how_they_are_given(
    loaded: LoadedBundle, built: Built
) -> None:
    files = sorted((built.bundle / "golden").glob("*.png"))
    alone = [loaded.predict(path)[0] for path in files]
    # More than one batch.
    together = loaded.predict([*files, *files, *(Image.open(path) for path in files)])
    for index, item in enumerate(together):
        assert np.allclose(item.logits, alone[index % 9].logits, atol=1e-5)
        assert item.label == alone[index % 9].label


def test_a_bad_image_is_named_and_the_others_are_answered(loaded: LoadedBundle, built: Built, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    good = built.bundle / "golden" / "000.png"
    found = list(loaded.predict_each([good, tmp_path / "cut.jpg", good]))
    assert [isinstance(item, RefusedImage) for item in found] == [False, True, False]
    assert isinstance(found[1], RefusedImage)
    assert "cut.jpg" in found[1].error.message
    with pytest.raises(DataError, match=r"cut\.jpg"):
        loaded.predict([good, tmp_path / "cut.jpg"])
    assert list(loaded.predict_each([])) == []


def test_a_folder_of_classes_is_evaluated_whole_and_bad_files_do_not_count(
    loaded: LoadedBundle, built: Built, tmp_path: Path
) -> None:
    golden = load_file(built.bundle / "golden" / "logits.safetensors")
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        shutil.copyfile(built.bundle / "golden" / "000.png", tmp_path / str(label) / "one.png")
    for index, label in enumerate(golden["labels"]):
        shutil.copyfile(built.bundle / "golden" / f"{index:03d}.png", tmp_path / str(label) / f"g{index}.png")
    (tmp_path / "4" / "bad.png").write_bytes(b"no image")
    lines: list[str] = []
    found = loaded.evaluate(tmp_path, progress=lines.append)
    assert found.scores.images == 19
    said = golden["logits"].argmax(axis=1)
    right = int((said == golden["labels"]).sum()) + 1
    assert found.scores.top1.value == right / 19
    assert [Path(item.source).name for item in found.refused] == ["bad.png"]
    assert "20 of 20 images" in lines[-1]
    assert json.loads(json.dumps(found.to_json()))["top1"]["value"] == right / 19


def test_other_classes_and_data_without_a_readable_image_are_errors(loaded: LoadedBundle, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(MismatchError, match="cat"):
        loaded.evaluate(tmp_path)


def test_a_changed_bundle_an_unknown_target_and_one_that_cannot_run_are_refused(bundle_copy: Path) -> None:
    with pytest.raises(UnknownNameError, match="onnx-int8"):
        kdexport.load(bundle_copy, target="onnx-int8")
    with pytest.raises(BackendUnavailableError, match="trt-rtx-fp16 cannot run on this machine"):
        kdexport.load(bundle_copy, target="trt-rtx-fp16")
    (bundle_copy / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match="do not match its manifest"):
        kdexport.load(str(bundle_copy))


def test_a_target_for_larger_batches_gets_them(
    loaded: LoadedBundle, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = built.bundle / "golden" / "000.png"
    expected = loaded.predict(good)[0].logits
    export = {**loaded.manifest.data["export"], "min_batch": 4, "max_batch": 6}
    monkeypatch.setitem(loaded.manifest.data, "export", export)
    sizes: list[int] = []
    run = loaded._runner.logits

    def counted(_: object, images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return run(images)

    monkeypatch.setattr(type(loaded._runner), "logits", counted)
    found = loaded.predict([good] * 3)
    assert sizes == [4]
    assert all(np.allclose(item.logits, expected, atol=1e-5) for item in found)
