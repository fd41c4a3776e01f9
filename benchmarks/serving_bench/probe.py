"""Health probes from a separate process, so that a busy client does not look like a busy server.

python probe.py PORT SECONDS
"""

import contextlib
import json
import sys
import time
import urllib.request


def probe(port: int, seconds: float) -> dict[str, int]:
    """Request /v2/health/live four times a second, on a new connection each; count the answers within 2 s."""
    url = f"http://127.0.0.1:{port}/v2/health/live"
    deadline = time.monotonic() + seconds
    probes = answered = 0
    while time.monotonic() < deadline:
        started = time.monotonic()
        probes += 1
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(url, timeout=2) as reply:
            answered += reply.status == 200
        time.sleep(max(0.0, 0.25 - (time.monotonic() - started)))
    return {"probes": probes, "answered": answered}


if __name__ == "__main__":
    print(json.dumps(probe(int(sys.argv[1]), float(sys.argv[2]))))
