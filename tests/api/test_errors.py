"""Whatever goes wrong, the answer is a problem that says what to do."""

import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from sqlalchemy import make_url

from polycollide import stack
from store.settings import Settings

from .conftest import JOB, Service, serve


def problem(response: httpx.Response, status: int) -> dict[str, object]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, object] = response.json()
    assert found["status"] == status and found["title"] and found["detail"] and found["code"]
    return found


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/jobs/", "/v2/jobs", "/v1/../x"])
def test_unknown_paths_are_problems(client: httpx.Client, path: str) -> None:
    problem(client.get(path), 404)


def test_wrong_methods_are_problems_that_name_the_right_ones(client: httpx.Client) -> None:
    response = client.put("/v1/jobs")
    problem(response, 405)
    assert response.headers["allow"] == "GET, POST"
    assert client.patch(f"/v1/jobs/{'0' * 32}").headers["allow"] == "GET, DELETE"


def test_validation_errors_name_fields_but_not_their_values(client: httpx.Client) -> None:
    found = problem(client.get("/v1/jobs", params={"limit": "s3cret"}), 422)
    assert found["errors"] == [
        {
            "loc": "query.limit",
            "message": "Input should be a valid integer, unable to parse string as an integer",
        }
    ]


def test_every_answer_bears_an_id_that_a_client_may_choose(client: httpx.Client) -> None:
    given = client.get("/v1/jobs", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.headers["x-content-type-options"] == "nosniff"
    for bad in ("a b", "x" * 65, 'a"b', ""):
        response = client.get("/v1/nothing", headers={"X-Request-Id": bad})
        assert len(response.headers["x-request-id"]) == 32


@pytest.fixture(scope="module")
def small(new_settings: Callable[..., Settings]) -> Iterator[Service]:
    with serve(new_settings(max_body_bytes=10_000)) as running:
        yield running


def test_a_body_over_the_limit_is_refused_by_its_announced_length(small: Service) -> None:
    with small.client() as client:
        content = b" " * 20_000
        response = client.post(
            "/v1/jobs", content=content, headers={"Content-Type": "application/json"}
        )
        assert problem(response, 413)["code"] == "body_too_large"
        assert "over 10,000 bytes" in response.json()["detail"]
        files = {"file": ("a.png", content)}
        assert problem(client.post("/v1/images", files=files), 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    "media_type", ["application/json", "multipart/form-data; boundary=b", "application/jsonl"]
)
def test_a_body_over_the_limit_is_refused_while_it_comes(small: Service, media_type: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b" " * 1000

    path = "/v1/batches" if media_type == "application/jsonl" else "/v1/jobs"
    with small.client() as client:
        response = client.post(path, content=chunks(), headers={"Content-Type": media_type})
        assert problem(response, 413)["code"] == "body_too_large"


def test_a_client_that_goes_away_does_no_harm(service: Service) -> None:
    url = httpx.URL(service.url)
    for _ in range(5):
        with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
    with service.client() as client:
        assert client.post("/v1/jobs", json=JOB).status_code == 202


def test_without_postgres_the_answer_is_503_and_with_it_all_goes_on(
    new_data_directory: Callable[[], object], redis: stack.Redis
) -> None:
    from store.database import migrate

    with stack.Postgres.start(new_data_directory()) as postgres:  # type: ignore[arg-type]
        settings = Settings(mode="local", database_url=postgres.url, redis_url=redis.url)
        assert make_url(postgres.url).password
        migrate(settings)
        with serve(settings) as service, service.client() as client:
            job = client.post("/v1/jobs", json=JOB).json()
            postgres.kill()
            for response in (
                client.get(job["urls"]["self"]),
                client.post("/v1/jobs", json=JOB),
                client.get(job["urls"]["self"], params={"wait": 1}),
            ):
                assert problem(response, 503)["code"] == "unavailable"
                assert int(response.headers["retry-after"]) > 0
            postgres.restart()
            assert client.get(job["urls"]["self"]).json()["status"] == "queued"
            # Those who wait hear again, too, within the second that listening takes to recover.
            time.sleep(2.5)
            began = time.monotonic()
            cancel = client.post(job["urls"]["cancel"])
            assert cancel.json()["status"] == "canceled"
            found = client.get(job["urls"]["self"], params={"wait": 20}).json()
            assert found["status"] == "canceled" and time.monotonic() - began < 15


def test_without_redis_jobs_are_accepted_all_the_same(
    new_settings: Callable[..., Settings],
) -> None:
    with serve(new_settings(redis_url="redis://127.0.0.1:1/0")) as fresh, fresh.client() as client:
        began = time.monotonic()
        assert [client.post("/v1/jobs", json=JOB).status_code for _ in range(20)] == [202] * 20
        assert time.monotonic() - began < 15, "who waited for Redis would take 40 s"
