"""The Celery application: one task, which drains the queue of Postgres when somebody rings.

A message is a doorbell and carries nothing. It is acknowledged before the work starts, and no
result is kept: leases in Postgres recover what a worker leaves behind. Only the pool's child, one
to a worker, opens torch.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery, signals
from celery.signals import (
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
    worker_shutting_down,
)
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from store import workers
from store.database import connect
from store.logs import configure
from store.settings import DRAIN_TASK, QUEUE, settings

log = structlog.get_logger(__name__)

# By the options of TCP that this system has, in seconds but for the last, in milliseconds.
_PROBES = {"KEEPIDLE": 10, "KEEPINTVL": 5, "KEEPCNT": 3, "USER_TIMEOUT": 15_000}
KEEPALIVE = {
    getattr(socket, f"TCP_{name}"): value
    for name, value in _PROBES.items()
    if hasattr(socket, f"TCP_{name}")
}

app = Celery("polycollide", broker=settings().redis_url.get_secret_value(), set_as_current=False)
app.conf.update(
    task_ignore_result=True,
    task_serializer="json",
    accept_content=["json"],
    task_default_queue=QUEUE,
    task_acks_late=False,
    # A bell that waits behind a long job is heard by whoever is free.
    worker_disable_prefetch=True,
    worker_pool="prefork",
    # A forked child cannot use CUDA.
    worker_pool_start_method="spawn",
    worker_concurrency=1,
    # Importing torch and opening a GPU takes longer than the 4 s that Celery allows.
    worker_proc_alive_timeout=120,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    # A server that has become a read-only replica answers with an error, and will be master again.
    broker_channel_error_retry=True,
    broker_transport_options={
        # Who waits for a bell sends nothing: only this tells it that Redis is out of reach.
        "socket_keepalive": True,
        "socket_keepalive_options": KEEPALIVE,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "health_check_interval": 10,
    },
)

_child: Any = None  # the Runner, in the pool's child only


@signals.celeryd_init.connect  # which comes before the first warnings
@signals.setup_logging.connect
def _log(**_: Any) -> None:
    configure(settings().mode)


@worker_process_init.connect
def _start(**_: Any) -> None:
    from worker.runner import Runner

    global _child
    configure(settings().mode)
    # Threads of torch give up the interpreter at every operation; the default of 5 ms is what they
    # then wait for one that encodes a result. Still less costs more in switches.
    sys.setswitchinterval(1e-3)
    _child = Runner(settings(), os.environ["POLYCOLLIDE_SLOT"])
    _child.start()
    threading.Thread(target=_look, name="look", daemon=True).start()


def _look() -> None:
    """Looks at the table now and then: bells may be lost, or Redis away."""
    while True:
        time.sleep(settings().reconcile_every.total_seconds())
        try:
            _child.look()
        except SQLAlchemyError as error:
            log.warning("the store does not answer", error=str(error).splitlines()[0])
        except Exception:  # this thread must outlive whatever happens to it
            log.exception("a look at the queue failed")


@worker_process_shutdown.connect
def _end(**_: Any) -> None:
    if _child:
        _child.close()


@worker_shutting_down.connect
def _hand_back(**_: Any) -> None:
    """Tells the child, which no signal reaches while it works, that this worker is to end."""
    # A signal handler must not wait for a database.
    threading.Thread(target=_tell_store, args=(workers.drain,), name="hand back").start()


@worker_shutdown.connect
def _leave(**_: Any) -> None:
    _tell_store(workers.leave)


def _tell_store(news: Callable[[Connection, str], None]) -> None:
    database = connect(settings())
    try:
        with database.begin() as connection:
            news(connection, os.environ["POLYCOLLIDE_SLOT"])
    except SQLAlchemyError as error:
        log.warning("the store does not answer", error=str(error).splitlines()[0])
    finally:
        database.dispose()


@app.task(name=DRAIN_TASK)
def drain() -> None:
    """Runs jobs until none is left."""
    _child.drain()
