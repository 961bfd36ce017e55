"""Processes are killed, stopped and lied to; every accepted job ends once, and well."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import redis as redis_client
from hanging import Moody
from safetensors.torch import save_file
from service import SMALL, WITHIN, Service, endless, pair
from sqlalchemy import text

from polycollide import stack
from store import blobs
from store.database import migrate
from store.settings import Settings


@pytest.fixture(autouse=True)
def workers_of_this_test_alone(whole: Service) -> Iterator[None]:
    yield
    whole.stop_workers()
    with whole.database.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


def test_kill_9_of_the_pools_child_loses_nothing(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(6))
    short = whole.submit_many(10)
    whole.running(long)
    time.sleep(1)
    whole.child_of(worker).kill()
    jobs = whole.all_succeed([long, *short])
    assert jobs[0]["attempt"] == 2


def test_kill_9_of_a_whole_worker_loses_nothing(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(4))
    whole.running(long)
    child = whole.child_of(worker)
    worker.kill()
    assert psutil.wait_procs([child], timeout=WITHIN)[0], "the child does not outlive its parent"
    whole.run_out(long)
    short = whole.submit_many(5)
    whole.start_worker()
    assert whole.all_succeed([long, *short])[0]["attempt"] == 2


def test_a_worker_told_to_end_hands_back_with_a_checkpoint(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(6))
    whole.running(long)
    whole.until(lambda: len(_progress(whole, long)) >= 4, WITHIN, "it has told of its steps")
    worker.stop()
    job = whole.job(long)
    assert job["status"] == "queued", job
    assert job["status_reason"] == "No worker is running."
    first = _progress(whole, long)
    whole.start_worker()
    job = whole.all_succeed([long])[0]
    assert job["attempt"] == 2
    second = _progress(whole, long)[len(first) :]
    assert second and min(second) >= max(first), "it went on where the first attempt stood"
    assert job["result"]["seconds"] >= 6, "max_seconds counts both attempts"


def _progress(service: Service, job_id: str) -> list[int]:
    """The steps that a job has told of, from all its attempts, in order."""
    told = """
        SELECT (data->>'steps')::int FROM job_events
        WHERE job_id = :id AND type = 'progress' ORDER BY id
    """
    with service.database.begin() as connection:
        return list(connection.scalars(text(told), {"id": job_id}))


DRAWN = SMALL | {"figures": True, "snapshots": 4}


def artist_of(service: Service, worker: stack.Process) -> psutil.Process:
    """The process that draws the pictures, once there is one."""
    found: list[psutil.Process] = []

    def drawing() -> bool:
        found[:] = [
            process
            for process in service.child_of(worker).children()
            if "worker.artist" in process.cmdline()
        ]
        return bool(found)

    service.until(drawing, WITHIN, "it draws")
    return found[0]


def test_kill_9_of_the_artist_costs_no_picture_and_it_outlives_no_worker(whole: Service) -> None:
    worker = whole.start_worker()
    jobs = [whole.submit(DRAWN, i) for i in range(4)]
    artist_of(whole, worker).kill()
    for job in whole.all_succeed(jobs):
        assert job["attempt"] == 1
        for picture in ("figure_png", "snapshots_png"):
            assert whole.client.get(job["urls"][picture]).content.startswith(b"\x89PNG")
    second = artist_of(whole, worker)
    whole.child_of(worker).kill()
    with suppress(psutil.NoSuchProcess):  # nobody may have collected it yet
        whole.until(lambda: second.status() == psutil.STATUS_ZOMBIE, WITHIN, "it ends, too")


def test_a_worker_told_to_end_leaves_the_pictures_to_the_next(whole: Service) -> None:
    worker = whole.start_worker()
    jobs = [whole.submit(DRAWN, i) for i in range(8)]
    artist_of(whole, worker)
    worker.stop()
    attempts = [whole.job(job)["status"] for job in jobs]
    assert "queued" in attempts
    assert "running" not in attempts
    whole.start_worker()
    for job in whole.all_succeed(jobs):
        assert whole.client.get(job["urls"]["figure_png"]).content.startswith(b"\x89PNG")


def test_kill_9_of_the_api_between_commit_and_doorbell(whole: Service, redis: stack.Redis) -> None:
    whole.start_worker()
    whole.reconciler.kill()
    broker = psutil.Process(redis.process.pid)
    broker.suspend()  # the bell hangs, the commit does not
    try:
        job = whole.submit(SMALL)
        whole.api.kill()
    finally:
        broker.resume()

    def ended() -> bool:
        with whole.database.begin() as connection:
            status = text("SELECT status FROM jobs WHERE id = :id")
            return connection.scalar(status, {"id": job}) == "succeeded"

    whole.until(ended, WITHIN, "the worker looks at the table itself, with nobody to ring")
    whole.start_reconciler()
    whole.start_api()
    whole.all_succeed([job])


def test_kill_9_of_the_reconciler_and_two_at_once(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(3))
    whole.running(long)
    whole.reconciler.kill()
    child = whole.child_of(worker)
    worker.kill()
    psutil.wait_procs([child], timeout=WITHIN)
    whole.start_reconciler()
    second = whole.start_reconciler()
    whole.run_out(long)
    whole.start_worker()
    assert whole.all_succeed([long])[0]["attempt"] == 2
    second.kill()
    whole.start_reconciler()


def test_a_reconciler_shows_its_pulse_where_it_is_told_to_and_lives_where_it_cannot(
    whole: Service, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    shown, hidden = tmp_path / "pulse", tmp_path / "file" / "pulse"
    first, second = (
        whole.start("reconciler", "worker.reconciler", POLYCOLLIDE_PULSE_FILE=str(path))
        for path in (shown, hidden)
    )
    for _ in range(2):  # it beats more than once
        whole.until(shown.exists, WITHIN, "it beats")
        shown.unlink()
    assert first.alive
    assert second.alive
    for reconciler in (first, second):
        reconciler.kill()


def test_a_worker_that_stood_still_past_its_lease_changes_nothing_afterwards(
    whole: Service,
) -> None:
    worker = whole.start_worker()
    job = whole.submit(endless(5))
    whole.running(job)
    sleepers = [whole.child_of(worker), psutil.Process(worker.pid)]
    for process in sleepers:
        process.suspend()
    whole.run_out(job)
    whole.start_worker()
    whole.until(lambda: whole.job(job)["attempt"] == 2, WITHIN, "another takes it")
    for process in sleepers:
        process.resume()
    assert whole.all_succeed([job])[0]["attempt"] == 2
    time.sleep(2)  # for late writes
    whole.check()
    assert whole.job(job)["attempt"] == 2


def test_the_only_worker_may_stand_still_past_its_lease_and_take_its_job_again(
    whole: Service,
) -> None:
    worker = whole.start_worker()
    jobs = [whole.submit(endless(4), i) for i in range(2)]
    whole.running(jobs[1])
    sleeper = whole.child_of(worker)
    sleeper.suspend()
    whole.run_out(*jobs)
    assert {whole.job(job)["status"] for job in jobs} == {"queued"}
    sleeper.resume()
    ended = whole.all_succeed(jobs)
    assert {job["attempt"] for job in ended} == {2}
    assert all(job["result"]["seconds"] >= 4 for job in ended)


def test_a_checkpoint_that_cannot_be_read_costs_only_its_steps(whole: Service) -> None:
    jobs = whole.submit_many(3)
    with whole.database.begin() as connection:
        connection.execute(*blobs.put([(blobs.SAFETENSORS, b"no tensors")]))
        for job, sha256 in zip(jobs, [blobs.digest(b"no tensors"), "0" * 64], strict=False):
            connection.execute(
                text("UPDATE jobs SET checkpoint_sha256 = :sha256 WHERE id = :id"),
                {"sha256": sha256, "id": job},
            )
    whole.start_worker()
    assert {job["attempt"] for job in whole.all_succeed(jobs)} == {1}


@pytest.fixture
def mood(tmp_path: Path) -> Path:
    """A file that sets the mood of the model `moody`, for workers that get `env_of` it."""
    save_file(Moody().state_dict(), tmp_path / "moody.safetensors")
    (tmp_path / "models.toml").write_text(f"""
        [[models]]
        name = "moody"
        factory = "hanging:Moody"
        weights = "moody.safetensors"
        sha256 = "{blobs.digest((tmp_path / "moody.safetensors").read_bytes())}"
        classes = {json.dumps([str(i) for i in range(10)])}
        [models.preprocessing]
        crop = 28
        channels = "L"
    """)
    return tmp_path / "mood"


def env_of(mood: Path) -> dict[str, str]:
    return {
        "MOOD": str(mood),
        "POLYCOLLIDE_MODELS": str(mood.parent / "models.toml"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }


def test_a_step_that_hangs_is_ended_and_its_job_tried_again(mood: Path, whole: Service) -> None:
    mood.write_text("hang")
    whole.start_worker(**env_of(mood))
    job = whole.submit(SMALL | {"model": "moody", "max_steps": 50})
    whole.until(lambda: "no step for too long" in whole.log(), WITHIN, "the watchdog bites")
    mood.unlink()
    assert whole.all_succeed([job])[0]["attempt"] >= 2


def test_a_job_that_always_hangs_fails_alone(mood: Path, whole: Service) -> None:
    whole.start_worker(**env_of(mood))
    mood.write_text("hang")
    poison = whole.submit(SMALL | {"model": "moody"})
    whole.running(poison)
    good = whole.submit_many(5)
    job = whole.ended(poison)
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_lost")
    assert job["attempt"] == 3
    all_ended = [whole.ended(job_id) for job_id in good]
    assert {job["status"] for job in all_ended} == {"succeeded"}
    whole.check()


def test_a_poisoned_accelerator_ends_its_worker_and_fails_no_job(
    mood: Path, whole: Service
) -> None:
    worker = whole.start_worker(**env_of(mood))
    first = whole.child_of(worker)
    mood.write_text("poisoned")
    job = whole.submit(SMALL | {"model": "moody", "max_steps": 50})
    whole.until(lambda: "the accelerator is lost" in whole.log(), WITHIN, "it notices")
    mood.unlink()
    good = whole.submit_many(3)
    ended = whole.all_succeed([job, *good])
    assert ended[0]["attempt"] >= 2
    assert not first.is_running(), "another process took its place"
    assert worker.alive, "its parent has started it"


def test_a_network_that_cannot_be_loaded_is_left_to_a_worker_that_can(
    mood: Path, whole: Service
) -> None:
    weights = mood.parent / "moody.safetensors"
    whole_file = weights.read_bytes()
    weights.write_bytes(b"damaged")
    whole.start_worker(**env_of(mood))
    job = whole.submit(SMALL | {"model": "moody", "max_steps": 50})
    whole.until(lambda: (whole.job(job)["status_reason"] or "").find("sha256") > 0, WITHIN, "why")
    assert whole.job(job)["status"] == "queued"
    weights.write_bytes(whole_file)
    whole.start_worker(**env_of(mood))
    assert whole.all_succeed([job])[0]["attempt"] >= 2


def test_settings_that_cannot_be_read_wait_and_keep_no_other_job_waiting(whole: Service) -> None:
    newer, unread = whole.submit(SMALL, 1, priority=9), whole.submit(SMALL, 2, priority=9)
    with whole.database.begin() as connection:
        change = "UPDATE jobs SET {} WHERE id = :id"
        connection.execute(text(change.format("schema_version = 99")), {"id": newer})
        stored = "(SELECT spec FROM specs WHERE sha256 = spec_sha256)"
        field = f"spec = {stored} || '{{\"of_tomorrow\": 1}}', spec_sha256 = NULL"
        connection.execute(text(change.format(field)), {"id": unread})
    whole.start_worker()
    others = [whole.ended(job) for job in whole.submit_many(3)]
    assert {job["status"] for job in others} == {"succeeded"}
    asked = {job: whole.job(job) for job in (newer, unread)}
    assert {job["status"] for job in asked.values()} == {"queued"}
    assert (asked[newer]["attempt"], asked[unread]["attempt"]) == (0, 1)
    assert "newer" in asked[newer]["status_reason"] and "newer" in asked[unread]["status_reason"]
    for job in asked:
        whole.client.post(f"/v1/jobs/{job}/cancel")


def test_out_of_memory_halves_the_rows_and_every_job_goes_on(mood: Path, whole: Service) -> None:
    hungry = endless(5) | {"model": "moody", "corners": 4}
    whole.start_worker(**env_of(mood))
    jobs = [whole.submit(hungry)]
    whole.running(jobs[0])
    time.sleep(1)
    mood.write_text("hungry")  # no more than 8 rows from now on
    jobs += [whole.submit(hungry, i) for i in range(5)]
    too_large = whole.submit(hungry | {"corners": 9})
    for job_id in jobs:
        assert whole.ended(job_id)["status"] == "succeeded"
    assert whole.ended(too_large)["error"]["code"] == "out_of_memory"
    assert "half of the jobs wait" in whole.log()


@pytest.fixture
def own_redis(new_data_directory: Callable[[], Path]) -> Iterator[stack.Redis]:
    with stack.Redis.start(new_data_directory(), durable=False) as server:
        yield server


def test_redis_may_stop_restart_and_forget(
    new_database: Callable[[], str], own_redis: stack.Redis, tmp_path: Path
) -> None:
    service = Service(new_database(), own_redis.url, tmp_path, reconcile_every="PT0.5S")
    try:
        service.start_api()
        service.start_reconciler()
        service.start_worker()
        service.all_succeed(service.submit_many(2))
        own_redis.stop()
        job = service.submit(SMALL)
        assert service.client.get("/readyz").json()["status"] == "degraded"
        own_redis.restart()
        service.all_succeed([job])
        long = service.submit(endless(3))
        service.running(long)
        waiting = service.submit_many(5)
        redis_client.Redis.from_url(own_redis.url).flushall()
        service.all_succeed([long, *waiting])
        own_redis.restart()
        service.all_succeed(service.submit_many(3))
    finally:
        service.stop()


def test_redis_may_become_read_only(
    new_database: Callable[[], str], own_redis: stack.Redis, tmp_path: Path
) -> None:
    """As a failover leaves it: everything may be read, and nobody can ring or wait for a bell."""
    service = Service(new_database(), own_redis.url, tmp_path, reconcile_every="PT0.5S")
    broker = redis_client.Redis.from_url(own_redis.url)
    try:
        service.start_api()
        service.start_reconciler()
        worker = service.start_worker()
        child = service.child_of(worker)
        service.all_succeed(service.submit_many(2))
        broker.replicaof("127.0.0.1", "1")
        jobs = service.submit_many(3)  # each is answered 202
        service.all_succeed(jobs)
        service.until(
            lambda: "read only replica" in service.log(), WITHIN, "the worker hears of it"
        )
        assert service.client.get("/readyz").json()["status"] == "degraded"
        service.all_succeed(service.submit_many(3))
        assert worker.alive and child.is_running(), service.log()[-3000:]
        broker.replicaof("NO", "ONE")
        # Bells are heard again: somebody waits for them.
        service.until(lambda: broker.info("clients")["blocked_clients"] > 0, WITHIN, "it listens")
        service.all_succeed(service.submit_many(3))
        assert worker.alive and child.is_running()
        for line in service.log().splitlines():
            json.loads(line)
    finally:
        service.stop()


def test_postgres_may_restart_while_jobs_run(
    template_database: str,
    new_data_directory: Callable[[], Path],
    redis: stack.Redis,
    tmp_path: Path,
) -> None:
    with stack.Postgres.start(new_data_directory(), durable=True) as server:
        migrate(Settings(mode="local", database_url=server.url))
        service = Service(
            server.url,
            redis.url,
            tmp_path,
            reconcile_every="PT0.5S",
            lease="PT8S",
            fresh_for="PT8S",
        )
        try:
            service.start_api()
            service.start_reconciler()
            service.start_worker()
            long = service.submit(endless(6))
            service.running(long)
            short = service.submit_many(10)
            server.restart()
            service.until(lambda: _is_ready(service), WITHIN, "the API finds it again")
            service.all_succeed([long, *short, *service.submit_many(3)])
        finally:
            service.stop()


def _is_ready(service: Service) -> bool:
    try:
        return service.client.get("/readyz").is_success
    except httpx.TransportError:
        return False


def test_two_workers_and_two_reconcilers_share_a_queue(whole: Service) -> None:
    whole.start_reconciler()
    for _ in range(2):
        # A few at a time, so that neither has them all before the other looks.
        whole.start_worker(POLYCOLLIDE_JOBS_AT_ONCE="4")
    items = [{**pair(i % 90), "spec": SMALL | {"seed": i}} for i in range(200)]
    answer = whole.client.post("/v1/batches", json={"items": items})
    assert answer.status_code == 202, answer.text
    batch = answer.json()

    def ended() -> bool:
        batch.update(whole.client.get(batch["urls"]["self"], params={"wait": 30}).json())
        return bool(batch["status"] == "completed")

    whole.until(ended, WITHIN, "the batch ends")
    assert batch["request_counts"]["succeeded"] == 200, batch["request_counts"]
    whole.check()
    distinct = "SELECT DISTINCT {} FROM jobs WHERE batch_id = :id"
    with whole.database.begin() as connection:
        workers = connection.scalars(text(distinct.format("worker_id")), {"id": batch["id"]})
        attempts = connection.scalars(text(distinct.format("attempt")), {"id": batch["id"]})
        assert len(workers.all()) == 2
        assert attempts.all() == [1]


def test_a_workers_clock_may_be_wrong(whole: Service, tmp_path: Path) -> None:
    folder = tmp_path / "skewed"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import datetime, time\n"
        "real, kind = time.time, datetime.datetime\n"
        "time.time = lambda: real() + 86400\n"
        "class Later(kind):\n"
        "    @classmethod\n"
        "    def now(cls, tz=None): return kind.now(tz) + datetime.timedelta(days=1)\n"
        "    @classmethod\n"
        "    def utcnow(cls): return kind.utcnow() + datetime.timedelta(days=1)\n"
        "datetime.datetime = Later\n"
    )
    whole.start_worker(PYTHONPATH=str(folder))
    long = whole.submit(endless(5))
    jobs = whole.all_succeed([long, *whole.submit_many(3)])
    assert {job["attempt"] for job in jobs} == {1}
