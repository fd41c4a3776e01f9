"""Bare onnxruntime in a separate process: the upper limit with which a server is compared.

python bare.py MODEL.onnx IMAGE_SIZE THREADS SECONDS
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Bare:
    """Images per second over all threads, latency of one call, and CPU time of one image."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def bare(model: Path, image_size: int, *, threads: int, seconds: float) -> Bare:
    """Run this module as a child process."""
    command = [sys.executable, __file__, str(model), str(image_size), str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Bare(**json.loads(done.stdout))


def _measure(model: str, image_size: int, threads: int, seconds: float) -> dict[str, float]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    image = np.random.default_rng(1).normal(0, 1, (1, 3, image_size, image_size)).astype(np.float32)
    sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for _ in range(threads)]
    latencies: list[list[float]] = [[] for _ in range(threads)]
    stop = threading.Event()

    def run(index: int) -> None:
        session, mine = sessions[index], latencies[index]
        while not stop.is_set():
            started = time.perf_counter()
            session.run(None, {"input": image})
            mine.append(time.perf_counter() - started)

    for session in sessions:
        for _ in range(5):
            session.run(None, {"input": image})
    workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
    started, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed, used = time.perf_counter() - started, time.process_time() - cpu
    times = np.concatenate([np.asarray(mine) for mine in latencies])
    return {
        "rate": times.size / elapsed,
        "p50_ms": float(np.percentile(times, 50)) * 1000,
        "p99_ms": float(np.percentile(times, 99)) * 1000,
        "cpu_ms": 1000 * used / times.size,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
