"""No response has the exception text of a library, which may hold addresses of memory; each error is our own text."""

import asyncio
import contextlib
import dataclasses
import gzip
import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdexport.backends.ort import CPU, load_model
from kdexport.bundle.manifest import hash_files
from kdexport.diagnose.environment import examine_bundle
from kdexport.errors import AuditError, KdexportError
from kdexport.serving.app import create_app, create_metrics_app, routes
from kdexport.serving.isolated_load import try_bundle
from kdexport.serving.limits import Limits
from kdexport.serving.loading import without_library_text
from kdexport.serving.repository import parse_sources
from kdexport.serving.service import Service, Settings
from tests.kdexport.serving.running_server import Answer, Running, binary_request, call, read_answer
from tests.kdexport.serving.served_bundles import encoded, photo

ADDRESS = re.compile(r"0x[0-9a-f]{6,}", re.IGNORECASE)
INFER = "/v2/models/zoo/infer"
TENSOR = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32"}
FORM = {"Content-Type": "multipart/form-data; boundary=zz"}
#: What a library's exception may say: the representation of an object, with its address.
LEAK = f"cannot read {object()!r}"
IMAGE = encoded(photo(50, 40, 1), "JPEG")

Request = tuple[str, str, bytes, dict[str, str]]


def damaged_images() -> Iterator[bytes]:
    """Files of no format, of other formats, truncated, and with damage at each of several places."""
    yield from (b"", b"\x00" * 500, b"<svg/>", b"not an image" * 9, b"RIFF\x40\x00\x00\x00WEBPVP8X" + bytes(64))
    picture = photo(50, 40, 1)
    yield from (encoded(picture, kind) for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM"))
    yield encoded(Image.fromarray(np.zeros((40, 40), np.uint16)), "PNG")
    yield encoded(picture, "PNG", save_all=True, append_images=[photo(50, 40, 2)])
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture, kind)
        for cut in (1, 9, 30, len(data) // 2, len(data) - 9):
            yield data[:cut]
        for place in (3, 13, 17, 25, 40, len(data) // 2):
            yield data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :]


def requests_of_every_endpoint() -> Iterator[Request]:
    """Every path with an existing and a missing model, by three methods."""
    for route, model, method in itertools.product(routes(), ("zoo", "none"), ("GET", "POST", "DELETE")):
        yield method, route.path.replace("{model}", model).replace("{version}", "1"), b"", {}
    yield "GET", "/nowhere", b"", {}
    yield "POST", "/v2/models/zoo/versions/7/infer", b"{}", {}


def bad_uploads() -> Iterator[Request]:
    """Images, queries and forms that cannot be used."""
    for data in damaged_images():
        yield "POST", "/v1/classify", data, {}
    for query in ("top=0", "top=x", "top=9999999999999999", "model=none", "version=9"):
        yield "POST", f"/v1/classify?{query}", IMAGE, {}
    for form in (b"", b"nonsense", b"--zz--\r\n", b"--zz\r\n\r\nx", b"--zz\r\n\r\nx\r\n" * 20 + b"--zz--\r\n"):
        yield "POST", "/v1/classify", form, FORM
    yield "POST", "/v1/classify", b"x", {"Content-Type": "multipart/form-data"}


def bad_bodies() -> Iterator[Request]:
    """Inference requests whose encoding, header length or JSON is damaged."""
    good, headers = binary_request(np.zeros((1, 3, 32, 32), np.float32))
    packed = gzip.compress(good)
    bodies = (b"x", packed[:-6], packed + b"x", gzip.compress(bytes(40_000_000)))
    for encoding, body in itertools.product(("gzip", "deflate", "br", "gzip, gzip"), bodies):
        yield "POST", INFER, body, {**headers, "Content-Encoding": encoding}
    for length in ("0", "x", "-1", "999999", "3"):
        yield "POST", INFER, good, {"Inference-Header-Content-Length": length}
    for text in (b"", b"{", b"[]", b"3", b"\xff", b'{"inputs": 3}', b'{"inputs": []}', b"[" * 5000, b"{}," * 60_000):
        yield "POST", INFER, text, {}


def bad_tensors() -> Iterator[Request]:
    """Inference requests whose input, outputs or parameters do not fit the model."""
    numbers: Any = [0.5] * 3072
    good = {**TENSOR, "data": numbers}
    for change in (
        {"data": None}, {"data": 3}, {"data": [1]}, {"data": [[1], [2, 3]]}, {"data": ["x"] * 3072},
        {"data": [1e39] * 3072}, {"data": [10**400] * 3072}, {"name": "x"}, {"name": 3}, {"datatype": "FP16"},
        {"shape": [1, 2]}, {"shape": [1.5]}, {"shape": [10**40]}, {"shape": "x"},
        {"parameters": {"binary_data_size": 3}}, {"parameters": {"shared_memory_region": "x"}},
    ):  # fmt: skip
        yield "POST", INFER, json.dumps({"inputs": [{**good, **change}]}).encode(), {}
    for more in (
        {"outputs": [{"name": "x"}]}, {"outputs": [{"name": "logits"}] * 2}, {"outputs": 3}, {"id": 3},
        {"parameters": {"sequence_id": 3}}, {"parameters": {"timeout": -1}}, {"parameters": 3},
    ):  # fmt: skip
        yield "POST", INFER, json.dumps({"inputs": [good], **more}).encode(), {}


def requests() -> Iterator[Request]:
    """Requests that reach every endpoint and every way to fail."""
    return itertools.chain(requests_of_every_endpoint(), bad_uploads(), bad_bodies(), bad_tensors())


def require_own_text(answer: Answer) -> None:
    """The response has no address, and an error is a whole sentence under the only key ``error``."""
    text = answer.body.decode()
    assert not ADDRESS.search(text), text
    if answer.status >= 400 and "ready" not in text:
        assert set(answer.data) == {"error"}
        assert answer.error[0].isalpha() or answer.error[0] == "/"
        assert answer.error.endswith(".")
        assert not re.search(r"Traceback|Exception|Errno|Error -\d|object at|<_?io\.|Input should", answer.error)


def test_no_response_of_any_endpoint_or_error_path_has_an_address_or_library_text(server: Running) -> None:
    statuses: dict[int, int] = {}
    for request in requests():
        answer = server.ask(*request)
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        require_own_text(answer)
    # The requests reach responses of every kind.
    assert statuses.keys() >= {200, 400, 404, 405, 413, 415}
    assert statuses[400] > 80


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 200_000, b"G\xffT / HTTP/1.1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", b"GET /v2 HTTP/1.1\r\nA: ",
    ],
    ids=["binary", "version", "long", "method", "length", "half"],
)  # fmt: skip
def test_bytes_that_are_not_http_get_our_own_text(server: Running, raw: bytes) -> None:
    received = b""
    with server.connect() as stream:
        try:
            stream.sendall(raw)
            while part := stream.recv(65536):
                received += part
        except ConnectionError:
            pass
    status = int(received.split()[1])
    assert status in (400, 408, 431)
    require_own_text(Answer(status, {}, received.partition(b"\r\n\r\n")[2]))


class Leaking:
    """Raises an exception whose text has an address."""

    def logits(self, images: Any) -> Any:
        raise ValueError(LEAK)


@pytest.fixture
def service(zoo: Path) -> Iterator[Service]:
    """A service in this process, so that any part of it can be made to fail."""
    loaded = Service(parse_sources([f"zoo={zoo}"]), Settings(instances=1))
    loaded.load()
    yield loaded
    loaded.close()


def ask(service: Service, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
    """The response of the application to one request, even if it raises after the response."""
    sent: list[Any] = []

    async def exchange() -> None:
        with contextlib.suppress(ValueError):
            await call(create_app(service=service), method, path, body, headers, sent=sent)

    asyncio.run(exchange())
    return read_answer(sent)


def test_an_exception_of_the_runtime_does_not_enter_the_response(service: Service) -> None:
    assert ADDRESS.search(LEAK)
    leaking: Any = Leaking()
    models = {key: dataclasses.replace(model, ort=leaking) for key, model in service.repository.models.items()}
    service.repository._models = models
    body, headers = binary_request(np.zeros((1, 3, 32, 32), np.float32))
    for answer in (
        ask(service, "POST", INFER, body, headers),
        ask(service, "POST", "/v1/classify", IMAGE),
    ):
        assert answer.status == 500
        assert answer.error == "Internal error: ValueError. The server's log has the details."


@pytest.mark.parametrize("place", ["PIL.Image.open", "PIL.JpegImagePlugin.JpegImageFile.load"])
def test_an_exception_of_the_image_decoder_does_not_enter_the_response(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(LEAK)

    monkeypatch.setattr(place, fail)
    # Where simplejpeg is installed, it would decode the image without a call of Pillow.
    monkeypatch.setattr("kdexport.serving.plain_jpeg._decoder", lambda: None)
    answer = ask(service, "POST", "/v1/classify", IMAGE)
    assert answer.status == 400
    assert answer.error == (
        "The upload is not a readable image: it is damaged or truncated (OSError). Send one of JPEG, PNG, WEBP."
    )


@pytest.mark.parametrize("place", ["loading.load_model", "loading.read_manifest", "repository.try_bundle"])
def test_the_reason_of_a_refused_bundle_has_no_library_text(
    service: Service, monkeypatch: pytest.MonkeyPatch, zoo: Path, place: str
) -> None:
    monkeypatch.setattr("kdexport.serving.repository.bundle_digest", lambda _: "another")

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError(LEAK)

    if place != "repository.try_bundle":
        monkeypatch.setattr("kdexport.serving.repository.try_bundle", lambda *_: 1.0)
    monkeypatch.setattr(f"kdexport.serving.{place}", fail)
    assert list(service.reload().refused) == [("zoo", 1)]
    answer = ask(service, "POST", "/v2/repository/index")
    require_own_text(answer)
    assert answer.data[0]["reason"] == f"A newer bundle was refused: {zoo} cannot be loaded (ValueError)."


def test_the_output_of_a_crashed_process_is_logged_and_not_part_of_the_reason(
    service: Service, monkeypatch: pytest.MonkeyPatch, zoo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    crash = f"import sys, os; sys.stderr.write({LEAK!r}); sys.stderr.flush(); os.abort()"
    real = subprocess.Popen
    monkeypatch.setattr("kdexport.serving.repository.bundle_digest", lambda _: "another")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real([command[0], "-c", crash], **options))
    service.reload()
    answer = ask(service, "POST", "/v2/repository/index")
    require_own_text(answer)
    reason = f"A newer bundle was refused: The process that loaded {zoo} crashed (exit code -6)."
    assert answer.data[0]["reason"] == reason
    assert LEAK in caplog.text


def truncate_graph(bundle: Path) -> None:
    """Cut the graph, and update its digest in the manifest."""
    model, manifest = bundle / "model.onnx", bundle / "manifest.json"
    model.write_bytes(model.read_bytes()[:9000])
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "files": hash_files(bundle)}))


def truncate_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text()[:500])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_graph, "{folder} cannot be loaded (DecodeError)."),
        (truncate_manifest, "{folder}/manifest.json is damaged or was written by another version: JSONDecodeError."),
    ],
)
def test_the_error_of_the_child_process_names_the_librarys_exception_without_its_text(
    zoo_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(zoo_copy)
    with pytest.raises(KdexportError) as caught:
        try_bundle(zoo_copy, CPU, Limits())
    assert caught.value.message == message.format(folder=zoo_copy)
    assert f"`kdexport doctor {zoo_copy}" in caught.value.remedy
    # The operator can read it: doctor keeps the exception of the library as the cause.
    with pytest.raises(KdexportError) as shown:
        examine_bundle(zoo_copy)
    assert type(shown.value.__cause__).__name__ in message


def test_onnxruntimes_own_text_is_replaced_by_the_name_of_its_exception(zoo_copy: Path) -> None:
    with pytest.raises(AuditError) as caught:
        load_model(zoo_copy / "model.onnx", content=b"not a graph")
    name, text = type(caught.value.__cause__).__name__, str(caught.value.__cause__)
    assert text in caught.value.message
    error = without_library_text(caught.value, zoo_copy)
    assert error.message == f"onnxruntime cannot open model.onnx: {name}"
    assert error.remedy.endswith(f"`kdexport doctor {zoo_copy}` shows the message of {name}.")


def test_metrics_have_no_address(service: Service) -> None:
    metrics = create_metrics_app(service.metrics.text)
    for path in ("/metrics", "/nowhere"):
        assert not ADDRESS.search(asyncio.run(call(metrics, "GET", path)).body.decode())
