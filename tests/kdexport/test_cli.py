"""The commands as a user types them: output, exit codes, errors."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Built, Command


def test_help_comes_within_half_a_second_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, kdexport.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    best = 10.0
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.monotonic() - started)
    assert done.stdout.strip().endswith("[]")
    assert best < 0.5


def test_json_prints_one_object_and_nothing_else(built: Built, here: Command) -> None:
    for arguments in (
        ("verify", built.bundle),
        ("doctor",),
        ("inspect", built.bundle),
        ("list", "students"),
        ("list", "teachers"),
        ("list", "recipes"),
        ("explain", "KDX330"),
    ):
        done = here(*arguments, "--json")
        assert done.exit_code == 0, (arguments, done.stderr)
        assert done.answer["command"] == arguments[0]


def test_an_error_in_json_has_its_code_and_remedy(kdexport: Command, tmp_path: Path) -> None:
    done = kdexport("inspect", tmp_path / "nothing", "--json")
    assert done.exit_code == 2
    assert done.error["code"] == "KDX203"
    assert "kdexport build" in done.error["remedy"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("list", "studnets"), 2, ["KDX101", "students"]),
        (("explain", "KDX331"), 2, ["KDX101", "KDX330"]),
        (("build",), 2, ["KDX100", "--student"]),
        (("build", "--student", "mobilnetv2"), 2, ["KDX101", "mobilenetv2"]),
        (("build", "--student", "mobilenetv2", "--target", "trt-fp61"), 2, ["KDX101", "trt-fp16"]),
        (("build", "--student", "mobilenetv2", "--target", ","), 2, ["KDX100", "--target"]),
        (("build", "--config", "nowhere.toml"), 2, ["KDX100", "nowhere.toml"]),
        (("verify", "nowhere"), 2, ["KDX203", "nowhere"]),
        (("verify", "nowhere", "--rung", "E"), 2, ["KDX101", "--rung A"]),
        (("frobnicate",), 2, ["No such command"]),
        (("build", "--student"), 2, ["requires an argument"]),
        (("list", "students", "--plugin", "nowhere.py"), 2, ["KDX100", "nowhere.py"]),
    ],
)
def test_bad_input_gets_a_sentence_and_no_traceback(
    arguments: tuple[str, ...], exit_code: int, words: list[str], here: Command, tmp_path: Path
) -> None:
    done = here(*arguments, cwd=tmp_path)
    assert done.exit_code == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_prints_the_traceback(here: Command, tmp_path: Path) -> None:
    assert "Traceback" in here("verify", tmp_path, "--debug").stderr


def test_a_gpu_target_without_tensorrt_exits_with_4_and_says_what_to_install(
    built: Built, here: Command, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("TensorRT is installed here")
    done = here("build", "--config", built.config, "--target", "trt-fp16", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 4
    assert done.error["code"] == "KDX400"
    assert "NVIDIA's package index" in done.error["remedy"]
    assert not (tmp_path / "out").exists()


def test_the_options_of_each_command_are_frozen() -> None:
    import typer.main

    from kdexport.cli import app

    command = typer.main.get_command(app)
    options = {
        name: sorted(option for p in sub.params for option in (*p.opts, *p.secondary_opts))
        for name, sub in command.commands.items()  # type: ignore[attr-defined]
    }
    assert options == {
        "build": [
            "--blame", "--checkpoint", "--config", "--data", "--debug", "--fresh", "--image-size", "--json", "--out",
            "--output", "--plugin", "--precision-search", "--processes", "--resume", "--student", "--target",
            "--teacher-checkpoint", "--weights", "--workspace", "--write-config",
        ],
        "explain-failure": ["--debug", "--json", "--out", "--plugin", "bundle"],
        "verify": [
            "--allow-looser", "--debug", "--json", "--plugin", "--require-executed", "--rethreshold", "--rung",
            "--signature", "bundle",
        ],
        "inspect": ["--debug", "--json", "--plugin", "bundle"],
        "diff": ["--debug", "--html", "--json", "--plugin", "a", "b"],
        "list": ["--debug", "--json", "--plugin", "kind"],
        "doctor": ["--debug", "--json", "--plugin", "--target", "bundle"],
        "explain": ["--debug", "--json", "code"],
        "history": ["--debug", "--html", "--json", "files"],
        "bench": [
            "--arms", "--batch", "--bencher", "--clock", "--debug", "--json", "--plugin", "--seed", "--sessions",
            "--target", "--threads", "bundle",
        ],
        "gate": [
            "--against", "--baseline", "--batch", "--clock", "--data", "--debug", "--json", "--junit", "--markdown",
            "--max-flips", "--max-slow-sessions", "--max-slowdown", "--max-top1-drop", "--on-inconclusive", "--plot",
            "--plugin", "--runner", "--seed", "--slo-p99", "--slow-session", "--target", "--threads", "bundle",
        ],
        "calibrate-runner": [
            "--batch", "--clock", "--debug", "--gates", "--json", "--max-slowdown", "--out", "--plugin", "--seed",
            "--threads", "bundle",
        ],
        "fuse": ["--debug", "--input", "--json", "--out", "--plugin", "source"],
        "quickstart": ["--debug", "--json", "--out", "--workspace"],
        "predict": [
            "--csv", "--debug", "--json", "--plugin", "--target", "--threads", "--top", "bundle", "files",
        ],
        "evaluate": ["--data", "--debug", "--json", "--plugin", "--target", "--threads", "bundle"],
        "replay": ["--debug", "--json", "--out", "--plugin", "bundle"],
        "push": ["--debug", "--dry-run", "--json", "--plugin", "--private", "bundle", "place"],
        "pull": ["--debug", "--json", "--out", "--plugin", "--signature", "place"],
        "slim": ["--debug", "--json", "--out", "--plugin", "--target", "bundle"],
        "sign": ["--certificate", "--debug", "--json", "--key", "--plugin", "bundle"],
        "serve": [
            "--access-log", "--body-timeout", "--connections", "--cors", "--debug", "--drain", "--engine-cache",
            "--grace", "--header-timeout", "--host", "--instances", "--json", "--keep-alive", "--max-bodies",
            "--max-body", "--max-pixels", "--metrics-host", "--metrics-port", "--min-side", "--otel", "--plugin",
            "--port", "--provider", "--queue", "--queue-timeout", "--require-signature", "--target", "--timeout",
            "--tls-cert", "--tls-key", "--token-file", "--watch", "bundles",
        ],
        "triton": [
            "--debug", "--delay-us", "--device", "--instances", "--json", "--keep-versions", "--max-batch",
            "--max-queue", "--name", "--plugin", "--queue-timeout-ms", "--repository", "--target", "--tensorrt-version",
            "--version", "bundle",
        ],
        "train": [], "teacher": [], "evaluate-run": [], "table": [],
    }  # fmt: skip
