"""Networks of torchvision and timm by name: the libraries' own loading runs on files of random weights, offline."""

import io
import os
import pickle
import sys
import time
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from kdexport.errors import BackendUnavailableError, CheckpointError, UnknownNameError
from kdexport.origins.libraries import from_timm_name, from_torchvision_name

NAME, FILE = "shufflenet_v2_x0_5", "shufflenetv2_x0.5-f707e7126e.pth"
TIMM = "mobilenetv3_small_050"


class Answer(io.BytesIO):
    """What ``urlopen`` returns."""

    def info(self) -> Message:
        """No headers."""
        return Message()


def random_weights(make: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    network = make()
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's folder of downloaded files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """timm's folder of downloaded files, empty, without a connection."""
    pytest.importorskip("timm")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_torchvision_loads_the_stored_file_into_its_own_classifier(weights: str, cache: Path) -> None:
    expected = random_weights(lambda: models.get_model(NAME))
    torch.save(expected, cache / FILE)
    made = from_torchvision_name(NAME, 5, None, weights, "strict")
    found = made.module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["fc.weight"].shape == (1000, 1024)
    assert made.notes == ("weights IMAGENET1K_V1 of torchvision",)
    assert made.preprocessing is not None
    assert (made.preprocessing.image_size, made.preprocessing.resize) == (224, 256)


def test_a_fresh_head_and_another_image_size_replace_those_of_torchvision(cache: Path) -> None:
    expected = random_weights(lambda: models.get_model(NAME))
    torch.save(expected, cache / FILE)
    made = from_torchvision_name(NAME, 5, 64, "DEFAULT", "fresh")
    found = made.module.state_dict()
    assert found["fc.weight"].shape == (5, 1024)
    assert torch.equal(found["conv1.0.weight"], expected["conv1.0.weight"])
    assert "fresh classifier fc of 5 classes" in made.notes
    assert made.preprocessing is not None
    assert (made.preprocessing.image_size, made.preprocessing.resize) == (64, 73)


def test_a_stored_file_with_code_is_refused_and_nothing_of_it_runs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    (cache / FILE).write_bytes(pickle.dumps({"fc.weight": Runs()}))
    with pytest.raises(CheckpointError, match="with its weights DEFAULT"):
        from_torchvision_name(NAME, 1000, None, "DEFAULT", "strict")
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_download_of_other_bytes_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.urlopen", lambda *_: Answer(b"not the weights"))
    with pytest.raises(CheckpointError, match="invalid hash"):
        from_torchvision_name(NAME, 1000, None, "DEFAULT", "strict")
    assert list(cache.iterdir()) == []


def test_without_a_connection_the_error_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(CheckpointError, match="cannot be downloaded: URLError") as refused:
        from_torchvision_name(NAME, 1000, None, "DEFAULT", "strict")
    assert "--weights" in refused.value.remedy


def test_timm_loads_the_stored_file_into_its_own_classifier(hub: Path) -> None:
    import timm

    expected = random_weights(lambda: timm.create_model(TIMM))
    repository, commit = hub / f"models--timm--{TIMM}.lamb_in1k", "0123456789" * 4
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    save_file(expected, repository / "snapshots" / commit / "model.safetensors")
    for weights in ("DEFAULT", "lamb_in1k"):
        made = from_timm_name(TIMM, 5, None, weights, "strict")
        found = made.module.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert found["classifier.weight"].shape[0] == 1000
        assert made.notes[0].startswith(f"weights {TIMM}")
    fresh = from_timm_name(TIMM, 5, None, "DEFAULT", "fresh").module.state_dict()
    assert fresh["classifier.weight"].shape[0] == 5
    assert torch.equal(fresh["conv_stem.weight"], expected["conv_stem.weight"])


def test_timm_without_a_connection_fails_at_once(hub: Path) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot be downloaded") as refused:
        from_timm_name(TIMM, 1000, None, "DEFAULT", "strict")
    assert time.monotonic() - started < 15
    assert "--weights" in refused.value.remedy
    assert list(hub.glob("models--*/snapshots/*")) == []


def test_a_server_that_does_not_answer_is_tried_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(CheckpointError, match="cannot be downloaded: ConnectionError: no route"):
        from_timm_name(TIMM, 1000, None, "DEFAULT", "strict")
    assert len(asked) == 1


def test_a_library_that_is_not_installed_is_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackendUnavailableError) as missing:
        from_timm_name(TIMM, 5, None, None, "strict")
    assert missing.value.exit_code == 4
    assert "pip install" in missing.value.remedy


@pytest.mark.parametrize(
    ("make", "name", "weights", "near"),
    [
        (from_torchvision_name, "resnt18", None, "resnet18"),
        (from_torchvision_name, "resnet18", "IMAGENET1K_V7", "IMAGENET1K_V1"),
        # A network of torchvision that is not a classifier.
        (from_torchvision_name, "fcn_resnet50", None, "resnet50"),
        (from_timm_name, "mobilenetv3_smal_050", None, TIMM),
        (from_timm_name, TIMM, "lamb", "lamb_in1k"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(make: Any, name: str, weights: str | None, near: str) -> None:
    if make is from_timm_name:
        pytest.importorskip("timm")
    with pytest.raises(UnknownNameError) as refused:
        make(name, 5, None, weights, "strict")
    assert near in refused.value.remedy


@pytest.mark.parametrize(("make", "name"), [(from_torchvision_name, NAME), (from_timm_name, TIMM)])
def test_fresh_weights_have_the_chosen_number_of_classes(make: Any, name: str) -> None:
    if make is from_timm_name:
        pytest.importorskip("timm")
    made = make(name, 7, 64, None, "strict")
    assert isinstance(made.module, nn.Module)
    with torch.no_grad():
        assert made.module.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert made.preprocessing.image_size == 64
    assert made.notes == ()
