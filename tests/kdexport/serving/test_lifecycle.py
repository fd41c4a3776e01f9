"""A server starts only if all checks pass, and it reloads and stops without losing a request."""

import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdexport.bundle.signature import sign_bundle
from tests.conftest import Command, run_command
from tests.kdexport.serving.loaded_server import BODY, HEADERS, rewritten, swap, under_load, wait_for
from tests.kdexport.serving.running_server import Running, command, running
from tests.kdexport.serving.served_bundles import CLASSES, encoded, photo
from tests.kdexport.signing_keys import make_keys

TRIALS = int(os.environ.get("KDEXPORT_SIGTERM_TRIALS", "2"))


@pytest.mark.parametrize("trial", range(TRIALS))
def test_sigterm_under_load_breaks_no_request(zoo: Path, trial: int) -> None:
    with running(f"zoo={zoo}", "--drain", "0.3", "--watch", "0") as server:
        with under_load(server) as load:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=60) == 0
        assert load.broken == []
        assert load.statuses == {200}
        assert load.answered > 20
        assert "stopped; 0 requests got no response" in server.log.read_text()


def test_after_sigterm_the_server_is_not_ready_and_serves_until_the_drain_ends(zoo: Path) -> None:
    with running(f"zoo={zoo}", "--drain", "3", "--watch", "0") as server:
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 2.5
        while (answer := server.ask("GET", "/v2/health/ready")).status == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert answer.status == 503
        answer = server.ask("POST", "/v2/models/zoo/infer", BODY, HEADERS)
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        assert server.process.wait(timeout=60) == 0


def renamed_classes(bundle: Path, mark: str) -> None:
    """Give a bundle other labels; all of its files stay those that were verified."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    data["student"]["classes"] = [f"{mark}{name}" for name in CLASSES]
    path.write_text(json.dumps(data))


def served_digest(server: Running, version: str = "") -> str:
    answer = server.ask("GET", f"/v2/models/zoo{version}").data
    return str(answer["parameters"]["bundle_sha256"])


@pytest.fixture
def reloading(zoo_copy: Path) -> Iterator[Running]:
    with running(f"zoo={zoo_copy}", "--drain", "0", "--watch", "0") as server:
        yield server


def test_sighup_replaces_models_under_load_and_refuses_a_bad_one(
    reloading: Running, zoo: Path, zoo_copy: Path, tmp_path: Path
) -> None:
    server = reloading
    with under_load(server) as load:
        fresh = Path(shutil.copytree(zoo, tmp_path / "fresh"))
        digest = rewritten(fresh)
        swap(fresh, zoo_copy)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: served_digest(server) == digest)
        bad = Path(shutil.copytree(zoo, tmp_path / "bad"))
        graph = bytearray((bad / "model.onnx").read_bytes())
        graph[len(graph) // 2] ^= 1
        (bad / "model.onnx").write_bytes(graph)
        swap(bad, zoo_copy)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") == 1)
        answered = load.answered
        wait_for(lambda: load.answered > answered + 20)
    assert served_digest(server) == digest
    assert load.broken == []
    assert load.statuses == {200}
    (row,) = server.ask("POST", "/v2/repository/index").data
    assert row["state"] == "READY"
    assert row["reason"].startswith("A newer bundle was refused: 1 files of ")
    assert row["reason"].endswith(" differ from those that were verified: model.onnx changed.")
    assert "zoo version 1: the new bundle is refused:" in server.log.read_text()
    other = Path(shutil.copytree(zoo, tmp_path / "other"))
    renamed_classes(other, "renamed ")
    swap(other, zoo_copy)
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") == 2)
    (row,) = server.ask("POST", "/v2/repository/index").data
    assert row["reason"].endswith(" and the served version 1 of zoo differ in classes; clients rely on them.")
    assert served_digest(server) == digest
    good = Path(shutil.copytree(zoo, tmp_path / "good"))
    digest = rewritten(good)
    swap(good, zoo_copy)
    server.process.send_signal(signal.SIGHUP)
    wait_for(
        lambda: served_digest(server) == digest and not server.ask("POST", "/v2/repository/index").data[0]["reason"]
    )
    with (zoo_copy / "report.md").open("a") as stream:
        stream.write("changed in place")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") == 3)
    (row,) = server.ask("POST", "/v2/repository/index").data
    assert row["reason"].endswith("differ from those that were verified: report.md changed.")


def test_a_new_version_is_found_without_a_signal_and_is_the_default(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo, tmp_path / "models" / "1")
    with running(f"zoo={tmp_path / 'models'}", "--drain", "0", "--watch", "0.2") as server:
        first = served_digest(server)
        shutil.copytree(zoo, tmp_path / "2")
        second = rewritten(tmp_path / "2")
        (tmp_path / "2").rename(tmp_path / "models" / "2")
        wait_for(lambda: served_digest(server) == second)
        assert server.ask("GET", "/v2/models/zoo").data["versions"] == ["1", "2"]
        assert served_digest(server, "/versions/1") == first
        # Clients that name no version would get other classes.
        shutil.copytree(zoo, tmp_path / "3")
        renamed_classes(tmp_path / "3", "third ")
        (tmp_path / "3").rename(tmp_path / "models" / "3")
        wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") >= 1)
        assert served_digest(server) == second
        shutil.rmtree(tmp_path / "models" / "3")
        shutil.rmtree(tmp_path / "models" / "1")
        wait_for(lambda: server.ask("GET", "/v2/models/zoo").data["versions"] == ["2"])
        refused = server.metric("kdexport_bundle_loads_total", outcome="refused")
        shutil.rmtree(tmp_path / "models" / "2")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") > refused)
        assert served_digest(server) == second


def test_a_signature_is_required_at_the_start_and_at_every_reload(zoo: Path, zoo_copy: Path, tmp_path: Path) -> None:
    keys, other = make_keys(tmp_path), make_keys(tmp_path, "other")
    signer = sign_bundle(zoo_copy, key=keys.private)
    arguments = (f"zoo={zoo_copy}", "--require-signature", keys.public, "--drain", "0", "--watch", "0")
    with running(*arguments) as server:
        assert server.announced["models"][0]["signed_by"] == signer.to_json()
        fresh = Path(shutil.copytree(zoo, tmp_path / "fresh"))
        digest = rewritten(fresh)
        sign_bundle(fresh, key=other.private)
        before = served_digest(server)
        swap(fresh, zoo_copy)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: server.metric("kdexport_bundle_loads_total", outcome="refused") == 1)
        assert served_digest(server) == before
        sign_bundle(zoo_copy, key=keys.private)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: served_digest(server) == digest)
    done = subprocess.run(
        command(f"zoo={zoo}", "--require-signature", keys.public), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error KDX332: ")


def test_several_bundles_and_a_token(zoo: Path, zoo_copy: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    renamed_classes(zoo_copy, "two ")
    with running(f"one={zoo}", f"two={zoo_copy}", "--token-file", token, "--drain", "0") as server:
        data, bearer = encoded(photo(50, 50, 1), "PNG"), {"Authorization": "Bearer 0123456789abcdef"}
        for headers in ({}, {"Authorization": "Bearer 0123456789abcdeX"}, {"Authorization": "Basic \u00e9"}):
            answer = server.ask("POST", "/v1/classify?model=one", data, headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error == (
                "The request has no valid bearer token. Send the header Authorization: Bearer TOKEN."
            )
        assert server.ask("GET", "/v2/models/one").status == 401
        assert server.ask("GET", "/v2/health/ready").status == 200
        answer = server.ask("POST", "/v1/classify", data, bearer)
        assert answer.error == "The request names no model, and the server has 2. Add ?model=NAME with one of one, two."
        assert (
            server.ask("POST", "/v1/classify?model=two&top=1", data, bearer).data["predictions"][0]["label"][:4]
            == "two "
        )
        rows = server.ask("POST", "/v2/repository/index", None, bearer).data
        assert [(row["name"], row["version"]) for row in rows] == [("one", "1"), ("two", "1")]
        token.write_text("fedcba9876543210\n")
        server.process.send_signal(signal.SIGHUP)
        renewed = {"Authorization": "Bearer fedcba9876543210"}
        wait_for(lambda: server.ask("GET", "/v2/models/one", None, renewed).status == 200)
        assert server.ask("GET", "/v2/models/one", None, bearer).status == 401
        token.write_text("short")
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "has 5 characters" in server.log.read_text())
        assert server.ask("GET", "/v2/models/one", None, renewed).status == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_serves_and_an_idle_connection_does_not_delay_the_shutdown(zoo: Path, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert}"
    subprocess.run(request.split(), check=True, capture_output=True)
    with running(f"zoo={zoo}", "--tls-cert", cert, "--tls-key", key, "--drain", "0", "--watch", "0") as server:
        context = ssl.create_default_context(cafile=str(cert))
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=30)
        connection.request("POST", "/v2/models/zoo/infer", BODY, HEADERS)
        assert connection.getresponse().read()
        old = ssl.get_server_certificate(("127.0.0.1", server.port))
        subprocess.run(request.split(), check=True, capture_output=True)
        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: ssl.get_server_certificate(("127.0.0.1", server.port)) != old)
        began = time.monotonic()
        assert "stopped; 0 requests got no response" in server.stop()
        assert time.monotonic() - began < 15
        connection.close()


def test_a_port_that_is_taken_is_an_error(server: Running, zoo: Path) -> None:
    done = run_command("serve", zoo, "--port", str(server.port), "--metrics-port", "0")
    assert done.exit_code == 4
    assert done.stderr == (
        f"error KDX402: Cannot listen on 127.0.0.1:{server.port}: Address already in use.\n"
        "Choose another --host or --port.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 2, "nowhere is neither a bundle nor a folder of bundles named 1, 2, 3: it has no manifest.json."),
        (
            ["a=x", "a=y"],
            2,
            "Two bundles have the name a; each needs its own.\nName them: kdexport serve a=FOLDER a-2=FOLDER\n",
        ),
        (["spaced name=x"], 2, "'spaced name' is not a valid model name: 1 to 128 letters, digits, dots, dashes"),
        (
            ["x", "--engine-cache", "engines"],
            2,
            "--engine-cache keeps engines of TensorRT, but --provider is cpu.\n"
            "Omit --engine-cache, or pass --provider tensorrt.\n",
        ),
        (["x", "--provider", "tpu"], 2, "--provider 'tpu' is not known.\nKnown providers: cpu, cuda, tensorrt.\n"),
        (
            ["x", "--tls-cert", "c.pem"],
            2,
            "--tls-cert was given without --tls-key; TLS needs both.\nAdd --tls-key FILE.\n",
        ),
    ],
)
def test_a_start_that_fails_is_an_error_with_a_remedy(
    arguments: list[str], code: int, words: str, here: Command, tmp_path: Path
) -> None:
    done = here("serve", *arguments, "--port", "0", "--metrics-port", "0", cwd=tmp_path)
    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
