"""The client against a real HTTP server that answers what each test writes down."""

import io
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from polycollide import (
    ApiError,
    Client,
    JobFailed,
    PolycollideError,
    WaitTimeout,
    transport,
)
from polycollide.errors import InvalidInput

from .conftest import (
    JOB,
    PAIR,
    drop,
    job,
    late,
    parts,
    problem,
    reply,
)

JOBS, EVENTS = "POST /v1/jobs", "GET /v1/jobs/a/events"


# Submitting


def test_a_job_goes_out_as_the_contract_says(service, client):
    service.on(JOBS, reply(job(priority=3, from_the_future=[1]), 202))
    submitted = client.submit(
        *PAIR,
        spec={"preset": "paper-mnist", "corners": 3},
        corners=np.int64(8),
        labels="x",
        priority=3,
    )
    assert (submitted.id, submitted.status, submitted.done) == ("a", "queued", False)
    (received,) = service.received
    assert received.headers["authorization"] == "Bearer pc_test"
    assert len(received.headers["idempotency-key"]) >= 32
    assert received.json == {
        **{"source": PAIR[0], "target": PAIR[1], "labels": ["x"], "priority": 3},
        **{"spec": {"preset": "paper-mnist", "corners": 8}, "deadline_seconds": None},
    }


def test_own_images_travel_in_the_same_request(service, client, tmp_path):
    service.on(JOBS, reply(job(), 202))
    (tmp_path / "ü 3.png").write_bytes(b"a file")
    client.submit(tmp_path / "ü 3.png", np.eye(4), model="m", layer="l")
    (received,) = service.received
    form = parts(received)
    assert form["source"].get_payload(decode=True) == b"a file"
    assert Image.open(io.BytesIO(form["target"].get_payload(decode=True))).size == (4, 4)
    assert b'"spec": {"model": "m", "layer": "l"}' in form["job"].get_payload(decode=True)
    assert b"source" not in form["job"].get_payload(decode=True)


def test_two_calls_have_two_keys_and_a_key_of_ones_own_is_kept(service, client):
    service.on(JOBS, reply(job(), 202))
    for key in (None, None, "mine"):
        client.submit(*PAIR, idempotency_key=key)
    keys = [received.headers["idempotency-key"] for received in service.received]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


@pytest.mark.parametrize("fault", [problem(503, "unavailable"), drop, problem(429, "busy")])
def test_a_job_is_sent_again_with_the_same_key(service, client, fault):
    service.on(JOBS, fault, fault, reply(job(), 202))
    assert client.submit(b"own image", PAIR[1], model="m").id == "a"
    first, *again = service.received
    assert len(again) == 2
    for received in again:
        assert received.headers["idempotency-key"] == first.headers["idempotency-key"]
        assert parts(received)["source"].get_payload() == "own image"


def test_a_silent_server_is_asked_again(service):
    service.on(JOBS, late(1.0, reply(job(), 202)), reply(job("b"), 202))
    with Client(service.url, timeout=0.2) as client:
        assert client.submit(*PAIR).id == "b"


def test_retry_after_is_honoured(service, client):
    service.on(JOB, problem(503, "unavailable", Retry_After="0.5"), reply(job()))
    began = time.monotonic()
    client.job("a")
    assert 0.5 <= time.monotonic() - began < 30


@pytest.mark.parametrize("asked", ["3600", "Sat, 22 Nov 2036 12:00:00 GMT"])
def test_a_server_that_asks_for_an_hour_is_not_waited_for(service, client, asked):
    service.on(JOB, problem(429, "quota", "Enough for today.", Retry_After=asked))
    with pytest.raises(ApiError, match="Enough for today") as error:
        client.job("a")
    assert len(service.received) == 1
    assert error.value.retry_after > 3500


def test_a_server_that_stays_busy_is_given_up(service):
    service.on(JOB, problem(503, "unavailable", "The database does not answer."))
    with Client(service.url, max_retries=4) as client, pytest.raises(ApiError) as error:
        client.job("a")
    assert len(service.received) == 5
    assert (error.value.status, error.value.code) == (503, "unavailable")


def test_pauses_grow_at_random_up_to_ten_seconds():
    class State:
        outcome = None

    def pauses(attempt: int) -> list[float]:
        State.attempt_number = attempt
        return [transport._pause(State) for _ in range(500)]

    assert 0.2 < np.mean(pauses(1)) < 0.3
    assert max(pauses(1)) <= 0.5
    assert 1.7 < np.mean(pauses(4)) < 2.3
    assert 9 < max(pauses(30)) <= 10


def test_without_a_server_one_sentence_says_so_soon():
    began = time.monotonic()
    with (
        Client("http://127.0.0.1:9", "pc_secret") as client,
        pytest.raises(
            PolycollideError, match=r"No answer from http://127.0.0.1:9 .*`polycollide up`"
        ) as error,
    ):
        client.submit(*PAIR)
    assert time.monotonic() - began < 30
    assert "pc_secret" not in repr(error.value) + repr(client) + repr(vars(client))


# Errors


def test_a_problem_becomes_one_sentence_and_is_not_asked_for_again(service, client):
    errors = [{"loc": "body.spec.corners", "message": "Input should be at most 256"}]
    detail = "Fields cannot be used; `errors` lists them."
    service.on(JOBS, problem(422, "invalid_request", detail, errors=errors))
    with pytest.raises(ApiError) as error:
        client.submit(*PAIR, corners=300)
    assert str(error.value) == "Fields cannot be used: spec.corners: Input should be at most 256"
    assert (error.value.status, error.value.code) == (422, "invalid_request")
    assert error.value.errors == errors
    assert len(service.received) == 1


@pytest.mark.parametrize("answer", [reply(b"<html>hello"), reply(b"<html>", 404), reply([1])])
def test_another_kind_of_server_is_told_from_ours(service, client, answer):
    service.on(JOB, answer)
    with pytest.raises(ApiError, match="not as polycollide does; check POLYCOLLIDE_URL"):
        client.job("a")


def test_ids_with_slashes_stay_ids(service, client):
    with pytest.raises(ApiError) as error:
        client.cancel("../models?x")
    assert error.value.status == 404
    assert service.received[0].path == "/v1/jobs/..%2Fmodels%3Fx/cancel"


@pytest.mark.parametrize("key", ["pc_a\npc_b", "pc_ä", "pc_a\x00"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(key):
    with pytest.raises(PolycollideError, match="POLYCOLLIDE_API_KEY") as error:
        Client(api_key=key)
    assert "pc_" not in str(error.value)


def test_a_key_may_end_in_a_newline_and_a_url_in_its_version(service):
    service.on(JOB, reply(job()))
    with Client(f"{service.url}/v1/", "pc_test\n") as client:
        client.job("a")
    assert service.received[0].headers["authorization"] == "Bearer pc_test"


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "NO_PROXY"])
@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "socks4://x", "[::1]", "http://h:x"])
def test_no_proxy_of_the_environment_stands_before_this_machine(service, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    service.on(JOB, reply(job()))
    with Client(service.url) as client:
        assert client.job("a").id == "a"


def test_what_is_wrong_with_a_proxy_is_not_said_of_the_url(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(InvalidInput, match=r"proxy that the environment names .*ALL_PROXY"):
        Client("http://polycollide.invalid")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "socksio", None)  # importing it fails
    with pytest.raises(InvalidInput, match="for a SOCKS proxy, pip install socksio"):
        Client("http://polycollide.invalid")


def test_a_service_is_reached_by_an_address_of_version_6_and_below_a_prefix(monkeypatch):
    class Below(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/lab/v1/jobs/a"
            (reply(job()) if found else problem(404, "unknown"))(self)

        def log_message(self, *_: object) -> None:
            pass

    class Six(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with Six(("::1", 0), Below) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        for end in ("/lab", "/lab/", "/lab/v1/"):
            with Client(f"http://[::1]:{server.server_address[1]}{end}") as client:
                assert client.job("a").id == "a"
        server.shutdown()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beta": float("nan")}, "spec.beta is nan, which JSON has no form for"),
        ({"units": [1, [2, float("inf")]]}, "spec.units.1.1 is inf"),
        ({"units": np.array([1.0, np.nan])}, "spec.units.1 is nan"),
        ({"beta": "\udcff"}, "has characters that are no text"),
        ({"beta": {1, 2}}, "has no form in JSON"),
    ],
)
def test_what_json_has_no_form_for_is_said_and_not_sent(service, client, given, said):
    with pytest.raises(InvalidInput, match=said):
        client.submit(*PAIR, **given)
    with pytest.raises(InvalidInput, match=said.removeprefix("spec")):
        client.batch([{"source": PAIR[0], "target": PAIR[1], "spec": given}])
    assert not service.received


def test_address_and_key_come_from_the_environment(service, monkeypatch):
    monkeypatch.setenv("POLYCOLLIDE_URL", service.url)
    monkeypatch.setenv("POLYCOLLIDE_API_KEY", "pc_env")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    service.on(JOB, reply(job()))
    with Client() as client:
        client.job("a")
    assert service.received[0].headers["authorization"] == "Bearer pc_env"


# Waiting


def test_waiting_polls_until_the_job_is_done(service, client):
    seen = []
    service.on(
        JOB, reply(job()), drop, reply(job(status="running")), reply(job(status="succeeded"))
    )
    done = client.wait("a", on_progress=lambda job: seen.append(job.status))
    assert done.succeeded
    assert seen == ["queued", "running", "succeeded"]
    assert all(float(received.query["wait"]) > 0 for received in service.received)


def test_many_jobs_are_waited_for_in_order_and_not_all_at_once(service, client):
    ids = [f"j{i}" for i in range(60)]
    for id in ids:
        service.on(f"GET /v1/jobs/{id}", late(0.02, reply(job(id, "succeeded"))))
    assert [job.id for job in client.wait(ids)] == ids
    assert 4 < service.most_at_once <= 16


def test_a_timeout_is_a_timeout_error_and_has_the_jobs(service, client):
    service.on(JOB, reply(job(status="running")))
    service.on("GET /v1/jobs/b", reply(job("b", "succeeded")))
    with pytest.raises(TimeoutError, match="1 running") as error:
        client.wait(["a", "b"], timeout=0.4)
    assert isinstance(error.value, WaitTimeout)
    assert [job.id for job in error.value.jobs] == ["a"]
    assert error.value.job.status == "running"


def test_an_error_ends_the_waiting_for_all(service, client):
    service.on(JOB, reply(job(status="running")))
    service.on("GET /v1/jobs/b", problem(404, "unknown_job", "There is no such job."))
    with pytest.raises(ApiError, match="no such job"):
        client.wait(["a", "b"])


def test_a_failed_job_is_returned_and_raises_where_its_result_is_asked_for(service, client):
    error = {"code": "diverged", "message": "The loss became infinite."}
    service.on(JOB, reply(job(status="failed", error=error)))
    done = client.wait("a")
    assert (done.done, done.succeeded, done.error.code) == (True, False, "diverged")
    for use in (done.check, lambda: client.corners(done), lambda: client.download("a", "x")):
        with pytest.raises(JobFailed, match="Job a has no result: The loss became infinite"):
            use()
