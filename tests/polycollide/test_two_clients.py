"""`Client` and `AsyncClient`: the same methods, one of them with a thread of its own."""

import asyncio
import inspect
import subprocess
import sys
import threading
import time

import pytest

from polycollide import (
    AsyncClient,
    Client,
    PolycollideError,
)

from .conftest import (
    END,
    JOB,
    PAIR,
    RUNNING,
    job,
    late,
    reply,
    stream,
)

JOBS, EVENTS = "POST /v1/jobs", "GET /v1/jobs/a/events"


def test_both_clients_have_the_same_methods():
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, callable)
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)
    assert "corners" in public(Client)
    assert Client.corners.__doc__ == AsyncClient.corners.__doc__


def test_the_async_client_shares_one_loop_with_its_caller(service):
    service.on(JOBS, reply(job(), 202))
    service.on(JOB, late(0.1, reply(job(status="succeeded"))))
    service.on(EVENTS, stream(RUNNING, END))

    async def use() -> list[str]:
        async with AsyncClient(service.url) as client:
            submitted = await client.submit(*PAIR)
            done, _ = await asyncio.gather(client.wait(submitted), asyncio.sleep(0))
            return [done.status, *[event.id async for event in client.events("a")]]

    assert asyncio.run(use()) == ["succeeded", "1", "4"]


def test_the_blocking_client_works_inside_a_running_loop_as_in_a_notebook(service, client):
    service.on(JOB, reply(job()))

    async def cell() -> str:
        return client.job("a").id

    assert asyncio.run(cell()) == "a"


def test_threads_share_a_client(service, client):
    service.on(JOB, late(0.5, reply(job())))
    threads = [threading.Thread(target=client.job, args=("a",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.most_at_once > 1, "none waits for another's answer"
    assert len(service.received) == 8


def test_a_closed_client_and_a_callback_that_uses_its_own_say_so(service):
    service.on(JOB, reply(job(status="succeeded")))
    with Client(service.url) as client, pytest.raises(PolycollideError, match="callback"):
        client.wait("a", on_progress=client.job)
    with pytest.raises(PolycollideError, match="closed"):
        client.job("a")
    client.close()


def test_closing_a_client_ends_what_other_threads_wait_for(service):
    service.on(JOB, reply(job(status="running")))
    client, ends = Client(service.url), []

    def wait() -> None:
        try:
            client.wait("a")
        except PolycollideError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(service.received) < 3:
        time.sleep(0.01)
    client.close()
    for thread in threads:
        thread.join()
    assert ends == ["This client was closed meanwhile; make a new one."] * 3


def test_a_client_that_is_let_go_ends_its_thread(service):
    service.on(JOB, reply(job()))
    client = Client(service.url)
    client.job("a")
    thread = client._thread
    del client
    thread.join(5)
    assert not thread.is_alive()


def test_a_client_survives_a_fork_and_the_end_of_a_program_that_does_not_close_it(service):
    service.on(JOB, reply(job()))
    code = f"""if True:
        import os
        from polycollide import Client
        client = Client({service.url!r})
        print(client.job("a").id, flush=True)
        child = os.fork()
        if not child:
            print(client.job("a").id, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(client.job("a").id, flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200
    )
    assert (done.stdout.split(), done.stderr) == (["a", "a", "a"], "")


def test_the_client_needs_neither_torch_nor_core_nor_pillow():
    code = """if True:
        import sys
        import polycollide
        assert not {"numpy", "httpx", "pydantic"} & set(sys.modules), "import polycollide is light"
        from polycollide import Client, AsyncClient, JobFailed, Batch
        import polycollide.remote
        print({"torch", "core", "PIL", "matplotlib", "sqlalchemy", "fastapi"} & set(sys.modules))
        try:
            polycollide.nothing
        except AttributeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "module 'polycollide' has no attribute 'nothing'"]
