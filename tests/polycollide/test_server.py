"""The commands that run the service, as an operator uses them: real processes, real kills."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from polycollide import Client, server, stack
from polycollide.server import Part

POLYCOLLIDE = Path(sys.executable).with_name("polycollide")
PAIR = ("sample:mnist/3-0", "sample:mnist/7-0")
# Runs until it is stopped.
ENDLESS = {
    **{"model": "mnist-mlp", "layer": "fc1", "figures": False},
    **{"l_pos_threshold": 1e-12, "learning_rate": 1e-6, "max_steps": 1_000_000},
}
# Says that it runs, and takes a second to end.
SLOW = (
    "import signal, sys, time; "
    "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), sys.exit(0))); "
    "print('slow', flush=True); time.sleep(600)"
)
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(600)"
)
# What `polycollide worker` does, with another worker.
KEEPER = """
import sys, typer
from polycollide import server

def keep(code: str) -> None:
    with server.in_one_sentence():
        ended = server.first_signal()
        part = server.Part("deaf", [sys.executable, "-c", code], grace=60)
        with server.running([part]) as processes:
            server.watch(processes, ended)

typer.run(keep)
"""


def environment(**settings: str) -> dict[str, str]:
    """Ours without its settings, without GPUs, with these settings."""
    own = {name: value for name, value in os.environ.items() if "POLYCOLLIDE_" not in name}
    given = {f"POLYCOLLIDE_{name.upper()}": value for name, value in settings.items()}
    return own | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | given


def polycollide(*argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [POLYCOLLIDE, *argv]
    return subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=200
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed has to say: one line."""
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextmanager
def up(data: Path, port: int, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`polycollide up`, once it says so."""
    command = [POLYCOLLIDE, "up", "--data", data, "--port", str(port), *more]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said = process.stdout.readline()
            assert f":{port}/docs" in said, process.stderr.read()
            yield process
        except BaseException:
            print((data / "polycollide.log").read_text()[-5000:])
            raise
        finally:
            process.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def ended(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_up_loses_no_job_to_kill_9_and_leaves_nothing_behind(new_data_directory, port, gone):
    data = new_data_directory()
    with up(data, port) as process, Client(f"http://127.0.0.1:{port}") as client:
        assert "every user of this machine can use it" in process.stdout.readline()
        # It is up once a worker is, so this one need not wait for a later doorbell.
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").json()["checks"]["workers"] == 1
        first = client.submit(*PAIR, preset="paper-mnist", figures=False)
        assert client.wait(first, timeout=120).status == "succeeded"
        second = client.submit(*PAIR, **ENDLESS)
        wait_until(lambda: client.job(second).status == "running")
        started = family(process)
        names = " ".join(" ".join(each.cmdline()) for each in started if not ended(each))
        for part in ("postgres", "-m api", "worker.reconciler", "worker.sweeper", "celery --quiet"):
            assert part in names
        process.kill()
        process.wait()
        assert gone(started, within=60)
    # What the worker says at its start would break a log of JSON lines.
    assert ".> transport:" not in (data / "polycollide.log").read_text()

    with up(data, port) as process, Client(f"http://127.0.0.1:{port}") as client:
        assert client.job(first).status == "succeeded"
        assert len(client.corners(first)) == 5
        assert client.job(second).status in ("queued", "running")
        started = family(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert gone(started, within=5)
        assert process.stderr.read() == ""


def test_up_for_a_lab_opens_to_the_network_with_keys_only(new_data_directory, port, gone):
    data = new_data_directory()
    refused = sentence(polycollide("up", "--data", str(data), "--host", "0.0.0.0"))
    assert "add --keys" in refused and not data.exists()
    with up(data, port, "--host", "0.0.0.0", "--keys") as process:
        url = f"http://127.0.0.1:{port}/v1/jobs"
        assert httpx.get(url).status_code == 401
        asks = process.stdout.readline()
        assert "It asks for keys" in asks and "TLS" in asks
        file = data / "environment"
        assert (
            f"`. {file}; polycollide keys create NAME`" in asks
            and file.stat().st_mode & 0o777 == 0o600
        )
        make = f". {file}; {POLYCOLLIDE} keys create ada"
        made = subprocess.run(
            ["sh", "-c", make], env=environment(), capture_output=True, text=True, timeout=60
        )
        key = {"Authorization": f"Bearer {made.stdout.strip()}"}
        assert httpx.get(url, headers=key).status_code == 200, made.stderr
        started = family(process)
        process.kill()
        process.wait()
        assert gone(started, within=20)


def test_up_says_that_a_port_is_taken_before_it_starts_anything(new_data_directory):
    data = new_data_directory()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = sentence(polycollide("up", "--data", str(data), "--port", str(port)))
    assert f"Port {port} cannot be used (Address already in use)" in refused
    assert "--port" in refused
    assert not data.exists()


def test_one_that_ends_by_itself_is_named_with_its_status_and_its_log(tmp_path):
    log = tmp_path / "log"
    parts = [
        Part("describe", [sys.executable, "-c", "pass"], lasts=False),
        Part("sleeper", ["sleep", "600"]),
        Part("API", [sys.executable, "-c", "raise SystemExit(7)"]),
    ]
    named = rf"^The API ended by itself with status 7; see {log}\.$"
    with server.running(parts, log=log) as processes:
        assert [process.name for process in processes] == ["sleeper", "API"]
        with pytest.raises(stack.StackError, match=named):
            server.watch(processes, [])
    assert not any(process.alive for process in processes)


def test_all_are_asked_to_end_before_any_is_waited_for(tmp_path):
    log = tmp_path / "log"
    parts = [Part(f"slow {i}", [sys.executable, "-c", SLOW]) for i in range(4)]
    with server.running(parts, log=log) as processes:
        wait_until(lambda: log.read_text().count("slow") == 4)
        began = time.monotonic()
    assert 3 <= time.monotonic() - began < 10, "one after the other takes 12 s"
    assert [process.popen.returncode for process in processes] == [0] * 4


def test_a_second_ctrl_c_ends_at_once_and_a_doubled_first_does_not(gone):
    command = [sys.executable, "-c", KEEPER, DEAF]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "deaf\n"
            started = family(process)
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130, "it does not wait for the grace of 60 s"
            assert gone(started, within=10)
        finally:
            process.kill()


def test_wrong_settings_are_named_in_a_sentence():
    wrong = sentence(polycollide("worker", port="many", mode="local"))
    assert wrong.startswith("Error: POLYCOLLIDE_PORT: Input should be a valid integer")
    wrong = sentence(polycollide("migrate", database_url="nowhere"))
    assert wrong == "Error: POLYCOLLIDE_DATABASE_URL is not the URL of a database.\n"


@pytest.mark.parametrize("command", ["api", "worker"])
def test_server_mode_refuses_a_default_password(command):
    url = "postgresql://polycollide@127.0.0.1:1/polycollide"
    refused = sentence(polycollide(command, database_url=url))
    assert "default password" in refused and "POLYCOLLIDE_DATABASE_PASSWORD" in refused


def test_a_database_that_is_away_is_a_sentence():
    url = "postgresql://polycollide:secret@127.0.0.1:1/polycollide"
    away = sentence(polycollide("keys", "list", database_url=url))
    assert "The database does not answer" in away
    assert "`polycollide up` runs needs no keys" in away
    assert "secret" not in away


def test_server_mode_takes_requests_with_an_open_key_only(empty_database, redis, port):
    settings = {"mode": "server", "database_url": empty_database, "redis_url": redis.url}
    assert "`polycollide migrate`" in sentence(polycollide("keys", "list", **settings))
    assert polycollide("migrate", **settings).returncode == 0

    made = polycollide("keys", "create", "ada", **settings)
    key = made.stdout.strip()
    mark, prefix, _ = key.split("_", 2)
    assert (mark, made.returncode) == ("pc", 0)
    listed = polycollide("keys", "list", **settings).stdout
    assert "ada" in listed and prefix in listed and key not in listed

    url = f"http://127.0.0.1:{port}/v1/jobs"
    authorization = {"Authorization": f"Bearer {key}"}
    env = environment(**settings, host="127.0.0.1", port=str(port))
    with subprocess.Popen([POLYCOLLIDE, "api"], env=env, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: process.poll() is not None or answers(port))
            assert httpx.get(url).status_code == 401
            assert httpx.get(url, headers={"Authorization": "Bearer pc_no"}).status_code == 401
            assert httpx.get(url, headers=authorization).status_code == 200
            assert polycollide("keys", "revoke", prefix, **settings).returncode == 0
            assert httpx.get(url, headers=authorization).status_code == 401
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()
    unknown = sentence(polycollide("keys", "revoke", "unknown", **settings))
    assert "There is no open key 'unknown'" in unknown


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/livez").is_success
    except httpx.TransportError:
        return False
