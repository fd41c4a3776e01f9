import pytest

from kdexport.errors import ConfigError
from kdexport.origins.references import parse_reference, weights_file


@pytest.mark.parametrize(
    ("text", "kind", "label", "folder"),
    [
        ("timm:repvgg_a0.rvgg_in1k", "timm", "timm:repvgg_a0.rvgg_in1k", "timm-repvgg_a0.rvgg_in1k"),
        ("torchvision:resnet18", "torchvision", "torchvision:resnet18", "torchvision-resnet18"),
        ("my.nets:make_small", "factory", "my.nets:make_small", "my.nets-make_small"),
        ("out/deep/net.pt2", "program", "net.pt2", "net"),
    ],
)
def test_a_reference_knows_its_origin_and_a_name_without_folders(text: str, kind: str, label: str, folder: str) -> None:
    found = parse_reference(text)
    assert found is not None
    assert (found.kind, found.label, found.folder_name) == (kind, label, folder)


@pytest.mark.parametrize("name", ["mobilenetv2", "my-net", "net_2"])
def test_a_plain_name_is_a_registered_one(name: str) -> None:
    assert parse_reference(name) is None


@pytest.mark.parametrize("text", ["timm:", "net.pth", "a/b", "best.safetensors", "x:y:z", "1a:make", "os:path.join"])
def test_what_is_neither_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a registered name nor a reference") as caught:
        parse_reference(text)
    assert "torchvision:NAME" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "is_file"), [("DEFAULT", False), ("IMAGENET1K_V1", False), ("best.pth", True), ("run/best", True)]
)
def test_names_of_weights_are_told_from_files(text: str, is_file: bool) -> None:
    assert (weights_file(text) is not None) == is_file
