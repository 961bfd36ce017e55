"""Jobs over HTTP: what goes in, what comes back, and who waits for it."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from core.result import Result
from store.settings import Settings

from .conftest import (
    JOB,
    MODEL,
    PATCH_SET,
    SPEC,
    Service,
    Worker,
    inline,
    png,
    serve,
    serving,
)


def submitted(client: httpx.Client, **given: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=JOB | given)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    return job


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    return json.dumps(problem)


def test_a_submitted_job_is_queued_and_says_where_it_is(client: httpx.Client) -> None:
    response = client.post("/v1/jobs", json=JOB | {"labels": ["a'; DROP TABLE jobs; --"]})
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert response.headers["retry-after"] == "1"
    assert job["status"] == "queued" and job["status_reason"] == "No worker is running."
    assert job["labels"] == ["a'; DROP TABLE jobs; --"]
    assert job["spec"]["corners"] == 2 and job["spec"]["max_steps"] == 2000
    assert job["source"]["name"] == "mnist/3-0"
    assert job["deadline_seconds"] == 3600 + 3600
    assert "corners" not in job["urls"]
    assert client.get(job["urls"]["self"]).json() | {"queue_position": 0} == job | {
        "queue_position": 0
    }


def test_images_come_inline_as_files_or_by_hash(client: httpx.Client) -> None:
    one, two = png(seed=1), png(seed=2)
    job = submitted(client, source=inline(one), target=inline(two))
    again = submitted(client, source=f"sha256:{job['source']['sha256']}")
    assert again["source"] == job["source"]
    files = {
        "job": (None, json.dumps({"spec": SPEC}), "application/json"),
        "source": ("../../etc/pass\r\nwd\x07.png", one, "image/png"),
        "target": ("C:\\pictures\\ü 2.png", two, "image/png"),
    }
    response = client.post("/v1/jobs", files=files)
    assert response.status_code == 202, response.text
    assert response.json()["source"]["sha256"] == job["source"]["sha256"]
    assert response.json()["target"]["name"] == "ü 2.png"
    assert "/" not in response.json()["source"]["name"]
    mixed = {"job": (None, json.dumps({"spec": SPEC, "source": JOB["source"]}))}
    response = client.post("/v1/jobs", files=mixed | {"target": ("t.png", two)})
    assert response.status_code == 202, response.text


@pytest.mark.parametrize(
    "given, code, says",
    [
        ({"source": "sample:mnist/3-x"}, "unknown_name", "mnist/3-0"),
        ({"source": f"sha256:{'0' * 64}"}, "unknown_image", "send it first"),
        ({"source": "sha256:0"}, "invalid_image", "64"),
        ({"source": "base64:%%%"}, "invalid_image", "base64"),
        ({"source": "base64:aGVsbG8="}, "invalid_image", "PNG"),
        ({"source": "/etc/passwd"}, "invalid_image", "sample:"),
        ({"source": inline(png()[:200])}, "invalid_image", "truncated"),
        ({"source": JOB["target"]}, "same_image", "two"),
        ({"source": None}, "invalid_request", "body.source"),
        ({"spec": SPEC | {"corners": 0}}, "invalid_request", "body.spec.corners"),
        ({"spec": SPEC | {"corners": "2"}}, "invalid_request", "body.spec.corners"),
        ({"spec": SPEC | {"corners": True}}, "invalid_request", "body.spec.corners"),
        ({"spec": SPEC | {"cornrs": 2}}, "invalid_request", "body.spec.cornrs"),
        ({"spec": SPEC | {"cornrs": 2}}, "invalid_request", "did you mean 'corners'"),
        ({"spec": SPEC | {"interpolation": {"sampels": 2}}}, "invalid_request", "'samples'"),
        ({"spec": SPEC | {"beta": {"relative": 0}}}, "invalid_request", "body.spec.beta.relative"),
        ({"priorty": 1}, "invalid_request", "There is no field 'priorty'; did you mean 'priority'"),
        ({"spec": SPEC | {"preset": "papr-mnist"}}, "invalid_request", "paper-mnist"),
        ({"spec": SPEC | {"units": [1]}}, "invalid_request", "one entry for each corner"),
        ({"priority": 101}, "invalid_request", "body.priority"),
        ({"labels": ["a\nb"]}, "invalid_request", "body.labels.0"),
        ({"labels": ["a"] * 17}, "invalid_request", "body.labels"),
        ({"labels": ["\x00"]}, "invalid_request", "body.labels.0"),
        ({"deadline_seconds": 0}, "invalid_request", "body.deadline_seconds"),
        ({"deadline_seconds": "NaN"}, "invalid_request", "body.deadline_seconds"),
        ({"job_id": "x"}, "invalid_request", "body.job_id"),
    ],
)
def test_what_cannot_run_is_refused_and_says_why(
    client: httpx.Client, given: dict[str, Any], code: str, says: str
) -> None:
    assert says in refused(client.post("/v1/jobs", json=JOB | given), 422, code)


@pytest.mark.parametrize(
    "content, headers, status, code",
    [
        (b"{", {"Content-Type": "application/json"}, 422, "invalid_request"),
        (b"[" * 100_000, {"Content-Type": "application/json"}, 422, "invalid_request"),
        (b"\xff", {"Content-Type": "application/json"}, 422, "invalid_request"),
        (b"", {"Content-Type": "application/json"}, 422, "invalid_request"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"{}", {}, 415, "unsupported_media_type"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "malformed_body"),
        (b"x", {"Content-Type": "multipart/form-data; boundary=y"}, 400, "malformed_body"),
    ],
)
def test_bodies_that_are_no_job_are_refused(
    client: httpx.Client, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    refused(client.post("/v1/jobs", content=content, headers=headers), status, code)


def test_multipart_takes_each_image_once_and_nothing_else(client: httpx.Client) -> None:
    job, image = (None, json.dumps({"spec": SPEC})), ("a.png", png())
    for files in (
        {"job": job, "source": image},
        {"source": image, "target": image},
        {"job": job, "source": image, "third": image},
        {"job": (None, json.dumps(JOB)), "source": image},
        {"job": ("job.json", json.dumps(JOB))},
    ):
        response = client.post("/v1/jobs", files=files)
        refused(response, 422, "invalid_request")


def test_the_same_idempotency_key_and_body_give_the_same_job(client: httpx.Client) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: client.post("/v1/jobs", json=JOB, headers=headers), range(8))
        )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    # The same thing said in another way is the same body.
    image = client.get(f"/v1/images/{answers[0].json()['source']['sha256']}").content
    spec = {"corners": 2, "layer": "fc1", "model": "mnist-mlp", "seed": 0}
    said = JOB | {"source": inline(image), "spec": spec, "priority": 0}
    assert (
        client.post("/v1/jobs", json=said, headers=headers).json()["id"]
        == (answers[0].json()["id"])
    )
    other = client.post("/v1/jobs", json=JOB | {"priority": 1}, headers=headers)
    refused(other, 422, "idempotency_key_reused")


def test_an_idempotency_key_is_free_again_after_a_refusal_or_a_deletion(
    client: httpx.Client,
) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    unknown = JOB | {"source": f"sha256:{'0' * 64}"}
    refused(client.post("/v1/jobs", json=unknown, headers=headers), 422, "unknown_image")
    job = client.post("/v1/jobs", json=JOB, headers=headers).json()
    client.post(job["urls"]["cancel"])
    assert client.delete(job["urls"]["self"]).status_code == 204
    again = client.post("/v1/jobs", json=JOB | {"priority": 3}, headers=headers)
    assert again.status_code == 202 and again.json()["id"] != job["id"]


def test_a_finished_job_has_its_result_as_result_json_has_it(
    client: httpx.Client, worker: Worker
) -> None:
    job = submitted(client)
    expected = worker.succeed(worker.claim(job), corners_npz=b"PK", figure_png=png())
    job = client.get(job["urls"]["self"]).json()
    assert job["status"] == "succeeded" and job["progress"] is None and job["attempt"] == 1
    assert job["result"] == expected
    written = Result.model_validate(expected).model_dump(mode="json")
    assert json.dumps(job["result"]) == json.dumps(written)  # the order of keys is the same
    assert job["urls"]["corners"] == [f"{job['urls']['self']}/corners/{i}.png" for i in (0, 1)]
    assert job["urls"]["figure_png"] == f"{job['urls']['self']}/figure.png"
    assert "samples_npz" not in job["urls"]
    listed = client.get("/v1/jobs").json()["jobs"][0]
    assert "result" not in listed and listed["urls"] == job["urls"]


def test_progress_ends_with_the_job(client: httpx.Client, worker: Worker) -> None:
    job = submitted(client)
    claimed = worker.claim(job)
    worker.progress(claimed, steps=10, rows_left=2, worst_l_pos=1.0, steps_per_second=5.0, eta=3.0)
    assert client.get(job["urls"]["self"]).json()["progress"]["eta"] == 3.0
    worker.fail(claimed, "diverged", "It diverged.")
    assert client.get(job["urls"]["self"]).json()["progress"] is None


def test_a_failed_job_says_why(client: httpx.Client, worker: Worker) -> None:
    job = submitted(client)
    worker.fail(worker.claim(job), "diverged", "The loss is not finite; lower the rate.")
    job = client.get(job["urls"]["self"]).json()
    assert job["status"] == "failed"
    assert job["error"] == {
        "code": "diverged",
        "message": "The loss is not finite; lower the rate.",
    }


def test_the_place_in_the_queue_is_by_priority_then_age(
    new_settings: Callable[..., Settings],
) -> None:
    with serve(new_settings()) as fresh, fresh.client() as client:
        jobs = [submitted(client, priority=priority) for priority in (0, 0, 5, -5)]
        places = [client.get(job["urls"]["self"]).json()["queue_position"] for job in jobs]
    assert places == [1, 2, 0, 3]


def test_a_waiting_job_says_what_it_waits_for(service: Service, client: httpx.Client) -> None:
    url = submitted(client)["urls"]["self"]
    with serving(service.engine, MODEL | {"name": "mnist-cnn"}):
        reason = client.get(url).json()["status_reason"]
        assert reason == "No running worker serves model 'mnist-mlp'."
    with serving(service.engine, MODEL):
        assert client.get(url).json()["status_reason"] == "Waits for its turn."
    assert client.get(url).json()["status_reason"] == "No worker is running."


def test_what_no_worker_knows_is_refused_with_what_is_near(
    service: Service, client: httpx.Client
) -> None:
    large = MODEL | {"name": "large", "input_shape": [3, 4096, 4096], "layers": None}
    wide = large | {"name": "wide", "input_shape": [3, 2000, 2000]}
    with serving(service.engine, MODEL, large, wide):
        for given, code, near in (
            ({"model": "mnist-mpl"}, "unknown_name", "mnist-mlp"),
            ({"layer": "fc3"}, "unknown_name", "fc1"),
            ({"weights": "shippd"}, "unknown_name", "shipped"),
            ({"target_class": "11"}, "unknown_name", "known"),
            ({"model": "large"}, "invalid_spec", "ask for fewer"),
            ({"model": "wide", "objective": "hull"}, "invalid_spec", "5 points between them"),
            ({"model": "wide"}, "invalid_spec", "ask for fewer corners or snapshots"),
            ({"units": [255, 256]}, "invalid_spec", "no unit 256: layer 'fc1' has 256"),
            ({"units": [1, [2, 300]]}, "invalid_spec", "no unit 300"),
        ):
            response = client.post("/v1/jobs", json=JOB | {"spec": SPEC | given})
            assert near in refused(response, 422, code)
        submitted(client, spec=SPEC | {"target_class": 7, "weights": "shipped"})
        submitted(client, spec=SPEC | {"units": [254, 255]})
        submitted(client, spec=SPEC | {"model": "wide", "snapshots": 0, "figures": False})


COLOUR = MODEL | {"name": "colour", "input_shape": [3, 64, 64], "layers": None}
PATCHES = {"parametrization": "patches", "patches": {"set": "photos"}}
OF_PATCHES = SPEC | {"model": "colour"} | PATCHES


def test_a_job_of_patches_names_a_set_that_a_worker_has_and_fits_its_size(
    service: Service, client: httpx.Client
) -> None:
    large = PATCH_SET | {"name": "large", "size": 65}
    wide = COLOUR | {"name": "wide", "input_shape": [3, 1024, 1024]}
    with serving(service.engine, MODEL, COLOUR, wide, patch_sets=[PATCH_SET, large]):
        for given, code, says in (
            ({"patches": {"set": "photo"}}, "unknown_name", "did you mean 'photos'?"),
            ({"patches": {"set": "large"}}, "invalid_spec", "65 px do not fit"),
            ({"patches": {"set": "photos", "stride": 17}}, "invalid_spec", "do not cover"),
            ({"model": "mnist-mlp"}, "invalid_spec", "takes grey ones"),
            ({"model": "wide"}, "invalid_spec", "larger stride"),
        ):
            plain = {"corners": 10, "snapshots": 0, "figures": False}
            job = JOB | {"spec": OF_PATCHES | plain | given}
            assert says in refused(client.post("/v1/jobs", json=job), 422, code)
            batch = client.post("/v1/batches", json={"items": [job, JOB]}).json()
            (error,) = batch["errors"]
            assert (error["index"], error["code"]) == (0, code) and says in error["message"]
        submitted(client, spec=OF_PATCHES)
    with serving(service.engine, COLOUR):  # who has none, has told so
        response = client.post("/v1/jobs", json=JOB | {"spec": OF_PATCHES})
        assert "There is no patch set 'photos'; known: none." in refused(
            response, 422, "unknown_name"
        )


def test_without_a_worker_a_job_of_patches_is_taken_and_says_what_it_waits_for(
    service: Service, client: httpx.Client
) -> None:
    url = submitted(client, spec=OF_PATCHES)["urls"]["self"]
    batch = client.post("/v1/batches", json={"items": [JOB | {"spec": OF_PATCHES}]}).json()
    (item,) = client.get(batch["urls"]["jobs"]).json()["jobs"]

    def reasons() -> set[str]:
        return {client.get(each).json()["status_reason"] for each in (url, item["urls"]["self"])}

    assert reasons() == {"No worker is running."}
    with serving(service.engine, COLOUR):
        says = "No running worker that serves the model has patch set 'photos'."
        assert reasons() == {says}
    with serving(service.engine, COLOUR, patch_sets=[PATCH_SET]):
        assert reasons() == {"Waits for its turn."}
    with service.engine.begin() as connection:
        named = text("SELECT DISTINCT patch_set FROM jobs WHERE model = 'colour'")
        assert connection.scalars(named).all() == ["photos"]


def test_patches_may_collide_with_their_own_source(client: httpx.Client) -> None:
    same = {"source": JOB["source"], "target": JOB["source"], "spec": OF_PATCHES}
    assert client.post("/v1/jobs", json=same).status_code == 202
    batch = client.post("/v1/batches", json={"items": [same, same | {"spec": SPEC}]}).json()
    assert [(error["index"], error["code"]) for error in batch["errors"]] == [(1, "same_image")]


def test_a_key_may_have_only_so_many_jobs_waiting(new_settings: Callable[..., Settings]) -> None:
    with serve(new_settings(max_queued_jobs=2)) as fresh, fresh.client() as client:
        first = submitted(client)
        submitted(client)
        response = client.post("/v1/jobs", json=JOB)
        refused(response, 429, "too_many_queued_jobs")
        assert int(response.headers["retry-after"]) > 0
        client.post(first["urls"]["cancel"])
        submitted(client)


def test_what_a_union_has_against_a_setting_is_one_complaint_of_it(client: httpx.Client) -> None:
    response = client.post("/v1/jobs", json=JOB | {"spec": SPEC | {"beta": "x"}})
    assert response.json()["errors"] == [
        {"loc": "body.spec.beta", "message": "Input should be a valid number"}
    ]


def test_a_batchs_label_finds_its_jobs(keyed: Service) -> None:
    label = f"l-{uuid4()}"
    items = {"items": [JOB, JOB], "labels": [label]}
    with keyed.client("dora") as client, keyed.client("emil") as other:
        alone = submitted(client, labels=[label])["id"]
        batch = client.post("/v1/batches", json=items).json()["id"]
        assert other.post("/v1/batches", json=items).status_code == 202
        client.post("/v1/batches", json=items | {"labels": ["else"]})
        found = client.get("/v1/jobs", params={"label": label}).json()["jobs"]
        assert [job["batch_id"] for job in found] == [batch, batch, None]
        assert found[-1]["id"] == alone
        listed = client.get("/v1/batches", params={"label": label}).json()["batches"]
        assert [found["id"] for found in listed] == [batch]


def test_lists_are_paged_and_filtered(client: httpx.Client) -> None:
    label = f"l-{uuid4()}"
    ids = [submitted(client, labels=[label, str(i % 2)])["id"] for i in range(7)]
    client.post(f"/v1/jobs/{ids[0]}/cancel")
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        params = {"label": label, "limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/jobs", params=params).json()
        assert len(page["jobs"]) <= 3
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert seen == ids[::-1]
    canceled = client.get("/v1/jobs", params={"label": label, "status": "canceled"}).json()
    assert [job["id"] for job in canceled["jobs"]] == ids[:1]
    assert client.get("/v1/jobs", params={"batch": str(uuid4())}).json()["jobs"] == []
    for bad in ({"limit": 0}, {"limit": 201}, {"cursor": "x"}, {"status": "done"}, {"batch": "x"}):
        refused(client.get("/v1/jobs", params=bad), 422, "invalid_request")


def test_canceling_ends_a_queued_job_at_once_and_a_running_one_soon(
    client: httpx.Client, worker: Worker
) -> None:
    queued, running = submitted(client), submitted(client)
    response = client.post(queued["urls"]["cancel"])
    assert response.status_code == 202 and response.json()["status"] == "canceled"
    assert response.json()["finished_at"] is not None
    assert response.json()["status_reason"] == "Canceled by its owner."
    claimed = worker.claim(running)
    for _ in range(2):
        response = client.post(running["urls"]["cancel"])
        assert response.status_code == 202 and response.json()["status"] == "canceling"
    worker.succeed(claimed)
    response = client.post(running["urls"]["cancel"])
    assert response.status_code == 200 and response.json()["status"] == "canceled"
    assert response.json()["result"] is None


def test_only_a_job_that_has_ended_is_deleted(
    client: httpx.Client, worker: Worker, service: Service
) -> None:
    job = submitted(client)
    refused(client.delete(job["urls"]["self"]), 409, "job_not_final")
    worker.succeed(worker.claim(job), figure_png=png())
    assert client.delete(job["urls"]["self"]).status_code == 204
    refused(client.get(job["urls"]["self"]), 404, "unknown_job")
    refused(client.delete(job["urls"]["self"]), 404, "unknown_job")
    with service.engine.begin() as connection:
        for table in ("corners", "metrics", "artifacts", "job_events"):
            count = text(f"SELECT count(*) FROM {table} WHERE job_id = :id")
            assert connection.scalar(count, {"id": job["id"]}) == 0


def test_waiting_ends_when_the_job_does(client: httpx.Client, worker: Worker) -> None:
    job = submitted(client)
    claimed = worker.claim(job)
    timer = threading.Timer(0.5, lambda: worker.succeed(claimed))
    timer.start()
    began = time.monotonic()
    found = client.get(job["urls"]["self"], params={"wait": 20}).json()
    took = time.monotonic() - began
    timer.join()
    assert found["status"] == "succeeded" and 0.4 < took < 15
    began = time.monotonic()
    client.get(job["urls"]["self"], params={"wait": 20})
    assert time.monotonic() - began < 15


def test_waiting_ends_when_the_time_is_over(client: httpx.Client) -> None:
    job = submitted(client)
    began = time.monotonic()
    found = client.get(job["urls"]["self"], params={"wait": 0.5}).json()
    assert found["status"] == "queued" and time.monotonic() - began > 0.4
    refused(client.get(job["urls"]["self"], params={"wait": 61}), 422, "invalid_request")
    refused(client.get(f"/v1/jobs/{uuid4()}", params={"wait": 5}), 404, "unknown_job")


def test_those_who_wait_hold_no_connections(service: Service, worker: Worker) -> None:
    with service.client() as client:
        job = submitted(client)
        claimed = worker.claim(job)
    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=service.url, limits=limits, timeout=30) as many,
        ThreadPoolExecutor(60) as pool,
    ):
        url, params = job["urls"]["self"], {"wait": 20}
        # Three times as many as the pool has connections.
        waiting = [pool.submit(many.get, url, params=params) for _ in range(60)]
        time.sleep(1)
        assert many.get(url).status_code == 200
        assert not any(answer.done() for answer in waiting), "they wait on"
        worker.succeed(claimed)
        assert {answer.result().json()["status"] for answer in waiting} == {"succeeded"}
