"""Tells the store which layers the networks on this machine have; run once beside a worker.

Opening each network takes a while, so this is a process of its own: `python -m worker.describe`
with the slots to report for.
"""

import sys

import structlog
import torch

from core import models
from core.errors import CoreError
from core.job import describe
from store import workers
from store.database import connect
from store.logs import configure
from store.settings import settings

log = structlog.get_logger(__name__)


def main(slots: list[str]) -> None:
    """Describes every network whose weights are here."""
    configure(settings().mode)
    torch.set_num_threads(1)  # the worker beside it has jobs to run
    database = connect(settings())
    for listed in models.listed():
        if not listed.ready:
            continue
        try:
            model = models.load(listed.name)
            layers = [vars(layer) for layer in describe(model)]
        except CoreError as error:
            log.warning("a model cannot be described", model=listed.name, reason=str(error))
            continue
        with database.begin() as connection:
            for slot in slots:
                workers.report_layers(connection, slot, listed.name, model.classes, layers)
    database.dispose()


if __name__ == "__main__":
    main(sys.argv[1:])
