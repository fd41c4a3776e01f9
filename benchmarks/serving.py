"""Measure the speed and robustness of ``kdexport serve`` on one machine, against bare onnxruntime in the same run.

python benchmarks/serving.py all --litserve PYTHON --mlserver PYTHON
python benchmarks/serving.py throughput --seconds 3 --rounds 1
python benchmarks/serving.py report

PYTHON is the interpreter of a separate virtual environment with that server, onnxruntime and Pillow. wrk must be
installed. Raw results are appended to docs/results/serving.jsonl, and the report is made from that file.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from serving_bench.bundles import MODELS, random_bundle
from serving_bench.endurance import overload, soak, terminations
from serving_bench.fuzz import fuzz
from serving_bench.images import images
from serving_bench.records import Records
from serving_bench.report import report
from serving_bench.servers import ROOT, Arm, kdexport_arm, least_arm, litserve_arm, mlserver_arm
from serving_bench.slow import slow
from serving_bench.throughput import Cell, Effort, measure
from serving_bench.wrk import require_wrk

TOPICS = ("throughput", "overload", "soak", "fuzz", "images", "slow", "sigterm")


def main() -> None:
    """Run one topic or all, and write the report."""
    arguments = _arguments()
    # After SIGTERM the server that is measured must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    require_wrk()
    results = ROOT / "docs" / "results" if arguments.results is None else arguments.results
    records = Records(results / "serving.jsonl")
    topics = TOPICS if arguments.topic == "all" else (arguments.topic,)
    if arguments.fresh:
        records.path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for topic in topics:
            if topic == "throughput":
                _throughput(arguments, records, Path(folder))
            elif topic != "report":
                _robustness(topic, arguments, records, Path(folder))
    (results / "serving.md").write_text(report(records.read()), encoding="utf-8")


def _throughput(arguments: argparse.Namespace, records: Records, logs: Path) -> None:
    effort = Effort(
        rounds=arguments.rounds, seconds=arguments.seconds, max_foreign=arguments.max_foreign,
        attempts=arguments.attempts,
    )  # fmt: skip
    for name in arguments.models.split(","):
        model = MODELS[name]
        bundle = random_bundle(model, arguments.bundles / name)
        one, two = (kdexport_arm(model, bundle, arguments.source, instances=count) for count in (1, 2))
        cells = [
            Cell(one, "FP32 binary", 1), Cell(one, "FP32 binary", 8), Cell(two, "FP32 binary", 8, bare_threads=2),
            Cell(one, "JPEG", 1), Cell(one, "JPEG", 8), Cell(one, "FP32 JSON", 8),
        ]  # fmt: skip
        cells += [Cell(least_arm(model, bundle), "FP32 binary", clients) for clients in (1, 8)]
        if arguments.litserve:
            tensors = litserve_arm(model, bundle, arguments.litserve, mode="tensor")
            uploads = litserve_arm(model, bundle, arguments.litserve, mode="image")
            cells += _peer_cells(tensors, ("FP32 binary",)) + _peer_cells(uploads, ("JPEG",))
        if arguments.mlserver:
            cells += _peer_cells(
                mlserver_arm(model, bundle, arguments.mlserver, logs / "mlserver"), ("FP32 binary", "JPEG")
            )
        measure(cells, model, bundle, records, effort, logs)


def _peer_cells(arm: Arm, kinds: tuple[str, ...]) -> list[Cell]:
    return [Cell(arm, kind, clients) for kind in kinds for clients in (1, 8)]


def _robustness(topic: str, arguments: argparse.Namespace, records: Records, logs: Path) -> None:
    big, small = MODELS["mobilenetv2-224"], MODELS["cifar-student"]
    model = small if topic in ("fuzz", "images", "sigterm") else big
    bundle = random_bundle(model, arguments.bundles / model.name)
    # The server waits for the rest of an incomplete request until its deadline, so it is short for 20,000 of them.
    options = {
        "fuzz": ("--header-timeout", "1", "--body-timeout", "1"),
        "sigterm": ("--drain", "1"),
        # As many as 1024 file descriptors allow.
        "slow": ("--connections", "448"),
    }.get(topic, ())
    arm = kdexport_arm(model, bundle, arguments.source, instances=2, options=options)
    if topic == "overload":
        overload(arm, records, rounds=arguments.rounds, seconds=2 * arguments.seconds, logs=logs)
    elif topic == "soak":
        soak(arm, records, seconds=arguments.soak_seconds, logs=logs)
    elif topic == "fuzz":
        fuzz(arm, model.name, model.image_size, records, count=arguments.fuzz_requests, logs=logs)
    elif topic == "images":
        images(arm, model.name, records, count=arguments.images, logs=logs)
    elif topic == "slow":
        slow(arm, records, connections=arguments.connections, seconds=arguments.slow_seconds, logs=logs)
    else:
        terminations(arm, records, times=arguments.terminations, logs=logs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topic", choices=("all", *TOPICS, "report"))
    parser.add_argument("--models", default=",".join(MODELS), help="for throughput, comma separated")
    parser.add_argument(
        "--bundles", type=Path, default=ROOT / "dist" / "benchmark", help="folder in which bundles are kept"
    )
    parser.add_argument("--source", type=Path, default=ROOT, help="working tree whose `kdexport serve` is measured")
    parser.add_argument("--results", type=Path, help="folder of serving.md and serving.jsonl; default docs/results")
    parser.add_argument("--fresh", action="store_true", help="delete earlier raw results first")
    parser.add_argument("--litserve", help="Python of an environment with LitServe")
    parser.add_argument("--mlserver", help="Python of an environment with MLServer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="length of one run")
    parser.add_argument(
        "--max-foreign", type=float, default=0.15, help="largest CPU share of other processes in a quiet run"
    )
    parser.add_argument("--attempts", type=int, default=2, help="runs until one is quiet")
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--fuzz-requests", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--connections", type=int, default=1200)
    parser.add_argument("--slow-seconds", type=float, default=15)
    parser.add_argument("--terminations", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
