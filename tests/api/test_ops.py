"""What the service tells of itself: models, health, numbers."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import text

from api.cached import Cached
from store import queue, workers
from store.settings import Settings

from .conftest import JOB, PATCH_SET, SPEC, Service, Worker, serve

LAYERS = [
    {"name": name, "kind": "relu", "shape": [256], "units": 256, "cut": True, "cut_proved": proved}
    for name, proved in (("fc1", True), ("fc2", False))
]


def model(name: str = "mnist-mlp", **given: Any) -> dict[str, Any]:
    report = {
        "name": name,
        "weights": ["shipped"],
        "input_shape": [1, 28, 28],
        "classes": None,
        "origin": "polycollide",
        "ready": True,
    }
    return report | given


@contextmanager
def slot(
    service: Service,
    name: str,
    *models: dict[str, Any],
    patch_sets: Sequence[dict[str, Any]] = (),
    rate: float = 0,
) -> Iterator[str]:
    """A live worker in a slot, and what it serves."""
    with service.engine.begin() as connection:
        workers.register(connection, worker := uuid4(), name, "cpu")
        workers.heartbeat(
            connection,
            worker,
            slot=name,
            device="cpu",
            steps_per_second=rate,
            fresh_for=service.settings.fresh_for,
        )
        workers.report_models(connection, name, models)
        workers.report_patch_sets(connection, name, patch_sets)
    try:
        yield name
    finally:
        with service.engine.begin() as connection:
            workers.leave(connection, name)


def report_layers(service: Service, name: str, of: str = "mnist-mlp") -> None:
    with service.engine.begin() as connection:
        workers.report_layers(connection, name, of, list("0123456789"), LAYERS)


def make_stale(service: Service, name: str) -> None:
    """As if the worker had fallen silent."""
    with service.engine.begin() as connection:
        connection.execute(
            text("UPDATE workers SET heartbeat_at = now() - interval '11 s' WHERE slot = :slot"),
            {"slot": name},
        )


def numbers(client: httpx.Client, path: str = "/metrics") -> dict[str, float]:
    """What is scraped: the samples by name and status."""
    response = client.get(path)
    assert response.status_code == 200
    return {
        sample.name + sample.labels.get("status", ""): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name.startswith("polycollide_")
    }


def test_models_are_those_of_running_workers(service: Service, client: httpx.Client) -> None:
    assert client.get("/v1/models").json() == {"models": []}
    with slot(service, "a/cpu", model()), slot(service, "b/cpu", model("vgg16")):
        make_stale(service, "b/cpu")
        assert client.get("/v1/models").json() == {
            "models": [
                {
                    "name": "mnist-mlp",
                    "weights": ["shipped"],
                    "input_shape": [1, 28, 28],
                    "classes": None,
                    "origin": "polycollide",
                    "ready": True,
                    "layers_known": False,
                    "url": "/v1/models/mnist-mlp",
                }
            ]
        }
        with service.engine.begin() as connection:
            workers.drain(connection, "a/cpu")
        assert client.get("/v1/models").json() == {"models": []}


def test_slots_are_merged_the_latest_report_first(service: Service, client: httpx.Client) -> None:
    old, new = model(ready=True, origin="old"), model(ready=False, origin="new")
    with slot(service, "a/cpu", old), slot(service, "b/cpu", new):
        report_layers(service, "a/cpu")
        (only,) = client.get("/v1/models").json()["models"]
        assert (only["origin"], only["ready"], only["layers_known"]) == ("new", True, True)
        assert only["classes"] == 10
        with service.engine.begin() as connection:
            workers.report_models(connection, "b/cpu", [model(weights=["other"], ready=False)])
        (only,) = client.get("/v1/models").json()["models"]
        assert only["weights"] == ["other"] and only["layers_known"] is False
        assert only["classes"] is None


def test_a_model_tells_its_layers_and_classes(service: Service, client: httpx.Client) -> None:
    with slot(service, "a/cpu", model(), model("odd#1(x)+.y")):
        assert client.get("/v1/models/mnist-mlp").json()["layers"] is None
        report_layers(service, "a/cpu")
        found = client.get("/v1/models/mnist-mlp").json()
        assert found["layers"] == LAYERS
        assert found["class_names"] == list("0123456789") and found["classes"] == 10
        odd = client.get("/v1/models").json()["models"][1]
        assert client.get(odd["url"]).json()["name"] == "odd#1(x)+.y"


def test_an_unknown_model_is_answered_with_near_names(
    service: Service, client: httpx.Client
) -> None:
    with slot(service, "a/cpu", model()):
        response = client.get("/v1/models/mnist-mpl")
        assert response.status_code == 404
        assert response.json()["code"] == "unknown_model"
        assert "did you mean 'mnist-mlp'?" in response.json()["detail"]
    for name in ("mnist-mlp", "%27;%20DROP%20TABLE%20models;--", "%00", "x" * 201):
        assert client.get(f"/v1/models/{name}").status_code in (404, 422)


def test_patch_sets_are_those_of_running_workers(service: Service, client: httpx.Client) -> None:
    assert client.get("/v1/patch-sets").json() == {"patch_sets": []}
    birds = PATCH_SET | {"name": "birds", "index": "ivf-pq"}
    with (
        slot(service, "a/cpu", patch_sets=[PATCH_SET]),
        slot(service, "b/cpu", patch_sets=[birds, PATCH_SET]),
        slot(service, "c/cpu", patch_sets=[PATCH_SET | {"name": "silent"}]),
    ):
        make_stale(service, "c/cpu")
        shown = [
            given | {"workers": count, "differs": False, "url": f"/v1/patch-sets/{given['name']}"}
            for given, count in ((birds, 1), (PATCH_SET, 2))
        ]
        assert client.get("/v1/patch-sets").json() == {"patch_sets": shown}
        assert client.get("/v1/patch-sets/photos").json() == shown[1]


def test_of_different_patch_sets_with_one_name_the_latest_is_shown_and_that_it_differs(
    service: Service, client: httpx.Client
) -> None:
    other = PATCH_SET | {"sha256": "b" * 64, "images": 9}
    with (
        slot(service, "a/cpu", patch_sets=[PATCH_SET]),
        slot(service, "b/cpu", patch_sets=[PATCH_SET]),
        slot(service, "c/cpu", patch_sets=[other]),
    ):
        shown = client.get("/v1/patch-sets/photos").json()
        assert (shown["sha256"], shown["images"]) == ("b" * 64, 9)  # the latest
        assert (shown["workers"], shown["differs"]) == (1, True)
        with service.engine.begin() as connection:
            workers.report_patch_sets(connection, "c/cpu", [PATCH_SET])
        (shown,) = client.get("/v1/patch-sets").json()["patch_sets"]
        assert (shown["sha256"], shown["workers"], shown["differs"]) == ("a" * 64, 3, False)


def test_an_unknown_patch_set_is_answered_with_near_names(
    service: Service, client: httpx.Client
) -> None:
    with slot(service, "a/cpu", patch_sets=[PATCH_SET]):
        response = client.get("/v1/patch-sets/photo")
        assert (response.status_code, response.json()["code"]) == (404, "unknown_patch_set")
        assert "did you mean 'photos'?" in response.json()["detail"]
    for name in ("photos", "%27;%20DROP%20TABLE%20patch_sets;--", "%00", "x" * 201):
        assert client.get(f"/v1/patch-sets/{name}").status_code in (404, 422)


def test_models_and_patch_sets_need_a_key_and_probes_need_none(keyed: Service) -> None:
    with keyed.client() as nobody:
        assert nobody.get("/v1/models").status_code == 401
        assert nobody.get("/v1/models/mnist-mlp").status_code == 401
        assert nobody.get("/v1/patch-sets").status_code == 401
        assert nobody.get("/v1/patch-sets/photos").status_code == 401
        for path in ("/livez", "/readyz", "/metrics"):
            assert nobody.get(path).status_code == 200
            assert nobody.get(f"/v1{path}").status_code == 404


def test_a_healthy_service_is_ready(service: Service, client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    with slot(service, "a/cpu"):
        response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "checks": {"database": "ok", "schema": "ok", "redis": "ok", "workers": 1},
    }


def test_without_redis_the_service_is_degraded_and_takes_jobs(
    new_settings: Callable[..., Settings],
) -> None:
    settings = new_settings(redis_url=SecretStr("redis://127.0.0.1:1/0"))
    with serve(settings) as own, own.client() as client:
        response = client.get("/readyz")
        assert response.status_code == 200
        assert response.json()["status"] == "degraded"
        assert response.json()["checks"]["redis"] == "unavailable"
        assert client.post("/v1/batches", json={"items": [JOB]}).status_code == 202


@pytest.mark.parametrize(
    "change, schema",
    [
        ("UPDATE alembic_version SET version_num = '0001'", "behind"),
        ("DELETE FROM alembic_version", "behind"),
        ("DROP TABLE alembic_version", "behind"),
    ],
)
def test_with_an_older_schema_the_service_is_not_ready(
    new_settings: Callable[..., Settings], change: str, schema: str
) -> None:
    with serve(new_settings()) as own, own.client() as client:
        with own.engine.begin() as connection:
            connection.execute(text(change))
        response = client.get("/readyz")
        assert response.status_code == 503
        assert response.json()["status"] == "unavailable"
        assert response.json()["checks"]["schema"] == schema
        assert response.json()["checks"]["database"] == "ok"


def test_with_a_newer_schema_the_service_is_ready(new_settings: Callable[..., Settings]) -> None:
    """Migrations expand first, so that an API of before goes on until it is replaced."""
    with serve(new_settings()) as own, own.client() as client:
        with own.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        response = client.get("/readyz")
        assert response.status_code == 200
        assert (response.json()["status"], response.json()["checks"]["schema"]) == ("ok", "newer")


@pytest.mark.parametrize("hangs", [False, True])
def test_without_a_database_the_service_says_so_in_time(
    new_settings: Callable[..., Settings], hangs: bool
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if hangs:
            silent.listen()
        url = f"postgresql://polycollide:x@127.0.0.1:{silent.getsockname()[1]}/polycollide"
        with serve(new_settings(database_url=url)) as own, own.client() as client:
            for _ in range(3):
                began = time.monotonic()
                response = client.get("/readyz")
                assert time.monotonic() - began < 4.9, "connecting gives up after 5 s"
                assert response.status_code == 503
                assert response.json()["status"] == "unavailable"
                checks = response.json()["checks"]
                assert (checks["database"], checks["workers"]) == ("unavailable", None)
                assert (checks["schema"], checks["redis"]) == ("unknown", "ok")
            assert client.get("/livez").json() == {"status": "ok"}
            began = time.monotonic()
            found = numbers(client)
            assert time.monotonic() - began < 4
            assert found["polycollide_database_up"] == 0
            assert "polycollide_queue_depth" not in found


def test_numbers_are_those_of_the_database(new_settings: Callable[..., Settings]) -> None:
    with serve(new_settings()) as own, own.client() as client:
        spec = SPEC | {"model": "counted"}
        batch = client.post("/v1/batches", json={"items": [JOB | {"spec": spec}] * 3}).json()
        jobs = client.get(batch["urls"]["jobs"]).json()["jobs"]
        worker = Worker(own.engine)
        claimed = worker.claim(jobs[0])
        worker.succeed(claimed)
        client.post("/v1/jobs", json=JOB | {"labels": ["secret label"]})
        with own.engine.begin() as connection:
            queue.count(connection, "claims", 3)
            queue.count(connection, "lease_losses", 2)
            connection.execute(
                text("UPDATE jobs SET queued_at = now() - interval '1 h' WHERE status = 'queued'")
            )
        with slot(own, "a/cpu", rate=12.5), slot(own, "b/cpu", rate=7.5):
            found = numbers(client)
        body = client.get("/metrics").text
    assert found["polycollide_database_up"] == 1
    assert found["polycollide_queue_depth"] == found["polycollide_jobsqueued"] == 1
    assert 3600 <= found["polycollide_queue_age_seconds"] < 3700
    assert found["polycollide_jobsrunning"] == 2 and found["polycollide_jobssucceeded"] == 1
    assert found["polycollide_jobsfailed"] == found["polycollide_jobscanceling"] == 0
    assert found["polycollide_workers"] == 2 and found["polycollide_steps_per_second"] == 20
    assert found["polycollide_lease_losses_total"] == 2
    assert found["polycollide_claims_total"] >= 3
    assert "secret" not in body and "local" not in body and "counted" not in body


def test_an_empty_queue_has_no_age(new_settings: Callable[..., Settings]) -> None:
    with serve(new_settings()) as own, own.client() as client:
        found = numbers(client)
    assert found["polycollide_queue_depth"] == found["polycollide_queue_age_seconds"] == 0
    assert found["polycollide_claims_total"] == 0


def test_openmetrics_is_spoken_where_it_is_asked_for(client: httpx.Client) -> None:
    accept = "application/openmetrics-text; version=1.0.0"
    response = client.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n") and "polycollide_claims_total" in response.text


def test_scrapes_do_not_count_finished_jobs_each_time(
    client: httpx.Client,
) -> None:
    first = numbers(client)
    job = client.post("/v1/jobs", json=JOB).json()
    client.post(job["urls"]["cancel"])
    assert numbers(client)["polycollide_jobscanceled"] == first["polycollide_jobscanceled"]


def test_a_slow_question_is_asked_once_and_its_last_answer_kept() -> None:
    asked: list[int] = []

    async def look() -> None:
        quick = asyncio.Event()

        async def ask() -> int:
            asked.append(len(asked) + 1)
            number = asked[-1]
            if number > 1:
                await quick.wait()
            if number == 3:
                raise OSError("away")
            return number

        stale = Cached(ask, patience=0.05, stale=True)
        assert await stale.get() == 1
        assert await asyncio.gather(*(stale.get() for _ in range(5))) == [1] * 5
        assert asked == [1, 2]
        quick.set()
        assert await stale.get() == 2
        quick.clear()
        impatient = Cached(ask, patience=0.05)
        assert await impatient.get() is None and asked == [1, 2, 3]
        quick.set()
        assert await impatient.get() is None, "it failed"
        assert await Cached(ask, patience=60, max_age=9).get() == 4

    asyncio.run(look())
