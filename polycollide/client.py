"""The service from Python: `AsyncClient`, and `Client`, which is the same and blocks."""

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from polycollide.batches import BatchesClient
from polycollide.errors import PolycollideError
from polycollide.transport import Transport

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClient(BatchesClient):
    """Submits jobs to a polycollide service, waits for them, and fetches what they found.

    `base_url` and `api_key` come from POLYCOLLIDE_URL (else http://127.0.0.1:8000) and
    POLYCOLLIDE_API_KEY. `timeout` bounds the silence of a server in seconds. Requests that meet a
    broken connection, a silent or a busy server are sent again up to `max_retries` times within
    about half a minute, those that wait for two minutes; jobs and batches carry an Idempotency-Key,
    so that none comes in twice.

    >>> async with AsyncClient() as client:  # doctest: +SKIP
    ...     job = await client.submit("3.png", "sample:mnist/7-0", model="mnist-mlp", layer="fc1")
    ...     corners = await client.corners(await client.wait(job))

    An image is a path, the bytes of a file, an array (floats in [0, 1] as [H, W] or [C, H, W], or
    uint8 as [H, W] or [H, W, 3]), a sample ("sample:mnist/3-0") or what `upload` gave.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 10,
    ) -> None:
        self._transport = Transport(base_url, api_key, timeout, max_retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._transport.http.aclose()


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """The same method for callers that block."""

    @wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda client: method(client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate["Client", P], Iterator[T]]:
    """The same method for callers that block, an item at a time."""

    @wraps(method)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        stream: AsyncGenerator[T] | None = None

        async def step(client: AsyncClient) -> T | None:
            nonlocal stream
            stream = stream or method(client, *args, **kwargs)
            return await anext(stream, None)

        async def close(_: AsyncClient) -> None:
            if stream:
                await stream.aclose()

        while (item := self._run(step)) is not None:
            try:
                yield item
            except BaseException:  # the caller wants no more
                with suppress(PolycollideError):
                    self._run(close)
                raise

    return call


class Client:
    """`AsyncClient` for scripts and notebooks: the same methods, which block.

    >>> with Client() as client:  # doctest: +SKIP
    ...     job = client.submit("3.png", "sample:mnist/7-0", model="mnist-mlp", layer="fc1")
    ...     corners = client.corners(client.wait(job))

    Its connections live in a thread of its own, which is where callbacks such as `on_progress` are
    called. Threads may share a client. `close()` is not needed at the end of a program.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 10,
    ) -> None:
        # Unlike a partial, it does not show the key when it is printed.
        self._open: Callable[[], AsyncClient] = lambda: AsyncClient(
            base_url, api_key, timeout, max_retries
        )
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._client = self._open()
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=asyncio.run, args=(_serve(self._client, ready),), name="polycollide", daemon=True
        )
        self._thread.start()
        self._loop, stop = ready.result()
        self._stop = weakref.finalize(self, self._loop.call_soon_threadsafe, stop.set)
        # The end of the process closes its connections by itself.
        self._stop.atexit = False

    def _run(self, call: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        if self._process != os.getpid():  # a fork has no thread of its parent
            self._start()
        if not self._stop.alive:
            raise PolycollideError("This client is closed; make a new one.")
        if threading.current_thread() is self._thread:  # it would wait for itself
            raise PolycollideError("A callback cannot use its own client; give it another one.")
        future = asyncio.run_coroutine_threadsafe(call(self._client), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise PolycollideError("This client was closed meanwhile; make a new one.") from None
        except BaseException:  # such as Ctrl-C: what it waits for is given up
            future.cancel()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._stop()
        self._thread.join()

    upload = _blocking(AsyncClient.upload)
    submit = _blocking(AsyncClient.submit)
    job = _blocking(AsyncClient.job)
    wait = _blocking(AsyncClient.wait)
    cancel = _blocking(AsyncClient.cancel)
    delete = _blocking(AsyncClient.delete)
    delete_image = _blocking(AsyncClient.delete_image)
    jobs = _iterating(AsyncClient.jobs)
    events = _iterating(AsyncClient.events)
    corners = _blocking(AsyncClient.corners)
    samples = _blocking(AsyncClient.samples)
    download = _blocking(AsyncClient.download)
    batch = _blocking(AsyncClient.batch)
    get_batch = _blocking(AsyncClient.get_batch)
    batches = _iterating(AsyncClient.batches)
    wait_batch = _blocking(AsyncClient.wait_batch)
    cancel_batch = _blocking(AsyncClient.cancel_batch)
    delete_batch = _blocking(AsyncClient.delete_batch)
    iter_results = _iterating(AsyncClient.iter_results)
    results_csv = _blocking(AsyncClient.results_csv)
    download_results = _blocking(AsyncClient.download_results)
    models = _blocking(AsyncClient.models)
    model = _blocking(AsyncClient.model)
    patch_sets = _blocking(AsyncClient.patch_sets)


async def _serve(
    client: AsyncClient, ready: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]"
) -> None:
    """Keeps a loop and a client in it until it is told to stop."""
    stop = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
