"""Who may ask, and what one key may see of another's."""

import socket
from collections.abc import Callable, Iterator
from uuid import UUID

import httpx
import pytest

from store import keys
from store.settings import Settings

from .conftest import JOB, SPEC, Service, Worker, inline, png

NOBODYS = UUID(int=0)  # a job that is not there
ROUTES = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", f"/v1/jobs/{NOBODYS}"),
    ("DELETE", f"/v1/jobs/{NOBODYS}"),
    ("POST", f"/v1/jobs/{NOBODYS}/cancel"),
    ("GET", f"/v1/jobs/{NOBODYS}/events"),
    ("GET", f"/v1/jobs/{NOBODYS}/corners/0.png"),
    ("POST", "/v1/images"),
    ("GET", f"/v1/images/{'0' * 64}"),
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/models"),
]


@pytest.fixture
def alice(keyed: Service) -> Iterator[httpx.Client]:
    with keyed.client("alice") as client:
        yield client


@pytest.fixture
def bob(keyed: Service) -> Iterator[httpx.Client]:
    with keyed.client("bob") as client:
        yield client


@pytest.mark.parametrize("method, path", ROUTES)
@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer x", "Basic cGNfOg==", "wrong"])
def test_without_a_valid_key_nothing_is_answered(
    keyed: Service, method: str, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    if authorization == "wrong":
        key = keyed.key("alice")
        headers["Authorization"] = f"Bearer {key[:-1]}{'a' if key[-1] != 'a' else 'b'}"
    with keyed.client() as client:
        response = client.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.json()["code"] == "unauthorized"
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_a_revoked_key_opens_nothing(keyed: Service) -> None:
    with keyed.client("carol") as client:
        assert client.get("/v1/jobs").status_code == 200
        with keyed.engine.begin() as connection:
            revoked = keys.revoke(connection, keyed.key("carol").split("_")[1])
        assert revoked is not None and revoked.name == "carol"
        assert client.get("/v1/jobs").status_code == 401


def test_another_keys_things_are_not_there(
    keyed: Service, alice: httpx.Client, bob: httpx.Client
) -> None:
    own = {"source": inline(png(seed=71)), "target": inline(png(seed=72)), "spec": SPEC}
    job = alice.post("/v1/jobs", json=own).json()
    worker = Worker(keyed.engine)
    worker.succeed(worker.claim(job), figure_png=png())
    job = alice.get(job["urls"]["self"]).json()
    assert job["status"] == "succeeded"
    urls = job["urls"]
    paths = [urls["self"], urls["events"], urls["figure_png"], *urls["corners"]]
    paths += [f"/v1/images/{job['source']['sha256']}"]
    for path in paths:
        assert bob.get(path).status_code == 404, path
        assert alice.get(path).status_code == 200, path
    assert bob.post(urls["cancel"]).status_code == 404
    assert bob.delete(urls["self"]).status_code == 404
    assert bob.get("/v1/jobs").json()["jobs"] == []
    stolen = JOB | {"source": f"sha256:{job['source']['sha256']}"}
    assert bob.post("/v1/jobs", json=stolen).json()["code"] == "unknown_image"
    assert alice.get(urls["self"]).status_code == 200


def test_two_keys_may_use_the_same_idempotency_key(alice: httpx.Client, bob: httpx.Client) -> None:
    headers = {"Idempotency-Key": "mine"}
    ids = {
        client.post("/v1/jobs", json=JOB | {"labels": [label]}, headers=headers).json()["id"]
        for label, client in (("a", alice), ("b", bob))
    }
    assert len(ids) == 2


def test_without_a_key_the_answer_comes_before_the_body(keyed: Service) -> None:
    url = httpx.URL(keyed.url)
    with socket.create_connection((url.host, url.port or 80), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000\r\n\r\n"
        )
        assert b" 401 " in connection.recv(1000)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", ""])
def test_without_keys_only_localhost_is_answered(service: Service, host: str) -> None:
    with service.client() as client:
        response = client.get("/v1/jobs", headers={"Host": host})
    assert response.status_code in (400, 403)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost", "http://127.0.0.1:1", ""]
)
def test_without_keys_no_page_of_another_site_may_ask(service: Service, origin: str) -> None:
    with service.client() as client:
        response = client.post("/v1/jobs", json=JOB, headers={"Origin": origin})
        assert response.status_code == 403 and response.json()["code"] == "foreign_page"
        own = {"Origin": service.url}
        assert client.post("/v1/jobs", json=JOB, headers=own).status_code == 202


def test_in_local_mode_a_key_is_taken_too(service: Service) -> None:
    with service.client("dora") as client, service.client() as nobody:
        job = client.post("/v1/jobs", json=JOB).json()
        assert client.get(job["urls"]["self"]).status_code == 200
        assert nobody.get(job["urls"]["self"]).status_code == 404
        wrong = {"Authorization": f"Bearer pc_{'a' * 8}_{'b' * 43}"}
        assert nobody.get("/v1/jobs", headers=wrong).status_code == 401


def test_beyond_loopback_keys_are_needed_even_in_local_mode(
    new_settings: Callable[..., Settings],
) -> None:
    assert not new_settings(host="0.0.0.0").keyless
    assert new_settings(host="::1").keyless


def test_the_built_in_key_cannot_be_used_by_name(keyed: Service) -> None:
    with keyed.client() as client:
        for key in ("local", "pc_local_", f"pc_local000_{'0' * 43}", "pc__"):
            headers = {"Authorization": f"Bearer {key}"}
            assert client.get("/v1/jobs", headers=headers).status_code == 401
