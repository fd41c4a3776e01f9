"""Images: an upload gets the label that the training pipeline gives it, in every format and form of request."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdexport.backends.ort import load_model
from kdexport.bundle.manifest import read_manifest
from kdexport.data.preprocessing import decode
from tests.kdexport.serving.running_server import Running
from tests.kdexport.serving.served_bundles import CLASSES, encoded, photo


def trained_logits(zoo: Path, data: bytes) -> np.ndarray[Any, Any]:
    """Logits (K,) by the code of training and verification, without the server's tables and threads."""
    preprocessing = read_manifest(zoo).spec.preprocessing
    images = preprocessing.normalise(preprocessing.pixels(decode(data, "x"))[None])
    return np.asarray(load_model(zoo / "model.onnx", threads=1).logits(images)[0], np.float64)


def trained(zoo: Path, data: bytes) -> np.ndarray[Any, Any]:
    """Probabilities (K,)."""
    logits = trained_logits(zoo, data)
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def multipart(data: bytes, name: str = "file") -> tuple[bytes, dict[str, str]]:
    head = f'--zz\r\nContent-Disposition: form-data; name="{name}"; filename="a.jpg"\r\n\r\n'.encode()
    return head + data + b"\r\n--zz--\r\n", {"Content-Type": "multipart/form-data; boundary=zz"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(61, 47), (32, 32), (300, 120), (37, 200)])
def test_an_upload_gets_the_probabilities_of_the_training_pipeline(
    server: Running, zoo: Path, kind: str, size: tuple[int, int]
) -> None:
    data = encoded(photo(*size, seed=sum(size)), kind)
    answer = server.ask("POST", f"/v1/classify?top={len(CLASSES)}", data)
    assert answer.status == 200
    chances = trained(zoo, data)
    order = np.argsort(-trained_logits(zoo, data), kind="stable")
    assert [row["index"] for row in answer.data["predictions"]] == list(order)
    for row in answer.data["predictions"]:
        assert row["label"] == CLASSES[row["index"]]
        assert row["probability"] == pytest.approx(chances[row["index"]], rel=1e-12)
    assert sum(row["probability"] for row in answer.data["predictions"]) == pytest.approx(1)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_read_as_training_reads_it(server: Running, zoo: Path, mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    data = encoded(photo(64, 50, 3).convert(mode), kind)
    (first, *_) = server.ask("POST", "/v1/classify", data).data["predictions"]
    chances = trained(zoo, data)
    assert (first["index"], first["probability"]) == (int(chances.argmax()), pytest.approx(chances.max(), rel=1e-12))


def test_a_photo_is_turned_upright_and_counted(server: Running, zoo: Path) -> None:
    upright = photo(64, 50, 11)
    exif = Image.Exif()
    exif[0x0112] = 8
    labels = {"model": "zoo", "version": "1", "orientation": "8", "transparency": "no"}
    before = server.metric("kdexport_uploaded_images_total", **labels)
    sideways = encoded(upright.transpose(Image.Transpose.ROTATE_270), "PNG", exif=exif)
    answers = [
        server.ask("POST", "/v1/classify", data).data["predictions"] for data in (encoded(upright, "PNG"), sideways)
    ]
    assert answers[0] == answers[1]
    assert server.metric("kdexport_uploaded_images_total", **labels) == before + 1


def test_transparent_pixels_are_black_whatever_their_file_stores(server: Running) -> None:
    colours, alpha = np.asarray(photo(64, 50, 12)), np.zeros((50, 64), np.uint8)
    alpha[10:30, 20:50] = 255
    black = np.where(alpha[..., None] > 0, colours, 0).astype(np.uint8)
    hidden = np.dstack([colours, alpha])
    answers = [
        server.ask("POST", "/v1/classify", encoded(Image.fromarray(pixels), "PNG")).data["predictions"]
        for pixels in (black, hidden)
    ]
    assert answers[0] == answers[1]


def test_the_golden_images_get_their_labels_from_their_bytes(server: Running, zoo: Path) -> None:
    from safetensors.numpy import load_file

    logits = load_file(zoo / "golden" / "logits.safetensors")["logits"]
    names = json.loads((zoo / "manifest.json").read_text())["golden"]
    assert {Path(name).suffix for name in names} == {".jpeg", ".png", ".webp"}
    for name, exact in zip(names, logits, strict=True):
        answer = server.ask("POST", "/v1/classify?top=1", (zoo / name).read_bytes())
        assert answer.data["predictions"][0]["index"] == exact.argmax()


def test_a_form_is_the_same_image(server: Running) -> None:
    data = encoded(photo(80, 60, 1), "JPEG")
    body, headers = multipart(data)
    assert server.ask("POST", "/v1/classify", body, headers).data == server.ask("POST", "/v1/classify", data).data


def test_top_is_the_number_of_labels_and_five_by_default(server: Running) -> None:
    data = encoded(photo(80, 60, 2), "PNG")
    counts = [len(server.ask("POST", f"/v1/classify{q}", data).data["predictions"]) for q in ("", "?top=1", "?top=7")]
    assert counts == [5, 1, 7]
    for top in ("0", "8", "-1", "x", "1e9", "9" * 30):
        answer = server.ask("POST", f"/v1/classify?top={top}", data)
        assert answer.status == 400
        assert answer.error == f"top must be a number from 1 to 7, the classes of the model; got {top[:20]!r}."


def test_model_and_version_can_be_named(server: Running) -> None:
    data = encoded(photo(80, 60, 2), "PNG")
    assert server.ask("POST", "/v1/classify?model=zoo&version=1", data).status == 200
    assert server.ask("POST", "/v1/classify?model=other", data).status == 404
    assert server.ask("POST", "/v1/classify?version=2", data).status == 404


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "The body is empty. Send a JPEG, PNG or WebP image."),
        (b"\x00" * 500, "The upload is not a readable image: its content is not JPEG, PNG or WEBP."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "The upload is not a readable image: its content is not"),
        (encoded(photo(60, 40, 1), "GIF"), "its content is not JPEG, PNG or WEBP. Send one of JPEG, PNG, WEBP."),
        (encoded(photo(60, 40, 1), "BMP"), "its content is not JPEG, PNG or WEBP. Send one of JPEG, PNG, WEBP."),
        (encoded(photo(60, 40, 1), "TIFF"), "its content is not JPEG, PNG or WEBP. Send one of JPEG, PNG, WEBP."),
        (encoded(photo(60, 40, 1), "JPEG")[:600], "not a readable image: it is damaged or truncated (OSError)."),
        (encoded(photo(60, 15, 1), "PNG"), "The image is 60x15; its short side must have at least 16 pixels."),
        (encoded(photo(700, 32, 1), "PNG"), "The image is 700x32; its long side may be up to 20 times its short side."),
        (encoded(Image.fromarray(np.zeros((40, 40), np.uint16)), "PNG"), "wider than 8 bits"),
    ],
    ids=["empty", "zeros", "svg", "gif", "bmp", "tiff", "truncated", "small", "thin", "16 bits"],
)
def test_an_upload_that_cannot_be_used_is_a_400_with_the_reason(server: Running, data: bytes, words: str) -> None:
    answer = server.ask("POST", "/v1/classify", data)
    assert answer.status == 400
    assert words in answer.error


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(server: Running, kind: str) -> None:
    frames = [photo(40, 40, seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert server.ask("POST", "/v1/classify", data).error == "The image is animated. Send a single frame."


def test_a_photo_with_a_second_picture_inside_is_read_as_its_first(server: Running, zoo: Path) -> None:
    # What phones write (MPO): a JPEG followed by a gain map or a second view.
    frames = [photo(90, 70, seed) for seed in (4, 9)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert server.ask("POST", "/v1/classify", data).data["predictions"][0]["index"] == trained(zoo, data).argmax()


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (multipart(b"x")[0], "multipart/form-data", "The Content-Type of the multipart body has no boundary."),
        (
            multipart(b"x")[0][:-10],
            "multipart/form-data; boundary=zz",
            "The multipart body ends before its closing boundary. Send the whole body.",
        ),
        (
            b"nonsense",
            "multipart/form-data; boundary=zz",
            "The multipart body is damaged, or its boundary is not the one in the Content-Type.",
        ),
        (
            b"--zz\r\n\r\n1\r\n" * 2 + b"--zz--\r\n",
            "multipart/form-data; boundary=zz",
            "The form has 2 parts (1 allowed). Send one part: the image.",
        ),
        (
            b"--zz\r\n\r\n1\r\n" * 50 + b"--zz--\r\n",
            "multipart/form-data; boundary=zz",
            "The form has more than 8 parts. Send one part: the image.",
        ),
        (
            b"--zz\r\n" + b"a: b\r\n" * 5000 + b"\r\n\r\n--zz--\r\n",
            "multipart/form-data; boundary=zz",
            "The multipart body is damaged, or its boundary is not the one in the Content-Type.",
        ),
        (
            b"--zz--\r\n",
            "multipart/form-data; boundary=" + "z" * 5000,
            "The multipart body is damaged, or its boundary is not the one in the Content-Type.",
        ),
    ],
    ids=["boundary", "early end", "nonsense", "two parts", "many parts", "many headers", "long boundary"],
)
def test_a_damaged_form_is_a_400_with_the_reason(server: Running, body: bytes, content_type: str, words: str) -> None:
    answer = server.ask("POST", "/v1/classify", body, {"Content-Type": content_type})
    assert answer.status == 400
    assert words in answer.error
