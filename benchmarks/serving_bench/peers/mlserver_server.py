"""Start MLServer on chosen ports: mlserver_server.py FOLDER PORT SETTINGS."""

import json
import socket
import sys
from pathlib import Path

from mlserver.cli.main import main


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    settings = json.loads(sys.argv[3])
    settings |= {"http_port": int(sys.argv[2]), "grpc_port": free_port(), "metrics_port": free_port()}
    (folder / "settings.json").write_text(json.dumps(settings | {"host": "127.0.0.1"}))
    sys.argv = ["mlserver", "start", str(folder)]
    main()
