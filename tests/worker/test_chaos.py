"""Processes are killed, stopped and lied to; every accepted job ends once, and well."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import httpx
import psutil
import pytest
import redis as redis_client
from safetensors.torch import save_file
from service import SMALL, Service, endless, pair
from sqlalchemy import text

from polycollide import stack
from store.settings import DRAIN_TASK


@pytest.fixture
def whole(service: Service) -> Service:
    """API, reconciler; workers are the test's."""
    service.start_api()
    service.start_reconciler()
    return service


def many(service: Service, count: int) -> list[str]:
    return [service.submit(SMALL, i) for i in range(count)]


def all_succeed(service: Service, ids: list[str], within: float = 60) -> list[dict]:
    ended = [service.ended(job_id, within) for job_id in ids]
    assert {job["status"] for job in ended} == {"succeeded"}, service.log()[-5000:]
    service.check()
    return ended


def test_kill_9_of_the_pools_child_loses_nothing(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(6))
    short = many(whole, 10)
    whole.running(long)
    time.sleep(1)
    whole.child_of(worker).kill()
    jobs = all_succeed(whole, [long, *short])
    assert jobs[0]["attempt"] == 2


def test_kill_9_of_a_whole_worker_loses_nothing(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(4))
    whole.running(long)
    child = whole.child_of(worker)
    worker.kill()
    assert psutil.wait_procs([child], timeout=10)[0], "the child does not outlive its parent"
    short = many(whole, 5)
    whole.start_worker()
    assert all_succeed(whole, [long, *short])[0]["attempt"] == 2


def test_a_worker_told_to_end_hands_back_with_a_checkpoint(whole: Service) -> None:
    worker = whole.start_worker()
    long = whole.submit(endless(6))
    whole.running(long)
    whole.until(lambda: (whole.job(long)["progress"] or {}).get("steps", 0) > 0, 20, "it steps")
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10
    job = whole.job(long)
    assert job["status"] == "queued", job
    assert "Handed back" in job["status_reason"]
    assert whole.slots() == []
    whole.start_worker()
    job = all_succeed(whole, [long])[0]
    # max_seconds counts both attempts, so the second one went on where the first one stood.
    assert job["attempt"] == 2
    assert 6 <= job["result"]["seconds"] < 7
    assert "It goes on" not in (job["status_reason"] or "")


def test_kill_9_of_the_api_between_commit_and_doorbell(
    service: Service, redis: stack.Redis
) -> None:
    api = service.start_api()
    service.start_worker()
    broker = psutil.Process(redis.process.pid)
    broker.suspend()  # the bell hangs, the commit does not
    try:
        job = service.submit(SMALL)
        api.kill()
    finally:
        broker.resume()
    time.sleep(1)
    with service.database.begin() as connection:
        assert connection.scalar(text("SELECT status FROM jobs")) == "queued"
    service.start_reconciler()
    service.start_api()
    all_succeed(service, [job])


def test_kill_9_of_the_reconciler_and_two_at_once(service: Service) -> None:
    service.start_api()
    first = service.start_reconciler()
    worker = service.start_worker()
    long = service.submit(endless(3))
    service.running(long)
    first.kill()
    worker.kill()
    service.start_reconciler()
    service.start_reconciler()
    service.start_worker()
    assert all_succeed(service, [long])[0]["attempt"] == 2


def test_a_worker_that_stood_still_past_its_lease_changes_nothing_afterwards(
    whole: Service,
) -> None:
    worker = whole.start_worker()
    job = whole.submit(endless(5))
    whole.running(job)
    sleepers = [whole.child_of(worker), psutil.Process(worker.pid)]
    for process in sleepers:
        process.suspend()
    whole.start_worker()
    whole.until(lambda: whole.job(job)["attempt"] == 2, 30, "another takes it")
    for process in sleepers:
        process.resume()
    assert all_succeed(whole, [job])[0]["attempt"] == 2
    time.sleep(2)  # for late writes
    whole.check()
    assert whole.job(job)["attempt"] == 2


@pytest.fixture
def moody(tmp_path: Path, service: Service) -> Path:
    """A file that sets the mood of the model `moody`."""
    from hanging import Moody

    folder = Path(__file__).parent
    save_file(Moody().state_dict(), tmp_path / "moody.safetensors")
    (tmp_path / "models.toml").write_text(f"""
        [[models]]
        name = "moody"
        factory = "hanging:Moody"
        weights = "moody.safetensors"
        classes = {json.dumps([str(i) for i in range(10)])}
        [models.preprocessing]
        crop = 28
        channels = "L"
    """)
    mood = tmp_path / "mood"
    service.env |= {
        "MOOD": str(mood),
        "POLYCOLLIDE_MODELS": str(tmp_path / "models.toml"),
        "PYTHONPATH": str(folder),
    }
    return mood


def test_a_step_that_hangs_is_ended_and_its_job_tried_again(moody: Path, whole: Service) -> None:
    moody.write_text("hang")
    whole.start_worker(POLYCOLLIDE_STALL_AFTER="PT3S")
    job = whole.submit(SMALL | {"model": "moody", "max_steps": 50})
    whole.until(lambda: "no step for too long" in whole.log(), 40, "the watchdog bites")
    moody.unlink()
    assert all_succeed(whole, [job])[0]["attempt"] >= 2


def test_a_job_that_always_hangs_fails_alone(moody: Path, whole: Service) -> None:
    whole.start_worker(POLYCOLLIDE_STALL_AFTER="PT2S")
    moody.write_text("hang")
    poison = whole.submit(SMALL | {"model": "moody"})
    whole.running(poison)
    good = many(whole, 5)
    job = whole.ended(poison, 90)
    assert (job["status"], job["error"]["code"]) == ("failed", "worker_lost")
    assert job["attempt"] == 3
    all_ended = [whole.ended(job_id) for job_id in good]
    assert {job["status"] for job in all_ended} == {"succeeded"}
    whole.check()


def test_out_of_memory_halves_the_rows_and_every_job_goes_on(moody: Path, whole: Service) -> None:
    hungry = SMALL | {"model": "moody", "max_steps": 2000, "l_pos_threshold": 1e-12}
    moody.write_text("hang")  # until all of them wait
    jobs = [whole.submit(hungry | {"corners": 4}, i) for i in range(6)]
    too_large = whole.submit(hungry | {"corners": 9})
    moody.write_text("hungry")
    whole.start_worker()
    all_ended = [whole.ended(job_id) for job_id in jobs]
    assert {job["status"] for job in all_ended} == {"succeeded"}
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
        all_succeed(service, many(service, 2))
        own_redis.stop()
        job = service.submit(SMALL)
        assert service.client.get("/readyz").json()["status"] == "degraded"
        own_redis.restart()
        all_succeed(service, [job])
        long = service.submit(endless(3))
        service.running(long)
        waiting = many(service, 5)
        redis_client.Redis.from_url(own_redis.url).flushall()
        all_succeed(service, [long, *waiting])
        own_redis.restart()
        all_succeed(service, many(service, 3))
    finally:
        service.stop()


def test_postgres_may_restart_while_jobs_run(
    template_database: str,
    new_data_directory: Callable[[], Path],
    redis: stack.Redis,
    tmp_path: Path,
) -> None:
    from store.database import migrate
    from store.settings import Settings

    with stack.Postgres.start(new_data_directory(), durable=True) as server:
        migrate(Settings(mode="local", database_url=server.url))
        service = Service(server.url, redis.url, tmp_path, reconcile_every="PT0.5S", lease="PT8S")
        try:
            service.start_api()
            service.start_reconciler()
            service.start_worker()
            long = service.submit(endless(6))
            service.running(long)
            short = many(service, 10)
            server.restart()
            service.until(lambda: _is_ready(service), 30, "the API finds it again")
            all_succeed(service, [long, *short, *many(service, 3)])
        finally:
            service.stop()


def _is_ready(service: Service) -> bool:
    try:
        return service.client.get("/readyz").is_success
    except httpx.TransportError:
        return False


def test_a_hundred_bells_change_nothing(whole: Service, redis: stack.Redis) -> None:
    from celery import Celery

    whole.start_worker()
    whole.start_worker()
    app = Celery(broker=redis.url)
    app.conf.task_default_queue = "polycollide"
    jobs = many(whole, 4)
    for _ in range(100):
        app.send_task(DRAIN_TASK, ignore_result=True)
    app.close()
    assert {job["attempt"] for job in all_succeed(whole, jobs)} == {1}


def test_two_workers_and_two_reconcilers_share_a_queue(whole: Service) -> None:
    whole.start_reconciler()
    items = [{**pair(i % 90), "spec": SMALL | {"seed": i}} for i in range(200)]
    answer = whole.client.post("/v1/batches", json={"items": items})
    assert answer.status_code == 202, answer.text
    whole.start_worker(ready=False)
    whole.start_worker(ready=False)
    batch = whole.client.get(answer.json()["urls"]["self"], params={"wait": 60}).json()
    assert batch["request_counts"]["succeeded"] == 200, batch["request_counts"]
    whole.check()
    with whole.database.begin() as connection:
        workers = connection.scalars(text("SELECT DISTINCT worker_id FROM jobs")).all()
        attempts = connection.scalars(text("SELECT DISTINCT attempt FROM jobs")).all()
    assert len(workers) == 2
    assert attempts == [1]


def test_cancel_races_finish(whole: Service) -> None:
    whole.start_worker()
    random = Random(0)
    jobs = many(whole, 30)
    for job_id in random.sample(jobs, len(jobs)):
        time.sleep(random.random() / 50)
        assert whole.client.post(f"/v1/jobs/{job_id}/cancel").status_code in (200, 202)
    ended = [whole.ended(job_id) for job_id in jobs]
    assert {job["status"] for job in ended} <= {"succeeded", "canceled"}
    whole.check()


def test_cancel_takes_effect_within_two_seconds(whole: Service) -> None:
    whole.start_worker()
    job = whole.submit(endless(60))
    whole.running(job)
    time.sleep(1)
    began = time.monotonic()
    whole.client.post(f"/v1/jobs/{job}/cancel")
    assert whole.ended(job)["status"] == "canceled"
    assert time.monotonic() - began < 2
    whole.check()


def test_a_deadline_ends_a_job_with_a_reason(whole: Service) -> None:
    whole.start_worker()
    job = whole.ended(whole.submit(endless(60), deadline_seconds=2))
    assert (job["status"], job["error"]["code"]) == ("failed", "timeout")


def test_refused_blob_writes_are_tried_again(whole: Service) -> None:
    whole.start_worker()
    jobs = many(whole, 3)
    with whole.database.begin() as connection:
        connection.execute(
            text("""
                CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = '53100'; END $$
            """)
        )
        connection.execute(
            text("""
                CREATE TRIGGER refuse BEFORE INSERT ON artifacts
                FOR EACH ROW EXECUTE FUNCTION refuse()
            """)
        )
    later = whole.submit(SMALL, 50)
    whole.running(later)
    time.sleep(5)  # past the lease, which is renewed meanwhile
    assert whole.job(later)["status"] == "running"
    with whole.database.begin() as connection:
        connection.execute(text("DROP TRIGGER refuse ON artifacts"))
    assert {job["attempt"] for job in all_succeed(whole, [*jobs, later])} == {1}


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
    jobs = all_succeed(whole, [long, *many(whole, 3)])
    assert {job["attempt"] for job in jobs} == {1}


def test_jobs_of_all_keys_and_kinds_get_their_turn(whole: Service) -> None:
    """A stream of one kind does not keep a job of another waiting for its end."""
    whole.start_worker()
    stream = [{**pair(i % 90), "spec": SMALL | {"seed": i}} for i in range(300)]
    batch = whole.client.post("/v1/batches", json={"items": stream}).json()
    other = whole.submit(SMALL | {"optimizer": "gd", "learning_rate": 1e-3, "max_steps": 100})
    whole.ended(other)
    counts = whole.client.get(batch["urls"]["self"]).json()["request_counts"]
    assert counts["queued"] + counts["running"] > 0
