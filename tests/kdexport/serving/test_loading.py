"""Only bundles whose files, graph, provider and golden images pass all checks are loaded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save_file

from kdexport.backends import engine_cache
from kdexport.backends.ort import CPU, TENSORRT
from kdexport.bundle.manifest import hash_files, load_unfused, read_golden
from kdexport.bundle.signature import Signer, require_signed, sign_bundle
from kdexport.core.digests import digest
from kdexport.diagnose.environment import examine_bundle
from kdexport.errors import (
    AuditError,
    BackendUnavailableError,
    BundleError,
    ConfigError,
    KdexportError,
    SignatureError,
    VerificationError,
)
from kdexport.serving import loading
from kdexport.serving.isolated_load import require_one_file, try_bundle
from kdexport.serving.limits import Limits
from kdexport.serving.loading import load, read_files
from kdexport.serving.repository import Repository, parse_source
from kdexport.verify.golden_limits import allowed_error
from tests.conftest import Command
from tests.kdexport.serving.served_bundles import encoded, make_bundle, photo
from tests.kdexport.signing_keys import make_keys


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Update the digests in the manifest to the present files, as an attacker with write access can do too."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    data["files"] = hash_files(bundle)
    change(data)
    path.write_text(json.dumps(data))


def edit_graph(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(bundle / "model.onnx"))
    change(model)
    onnx.save(model, str(bundle / "model.onnx"))
    rewrite(bundle)


def one_weight(model: onnx.ModelProto) -> None:
    item = next(i for i in model.graph.initializer if i.name == "classifier.0.weight")
    values = numpy_helper.to_array(item).copy()
    values.flat[:40] *= 1.001
    item.CopyFrom(numpy_helper.from_array(values, item.name))


def test_the_unchanged_bundle_passes_all_checks(zoo: Path) -> None:
    files = read_files(zoo)
    allowed = allowed_error(zoo, files.manifest)
    model = load(zoo, name="zoo", version=1, provider=CPU, limits=Limits(), allowed_error=allowed)
    assert model.golden.images == 8
    assert 0 < model.golden.error <= model.golden.allowed == allowed
    assert model.signature.max_batch == 8
    assert model.ort.nodes_by_provider.keys() == {CPU}


def test_the_allowed_error_of_a_bundle_is_rung_b_of_its_unfused_student(zoo: Path, zoo_copy: Path) -> None:
    written = float(load_file(zoo / "golden" / "logits.safetensors")["allowed_error"])
    tensors = load_file(zoo_copy / "golden" / "logits.safetensors")
    del tensors["allowed_error"], tensors["unit_error"]
    save_file(tensors, zoo_copy / "golden" / "logits.safetensors")
    rewrite(zoo_copy)
    # An older bundle has no such entry: the child process computes it from the unfused weights.
    assert try_bundle(zoo_copy, CPU, Limits()) == pytest.approx(written, rel=0.5)
    assert written < 1e-3 * np.abs(tensors["logits"]).max()


def allow(max_error: float) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["policy"]["B"].update(max_error=max_error)


@pytest.mark.parametrize("missing", [(), ("unit_error",), ("unit_error", "allowed_error")])
def test_the_policy_of_the_bundle_decides_how_far_its_logits_may_be_off(
    zoo_copy: Path, missing: tuple[str, ...]
) -> None:
    tensors = load_file(zoo_copy / "golden" / "logits.safetensors")
    for name in missing:
        # Bundles of earlier versions have fewer entries.
        del tensors[name]
    save_file(tensors, zoo_copy / "golden" / "logits.safetensors")
    rewrite(zoo_copy)
    allowed = try_bundle(zoo_copy, CPU, Limits())
    rewrite(zoo_copy, allow(20))
    assert try_bundle(zoo_copy, CPU, Limits()) == pytest.approx(5 * allowed, rel=1e-12)
    rewrite(zoo_copy, allow(1e-3))
    with pytest.raises(VerificationError, match=r"The logits of golden/\d+\.\w+ differ from those of the reference"):
        examine_bundle(zoo_copy)


def test_a_build_writes_the_limits_of_its_own_policy(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, policy={"B": {"max_error": 100.0}})
    tensors, manifest = load_file(bundle / "golden" / "logits.safetensors"), read_files(bundle).manifest
    images = torch.from_numpy(manifest.spec.preprocessing.normalise(read_golden(bundle, manifest)))
    with torch.no_grad():
        logits = load_unfused(bundle, manifest.spec)(images).double()
    own = float((logits - torch.from_numpy(tensors["logits"])).abs().max())
    assert float(tensors["allowed_error"]) == 100 * float(tensors["unit_error"])
    assert own <= float(tensors["unit_error"]) < 100 * own
    assert allowed_error(bundle, manifest) == float(tensors["allowed_error"])


@pytest.mark.parametrize("name", ["model.onnx", "student.safetensors", "golden/003.jpeg", "report.html"])
def test_a_changed_byte_is_found_in_any_file(zoo_copy: Path, name: str) -> None:
    data = bytearray((zoo_copy / name).read_bytes())
    data[-3] ^= 1
    (zoo_copy / name).write_bytes(data)
    with pytest.raises(VerificationError, match=f"{name} changed"):
        read_files(zoo_copy)


def test_a_missing_and_a_stray_file_are_found(zoo_copy: Path) -> None:
    (zoo_copy / "golden" / "001.png").unlink()
    (zoo_copy / "libops.so").write_bytes(b"\x7fELF")
    with pytest.raises(
        VerificationError,
        match=r"2 files of .* differ from those that were verified: .*001.png missing, libops.so unknown",
    ):
        read_files(zoo_copy)


@pytest.mark.parametrize("kind", ["symlink", "folder link", "fifo", "outside link"])
def test_links_and_devices_are_refused(zoo: Path, zoo_copy: Path, tmp_path: Path, kind: str) -> None:
    model = zoo_copy / "model.onnx"
    if kind == "symlink":
        model.rename(zoo_copy / "golden" / "m.onnx")
        model.symlink_to("golden/m.onnx")
    elif kind == "folder link":
        (zoo_copy / "golden").rename(tmp_path / "golden")
        (zoo_copy / "golden").symlink_to(tmp_path / "golden")
    elif kind == "fifo":
        os.mkfifo(zoo_copy / "report.md.new")
    else:
        model.unlink()
        model.symlink_to(zoo / "model.onnx")
    rewrite(zoo_copy)
    with pytest.raises(BundleError, match=r"is a (symbolic link|device, .*); a bundle may have regular files only"):
        read_files(zoo_copy)


def test_a_second_name_of_a_file_elsewhere_does_not_end_the_service(zoo_copy: Path, tmp_path: Path) -> None:
    os.link(zoo_copy / "model.onnx", tmp_path / "backup.onnx")
    assert read_files(zoo_copy).name == "model.onnx"


@pytest.mark.parametrize("name", ["README.txt", ".DS_Store", "golden/Thumbs.db"])
def test_a_stray_file_is_refused_with_what_to_do(zoo_copy: Path, name: str) -> None:
    (zoo_copy / name).write_text("x")
    with pytest.raises(VerificationError) as caught:
        read_files(zoo_copy)
    assert caught.value.message == f"{zoo_copy} has 1 files that its manifest does not list: {name} unknown."
    assert caught.value.remedy == f"Move them out of {zoo_copy}; all other files are those that were verified."


def test_one_bad_version_does_not_stop_a_start_with_a_good_one(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "models" / "2")
    (tmp_path / "models" / "3").mkdir()
    (tmp_path / "models" / "3" / "manifest.json").write_text("{")
    repository = Repository((parse_source(f"zoo={tmp_path / 'models'}"),), provider=CPU, limits=Limits())
    assert repository.load_all().refused.keys() == {("zoo", 3)}
    assert repository.models.keys() == {("zoo", 2)}
    assert repository.refused.keys() == {("zoo", 3)}
    shutil.rmtree(tmp_path / "models" / "2")
    alone = Repository((parse_source(f"zoo={tmp_path / 'models'}"),), provider=CPU, limits=Limits())
    with pytest.raises(KdexportError, match=r"manifest\.json is damaged"):
        alone.load_all()


def test_the_bundle_as_a_whole_may_be_a_link(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(zoo)
    assert read_files(tmp_path / "current").digest == read_files(zoo).digest


def test_a_manifest_whose_checks_do_not_hold_is_refused(zoo_copy: Path) -> None:
    def fail(data: dict[str, object]) -> None:
        data["parity"][3]["holds"] = False  # type: ignore[index]

    rewrite(zoo_copy, fail)
    with pytest.raises(VerificationError, match=r"was not verified: 1 of \d+ checks in its manifest failed\."):
        read_files(zoo_copy)
    rewrite(zoo_copy, lambda data: data.update(parity=[]))
    with pytest.raises(VerificationError, match=r"was not verified: its manifest has no check of model\.onnx\."):
        read_files(zoo_copy)


def test_a_changed_weight_is_found_by_the_golden_images_though_every_digest_fits(zoo_copy: Path) -> None:
    edit_graph(zoo_copy, one_weight)
    with pytest.raises(
        KdexportError,
        match=r"The logits of golden/\d+\.\w+ differ from those of the reference by .* \(up to .* allowed\)\.",
    ) as caught:
        try_bundle(zoo_copy, CPU, Limits())
    assert caught.value.exit_code == 1


def test_other_golden_pixels_are_found_though_every_digest_fits(zoo_copy: Path) -> None:
    (zoo_copy / "golden" / "004.png").write_bytes(encoded(photo(99, 66, 77), "PNG"))
    rewrite(zoo_copy)
    with pytest.raises(VerificationError, match=r"The logits of golden/004\.png differ from those of the reference"):
        examine_bundle(zoo_copy)


def test_another_preprocessing_is_found_though_every_digest_fits(zoo_copy: Path) -> None:
    def shift(data: dict[str, object]) -> None:
        data["student"]["preprocessing"]["mean"] = [0.42, 0.47, 0.39]  # type: ignore[index]

    rewrite(zoo_copy, shift)
    with pytest.raises(VerificationError, match=r"The logits of golden/.* differ from those of the reference"):
        examine_bundle(zoo_copy)


def test_weights_in_another_file_are_refused(zoo_copy: Path) -> None:
    model = onnx.load(str(zoo_copy / "model.onnx"))
    onnx.save(
        model, str(zoo_copy / "model.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=64
    )
    rewrite(zoo_copy)
    with pytest.raises(
        KdexportError, match=r"model\.onnx stores weights in other files; the server takes graphs of one file only\."
    ):
        try_bundle(zoo_copy, CPU, Limits())


@pytest.mark.parametrize("place", ["an attribute", "a subgraph", "sparse values", "a function"])
def test_a_tensor_in_another_file_is_found_wherever_it_is(place: str) -> None:
    tensor = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    node = helper.make_node("Constant", [], ["w"], value=tensor)
    inner = helper.make_graph([node], "inner", [], [])
    graph = helper.make_graph([], "outer", [], [])
    model = helper.make_model(graph)
    if place == "an attribute":
        model.graph.node.append(node)
    elif place == "a subgraph":
        model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    elif place == "sparse values":
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor))
    else:
        model.functions.append(onnx.FunctionProto(name="f", node=[node]))
    with pytest.raises(AuditError, match="stores weights in other files"):
        require_one_file(model.SerializeToString())
    tensor.ClearField("data_location")
    plain = helper.make_model(helper.make_graph([], "outer", [], [], [tensor]))
    require_one_file(plain.SerializeToString())


def test_foreign_operators_and_functions_are_refused(zoo_copy: Path, zoo: Path) -> None:
    edit_graph(zoo_copy, lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)))
    with pytest.raises(
        KdexportError, match=r"model\.onnx uses the operator sets com\.microsoft; only ONNX's own is allowed\."
    ):
        examine_bundle(zoo_copy)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_graph_whose_digest_fits_is_refused(zoo_copy: Path, keep: float) -> None:
    data = (zoo_copy / "model.onnx").read_bytes()
    (zoo_copy / "model.onnx").write_bytes(data[: int(len(data) * keep)])
    rewrite(zoo_copy)
    with pytest.raises(KdexportError):
        examine_bundle(zoo_copy)


def test_a_graph_of_another_shape_is_refused(zoo_copy: Path) -> None:
    def widen(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 33

    edit_graph(zoo_copy, widen)
    with pytest.raises(KdexportError):
        examine_bundle(zoo_copy)


def test_a_provider_that_is_not_here_is_an_error_and_never_another_one(zoo: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises((BackendUnavailableError, KdexportError)) as caught:
        try_bundle(zoo, "CUDAExecutionProvider", Limits())
    assert caught.value.exit_code == 4


def test_tensorrt_gets_one_engine_for_all_batches_of_the_bundle(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def opened(_path: Path, **settings: Any) -> None:
        given.update(settings)
        raise AuditError("seen", remedy="")

    monkeypatch.setattr(loading, "load_model", opened)
    for provider in (TENSORRT, CPU):
        with pytest.raises(AuditError, match="seen"):
            load(zoo, name="a", version=1, provider=provider, limits=Limits(), allowed_error=1.0)
        assert given.pop("provider") == provider
        expected = {
            "trt_profile_min_shapes": "input:1x3x32x32", "trt_profile_opt_shapes": "input:1x3x32x32",
            "trt_profile_max_shapes": "input:8x3x32x32",
        }  # fmt: skip
        assert given.pop("provider_options") == (expected if provider == TENSORRT else {})


def test_tensorrt_keeps_the_engine_of_a_file_where_it_is_told(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    def opened(_path: Path, *, provider_options: dict[str, str], **_settings: Any) -> None:
        given.append(dict(provider_options))
        raise AuditError("seen", remedy="")

    def start(provider: str) -> dict[str, str]:
        with pytest.raises(AuditError, match="seen"):
            load(
                zoo, name="a", version=1, provider=provider, limits=Limits(), allowed_error=1.0, engines=tmp_path / "e"
            )
        return given.pop()

    monkeypatch.setattr(loading, "load_model", opened)
    # Without TensorRT nothing is written: the session names the library that is missing.
    monkeypatch.setattr(engine_cache, "tensorrt_version", lambda: "")
    assert sorted(start(TENSORRT)) == [f"trt_profile_{name}_shapes" for name in ("max", "min", "opt")]
    assert start(CPU) == {}
    assert not (tmp_path / "e").exists()
    monkeypatch.setattr(engine_cache, "tensorrt_version", lambda: "10.13.3")
    options = start(TENSORRT)
    facts = engine_cache.engine_facts(
        (zoo / "model.onnx").read_bytes(), "fp32", {key: value for key, value in options.items() if "profile" in key}
    )
    assert options["trt_engine_cache_path"] == str(tmp_path / "e" / digest(facts)[:32])
    assert options["trt_profile_max_shapes"] == "input:8x3x32x32"


def test_golden_images_beyond_the_limits_stop_the_start(zoo: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"The server would refuse .*, a golden image of the bundle: .* at least 100 pixels"
    ):
        load(zoo, name="z", version=1, provider=CPU, limits=Limits(min_side=100), allowed_error=1.0)


def test_a_reload_keeps_what_it_cannot_replace(zoo: Path, zoo_copy: Path) -> None:
    repository = Repository((parse_source(f"zoo={zoo_copy}"),), provider=CPU, limits=Limits())
    repository.load_all()
    served = repository.find("zoo")
    assert not repository.changed()
    shutil.rmtree(zoo_copy)
    assert repository.changed()
    change = repository.reload()
    assert list(change.refused) == [("zoo", 1)]
    assert repository.find("zoo") is served
    shutil.copytree(zoo, zoo_copy)
    assert repository.reload().refused == {}
    # The same bundle again is the same model: nothing was loaded.
    assert repository.find("zoo") is served
    assert repository.refused == {}


def test_a_required_signature_is_checked_before_a_bundle_is_opened_and_at_every_reload(
    zoo_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, other = make_keys(tmp_path), make_keys(tmp_path, "other")
    trusted = Path(shutil.copyfile(keys.public, tmp_path / "trusted.pem"))
    repository = Repository((parse_source(f"zoo={zoo_copy}"),), provider=CPU, limits=Limits(), trusted=trusted)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "read_manifest", lambda _: pytest.fail("the manifest was read"))
        with pytest.raises(SignatureError, match="is not signed"):
            load(zoo_copy, name="z", version=1, provider=CPU, limits=Limits(), allowed_error=1.0, trusted=trusted)
    with pytest.raises(KdexportError, match="is not signed") as caught:
        repository.load_all()
    assert caught.value.code == "KDX332"
    assert repository.models == {}
    assert not repository.changed()
    sign_bundle(zoo_copy, key=keys.private)
    assert repository.changed()
    repository.load_all()
    served = repository.find("zoo")
    assert served.signer == require_signed(zoo_copy, trusted)
    sign_bundle(zoo_copy, key=other.private)
    assert repository.changed()
    assert "was made with another key" in str(repository.reload().refused["zoo", 1])
    assert repository.find("zoo") is served
    shutil.copyfile(other.public, trusted)
    assert repository.reload().refused == {}


def test_a_bundle_that_changes_after_its_signature_was_checked_is_refused(
    zoo_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = make_keys(tmp_path)
    sign_bundle(zoo_copy, key=keys.private)

    def changing(folder: Path, trusted: Path) -> Signer:
        signer = require_signed(folder, trusted)
        data = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(data))
        return signer

    monkeypatch.setattr(loading, "require_signed", changing)
    with pytest.raises(VerificationError, match="changed while it was read"):
        read_files(zoo_copy, trusted=keys.public)


@pytest.mark.parametrize(
    ("argument", "name"),
    [("a/b/mnet", "mnet"), ("x=a/b", "x"), ("a/v=1", "v=1"), ("x=a/v=1", "x"), ("./m.v2_x-1/", "m.v2_x-1")],
)
def test_a_model_is_named_by_its_folder_or_by_hand(argument: str, name: str) -> None:
    if "=" in name:
        with pytest.raises(
            ConfigError,
            match="is not a valid model name: 1 to 128 letters, digits, dots, dashes and underscores are allowed",
        ):
            parse_source(argument)
    else:
        assert parse_source(argument).name == name


def test_doctor_checks_a_bundle_and_names_what_it_found(zoo: Path, zoo_copy: Path, here: Command) -> None:
    done = here("doctor", zoo, "--json")
    assert done.exit_code == 0
    facts = {fact["what"]: fact["fact"] for fact in done.data["facts"]}
    assert "8 images: pixels as in training, labels as the reference" in facts["golden images"]
    assert "nodes on CPUExecutionProvider" in facts["provider"]
    image = Image.open(zoo_copy / "golden" / "001.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(zoo_copy / "golden" / "001.png")
    rewrite(zoo_copy)
    done = here("doctor", zoo_copy)
    assert done.exit_code == 1
    assert "KDX330" in done.stderr
    assert "The logits of golden/001.png differ from those of the reference by" in done.stderr
