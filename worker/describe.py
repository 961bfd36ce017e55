"""Tells the store which networks this machine has, and their layers; run once beside workers.

Opening each network takes a while, so this is a process of its own: `python -m worker.describe`
with the slots to report for.
"""

import sys
from typing import Any

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
    """Lists every network, and describes each whose weights are here."""
    configure(settings().mode)
    torch.set_num_threads(1)  # the worker beside it has jobs to run
    database = connect(settings())
    known = models.listed()
    with database.begin() as connection:
        for slot in slots:
            workers.report_models(connection, slot, [report(listed) for listed in known])
    for listed in known:
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


def report(listed: models.Listed) -> dict[str, Any]:
    """What is known before it is loaded, but not where an operator keeps a models.toml."""
    return {
        "name": listed.name,
        "weights": list(listed.weights),
        "input_shape": list(listed.input_shape),
        "classes": None,
        "origin": "own" if listed.origin.endswith(".toml") else listed.origin,
        "ready": listed.ready,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
