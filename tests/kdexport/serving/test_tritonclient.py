"""The unchanged tritonclient, sync and asyncio, against a running server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from kdexport.backends.ort import load_model
from tests.kdexport.serving.running_server import Running
from tests.kdexport.serving.served_bundles import CLASSES


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address, concurrency=4) as opened:
        yield opened


@pytest.fixture(scope="module")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(8).normal(0.2, 1.3, (3, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(zoo: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits of onnxruntime without a server."""
    return load_model(zoo / "model.onnx", threads=1).logits(images)


def given(images: NDArray[np.float32], *, binary: bool = True) -> Any:
    tensor = triton.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def test_health_and_readiness(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("zoo")
    assert client.is_model_ready("zoo", "1")
    assert not client.is_model_ready("zoo", "2")
    assert not client.is_model_ready("none")


def test_metadata_lists_the_supported_extensions(client: Any) -> None:
    metadata = client.get_server_metadata()
    assert metadata["name"] == "kdexport"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(metadata["extensions"])
    model = client.get_model_metadata("zoo")
    assert model["versions"] == ["1"]
    assert model["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, len(CLASSES)]}]


def test_the_configuration_has_the_form_of_tritons(client: Any) -> None:
    from google.protobuf import json_format
    from tritonclient.grpc import model_config_pb2

    config = client.get_model_config("zoo")
    # Parsing into the message refuses any key or type that Triton does not have.
    message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
    assert message.max_batch_size == 8
    assert list(message.input[0].dims) == [3, 32, 32]


def test_the_index_lists_models_and_versions(client: Any) -> None:
    assert client.get_model_repository_index() == [{"name": "zoo", "version": "1", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("count", [1, 3])
def test_logits_are_those_of_onnxruntime_bit_by_bit(
    client: Any, images: NDArray[np.float32], zoo: Path, binary_in: bool, binary_out: bool | None, count: int
) -> None:
    outputs = None if binary_out is None else [triton.InferRequestedOutput("logits", binary_data=binary_out)]
    result = client.infer("zoo", [given(images[:count], binary=binary_in)], outputs=outputs, request_id="r-1")
    assert np.array_equal(result.as_numpy("logits"), load_model(zoo / "model.onnx", threads=1).logits(images[:count]))
    assert result.get_response()["id"] == "r-1"
    assert result.get_response()["model_version"] == "1"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compressed_requests_are_the_same_requests(
    client: Any, images: NDArray[np.float32], expected: NDArray[np.float32], algorithm: str, binary: bool
) -> None:
    result = client.infer(
        "zoo", [given(images, binary=binary)], request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )  # fmt: skip
    assert np.array_equal(result.as_numpy("logits"), expected)


@pytest.mark.parametrize("binary", [True, False])
def test_classification_gives_score_index_and_label(
    client: Any, images: NDArray[np.float32], expected: NDArray[np.float32], binary: bool
) -> None:
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary, class_count=3)]
    rows = client.infer("zoo", [given(images)], outputs=outputs).as_numpy("logits")
    assert rows.shape == (3, 3)
    for row, logits in zip(rows, expected, strict=True):
        words = [word.decode() if isinstance(word, bytes) else word for word in row]
        for word, index in zip(words, np.argsort(logits)[::-1], strict=False):
            score, number, label = word.split(":", 2)
            assert int(number) == index
            assert label == CLASSES[index]
            assert float(score) == pytest.approx(float(logits[index]), abs=1e-6)


def test_more_classes_than_there_are_gives_all_of_them(client: Any, images: NDArray[np.float32]) -> None:
    outputs = [triton.InferRequestedOutput("logits", class_count=1000)]
    assert client.infer("zoo", [given(images)], outputs=outputs).as_numpy("logits").shape == (3, len(CLASSES))


def test_raw_requests_need_no_json(server: Running, images: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    answer = server.ask("POST", "/v2/models/zoo/infer", images.tobytes(), {"Inference-Header-Content-Length": "0"})
    length = int(answer.headers["inference-header-content-length"])
    assert np.array_equal(np.frombuffer(answer.body[length:], "<f4").reshape(expected.shape), expected)


def test_async_infer_of_many_requests(client: Any, images: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    pending = [client.async_infer("zoo", [given(images)], model_version="1") for _ in range(24)]
    for request in pending:
        assert np.array_equal(request.get_result().as_numpy("logits"), expected)


def test_the_asyncio_client(server: Running, images: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    async def check() -> None:
        async with triton_aio.InferenceServerClient(server.address) as opened:
            assert await opened.is_server_ready()
            assert (await opened.get_model_metadata("zoo"))["name"] == "zoo"
            many = [opened.infer("zoo", [given(images, binary=index % 2 == 0)]) for index in range(12)]
            for result in await asyncio.gather(*many):
                assert np.array_equal(result.as_numpy("logits"), expected)
            with pytest.raises(
                InferenceServerException,
                match=r"The server has no model .none.\. POST /v2/repository/index lists its models\.",
            ):
                await opened.infer("none", [given(images)])

    asyncio.run(check())


def test_statistics_and_metrics_count_the_same(server: Running, client: Any, images: NDArray[np.float32]) -> None:
    (before,) = client.get_inference_statistics("zoo", "1")["model_stats"]
    counted = server.metric("nv_inference_count", model="zoo", version="1")
    runs = server.metric("nv_inference_exec_count", model="zoo")
    for _ in range(4):
        client.infer("zoo", [given(images)])
    (after,) = client.get_inference_statistics("zoo", "1")["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 12
    assert after["execution_count"] - before["execution_count"] == 4
    success = after["inference_stats"]["success"]
    assert success["count"] - before["inference_stats"]["success"]["count"] == 4
    assert success["ns"] > before["inference_stats"]["success"]["ns"]
    assert server.metric("nv_inference_count", model="zoo", version="1") - counted == 12
    assert server.metric("nv_inference_exec_count", model="zoo") - runs == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other"}, r"The model has no input 'other'; its only input is 'input'\."),
        ({"shape": [1, 3, 32, 31]}, r"the model takes \[n, 3, 32, 32\] with n from 1 to 8"),
        ({"shape": [9, 3, 32, 32]}, "n from 1 to 8"),
        ({"shape": [3072]}, "n from 1 to 8"),
        ({"datatype": "FP16"}, "the model takes 'FP32'"),
    ],
)
def test_errors_name_the_given_and_the_expected_value(client: Any, change: dict[str, Any], words: str) -> None:
    described = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32", **change}
    tensor = triton.InferInput(described["name"], described["shape"], described["datatype"])
    kind = np.float16 if described["datatype"] == "FP16" else np.float32
    tensor.set_data_from_numpy(np.zeros(described["shape"], kind))
    with pytest.raises(InferenceServerException, match=words) as caught:
        client.infer("zoo", [tensor])
    assert caught.value.status() == "400"


def test_an_unknown_version_and_output_are_errors(client: Any, images: NDArray[np.float32]) -> None:
    with pytest.raises(InferenceServerException, match=r"Model 'zoo' has no version '7'; its versions are 1\."):
        client.infer("zoo", [given(images)], model_version="7")
    with pytest.raises(
        InferenceServerException, match=r"The model has no output 'features'; its only output is 'logits'\."
    ):
        client.infer("zoo", [given(images)], outputs=[triton.InferRequestedOutput("features")])


def test_the_timeout_of_a_request_limits_its_wait(client: Any, images: NDArray[np.float32]) -> None:
    assert client.infer("zoo", [given(images)], timeout=5_000_000).as_numpy("logits") is not None
    # An idle server may still be faster than a microsecond of queueing; fifty times in a row it is not.
    refusals = []
    for _ in range(50):
        try:
            client.infer("zoo", [given(images)], timeout=1)
        except InferenceServerException as error:
            refusals.append((error.status(), error.message()))
    message = (
        "The request waited 1e-06 s in the queue, the longest wait allowed. Retry later, or allow a longer wait in the "
        "parameter timeout."
    )
    assert set(refusals) == {("503", message)}
