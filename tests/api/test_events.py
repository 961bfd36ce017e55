"""A job's events as a stream: replayed, live, and ended."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import text

from store.settings import Settings

from .conftest import JOB, Service, Worker, png, serve


def watched(client: httpx.Client, job: dict[str, Any], after: int = 0) -> Iterator[dict[str, Any]]:
    headers = {"Last-Event-ID": str(after)} if after else {}
    with client.stream("GET", job["urls"]["events"], headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in response.iter_lines():
            if not line and event:
                yield event
                event = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                event[name] = json.loads(value) if name == "data" else value


def test_a_stream_tells_what_was_what_comes_and_ends_with_the_job(
    client: httpx.Client, worker: Worker
) -> None:
    job = client.post("/v1/jobs", json=JOB).json()
    claimed = worker.claim(job)

    def run() -> None:
        time.sleep(0.3)
        worker.progress(claimed, steps=10, rows_left=2)
        worker.snapshot(claimed, 10, png())
        worker.succeed(claimed)

    thread = threading.Thread(target=run)
    thread.start()
    began = time.monotonic()
    events = list(watched(client, job))
    thread.join()
    assert time.monotonic() - began < 9, "who hears no notice looks after 10 s"
    assert [event["event"] for event in events] == [
        *("status", "status", "progress", "snapshot", "status")
    ]
    assert events[0]["data"] == {"status": "queued", "status_reason": None, "attempt": 0}
    assert events[1]["data"]["status"] == "running" and events[1]["data"]["attempt"] == 1
    assert events[2]["data"] == {"steps": 10, "rows_left": 2}
    assert events[3]["data"] == {"steps": 10}
    assert events[4]["data"]["status"] == "succeeded"
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(ids)
    assert list(watched(client, job)) == events
    assert list(watched(client, job, after=ids[2])) == events[3:]
    assert list(watched(client, job, after=ids[4])) == []
    snapshot = client.get(f"{job['urls']['self']}/snapshots/10.png")
    assert snapshot.status_code == 200 and snapshot.content == png()


def test_many_events_are_all_told_in_order(client: httpx.Client, worker: Worker) -> None:
    job = client.post("/v1/jobs", json=JOB).json()
    claimed = worker.claim(job)
    for steps in range(250):
        worker.progress(claimed, steps=steps)
    worker.succeed(claimed)
    told = [event["data"] for event in watched(client, job) if event["event"] == "progress"]
    assert told == [{"steps": steps} for steps in range(250)]


def test_a_job_without_events_left_ends_the_stream(client: httpx.Client, service: Service) -> None:
    job = client.post("/v1/jobs", json=JOB).json()
    client.post(job["urls"]["cancel"])
    with service.engine.begin() as connection:
        forget = text("DELETE FROM job_events WHERE job_id = :id")
        connection.execute(forget, {"id": job["id"]})
    assert list(watched(client, job)) == []


def test_unknown_jobs_and_bad_places_are_problems(client: httpx.Client) -> None:
    response = client.get(f"/v1/jobs/{uuid4()}/events")
    assert response.status_code == 404 and response.json()["code"] == "unknown_job"
    job = client.post("/v1/jobs", json=JOB).json()
    for bad in ("x", "-1", str(2**63)):
        response = client.get(job["urls"]["events"], headers={"Last-Event-ID": bad})
        assert response.status_code == 422


def test_watchers_who_leave_or_stay_hold_nothing(
    new_settings: Callable[..., Settings],
) -> None:
    settings = new_settings(watch_for=timedelta(minutes=5))
    with serve(settings) as service, service.client() as client:
        job = client.post("/v1/jobs", json=JOB).json()
        for _ in range(40):
            with client.stream("GET", job["urls"]["events"]) as response:
                assert response.status_code == 200
        threads = [
            threading.Thread(target=lambda: list(watched(client, job)), daemon=True)
            for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)
        assert client.get("/v1/jobs", params={"limit": 1}).status_code == 200
        assert all(thread.is_alive() for thread in threads), "they watch on"
        client.post(job["urls"]["cancel"])
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)
