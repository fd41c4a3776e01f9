"""NVIDIA's driver and GPUs, read from files of the driver without loading it."""

from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia")


def gpu_fingerprint() -> list[str]:
    """Driver version and models of the GPUs; empty without a GPU."""
    if not (_DRIVER / "version").is_file():
        return []
    lines = [(_DRIVER / "version").read_text().splitlines()[0]]
    for info in sorted(_DRIVER.glob("gpus/*/information")):
        lines += [line for line in info.read_text().splitlines() if line.startswith("Model:")]
    return lines
