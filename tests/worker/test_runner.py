"""The loop itself, in a process of its own, where memory is short."""

import gc
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from sqlalchemy import Engine, insert, select
from torch import Tensor

from core import images, memory
from core.job import Subject
from core.spec import CollisionSpec
from store import blobs
from store.database import connect
from store.queue import ALONE
from store.settings import Settings
from store.tables import ApiKey, Job
from worker import station
from worker.runner import Runner

HEAVY: dict[str, Any] = {
    "model": "mnist-mlp",
    "layer": "fc1",
    "objective": "plain",
    "corners": 128,
    "optimizer": "adam",
    "l_pos_threshold": 1e-12,
    "max_steps": 30,
    "ball_samples": 0,
    "interpolation": {"samples": 0},
    "worst_starts": 0,
    "snapshots": 0,
    "figures": False,
}
OTHER = HEAVY | {"optimizer": "momentum"}
LIGHT = {"corners": 8}


class Scarce:
    """A device with so many bytes beside those of the tensors that are there now."""

    def __init__(self, total: int) -> None:
        self._total = total + _alive()

    def free(self, _: torch.device) -> int:
        return self._total - _alive()


def _alive() -> int:
    gc.collect()
    # No other thread may run while all objects are held here: a tuple that it is building must
    # have no other owner, or Python raises SystemError. Who waits already asks once more.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5)
    try:
        time.sleep(5 * interval)
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )
    finally:
        sys.setswitchinterval(interval)


def submit(engine: Engine, settings: dict[str, Any]) -> None:
    spec = CollisionSpec.model_validate(settings)
    pair = [images.read(f"sample:mnist/{name}")[1] for name in ("3-0", "7-1")]
    key_id = uuid4()
    with engine.begin() as connection:
        connection.execute(insert(ApiKey), {"id": key_id, "name": "n", "prefix": str(key_id)})
        connection.execute(*blobs.put([("image/png", image) for image in pair]))
        connection.execute(
            insert(Job),
            {
                "key_id": key_id,
                "labels": [],
                "spec": spec.model_dump(mode="json", exclude_defaults=True),
                "model": spec.model,
                "corners": spec.corners,
                "batch_key": spec.batch_key,
                "source_sha256": blobs.digest(pair[0]),
                "source_name": "3.png",
                "target_sha256": blobs.digest(pair[1]),
                "target_name": "7.png",
                "deadline_seconds": 60,
            },
        )


def ends(settings: Settings, rounds: list[list[dict[str, Any]]]) -> list[tuple[str, bool, Any]]:
    """Status, whether it ran alone, and error of all jobs; each round's come together.

    One of `HEAVY` takes nearly all the memory that there is.
    """
    torch.set_num_threads(1)
    engine, runner = connect(settings), Runner(settings, "slot")
    runner.start()
    for kind in (HEAVY, OTHER):  # opens what is opened once
        submit(engine, kind | LIGHT)
        runner.drain()
    spec = CollisionSpec.model_validate(HEAVY)
    footprint = Subject.open(spec, torch.device("cpu")).footprint
    footprint.checkpoints = True
    scarce = Scarce(int(1.1 * max(footprint.steps(spec), footprint.measuring(spec))))
    memory.free = station.free = scarce.free
    for each in rounds:
        for kind in each:
            submit(engine, kind)
        runner.drain()
    runner.close()
    with engine.begin() as connection:
        found = connection.execute(select(Job.status, Job.batch_key, Job.error).order_by(Job.seq))
        return [(status, key.startswith(ALONE), error) for status, key, error in found][2:]


@pytest.mark.parametrize(
    ("rounds", "alone"),
    [
        ([[HEAVY], [HEAVY], [OTHER]], [False, False, False]),
        ([[HEAVY, OTHER, HEAVY]], [False, True, True]),
    ],
    ids=["one after the other", "at once"],
)
def test_jobs_that_fit_one_at_a_time_all_succeed(
    rounds: list[list[dict[str, Any]]], alone: list[bool], database: str, tmp_path: Path
) -> None:
    settings = Settings(mode="local", database_url=database, checkpoint_dir=tmp_path)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(ends, (settings, rounds))
    assert found == [("succeeded", each, None) for each in alone]
