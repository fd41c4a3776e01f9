"""Raw results, one JSON object per line, appended at once, so that an interrupted benchmark keeps them."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any


def machine() -> str:
    """The processor of this machine and the number of its cores."""
    described = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("model name")]
    cores = described.count("processor\t")
    return f"{names[0] if names else platform.processor()}, {cores} cores"


class Records:
    """A file of results."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, topic: str, **values: Any) -> None:
        """Append a result to the file and print it."""
        row = {
            "topic": topic, "machine": machine(), "time": round(time.time()), "load": round(os.getloadavg()[0], 2),
            **values,
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def read(self) -> list[dict[str, Any]]:
        """All results so far."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
