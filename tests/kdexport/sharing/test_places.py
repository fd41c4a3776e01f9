import pytest

from kdexport.errors import ConfigError
from kdexport.sharing.places import Place, parse_place, without_secrets

DIGEST = f"sha256:{'0a' * 32}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://owner/my-net.v1_2", Place(kind="hf", name="owner/my-net.v1_2")),
        ("hf://Owner1/X@refs/pr/1", Place(kind="hf", name="Owner1/X", version="refs/pr/1")),
        ("oci://ghcr.io/me/net:1.0", Place(kind="oci", host="ghcr.io", name="me/net", version="1.0")),
        ("oci://localhost:5000/net:latest", Place(kind="oci", host="localhost:5000", name="net", version="latest")),
        (f"oci://ghcr.io/a__b/c-d@{DIGEST}", Place(kind="oci", host="ghcr.io", name="a__b/c-d", version=DIGEST)),
        (f"oci://ghcr.io/net:1@{DIGEST}", Place(kind="oci", host="ghcr.io", name="net", version=DIGEST)),
    ],
)
def test_places_are_read(text: str, place: Place) -> None:
    assert parse_place(text, pushes=False) == place
    if ":1@" not in text:
        assert str(place) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf://name", "hf://a/b/c", "hf://-a/b", "hf://a/b.", "hf://a/b--c", "hf://a/b..c", "hf://a/b.git", "hf://a/b c",
        f"hf://a/{'b' * 96}", "hf://a/b@rev", "hf://a/b@-x", "hf://a/../b", "https://huggingface.co/a/b", "a/b", "",
        "oci://ghcr.io/net", f"oci://ghcr.io/net@{DIGEST}", "oci://ghcr/net:1", "oci://ghcr.io/Net:1",
        "oci://ghcr.io/a//b:1", "oci://ghcr.io/net:-1", "oci://ghcr.io/net:1:2", "oci://me:secret1@ghcr.io/net:1",
        "oci://ghcr.io/../net:1", "oci://ghcr.io:70000000/net:1", "oci://ghcr.io/net:1\n", "hf://a/b\n", "hf://\u00e9/b",
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_to_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_place(text, pushes=True)
    assert "secret1" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "401 for url https://user:SECRET@host/x", "token hf_SECRETsecretsecret refused", "Authorization: Bearer SECRET",
        "authorization: basic SECRET==", "https://x/y?token=SECRET&a=1", "GET /b?X-Amz-Signature=SECRET",
    ],
)  # fmt: skip
def test_secrets_are_removed_from_text(text: str) -> None:
    assert "SECRET" in text
    assert "SECRET" not in without_secrets(text)
    assert without_secrets("https://host/x: a@b.c 404") == "https://host/x: a@b.c 404"
