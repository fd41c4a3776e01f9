"""Raw results, one JSON object per line, appended at once, so that an interrupted benchmark keeps them."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Records:
    """A file of results."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, topic: str, **values: Any) -> None:
        """Append a result to the file and print it."""
        row = {"topic": topic, "time": round(time.time()), "load": round(os.getloadavg()[0], 2), **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def read(self) -> list[dict[str, Any]]:
        """All results so far."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
