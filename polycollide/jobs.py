"""The client's half for single jobs, images, models and patch sets."""

import asyncio
import io
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing
from math import inf
from pathlib import Path
from typing import Any, TypeVar, overload
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from polycollide import images, results
from polycollide.answers import (
    Batch,
    Event,
    Job,
    Model,
    Models,
    Page,
    PatchSet,
    PatchSets,
    Uploaded,
)
from polycollide.errors import ApiError, PolycollideError, WaitTimeout
from polycollide.images import ImageLike
from polycollide.streams import server_sent
from polycollide.transport import LONG_POLL, PAUSE, Transport, path, to_json

# Seconds that the server may hold back an answer while nothing is final, where someone looks on.
WATCHED_POLL = 2.0
# Requests at a time: as long polls, and as uploads or downloads.
POLLS, TRANSFERS = 16, 8
PAGE = 200  # what the service gives at most

JobLike = Job | str
BatchLike = Batch | str
T = TypeVar("T")
U = TypeVar("U")


class JobsClient:
    """What there is to do with one job, or several."""

    _transport: Transport

    async def upload(self, image: ImageLike) -> str:
        """Stores an image and returns its reference, "sha256:...", to be used in its place."""
        file = images.given(image)
        if isinstance(file, str):
            return file
        response = await self._transport.ask("POST", path("images"), files={"file": file})
        return f"sha256:{self._transport.read(Uploaded, response).sha256}"

    async def submit(
        self,
        /,
        source: ImageLike,
        target: ImageLike,
        *,
        spec: Mapping[str, Any] | None = None,
        labels: Iterable[str] = (),
        priority: int = 0,
        deadline_seconds: float | None = None,
        idempotency_key: str | None = None,
        **settings: Any,
    ) -> Job:
        """Submits a job; its settings are those of `spec` and, over them, the keywords.

        >>> client.submit(
        ...     "3.png", "7.png", preset="paper-mnist", corners=8, interpolation={"samples": 500}
        ... )  # doctest: +SKIP
        """
        pair = {"source": images.given(source), "target": images.given(target)}
        job = {
            **{part: image for part, image in pair.items() if isinstance(image, str)},
            "spec": {**(spec or {}), **settings},
            "labels": label_list(labels),
            "priority": priority,
            "deadline_seconds": deadline_seconds,
        }
        files = {part: image for part, image in pair.items() if not isinstance(image, str)}
        response = await self._transport.ask(
            *("POST", path("jobs")),
            headers={"Idempotency-Key": idempotency_key or str(uuid4())},
            **(_form(job, files) if files else {"body": job}),
        )
        return self._transport.read(Job, response)

    async def job(self, job: JobLike, *, wait: float = 0.0) -> Job:
        """The job as it is now, or as soon as it is done, after `wait` seconds at the latest."""
        url = path("jobs", id_of(job))
        if wait:
            return await self._transport.wait(Job, url, wait, lambda job: job.done)
        return self._transport.read(Job, await self._transport.ask("GET", url))

    @overload
    async def wait(  # type: ignore[overload-overlap]  # of strings, the one string comes first
        self,
        jobs: JobLike,
        timeout: float | None = None,
        on_progress: Callable[[Job], object] | None = None,
    ) -> Job: ...
    @overload
    async def wait(
        self,
        jobs: Iterable[JobLike],
        timeout: float | None = None,
        on_progress: Callable[[Job], object] | None = None,
    ) -> list[Job]: ...
    async def wait(
        self,
        jobs: JobLike | Iterable[JobLike],
        timeout: float | None = None,
        on_progress: Callable[[Job], object] | None = None,
    ) -> Job | list[Job]:
        """Waits until a job, or each of several, is done, and returns it, or a list of them.

        A job that failed is returned like others: `wait(job).check()` raises JobFailed for it.
        Raises WaitTimeout after `timeout` seconds. `on_progress` gets every job that was asked for.
        """
        if isinstance(jobs, Job | str):
            return (await self.wait([jobs], timeout, on_progress))[0]
        jobs = list(jobs)
        latest = {job.id: job for job in jobs if isinstance(job, Job)}
        seconds = WATCHED_POLL if on_progress else LONG_POLL

        async def finish(id: str) -> Job:
            while True:
                job = latest[id] = await self.job(id, wait=seconds)
                if on_progress:
                    on_progress(job)
                if job.done:
                    return job
                await asyncio.sleep(PAUSE)

        try:
            async with asyncio.timeout(timeout):
                return await each(finish, [id_of(job) for job in jobs], at_a_time=POLLS)
        except TimeoutError as error:
            left = [job for job in latest.values() if not job.done]
            counts = Counter(job.status for job in left)
            states = ", ".join(f"{count} {status}" for status, count in counts.items())
            raise WaitTimeout(
                f"Not every job was done within {timeout:g} s{f' ({states})' if states else ''}; "
                "they go on, wait again.",
                left,
            ) from error

    async def cancel(self, job: JobLike) -> Job:
        """Asks for an end of the job; one that is done stays as it is."""
        return self._transport.read(
            Job, await self._transport.ask("POST", path("jobs", id_of(job), "cancel"))
        )

    async def delete(self, job: JobLike) -> None:
        """Deletes a job that is done, with everything it found and the images that came with it."""
        await self._delete("jobs", id_of(job))

    async def delete_image(self, image: str) -> None:
        """Deletes an image that no job of yours uses: `sha256:...`, as `upload` returns it."""
        await self._delete("images", image.removeprefix("sha256:"))

    async def _delete(self, *parts: str) -> None:
        try:
            await self._transport.ask("DELETE", path(*parts))
        except ApiError as error:
            if error.status != 404 or error.attempts == 1:  # else an earlier try of ours did it
                raise

    async def jobs(
        self,
        *,
        status: str | None = None,
        batch: BatchLike | None = None,
        label: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Job]:
        """Your jobs, the newest first, at most `limit` of them, without their results."""
        wanted = {
            "status": status,
            "batch": None if batch is None else id_of(batch),
            "label": label,
        }
        async for job in self._listed("jobs", Page[Job], wanted, limit):
            yield job

    async def _listed(
        self,
        what: str,
        model: type[Page[T]],
        wanted: Mapping[str, str | None],
        limit: int | None = None,
    ) -> AsyncGenerator[T]:
        left = inf if limit is None else limit
        params = {name: value for name, value in wanted.items() if value is not None}
        cursor: str | None = ""
        while cursor is not None and left > 0:
            more = {"limit": min(PAGE, left)} | ({"cursor": cursor} if cursor else {})
            response = await self._transport.ask("GET", path(what), params=params | more)
            page = self._transport.read(model, response)
            for item in page.listed:
                yield item
            left -= len(page.listed)
            cursor = page.next_cursor

    async def events(self, job: JobLike, *, after: str = "") -> AsyncGenerator[Event]:
        """What happens to a job, from its beginning (or after the event with that id) to its end.

        A connection that breaks is made again, and goes on after the last event that came.
        """
        seen = {"Last-Event-ID": after} if after else {}
        url = path("jobs", id_of(job), "events")

        async def connect() -> AsyncGenerator[Event]:
            while True:
                before = dict(seen)
                async with self._transport.stream(url, before) as response:
                    async for event in server_sent(response):
                        if event.id:
                            seen["Last-Event-ID"] = event.id
                        yield event
                        if event.final:
                            return
                # The service ends a stream now and then. That of an old job may have been deleted.
                if seen == before and (await self.job(job)).done:
                    return
                await asyncio.sleep(PAUSE)

        async with aclosing(self._transport.resumed(connect)) as events:
            async for event in events:
                yield event

    async def corners(self, job: JobLike) -> NDArray[np.float32]:
        """The images found, [K, C, H, W] in [0, 1]."""
        corners = (await self._arrays(job, "corners.npz"))["corners"]
        return corners.astype(np.float32, copy=False)

    async def samples(self, job: JobLike) -> dict[str, NDArray[Any]]:
        """Of every interpolation its weights [N, K] and what the network made of it, by name."""
        return await self._arrays(job, "samples.npz")

    async def _arrays(self, job: JobLike, name: str) -> dict[str, NDArray[Any]]:
        content = await self._artifact(job, name)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    async def _artifact(self, job: JobLike, *name: str) -> bytes:
        if isinstance(job, Job):
            job.check()
        return (await self._transport.ask("GET", path("jobs", id_of(job), *name))).content

    async def download(
        self, job: JobLike, folder: str | Path, *, force: bool = False
    ) -> list[Path]:
        """Writes all that a job found into a folder, as `polycollide run --out` does.

        An earlier result there is replaced. Files of your own that have a result's names stay, and
        the download is refused, unless you `force` it.
        """
        done = (await self.job(job)).check()
        if not done.done:
            raise PolycollideError(f"Job {done.id} is {done.status}; wait for it first.")
        folder = Path(folder)
        results.prepare(folder, force=force)
        names = results.files(done)
        contents = await each(
            lambda name: self._artifact(done, *names[name]), names, at_a_time=TRANSFERS
        )
        found = results.of_job(done, dict(zip(names, contents, strict=True)))
        return results.write(folder, found, force=force)

    async def models(self) -> list[Model]:
        """The networks that the service knows."""
        response = await self._transport.ask("GET", path("models"))
        return self._transport.read(Models, response).models

    async def model(self, name: str) -> Model:
        """A network with its layers, where a worker has told of them."""
        return self._transport.read(Model, await self._transport.ask("GET", path("models", name)))

    async def patch_sets(self) -> list[PatchSet]:
        """The patch sets that the service's workers have."""
        response = await self._transport.ask("GET", path("patch-sets"))
        return self._transport.read(PatchSets, response).patch_sets


def id_of(thing: Any) -> str:
    """The id of a job or a batch, or an id as it is."""
    return thing if isinstance(thing, str) else str(thing.id)


def label_list(labels: Iterable[str]) -> list[str]:
    """Labels as a list; one alone needs no brackets."""
    return [labels] if isinstance(labels, str) else list(labels)


async def each(
    function: Callable[[T], Coroutine[Any, Any, U]], items: Iterable[T], *, at_a_time: int
) -> list[U]:
    """What an async function gives for each item, in order; the first error ends the others."""
    gate = asyncio.Semaphore(at_a_time)

    async def one(item: T) -> U:
        async with gate:
            return await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _form(job: dict[str, Any], files: dict[str, tuple[str, bytes]]) -> dict[str, Any]:
    """A job as a form that holds its images."""
    return {"files": files, "data": {"job": to_json(job).decode()}}
