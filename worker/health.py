"""Whether the worker on this host is well, for health checks: `python -m worker.health`.

Exits 0 when every slot of one `polycollide worker` here was heard of lately, else 1. Torch stays
closed: a check is to be cheap.
"""

import socket
import sys
from collections.abc import Iterable

from sqlalchemy.exc import SQLAlchemyError

from store import workers
from store.database import connect
from store.settings import Settings


def main() -> int:
    """The exit status."""
    database = connect(Settings())
    try:
        with database.connect() as connection:
            slots = workers.slots_of(connection, socket.gethostname())
    except SQLAlchemyError as error:
        print(f"The store does not answer: {str(error).splitlines()[0]}")
        return 1
    print(*(f"{slot} {'well' if fresh else 'silent'}" for slot, fresh in slots), sep="\n")
    return 0 if well(slots) else 1


def well(slots: Iterable[tuple[str, bool]]) -> bool:
    """Of slots named `host:pid:gpu`, whether all of one pid are fresh.

    Slots of other pids may be there: a worker that was killed leaves its rows behind.
    """
    by_pid: dict[str, bool] = {}
    for slot, fresh in slots:
        pid = slot.split(":")[1]
        by_pid[pid] = by_pid.get(pid, True) and fresh
    return any(by_pid.values())


if __name__ == "__main__":
    sys.exit(main())
