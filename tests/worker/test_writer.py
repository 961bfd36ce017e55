"""Checkpoints on a worker's volume: kept while a job may go on from them, and no longer."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from sqlalchemy import Engine, insert

from store import blobs, queue
from store.database import connect
from store.queue import Claimed
from store.settings import Settings
from store.tables import ApiKey, Job
from worker import writer
from worker.heartbeat import Heartbeat
from worker.timing import Stages
from worker.writer import Writer


@pytest.fixture
def settings(database: str, tmp_path: Path) -> Settings:
    return Settings(mode="local", database_url=database, checkpoint_dir=tmp_path)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    own = connect(settings)
    yield own
    own.dispose()


@pytest.fixture
def claimed(engine: Engine, settings: Settings) -> Claimed:
    """A job that a worker holds."""
    key_id = uuid4()
    with engine.begin() as connection:
        connection.execute(insert(ApiKey), {"id": key_id, "name": "n", "prefix": "p"})
        connection.execute(*blobs.put([("image/png", b"s"), ("image/png", b"t")]))
        connection.execute(
            insert(Job),
            {
                "key_id": key_id,
                "labels": [],
                "spec": {},
                "model": "m",
                "corners": 5,
                "batch_key": "kind",
                "source_sha256": blobs.digest(b"s"),
                "source_name": "s",
                "target_sha256": blobs.digest(b"t"),
                "target_name": "t",
                "deadline_seconds": 9,
            },
        )
    return claim(engine, settings)


def claim(engine: Engine, settings: Settings) -> Claimed:
    with engine.begin() as connection:
        (taken,) = queue.claim(
            connection,
            batch_key="kind",
            rows=9,
            jobs=1,
            at_least_one=True,
            worker_id=uuid4(),
            lease=settings.lease,
        )
    return taken


@pytest.mark.parametrize("large", [True, False])
def test_a_checkpoint_stays_while_its_job_may_go_on_from_it(
    large: bool,
    engine: Engine,
    settings: Settings,
    claimed: Claimed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "INLINE", 0 if large else 2**20)
    beat = Heartbeat(engine, settings, uuid4(), "slot", "cpu")
    own = Writer(engine, settings, beat, Stages())
    own.start()

    def kept() -> set[str]:
        with engine.begin() as connection:
            named = queue.checkpoints(connection)
            inline = set(queue.read_blobs(connection, hashes))
        files = {path.stem for path in tmp_path.glob("*")}
        assert (files, inline) == ((named, set()) if large else (set(), named))
        return named

    states = [{"x": torch.full((10,), float(i))} for i in range(2)]
    hashes = [blobs.digest(writer.save(state)) for state in states]
    for state, sha256 in zip(states, hashes, strict=True):
        own.checkpoint(claimed.lease, state, 10)
        own.join_all()
        assert kept() == {sha256}  # a new one replaces the last
    own.release(claimed.lease, "Handed back.")
    own.join_all()
    assert kept() == {hashes[1]}
    again = claim(engine, settings)
    assert again.checkpoint_sha256 == hashes[1]
    own.checkpoint(again.lease, states[0], 20)
    own.fail(again.lease, "timeout", "It took too long.")
    own.join_all()
    with engine.begin() as connection:
        assert queue.checkpoints(connection) == set()
        # Who brought the last one is gone: registration and retention look after that.
        assert hashes[0] not in queue.read_blobs(connection, hashes)
    assert not (tmp_path / f"{hashes[0]}.safetensors").exists()
