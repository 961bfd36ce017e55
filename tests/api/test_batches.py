"""Batches over HTTP: items, grids and lines in; counts, cancellation and results out."""

import csv
import io
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

import httpx
import pytest
from redis import Redis
from sqlalchemy import text

from core.result import Result
from polycollide import stack
from store import workers
from store.settings import QUEUE, Settings

from .conftest import JOB, SPEC, Service, Worker, inline, png, serve, serving

DIGITS = [f"sample:mnist/{digit}-0" for digit in range(10)]
JSONL = {"content-type": "application/jsonl"}


def item(**given: Any) -> dict[str, Any]:
    return JOB | given


def submit(client: httpx.Client, body: Any, **headers: str) -> dict[str, Any]:
    response = client.post("/v1/batches", json=body, headers=headers)
    assert response.status_code == 202, response.text
    batch: dict[str, Any] = response.json()
    return batch


def submit_lines(client: httpx.Client, lines: Iterable[str]) -> httpx.Response:
    return client.post("/v1/batches", content="\n".join(lines), headers=JSONL)


def jobs_of(client: httpx.Client, batch: dict[str, Any]) -> list[dict[str, Any]]:
    found = client.get(batch["urls"]["jobs"] + "&limit=200").json()["jobs"]
    return found[::-1]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code
    return problem


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def counted(batch: dict[str, Any]) -> dict[str, int]:
    return {name: count for name, count in batch["request_counts"].items() if count}


def test_items_become_jobs_in_their_order(client: httpx.Client) -> None:
    items = [
        item(custom_id="a", labels=["x"], priority=3, deadline_seconds=5),
        item(custom_id="b"),
        item(spec=SPEC | {"figures": True}),
    ]
    response = client.post("/v1/batches", json={"items": items, "labels": ["mine"], "priority": 7})
    batch = response.json()
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/batches/{batch['id']}" == batch["urls"]["self"]
    assert response.headers["retry-after"] == "1"
    assert batch["labels"] == ["mine"] and batch["errors"] == []
    assert batch["status"] == "in_progress" and counted(batch) == {"total": 3, "queued": 3}
    jobs = jobs_of(client, batch)
    assert [job["custom_id"] for job in jobs] == ["a", "b", None]
    assert [job["priority"] for job in jobs] == [3, 7, 7]
    assert [job["labels"] for job in jobs] == [["x"], [], []]
    assert [job["deadline_seconds"] for job in jobs] == [5, 7200, 7200]
    assert [job["spec"]["figures"] for job in jobs] == [False, False, True]
    assert {job["batch_id"] for job in jobs} == {batch["id"]}
    assert client.get(batch["urls"]["self"]).json() == batch


def test_what_cannot_be_accepted_is_told_by_index_and_the_rest_runs(client: httpx.Client) -> None:
    unknown = "sha256:" + "0" * 64
    items: list[Any] = [
        item(custom_id="good"),
        item(custom_id="good"),
        item(custom_id="bad corners", spec=SPEC | {"corners": 0}),
        item(source=unknown),
        item(source="base64:aGVsbG8="),
        item(source="sample:mnist/3-O"),
        item(target=JOB["source"]),
        item(labels="x"),
        item(surprise=1),
        item(custom_id="x" * 201),
        item(custom_id="line\nbreak"),
        [1],
        None,
        {},
        item(priority=101),
        item(spec=SPEC | {"preset": "paper-mnits"}),
        item(source="/etc/passwd"),
        item(spec="fc1"),
    ]
    batch = submit(client, {"items": items})
    assert counted(batch) == {"total": 18, "refused": 17, "queued": 1}
    errors = batch["errors"]
    assert [error["index"] for error in errors] == list(range(1, 18))
    assert [error["code"] for error in errors] == [
        "duplicate_custom_id",
        "invalid_spec",
        "unknown_image",
        "invalid_image",
        "unknown_name",
        "same_image",
        *["invalid_item"] * 8,
        "invalid_spec",
        "invalid_image",
        "invalid_item",
    ]
    assert [error["custom_id"] for error in errors[:3]] == ["good", "bad corners", None]
    messages = [error["message"] for error in errors]
    assert messages[1] == "spec.corners: Input should be greater than or equal to 1."
    assert messages[7].startswith("surprise: There is no field 'surprise'; ")
    assert "'mnist/3-0'" in messages[4] and "paper-mnist" in messages[14]
    assert all(message.endswith((".", "?")) and "\n" not in message for message in messages)


LOOSE: list[dict[str, Any]] = [
    *({"spec": SPEC | {"corners": value}} for value in ("5", True, 2.0)),
    *({"spec": SPEC | {name: "1"}} for name in ("seed", "figures", "max_seconds", "alpha")),
    {"spec": SPEC | {"figures": 1}},
    {"spec": SPEC | {"interpolation": {"samples": 10.0}}},
    {"spec": SPEC | {"beta": {"relative": "1"}}},
    {"spec": SPEC | {"model": 1}},
    *({"priority": value} for value in ("5", True, 2.0)),
    *({"deadline_seconds": value} for value in ("5", True)),
    {"labels": "x"},
    {"source": 1},
]


def test_an_item_is_refused_where_a_single_job_is(client: httpx.Client) -> None:
    single = [client.post("/v1/jobs", json=JOB | given).status_code for given in LOOSE]
    assert single == [422] * len(LOOSE)
    good = [item(spec=SPEC | {"alpha": 100, "seed": 3}), item(deadline_seconds=5)]
    batch = submit(client, {"items": [*good, *(item(**given) for given in LOOSE)]})
    assert counted(batch) == {"total": len(LOOSE) + 2, "refused": len(LOOSE), "queued": 2}
    grid = {"sources": [JOB["source"]], "targets": [JOB["target"]], "settings": [{"corners": "5"}]}
    answer = client.post("/v1/batches", json={"grid": grid | {"spec": SPEC}})
    refused(answer, 422, "no_item_accepted")


def test_a_batch_without_any_good_item_is_refused_and_leaves_nothing(service: Service) -> None:
    with service.client() as client:
        before = client.get("/v1/batches").json()
        key = {"Idempotency-Key": str(uuid4())}
        bad = {"items": [item(spec=SPEC | {"corners": 0}), item(labels=3)]}
        problem = refused(
            client.post("/v1/batches", json=bad, headers=key), 422, "no_item_accepted"
        )
        assert [error["loc"] for error in problem["errors"]] == ["items.0", "items.1"]
        assert client.get("/v1/batches").json() == before
        assert client.post("/v1/batches", json={"items": [JOB]}, headers=key).status_code == 202


@pytest.mark.parametrize(
    "body, loc",
    [
        ({}, "body.items"),
        ({"items": []}, "body.items"),
        ({"items": {}}, "body.items"),
        ({"items": [JOB], "grid": {}}, "body.grid.sources"),
        ({"items": [JOB], "labels": ["\x00"]}, "body.labels.0"),
        ({"items": [JOB], "priority": 101}, "body.priority"),
        ({"items": [JOB], "prority": 1}, "body.prority"),
        ({"grid": {"sources": [], "targets": DIGITS, "spec": SPEC}}, "body.grid.sources"),
        ([JOB], "body"),
        (None, "body"),
    ],
)
def test_a_malformed_batch_says_where(client: httpx.Client, body: Any, loc: str) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/batches", content=json.dumps(body), headers=headers)
    problem = refused(response, 422, "invalid_request")
    assert problem["errors"][0]["loc"] == loc


def test_bodies_that_are_no_json_or_of_another_type_are_refused(client: httpx.Client) -> None:
    json_type = {"content-type": "application/json"}
    response = client.post("/v1/batches", content=b'{"items": [', headers=json_type)
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"
    response = client.post("/v1/batches", content=b"a,b", headers={"content-type": "text/csv"})
    refused(response, 415, "unsupported_media_type")
    deep = client.post("/v1/batches", content=b"[" * 100_000, headers=json_type)
    assert deep.status_code in (400, 422)


def test_a_grid_crosses_sources_targets_layers_and_settings(client: httpx.Client) -> None:
    grid = {
        "sources": DIGITS[:2],
        "targets": DIGITS[1:3],
        "layers": ["fc1", "fc2"],
        "settings": [{"seed": 1}, {"seed": 2, "corners": 3}],
        "spec": {"model": "mnist-mlp", "seed": 9, "max_steps": 10},
    }
    batch = submit(client, {"grid": grid, "labels": ["grid"], "priority": -3})
    assert counted(batch) == {"total": 16, "refused": 4, "queued": 12}
    assert {error["code"] for error in batch["errors"]} == {"same_image"}
    assert [error["custom_id"] for error in batch["errors"]] == [
        f"1/0/{layer}/{setting}" for layer in range(2) for setting in range(2)
    ]
    jobs = jobs_of(client, batch)
    job = next(job for job in jobs if job["custom_id"] == "0/1/1/1")
    assert (job["source"]["name"], job["target"]["name"]) == ("mnist/0-0", "mnist/2-0")
    spec = job["spec"]
    assert (spec["layer"], spec["seed"], spec["corners"]) == ("fc2", 2, 3)
    assert (spec["max_steps"], spec["figures"], job["priority"]) == (10, False, -3)


def test_a_grid_without_layers_and_settings_takes_the_spec(client: httpx.Client) -> None:
    grid = {"sources": DIGITS[:1], "targets": DIGITS[1:3], "spec": SPEC}
    batch = submit(client, {"grid": grid})
    assert [job["custom_id"] for job in jobs_of(client, batch)] == ["0/0/0/0", "0/1/0/0"]


def test_a_grid_over_the_limit_is_refused_before_it_is_unfolded(client: httpx.Client) -> None:
    grid = {"sources": DIGITS * 100, "targets": DIGITS * 100, "layers": ["fc1"] * 1000}
    began = time.monotonic()
    refused(client.post("/v1/batches", json={"grid": grid}), 422, "too_many_items")
    assert time.monotonic() - began < 30, "a thousand million items take longer"


def test_lines_are_items_and_their_numbers_indices(client: httpx.Client) -> None:
    lines = [json.dumps(JOB), "", "{", " \t\r", json.dumps(item(custom_id="é=\u0000")), "[]"]
    lines += [json.dumps(item(custom_id="last")) + "\r"]
    response = submit_lines(client, lines)
    assert response.status_code == 202, response.text
    batch = response.json()
    errors = [(error["index"], error["code"]) for error in batch["errors"]]
    assert errors == [(2, "invalid_json"), (4, "invalid_item"), (5, "invalid_item")]
    assert counted(batch) == {"total": 5, "refused": 3, "queued": 2}
    client.post(batch["urls"]["cancel"])
    results = client.get(batch["urls"]["results_jsonl"]).text.splitlines()
    assert [json.loads(line)["index"] for line in results] == [0, 6]


def test_lines_may_begin_with_a_byte_order_mark(client: httpx.Client) -> None:
    response = submit_lines(client, ["\ufeff" + json.dumps(JOB), "\ufeff" + json.dumps(JOB)])
    batch = response.json()
    assert [(error["index"], error["code"]) for error in batch["errors"]] == [(1, "invalid_json")]
    assert counted(batch) == {"total": 2, "refused": 1, "queued": 1}


@pytest.mark.parametrize("media_type", ["application/jsonl", "application/x-ndjson"])
def test_lines_may_come_in_any_pieces(client: httpx.Client, media_type: str) -> None:
    content = "\n".join(json.dumps(item(custom_id=str(i))) for i in range(5)).encode() + b"\n"
    pieces = (content[i : i + 7] for i in range(0, len(content), 7))
    response = client.post("/v1/batches", content=pieces, headers={"content-type": media_type})
    assert counted(response.json()) == {"total": 5, "queued": 5}


def test_images_of_a_batch_are_stored_once_each(service: Service, client: httpx.Client) -> None:
    one, two = inline(png(seed=100)), inline(png(seed=101))
    items = [item(source=one, target=two), item(source=two, target=one), item(source=one)]
    count = text("SELECT count(*) FROM blobs WHERE media_type = 'image/png'")
    with service.engine.connect() as connection:
        before = connection.scalar(count)
    batch = submit(client, {"items": [*items, item()]})
    with service.engine.connect() as connection:
        # Those two, and the samples if no other test has used them.
        assert connection.scalar(count) in (before + 2, before + 3, before + 4)
    jobs = jobs_of(client, batch)
    assert jobs[0]["source"]["sha256"] == jobs[1]["target"]["sha256"] == jobs[2]["source"]["sha256"]
    assert [job["source"]["name"] for job in jobs] == [*["source"] * 3, "mnist/3-0"]
    again = item(source=f"sha256:{jobs[0]['source']['sha256']}")
    assert counted(submit(client, {"items": [again]})) == {"total": 1, "queued": 1}


def test_the_same_idempotency_key_and_body_give_the_same_batch(client: httpx.Client) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    body = {"items": [item(custom_id="a"), item(custom_id="b")]}
    first = client.post("/v1/batches", json=body, headers=key)
    again = client.post("/v1/batches", json=body, headers=key)
    assert again.status_code == 202 and again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert first.json()["id"] == again.json()["id"]
    other = client.post("/v1/batches", json=body | {"priority": 1}, headers=key)
    refused(other, 422, "idempotency_key_reused")
    lines = "\n".join(json.dumps(line) for line in body["items"])
    same = client.post("/v1/batches", content=lines, headers=JSONL | key)
    assert same.json()["id"] == first.json()["id"]


def test_limits_hold(new_settings: Callable[..., Settings]) -> None:
    settings = new_settings(max_batch_items=3, max_queued_jobs=4, max_body_bytes=100_000)
    with serve(settings) as own, own.client() as client:
        refused(client.post("/v1/batches", json={"items": [JOB] * 4}), 422, "too_many_items")
        response = submit_lines(client, [json.dumps(JOB)] * 4)
        assert "3 items" in refused(response, 422, "too_many_items")["detail"]
        assert client.get("/v1/batches").json()["batches"] == []
        submit(client, {"items": [JOB] * 3})
        refused(client.post("/v1/batches", json={"items": [JOB] * 2}), 429, "too_many_queued_jobs")
        submit(client, {"items": [JOB]})
        response = submit_lines(client, [json.dumps(item(custom_id="x" * 100_000))])
        refused(response, 413, "body_too_large")


def test_a_batch_that_will_never_have_room_is_not_told_to_come_again(
    new_settings: Callable[..., Settings],
) -> None:
    with serve(new_settings(max_queued_jobs=2)) as own, own.client() as client:
        response = client.post("/v1/batches", json={"items": [JOB] * 3})
        assert "2 items" in refused(response, 422, "too_many_items")["detail"]


def test_specs_that_no_worker_can_run_are_item_errors(
    service: Service, client: httpx.Client
) -> None:
    model = {
        "name": "mnist-mlp",
        "weights": ["shipped"],
        "input_shape": [1, 28, 28],
        "classes": list("0123456789"),
        "origin": "polycollide",
        "ready": True,
        "layers": [{"name": "fc1", "names": ["fc1"], "shape": [256], "units": 256, "cut": True}],
    }
    items = [JOB, item(spec=SPEC | {"model": "mnist-mpl"}), item(spec=SPEC | {"layer": "fc7"})]
    with serving(service.engine, model):
        batch = submit(client, {"items": items})
    assert [error["code"] for error in batch["errors"]] == ["unknown_name", "unknown_name"]
    assert "did you mean 'mnist-mlp'" in batch["errors"][0]["message"]


def test_a_batch_is_seen_by_its_own_key_alone(keyed: Service) -> None:
    with keyed.client("anna") as anna, keyed.client("ben") as ben:
        batch = submit(anna, {"items": [JOB]})
        urls = batch["urls"]
        for url in (urls["self"], urls["self"] + "?wait=5", urls["results_jsonl"]):
            refused(ben.get(url), 404, "unknown_batch")
        refused(ben.get(urls["results_csv"]), 404, "unknown_batch")
        refused(ben.post(urls["cancel"]), 404, "unknown_batch")
        assert ben.get("/v1/batches").json()["batches"] == []
        assert anna.get(urls["self"]).json()["request_counts"]["queued"] == 1
        source = submit(anna, {"items": [item(source=inline(png(seed=7)))]})
        sha256 = jobs_of(anna, source)[0]["source"]["sha256"]
        stolen = ben.post("/v1/batches", json={"items": [item(source=f"sha256:{sha256}"), JOB]})
        assert stolen.json()["errors"][0]["code"] == "unknown_image"
    with keyed.client() as nobody:
        refused(nobody.post("/v1/batches", json={"items": [JOB]}), 401, "unauthorized")


def test_pages_lead_through_all_batches(keyed: Service) -> None:
    with keyed.client("carla") as client:
        ids = [submit(client, {"items": [JOB, {}]})["id"] for _ in range(5)]
        seen, url = [], "/v1/batches?limit=2"
        while True:
            page = client.get(url).json()
            seen += page["batches"]
            if page["next_cursor"] is None:
                break
            url = f"/v1/batches?limit=2&cursor={page['next_cursor']}"
    assert [batch["id"] for batch in seen] == ids[::-1]
    assert "errors" not in seen[0] and seen[0]["request_counts"]["refused"] == 1


def test_canceling_ends_what_waits_at_once(client: httpx.Client, worker: Worker) -> None:
    batch = submit(client, {"items": [item(spec=SPEC | {"seed": 5, "model": "cancel-me"})] * 3})
    response = client.post(batch["urls"]["cancel"])
    assert response.status_code == 202
    assert counted(response.json()) == {"total": 3, "canceled": 3}
    assert response.json()["status"] == "completed"
    assert response.json()["cancel_requested_at"] is not None
    again = client.post(batch["urls"]["cancel"])
    assert again.status_code == 202 and again.json() == response.json()
    assert {job["status_reason"] for job in jobs_of(client, batch)} == {"Canceled by its owner."}


def test_waiting_ends_when_no_job_is_left_to_run(client: httpx.Client, worker: Worker) -> None:
    batch = submit(client, {"items": [item(spec=SPEC | {"model": "wait-for-me"})] * 2})
    jobs = jobs_of(client, batch)
    claimed = [worker.claim(jobs[0])]

    short = client.get(batch["urls"]["self"], params={"wait": 0.2}).json()
    assert short["status"] == "in_progress"
    # The other job was claimed with the first: it ends as its worker hears of the cancellation.
    worker.succeed(claimed[0])
    client.post(jobs[1]["urls"]["cancel"])
    left = client.get(batch["urls"]["self"], params={"wait": 0.5}).json()
    assert counted(left) == {"total": 2, "succeeded": 1, "canceling": 1}


def test_waiting_is_answered_soon_after_the_last_job(client: httpx.Client, worker: Worker) -> None:
    batch = submit(client, {"items": [item(spec=SPEC | {"model": "last-one"})]})
    claimed = worker.claim(jobs_of(client, batch)[0])
    ended = []

    def end() -> None:
        time.sleep(0.8)
        worker.succeed(claimed)
        ended.append(time.monotonic())

    ending = threading.Thread(target=end)
    ending.start()
    done = client.get(batch["urls"]["self"], params={"wait": 25}).json()
    ending.join()
    assert time.monotonic() - ended[0] < 15
    assert done["status"] == "completed" and counted(done) == {"total": 1, "succeeded": 1}


def test_results_are_lines_and_rows_in_order_of_index(client: httpx.Client, worker: Worker) -> None:
    labels = ["=1+1", 'a"b,c', "'; DROP TABLE jobs; --", "\uff1dcmd()", "a;@b"]
    spec = SPEC | {"model": "tell-me", "seed": 4_000_000_000}
    items = [item(spec=spec, custom_id=f"@{i}", labels=labels) for i in range(3)]
    batch = submit(client, {"items": items})
    jobs = jobs_of(client, batch)
    claimed = worker.claim(jobs[0])
    result = worker.succeed(claimed)
    response = client.get(batch["urls"]["results_jsonl"])
    assert response.headers["content-type"] == "application/jsonl"
    assert response.headers["content-disposition"] == (
        f'attachment; filename="batch-{batch["id"]}.jsonl"'
    )
    (line,) = response.text.splitlines()
    assert list(json.loads(line)["result"]) == list(Result.model_fields)
    assert json.loads(line) == {
        "index": 0,
        "custom_id": "@0",
        "job_id": jobs[0]["id"],
        "status": "succeeded",
        "error": None,
        "result": result,
    }
    response = client.get(batch["urls"]["results_csv"])
    assert response.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    (row,) = csv.DictReader(io.StringIO(response.text))
    assert row["index"] == "0" and row["custom_id"] == "'@0" and row["job_id"] == jobs[0]["id"]
    assert row["labels"] == "'=1+1;a\"b,c;'; DROP TABLE jobs; --;'\uff1dcmd();a;'@b"
    assert (row["status"], row["error_code"], row["converged"]) == ("succeeded", "", "true")
    assert (row["model"], row["layer"], row["seed"]) == ("tell-me", "fc1", "4000000000")
    assert float(row["spread"]) == 0.13 and float(row["mean_pairwise_distance"]) == 1.3
    assert row["accuracy"] == row["min_probability"] == row["warnings"] == row["notes"] == ""
    batch = submit(client, {"items": [item(spec=spec | {"seed": 1, "model": "fail-me"})]})
    worker.fail(worker.claim(jobs_of(client, batch)[0]), "diverged", "It diverged.")
    (row,) = csv.DictReader(io.StringIO(client.get(batch["urls"]["results_csv"]).text))
    assert (row["status"], row["error_code"]) == ("failed", "diverged")
    assert row["error_message"] == "It diverged."


def test_the_doorbell_rings_once_for_each_live_worker(
    service: Service, client: httpx.Client, redis: stack.Redis
) -> None:
    with Redis.from_url(redis.url) as broker:
        for live in (0, 1, 3):
            time.sleep(0.2)  # the last ring is over
            broker.delete(QUEUE)
            with service.engine.begin() as connection:
                connection.execute(text("DELETE FROM workers"))
                for number in range(live):
                    workers.register(connection, uuid4(), f"host/{number}", "cpu")
            submit(client, {"items": [JOB] * 5})
            rings = max(1, live)
            until(lambda: broker.llen(QUEUE) == rings)  # noqa: B023 - called at once
            time.sleep(0.1)
            assert broker.llen(QUEUE) == rings
    with service.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


def test_ten_thousand_items_are_accepted_while_others_are_answered(service: Service) -> None:
    items = [
        item(
            source=DIGITS[i % 10],
            target=DIGITS[(i + 1 + i // 10 % 9) % 10],
            spec={"preset": "paper-mnist", "seed": i},
            custom_id=f"c{i}",
        )
        for i in range(10_000)
    ]
    lines = [json.dumps(line) for line in items]
    polls: list[float] = []
    over = threading.Event()

    def poll() -> None:
        with service.client() as client:
            while not over.wait(0.02):
                began = time.monotonic()
                assert client.get("/livez").status_code == 200
                polls.append(time.monotonic() - began)

    polling = threading.Thread(target=poll)
    with service.client() as client:
        polling.start()
        began = time.monotonic()
        response = submit_lines(client, lines)
        took = time.monotonic() - began
        over.set()
        polling.join()
        assert counted(response.json()) == {"total": 10_000, "queued": 10_000}
        canceled = client.post(response.json()["urls"]["cancel"]).json()
        assert counted(canceled) == {"total": 10_000, "canceled": 10_000}
        rows = client.get(canceled["urls"]["results_csv"]).text.splitlines()
    assert len(rows) == 10_001
    # 2 s on two idle cores; the bounds leave room for a busy machine, not for a blocked loop.
    assert took < 20
    assert sorted(polls)[len(polls) // 2] < 0.2


def test_a_client_that_reads_slowly_holds_no_connection(service: Service) -> None:
    busy = text("""
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
    """)
    with service.client() as client:
        batch = submit(client, {"items": [JOB] * 5_000})
        client.post(batch["urls"]["cancel"])
        for url in (batch["urls"]["results_jsonl"], batch["urls"]["results_csv"]):
            with client.stream("GET", url) as response:
                next(response.iter_raw())
                time.sleep(0.3)  # now the buffers are full, or everything is sent
                with service.engine.connect() as connection:
                    assert connection.scalar(busy) == 0
        assert client.get(batch["urls"]["self"]).status_code == 200
