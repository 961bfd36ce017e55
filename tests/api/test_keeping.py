"""What is kept, how much of it one key may have kept, and that what is deleted is gone."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from store import retention
from store.settings import Settings

from .conftest import JOB, MODEL, SPEC, Service, Worker, inline, png, serve, serving
from .test_images import sent

# As long as a spec may be: 32 768 units.
LONG = SPEC | {"units": [[*range(10**6, 10**6 + 4096)]] * 8, "corners": 8}


def submitted(client: httpx.Client, **given: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json=JOB | given)
    assert response.status_code == 202, response.text
    return dict(response.json())


def refused(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.json()["code"] == code
    return str(response.json()["detail"])


def count(service: Service, what: str) -> int:
    with service.engine.begin() as connection:
        return int(connection.scalar(text(f"SELECT {what}")) or 0)


def done(client: httpx.Client, worker: Worker, **given: Any) -> dict[str, Any]:
    """A job that has succeeded."""
    job = submitted(client, **given)
    worker.succeed(worker.claim(job), figure_png=png(seed=99))
    return job


def digest(client: httpx.Client, job: dict[str, Any], which: str = "source") -> str:
    return str(client.get(job["urls"]["self"]).json()[which]["sha256"])


@pytest.fixture
def own(new_settings: Callable[..., Settings]) -> Iterator[Service]:
    """A service with nothing in it."""
    with serve(new_settings()) as running:
        yield running


def test_items_with_one_spec_store_it_once(own: Service) -> None:
    digits = [f"sample:mnist/{digit}-0" for digit in range(6)]
    with own.client() as client:
        grid = {"grid": {"sources": digits, "targets": digits, "spec": LONG}}
        batch = client.post("/v1/batches", json=grid).json()
        assert batch["request_counts"]["queued"] == 30
        submitted(client, spec=LONG | {"figures": False, "snapshots": 0})
        (job, *_) = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
        assert job["spec"]["units"] == LONG["units"]
        told = client.get("/v1/usage").json()
    assert count(own, "count(*) FROM specs") == 1
    assert count(own, "count(*) FROM jobs WHERE spec IS NOT NULL") == 0
    size = count(own, "size FROM specs")
    assert size < 400_000
    # Of the jobs themselves next to nothing; with a spec each they took 12 MB.
    assert count(own, "sum(pg_column_size(jobs.*)) FROM jobs") < 31 * 2000
    assert 2 * size < told["specs"] < 2 * size + 2000  # and why six items were refused


def test_a_grid_of_long_specs_is_refused_before_it_fills_the_store(client: httpx.Client) -> None:
    """A megabyte could ask for 10 000 specs of 260 KB each."""
    seeds = [{"seed": seed} for seed in range(1000)]
    grid = {
        "sources": ["sample:mnist/3-0"],
        "targets": ["sample:mnist/7-0"],
        "spec": LONG,
        "settings": seeds,
    }
    response = client.post("/v1/batches", json={"grid": grid})
    assert "67,108,864 bytes together" in refused(response, 422, "too_many_specs")


def test_a_job_names_so_many_units_and_no_more(client: httpx.Client) -> None:
    more = LONG | {"units": [*LONG["units"], [1]], "corners": 9}
    response = client.post("/v1/jobs", json=JOB | {"spec": more})
    assert response.status_code == 422
    assert "32,769 units in all, over 32,768" in response.text


def test_a_page_ends_where_its_specs_become_long_and_none_is_left_out(own: Service) -> None:
    with own.client() as client:
        settings = [{"seed": seed} for seed in range(40)]
        grid = {"sources": ["sample:mnist/3-0"], "targets": ["sample:mnist/7-0"]}
        asked = {"grid": grid | {"spec": LONG, "settings": settings}}
        assert client.post("/v1/batches", json=asked).status_code == 202
        short = submitted(client)
        seen: list[str] = []
        cursor: str | None = None
        pages = 0
        while pages == 0 or cursor:
            at = {} if cursor is None else {"cursor": cursor}
            response = client.get("/v1/jobs", params={"limit": 50} | at)
            assert len(response.content) < 2 * 2**22  # JSON has a space behind each comma
            page = response.json()
            seen += [job["id"] for job in page["jobs"]]
            cursor, pages = page["next_cursor"], pages + 1
        assert pages > 1
        assert len(seen) == len(set(seen)) == 41 and seen[0] == short["id"]


def test_a_key_keeps_so_many_bytes_and_deleting_makes_room(
    new_settings: Callable[..., Settings],
) -> None:
    content = png((200, 200), seed=5)
    with serve(new_settings(max_key_bytes=2**20)) as service, service.client() as client:
        image = sent(client, content).json()
        told = client.get("/v1/usage").json()
        assert told["images"] == told["total"] == len(content) and told["limit"] == 2**20
        with serving(service.engine, MODEL):
            # A megabyte is set aside for the pictures of its result alone.
            response = client.post("/v1/jobs", json=JOB)
            assert "may keep 1.00 MiB" in refused(response, 403, "quota_exceeded")
            response = client.post("/v1/batches", json={"items": [JOB] * 30})
            refused(response, 403, "quota_exceeded")
            small = SPEC | {"figures": False, "snapshots": 0}
            job = submitted(client, spec=small)
            worker = Worker(service.engine)
            before = client.get("/v1/usage").json()
            worker.succeed(worker.claim(job), samples_npz=b"PK" * 1000)
            after = client.get("/v1/usage").json()
        assert 2000 < after["results"] < before["results"]
        for seed in range(100):
            response = sent(client, png((300, 300), seed=seed))
            if response.status_code == 403:
                break
        refused(response, 403, "quota_exceeded")
        assert client.delete(image["url"]).status_code == 204
        assert client.delete(job["urls"]["self"]).status_code == 204
        left = client.get("/v1/usage").json()
        assert left["results"] == left["specs"] == 0
        assert left["total"] < 2**20 - len(content)


def test_a_deleted_job_takes_its_own_images_along(client: httpx.Client, worker: Worker) -> None:
    source, target = png(seed=101), png(seed=102)
    given = {"source": inline(source), "target": inline(target)}
    first = done(client, worker, **given)
    second = done(client, worker, **given | {"target": inline(png())})
    ours, theirs = digest(client, first), digest(client, first, "target")
    assert client.get(f"/v1/images/{theirs}").status_code == 200
    assert client.delete(first["urls"]["self"]).status_code == 204
    assert client.get(f"/v1/images/{theirs}").status_code == 404  # nobody else's
    assert client.get(f"/v1/images/{ours}").status_code == 200  # the second job's, too
    assert client.delete(second["urls"]["self"]).status_code == 204
    assert client.get(f"/v1/images/{ours}").status_code == 404


def test_an_image_that_was_sent_by_itself_stays_until_it_is_deleted(
    client: httpx.Client, worker: Worker
) -> None:
    content = png(seed=103)
    early = done(client, worker, source=inline(content))
    image = sent(client, content).json()  # what came with a job is now kept for its own sake
    job = done(client, worker, source=f"sha256:{image['sha256']}")
    refused(client.delete(image["url"]), 409, "image_in_use")
    for each in (early, job):
        assert client.delete(each["urls"]["self"]).status_code == 204
    assert client.get(image["url"]).status_code == 200
    assert client.delete(image["url"]).status_code == 204
    refused(client.get(image["url"]), 404, "no_such_image")
    refused(client.delete(image["url"]), 404, "no_such_image")


def test_what_is_deleted_is_out_of_the_store_within_hours(own: Service) -> None:
    with own.client() as client:
        worker = Worker(own.engine)
        given = {"source": inline(png(seed=104)), "target": inline(png(seed=105))}
        job, _ = done(client, worker, **given), done(client, worker)
        kept = count(own, "count(*) FROM blobs")
        assert client.delete(job["urls"]["self"]).status_code == 204
        aging = "UPDATE blobs SET last_used_at = last_used_at - make_interval(mins => :minutes)"
        for minutes, gone in ((0, 0), (66, 2)):
            with own.engine.begin() as connection:
                connection.execute(text(aging), {"minutes": minutes})
                retention.walk(connection, "blobs", own.settings, retention.Place())
            # The corners and the figure are the other job's as well.
            assert count(own, "count(*) FROM blobs") == kept - gone


def test_a_batch_that_has_ended_is_deleted_with_all_that_is_its_own(keyed: Service) -> None:
    with keyed.client("ada") as ada, keyed.client("bob") as bob:
        items = [JOB | {"source": inline(png(seed=200 + i))} for i in range(3)]
        batch = ada.post("/v1/batches", json={"items": items}).json()
        url = batch["urls"]["self"]
        own = submitted(ada, source=inline(png(seed=200)))
        listed = ada.get(batch["urls"]["jobs"]).json()["jobs"]
        hashes = [job["source"]["sha256"] for job in listed]
        refused(bob.delete(url), 404, "unknown_batch")
        refused(ada.delete(url), 409, "batch_not_completed")
        ada.post(batch["urls"]["cancel"])
        assert ada.delete(url).status_code == 204
        refused(ada.get(url), 404, "unknown_batch")
        refused(ada.get(listed[0]["urls"]["self"]), 404, "unknown_job")
        still = [h for h in hashes if ada.get(f"/v1/images/{h}").status_code == 200]
        assert still == [own["source"]["sha256"]]
