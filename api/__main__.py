"""`python -m api`: the service's HTTP side, on the host and port of the settings."""

import resource
import sys
from contextlib import suppress

import uvicorn

from api import serving
from store import logs
from store.settings import settings


def main() -> None:
    """Serves until it is told to stop."""
    logs.configure(settings().mode)
    # A connection is a file, and a shell's limit is often 1024.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = uvicorn.Server(serving.config(settings()))
    with suppress(KeyboardInterrupt):
        server.run()
    sys.exit(0 if server.started else 3)


if __name__ == "__main__":
    main()
