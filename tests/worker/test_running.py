"""A worker that nobody harms: results, cancellations, deadlines, turns, refusals."""

import io
import time
from datetime import datetime
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from celery import Celery
from service import MNIST, SMALL, WITHIN, Service, endless, pair
from sqlalchemy import text

from core import images
from core.job import Subject
from core.outcome import run_alone
from core.spec import CollisionSpec
from polycollide import stack
from store.settings import DRAIN_TASK


@pytest.fixture(scope="module")
def service(whole: Service) -> Service:
    """With one worker, which stays."""
    whole.start_worker()
    return whole


def test_a_hundred_bells_change_nothing(service: Service, redis: stack.Redis) -> None:
    app = Celery(broker=redis.url)
    app.conf.task_default_queue = "polycollide"
    jobs = service.submit_many(4)
    for _ in range(100):
        app.send_task(DRAIN_TASK, ignore_result=True)
    app.close()
    assert {job["attempt"] for job in service.all_succeed(jobs)} == {1}


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "paper-mnist", "seed": 3},
        {"preset": "hull", "layer": "fc2", "hull": {"goal": 0.3}},
        {"solver": "exact", "source_budget": 0.95, "corners": 2, "certify": {"hull": "8bit"}},
    ],
    ids=["corners", "hull", "exact"],
)
def test_results_equal_those_of_a_run_without_a_service(
    service: Service, settings: dict[str, Any]
) -> None:
    spec = CollisionSpec.model_validate(MNIST | settings)
    subject = Subject.open(spec, torch.device("cpu"))
    names = pair(7)
    loaded = [
        images.load(*images.read(names[which]), subject.model.preprocessing)
        for which in ("source", "target")
    ]
    _, outcome = run_alone(subject, spec, *loaded)
    ours = outcome.result.model_dump(mode="json")
    # On deeper layers a hull that grows makes more of how kernels round in other company.
    company = [] if "layer" in settings else service.submit_many(5)
    ended = service.all_succeed([service.submit(MNIST | settings, 7), *company])
    theirs = service.job(ended[0]["id"])
    for which in (ours, theirs["result"]):
        # Every point of an exact polytope is the worst, but for rounding.
        which["worst"] = {name: which["worst"][name] for name in ("margin", "probability", "label")}
        for clocked in (which, which["certificate"] or {}):
            for name in ("seconds", "measuring_seconds"):
                clocked.pop(name, None)
    _assert_close(theirs["result"], ours)
    corners = service.client.get(theirs["urls"]["corners_npz"])
    with np.load(io.BytesIO(corners.content)) as arrays:
        # A worker has one thread for small images, and kernels round accordingly.
        atol = 1e-4 if spec.objective == "hull" else 1e-6
        np.testing.assert_allclose(arrays["corners"], outcome.corners, atol=atol)
    png = service.client.get(theirs["urls"]["corners"][1]).content
    assert png == images.to_png(outcome.corners[1])


def _assert_close(theirs: Any, ours: Any, path: str = "result") -> None:
    if isinstance(ours, dict):
        assert theirs.keys() == ours.keys(), path
        for key, value in ours.items():
            _assert_close(theirs[key], value, f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(theirs) == len(ours), path
        for i, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            _assert_close(their, our, f"{path}[{i}]")
    elif isinstance(ours, float):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6), path
    else:
        assert theirs == ours, path


def test_cancel_races_finish(service: Service) -> None:
    random = Random(0)
    jobs = service.submit_many(30)
    for job_id in random.sample(jobs, len(jobs)):
        time.sleep(random.random() / 50)
        assert service.client.post(f"/v1/jobs/{job_id}/cancel").status_code in (200, 202)
    ended = [service.ended(job_id) for job_id in jobs]
    assert {job["status"] for job in ended} <= {"succeeded", "canceled"}
    service.check()


def test_cancel_ends_a_job_that_would_run_on(service: Service) -> None:
    job = service.submit(endless(3600))
    service.running(job)
    time.sleep(1)
    service.client.post(f"/v1/jobs/{job}/cancel")
    assert service.ended(job)["status"] == "canceled"
    service.check()


def test_a_deadline_ends_a_job_with_a_reason(service: Service) -> None:
    job = service.ended(service.submit(endless(3600), deadline_seconds=2))
    assert (job["status"], job["error"]["code"]) == ("failed", "timeout")


def test_refused_blob_writes_are_tried_again(service: Service) -> None:
    jobs = service.submit_many(3)
    with service.database.begin() as connection:
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
    later = service.submit(SMALL, 50)
    service.running(later)
    first = _lease_of(service, later)
    service.until(lambda: _lease_of(service, later) > first, WITHIN, "its lease is renewed")
    assert service.job(later)["status"] == "running"
    with service.database.begin() as connection:
        connection.execute(text("DROP TRIGGER refuse ON artifacts"))
    assert {job["attempt"] for job in service.all_succeed([*jobs, later])} == {1}


def _lease_of(service: Service, job_id: str) -> datetime:
    """When the lease of a job that runs ends."""
    with service.database.begin() as connection:
        ends = connection.scalar(
            text("SELECT lease_expires_at FROM jobs WHERE id = :id"), {"id": job_id}
        )
    assert isinstance(ends, datetime), "the job has no lease"
    return ends


def test_jobs_of_all_keys_and_kinds_get_their_turn(service: Service) -> None:
    """A stream of one kind does not keep a job of another waiting for its end."""
    stream = [{**pair(i % 90), "spec": SMALL | {"seed": i}} for i in range(300)]
    batch = service.client.post("/v1/batches", json={"items": stream}).json()
    other = service.submit(SMALL | {"optimizer": "gd", "learning_rate": 1e-3, "max_steps": 100})
    service.ended(other)
    counts = service.client.get(batch["urls"]["self"]).json()["request_counts"]
    assert counts["queued"] + counts["running"] > 0
