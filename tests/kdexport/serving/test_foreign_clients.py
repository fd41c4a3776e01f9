"""Requests as KServe's SDK 0.21 writes them, recorded from it: both ways of tensors, and what it leaves out or adds."""

import json
from typing import Any

import numpy as np
import pytest

from tests.kdexport.serving.running_server import Running
from tests.kdexport.serving.served_bundles import CLASSES

IMAGES = np.random.default_rng(7).normal(0, 1, (2, 3, 32, 32)).astype(np.float32)
#: As recorded; the names in capitals stand for what differs between requests.
HEAD = (
    "POST /v2/models/zoo/infer HTTP/1.1\r\nHost: 127.0.0.1:8555\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\nUser-Agent: python-httpx/0.28.1\r\nFIELDScontent-length: LENGTH\r\n\r\n"
)
START = (
    '{"id":"f96b16cd-244e-4bc0-b1df-b3394530f341","model_name":"zoo",'
    '"inputs":[{"name":"input","shape":[2,3,32,32],"datatype":"FP32",'
)
BINARY = START + '"parameters":{"binary_data_size":24576}}]'


def exchange(server: Running, text: str, tensor: bytes) -> tuple[dict[str, str], bytes]:
    """Fields and body of the response to a request; the tensor follows the JSON."""
    fields = "content-type: application/json\r\n"
    if tensor:
        fields = f"inference-header-content-length: {len(text)}\r\ncontent-type: application/octet-stream\r\n"
    head = HEAD.replace("FIELDS", fields).replace("LENGTH", str(len(text) + len(tensor)))
    with server.connect() as connection:
        connection.sendall(head.encode() + text.encode() + tensor)
        stream = connection.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        found: dict[str, str] = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(": ")
            found[name.lower()] = value
        return found, stream.read(int(found["content-length"]))


def expected(server: Running) -> np.ndarray[Any, Any]:
    """The logits of each image alone, sent as JSON by another client."""
    rows = []
    for image in IMAGES:
        given = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": image.ravel().tolist()}
        answer = server.ask("POST", "/v2/models/zoo/infer", json.dumps({"inputs": [given]}).encode())
        rows.append(answer.data["outputs"][0]["data"])
    return np.array(rows, np.float32)


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize(
    ("end", "binary_answer"),
    [
        ("}", False),
        (',"outputs":[{"name":"logits","parameters":{"binary_data":true}}]}', True),
        (',"outputs":[{"name":"logits","parameters":{"binary_data":false}}]}', False),
        (',"outputs":[{"name":"logits"}]}', False),
        (',"parameters":{"binary_data_output":true}}', True),
        (',"parameters":{"a":"b","n":3,"t":true}}', False),
        (',"parameters":null,"outputs":null}', False),
    ],
)
def test_a_request_gets_its_logits_in_the_form_that_it_asks_for(
    server: Running, end: str, is_binary: bool, binary_answer: bool
) -> None:
    values = ",".join(repr(float(value)) for value in IMAGES.ravel())
    text = (BINARY if is_binary else f'{START}"data":[{values}]}}]') + end
    fields, body = exchange(server, text, IMAGES.tobytes() if is_binary else b"")
    size = int(fields["inference-header-content-length"]) if binary_answer else len(body)
    data = json.loads(body[:size])
    assert data["id"] == "f96b16cd-244e-4bc0-b1df-b3394530f341"
    assert (data["model_name"], data["model_version"]) == ("zoo", "1")
    (output,) = data["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [2, len(CLASSES)])
    assert ("data" in output) != binary_answer
    logits = np.frombuffer(body[size:], "<f4") if binary_answer else np.array(output["data"], np.float32)
    assert np.allclose(logits.reshape(2, -1), expected(server), rtol=1e-4, atol=1e-5)
    # What types of the protocol in other packages require and allow.
    assert data.keys() == {"id", "model_name", "model_version", "outputs"}
    assert output.keys() <= {"name", "datatype", "shape", "data", "parameters"}


def test_classes_have_the_form_of_strings(server: Running) -> None:
    text = BINARY + ',"outputs":[{"name":"logits","parameters":{"classification":2}}]}'
    fields, body = exchange(server, text, IMAGES.tobytes())
    (output,) = json.loads(body[: int(fields.get("inference-header-content-length", len(body)))])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
