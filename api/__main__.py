"""`python -m api`: the service's HTTP side, on the host and port of the settings."""

import uvicorn

from api.app import create
from store import logs
from store.settings import settings


def main() -> None:
    """Serves until it is told to stop."""
    logs.configure(settings().mode)
    uvicorn.run(
        create(settings()),
        host=settings().host,
        port=settings().port,
        log_config=None,
        access_log=False,  # our own line has ids
        server_header=False,
        # Those who wait or watch ask again elsewhere.
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
