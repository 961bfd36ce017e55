"""The queue against a model of it: whatever happens in whatever order, on the real Postgres."""

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, Engine, insert, text
from sqlalchemy.ext.asyncio import create_async_engine

from store import blobs, jobs, queue, workers
from store.lifecycle import FINAL, LEASED, Event, Status, after
from store.queue import ALONE, SUSPECT_AFTER, Finished, Lease
from store.tables import ApiKey, Job

from .conftest import CORNER, PHOTOS, result

LEASE = timedelta(hours=1)
any_bool = st.booleans()
RESULT = result(CORNER, CORNER | {"index": 1})
MAX_CRASHES = 3
# The last one is of patches, and its set comes and goes.
KINDS = ("a", "b", "c")
PATCH_SETS = {"c": "photos"}


@dataclass
class Expected:
    """What the model knows of a job."""

    kind: str
    patch_set: str | None = None
    status: Status = Status.QUEUED
    crashes: int = 0
    attempt: int = 0
    token: UUID | None = None
    history: list[Status] = field(default_factory=lambda: [Status.QUEUED])

    def befall(self, event: Event) -> None:
        moved = after(event, self.status)
        if moved != self.status:
            self.history.append(moved)
        self.status = moved
        if moved not in LEASED:
            self.token = None


def submit(connection: Connection, key_id: UUID, kind: str, corners: int, priority: int) -> UUID:
    """A queued job, with the event that says so."""
    connection.execute(*blobs.put([("image/png", b"source"), ("image/png", b"target")]))
    job_id = uuid4()
    connection.execute(
        insert(Job),
        {
            "id": job_id,
            "key_id": key_id,
            "labels": [],
            "spec": {},
            "model": "mnist-mlp",
            "corners": corners,
            "priority": priority,
            "batch_key": kind,
            "patch_set": PATCH_SETS.get(kind),
            "source_sha256": blobs.digest(b"source"),
            "source_name": "s",
            "target_sha256": blobs.digest(b"target"),
            "target_name": "t",
            "deadline_seconds": 10,
        },
    )
    connection.execute(
        text("""INSERT INTO job_events (job_id, type, data)
                VALUES (:id, 'status', '{"status": "queued"}')"""),
        {"id": job_id},
    )
    return job_id


class Life(RuleBasedStateMachine):
    """Workers, owners and the reconciler, in any order; late writes of workers included."""

    engine: Engine

    leases = Bundle("leases")  # of any age: most are no longer live

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.owners = create_async_engine(self.engine.url)
        self.expected: dict[UUID, Expected] = {}
        self.keys = [uuid4(), uuid4()]
        with self.engine.begin() as connection:
            connection.execute(text("TRUNCATE jobs, api_keys, counters CASCADE"))
            rows = [{"id": key, "name": "n", "prefix": str(key)} for key in self.keys]
            connection.execute(insert(ApiKey), rows)

    def teardown(self) -> None:
        self.nothing_queued_is_forgotten()
        self.runner.run(self.owners.dispose())
        self.runner.close()

    @rule(
        key=st.integers(0, 1),
        kind=st.sampled_from(KINDS),
        corners=st.integers(1, 8),
        priority=st.integers(-1, 1),
        count=st.integers(1, 4),
    )
    def submit(self, key: int, kind: str, corners: int, priority: int, count: int) -> None:
        with self.engine.begin() as connection:
            for _ in range(count):
                job = submit(connection, self.keys[key], kind, corners, priority)
                self.expected[job] = Expected(kind, PATCH_SETS.get(kind))

    @rule(
        target=leases, rows=st.integers(0, 20), at_least_one=st.booleans(), jobs=st.integers(1, 4)
    )
    def claim(self, rows: int, at_least_one: bool, jobs: int) -> Lease | None:
        with self.engine.begin() as connection:
            waiting = queue.kinds(connection)
            queued = {j.kind for j in self.expected.values() if j.status == Status.QUEUED}
            assert {kind.batch_key for kind in waiting} == queued
            if not waiting:
                return None
            taken = queue.claim(
                connection,
                batch_key=waiting[0].batch_key,
                rows=rows,
                jobs=jobs,
                at_least_one=at_least_one,
                worker_id=uuid4(),
                lease=LEASE,
            )
        assert len(taken) <= jobs
        assert taken or not at_least_one
        for each in taken:
            job = self.expected[each.lease.job_id]
            assert job.status == Status.QUEUED
            job.befall(Event.CLAIM)
            job.attempt += 1
            job.token = each.lease.token
            assert each.attempt == job.attempt
        return taken[0].lease if taken else None

    def is_live(self, lease: Lease) -> bool:
        return self.expected[lease.job_id].token == lease.token

    @rule(lease=leases)
    def extend(self, lease: Lease | None) -> None:
        if lease:
            with self.engine.begin() as connection:
                status = queue.extend(connection, [lease], LEASE)
                queue.report_progress(connection, {lease: {"steps": 1}})
            live = self.is_live(lease)
            now = (self.expected[lease.job_id].status, False)
            assert status == ({lease.token: now} if live else {})

    @rule(lease=leases)
    def succeed(self, lease: Lease | None) -> None:
        if lease:
            live = self.is_live(lease)
            if live:
                self.expected[lease.job_id].befall(Event.SUCCEED)
            done = Finished(lease, RESULT, [b"0", b"1"], {"samples.npz": b"s"})
            with self.engine.begin() as connection:
                succeeded = queue.succeed(connection, [done])
            ended = live and self.expected[lease.job_id].status == Status.SUCCEEDED
            assert succeeded == ({lease.job_id} if ended else set())

    @rule(lease=leases)
    def fail(self, lease: Lease | None) -> None:
        if lease:
            live = self.is_live(lease)
            if live:
                self.expected[lease.job_id].befall(Event.FAIL)
            with self.engine.begin() as connection:
                assert queue.fail(connection, lease, "timeout", "It took too long.") == live

    @rule(lease=leases, alone=st.booleans())
    def release(self, lease: Lease | None, alone: bool) -> None:
        if lease:
            job = self.expected[lease.job_id]
            if self.is_live(lease):
                job.befall(Event.RELEASE)
                if alone and job.status == Status.QUEUED:
                    job.kind = f"{ALONE}{lease.job_id}"
            with self.engine.begin() as connection:
                queue.keep_checkpoint(connection, lease, b"state", 0, inline=True)
                queue.release(connection, [lease], "Handed back.", alone=alone)

    @rule(lease=consumes(leases))
    def expire(self, lease: Lease | None) -> None:
        """Time passes for one lease, then the reconciler turns."""
        if lease is None:
            return
        with self.engine.begin() as connection:
            connection.execute(
                text("UPDATE jobs SET lease_expires_at = '-infinity' WHERE lease_token = :token"),
                {"token": lease.token},
            )
            expired = queue.expire(connection, MAX_CRASHES, LEASE)
        assert expired == self.is_live(lease)
        if expired:
            job = self.expected[lease.job_id]
            job.crashes += 1
            job.befall(Event.GIVE_UP if job.crashes >= MAX_CRASHES else Event.LOSE)
            if job.crashes >= SUSPECT_AFTER and job.status == Status.QUEUED:
                job.kind = f"{ALONE}{lease.job_id}"

    @rule(alive=st.booleans(), has_it=st.booleans(), patient=st.booleans())
    def look_for_patch_sets(self, alive: bool, has_it: bool, patient: bool) -> None:
        """The reconciler turns twice, without a wait between or after the grace."""
        grace = timedelta(hours=1) if patient else timedelta()
        with self.engine.begin() as connection:
            connection.execute(text("TRUNCATE workers, patch_sets, unserved_kinds"))
            if alive:
                workers.register(connection, uuid4(), "slot", "cpu")
                workers.report_patch_sets(connection, "slot", [PHOTOS] if has_it else [])
        waiting = [
            job for job in self.expected.values() if job.patch_set and job.status == Status.QUEUED
        ]
        for ended in (0, len(waiting) if alive and not has_it and not patient else 0):
            with self.engine.begin() as connection:
                kinds = queue.kinds(connection)
                assert queue.strand(connection, kinds, grace) == ended
            for job in waiting[:ended]:
                job.befall(Event.STRAND)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.expected:
            return
        job_id = data.draw(st.sampled_from(list(self.expected)))
        before = self.expected[job_id].status
        self.expected[job_id].befall(Event.CANCEL)

        async def cancel() -> bool:
            changed = False
            for key in self.keys:  # another's key changes nothing
                async with self.owners.begin() as connection:
                    changed |= await jobs.cancel(connection, key_id=key, job_id=job_id)
            return changed

        assert self.runner.run(cancel()) == (self.expected[job_id].status != before)

    @invariant()
    def the_store_agrees(self) -> None:
        with self.engine.begin() as connection:
            rows = connection.execute(text("SELECT * FROM jobs")).all()
            told = connection.execute(
                text("""SELECT job_id, array_agg(data->>'status' ORDER BY id) AS history
                        FROM job_events WHERE type = 'status' GROUP BY job_id""")
            )
            histories = {row.job_id: row.history for row in told}
            corners = connection.execute(
                text("SELECT job_id, count(*) AS n FROM corners GROUP BY job_id")
            )
            counted = {row.job_id: row.n for row in corners}
        assert {row.id for row in rows} == self.expected.keys()
        for row in rows:
            job = self.expected[row.id]
            assert (row.status, row.crashes, row.attempt) == (job.status, job.crashes, job.attempt)
            assert row.lease_token == job.token
            assert row.batch_key == job.kind or job.status != Status.QUEUED
            assert histories[row.id] == job.history
            assert not FINAL.intersection(job.history[:-1])
            assert counted.get(row.id, 0) == (2 if job.status == Status.SUCCEEDED else 0)

    def nothing_queued_is_forgotten(self) -> None:
        queued = {job_id for job_id, job in self.expected.items() if job.status == Status.QUEUED}
        taken: set[UUID] = set()
        with self.engine.begin() as connection:
            while waiting := queue.kinds(connection):
                claimed = queue.claim(
                    connection,
                    batch_key=waiting[0].batch_key,
                    rows=1000,
                    jobs=100,
                    at_least_one=True,
                    worker_id=uuid4(),
                    lease=LEASE,
                )
                assert claimed
                taken |= {each.lease.job_id for each in claimed}
        assert taken == queued


def test_one_live_lease_a_job_final_stays_final_and_nothing_queued_is_forgotten(
    engine: Engine,
) -> None:
    machine = type("OnThisDatabase", (Life,), {"engine": engine})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
