import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from kdexport.bundle.manifest import MANIFEST, has_synthetic_images, read_golden, read_manifest
from kdexport.checkpoint import open_checkpoint
from kdexport.config import BuildConfig
from kdexport.core.toml import parse
from kdexport.data.datasets import ImageSet
from kdexport.data.synthetic_images import synthetic_images
from kdexport.diagnose.environment import examine_bundle
from kdexport.errors import BundleError, ConfigError
from kdexport.gate.accuracy import labelled_images, require_golden_logits
from kdexport.gate.arms import artifact, open_bundle
from kdexport.report.check_tables import images_inside
from kdexport.verify.consistency import check_consistency
from kdexport.verify.golden import write_golden_set
from kdexport.verify.own_logits_checks import check_own_logits
from kdexport.verify.policy import Policy
from kdexport.verify.stored_limits import check_stored_limits
from kdexport.verify.student_checks import check_golden
from tests.conftest import Built, Command

SECRET = b"Ada Lovelace"


def photo(path: Path, seed: int) -> Path:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, SECRET.decode()
    exif.get_ifd(0x8825)[1] = "N"
    colours = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(colours).save(path, exif=exif, comment=SECRET)
    return path


def test_golden_images_of_a_folder_of_photos_tell_nothing_but_their_pixels(built: Built, tmp_path: Path) -> None:
    files = tuple(photo(tmp_path / f"Ada in Turin {seed}.jpg", seed) for seed in range(3))
    trained = open_checkpoint(built.checkpoint)
    images = ImageSet(classes=trained.spec.classes, labels=np.array([3, 1, 2]), pixels=None, files=files)
    found = write_golden_set(tmp_path / "bundle", trained, images, [0, 2], {}, [], policy=Policy())
    assert found.names == ["golden/000.jpg", "golden/001.jpg"]
    preprocessing = trained.spec.preprocessing
    assert preprocessing.orientation == "apply"
    for name, index in zip(found.names, (0, 2), strict=True):
        stored = (tmp_path / "bundle" / name).read_bytes()
        assert SECRET not in stored
        with Image.open(io.BytesIO(stored)) as image, Image.open(files[index]) as given:
            assert dict(image.getexif()) == {0x0112: 6}
            assert np.array_equal(preprocessing.pixels(image), preprocessing.pixels(given))


def test_a_bundle_says_which_images_it_holds(built: Built) -> None:
    data = json.loads((built.bundle / MANIFEST).read_text())
    positions = data["golden_images"]["positions"]
    assert (data["golden_images"]["kind"], len(positions)) == ("validation", 9)
    said = f"9 images of the validation split without metadata, at the positions {', '.join(map(str, positions))}"
    shown = data["report_images"]
    assert 1 <= len(shown) <= 8
    said += f"; report.html shows those at the positions {', '.join(map(str, shown))}, scaled down"
    assert images_inside(data) == said
    assert (built.bundle / "report.html").read_text().count("data:image/png;base64,") >= len(shown)
    assert said in (built.bundle / "report.md").read_text()
    del data["golden_images"]
    assert images_inside(data).startswith("9 validation images, as their files were, with their metadata")


def test_other_positions_than_those_of_the_golden_images_are_found(bundle_copy: Path) -> None:
    data = json.loads((bundle_copy / MANIFEST).read_text())
    data["golden_images"]["positions"][0] += 1
    (bundle_copy / MANIFEST).write_text(json.dumps(data))
    wrong = [check for check in check_consistency(bundle_copy, read_manifest(bundle_copy)) if not check.holds]
    assert [check.name for check in wrong] == ["labels"]
    assert "positions of images are" in wrong[0].detail


def test_a_bundle_with_computed_images_is_built_checked_served_and_gated(
    built: Built, here: Command, tmp_path: Path
) -> None:
    config, bundle = tmp_path / "private.toml", tmp_path / "bundle"
    config.write_text(built.config.read_text().replace("golden = 9", 'golden = "synthetic"'))
    done = here(
        "build", "--config", config, "--checkpoint", built.checkpoint, "--workspace", built.workspace, "--out", bundle,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    manifest = read_manifest(bundle)
    assert has_synthetic_images(manifest.data)
    pixels = read_golden(bundle, manifest)
    preprocessing = manifest.spec.preprocessing
    expected = [preprocessing.pixels(Image.fromarray(image)) for image in synthetic_images(preprocessing)]
    assert np.array_equal(pixels, np.stack(expected))
    assert "32 computed images; no image of a data set is inside" in (bundle / "report.md").read_text()
    assert "report_images" not in manifest.data
    assert "<img" not in (bundle / "report.html").read_text()
    checks = [*check_golden(bundle, manifest, pixels), *check_stored_limits(bundle, manifest, pixels)]
    checks += [*check_consistency(bundle, manifest), *check_own_logits(bundle, manifest, "onnx-fp32", pixels)]
    assert [check for check in checks if not check.holds] == []
    facts = {fact.what: fact.fact for fact in examine_bundle(bundle, "CPUExecutionProvider")}
    assert facts["golden images"].startswith("32 computed images")
    opened = open_bundle(bundle)
    require_golden_logits(artifact(opened, "onnx-fp32", "fused", tmp_path), opened, 1)
    with pytest.raises(BundleError, match="are synthetic and have no labels"):
        labelled_images(opened, None)
    place = bundle / "golden" / "logits.safetensors"
    save_file({**load_file(place), "labels": np.zeros(32, np.int64)}, place)
    wrong = [check for check in check_consistency(bundle, manifest) if not check.holds]
    assert [check.detail for check in wrong] == ["synthetic images have labels"]


@pytest.mark.parametrize(("written", "count"), [(0, 0), ("synthetic", 0), (5, 5)])
def test_no_validation_image_can_be_asked_for_in_two_ways(written: int | str, count: int) -> None:
    config = parse(BuildConfig, {"student": "s", "verify": {"golden": written}}, "it")
    assert config.verify.golden == count


@pytest.mark.parametrize("written", ["none", -1, 1025, 2.5, True])
def test_any_other_number_of_golden_images_is_refused(written: object) -> None:
    with pytest.raises(ConfigError, match=r"verify\.golden = "):
        parse(BuildConfig, {"student": "s", "verify": {"golden": written}}, "it")
