"""The client's half for batches: many jobs as a user writes them down, in one request."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from polycollide.answers import Batch, ItemResult, Page
from polycollide.errors import ApiError, InvalidInput, WaitTimeout
from polycollide.images import REFERENCES, ImageLike, given, identity, is_reference
from polycollide.jobs import (
    TRANSFERS,
    WATCHED_POLL,
    BatchLike,
    JobsClient,
    each,
    id_of,
    label_list,
)
from polycollide.results import naming
from polycollide.streams import lines
from polycollide.transport import LONG_POLL, PAUSE, path

# Seconds in which ten thousand jobs surely are accepted.
BATCH_SECONDS = 600.0

Items = str | Path | Iterable[Mapping[str, Any]]


class BatchesClient(JobsClient):
    """What there is to do with a batch."""

    async def batch(
        self,
        items: Items | None = None,
        *,
        grid: Mapping[str, Any] | None = None,
        labels: Iterable[str] = (),
        priority: int = 0,
        deadline_seconds: float | None = None,
        idempotency_key: str | None = None,
        on_upload: Callable[[int, int], object] | None = None,
    ) -> Batch:
        """Submits many jobs at once: items, a file of JSON lines with one item each, or a grid.

        An item is a dict of source, target and spec, with custom_id, labels, priority and
        deadline_seconds where wanted. A grid has sources, targets and, where wanted, layers,
        settings (a list of dicts) and spec, common to all. `labels` are those of the batch,
        `priority` and `deadline_seconds` those of items that have none of their own. Every image
        of your own goes up once; `on_upload` gets how many are up, and of how many. Items that the
        service refused are in the batch's `errors`; the others run.

        >>> digits = [f"sample:mnist/{digit}-0" for digit in range(10)]
        >>> client.batch(
        ...     grid={"sources": digits, "targets": digits, "spec": {"preset": "paper-mnist"}}
        ... )  # doctest: +SKIP
        """
        body = read_body(items, grid, deadline_seconds)
        places = [(box, key) for box, key in image_places(body) if not is_reference(box[key])]
        distinct = {identity(box[key]): box[key] for box, key in places}
        up = 0

        async def upload(image: ImageLike) -> str:
            nonlocal up
            try:
                reference = await self.upload(image)
            except ApiError as error:
                if error.status != 422:
                    raise
                where = _first_place(body, image)
                raise InvalidInput(f"{where}: {error} Nothing was submitted.") from error
            up += 1
            if on_upload:
                on_upload(up, len(distinct))
            return reference

        uploaded = await each(upload, distinct.values(), at_a_time=TRANSFERS)
        references = dict(zip(distinct, uploaded, strict=True))
        for box, key in places:
            box[key] = references[identity(box[key])]
        response = await self._transport.ask(
            *("POST", path("batches")),
            headers={"Idempotency-Key": idempotency_key or str(uuid4())},
            body=body | {"labels": label_list(labels), "priority": priority},
            wait=BATCH_SECONDS,
        )
        return self._transport.read(Batch, response)

    async def get_batch(self, batch: BatchLike, *, wait: float = 0.0) -> Batch:
        """The batch as it is now, or as soon as it is done, after `wait` seconds at the latest."""
        url = path("batches", id_of(batch))
        if wait:
            return await self._transport.wait(Batch, url, wait, lambda batch: batch.done)
        return self._transport.read(Batch, await self._transport.ask("GET", url))

    async def batches(
        self, *, label: str | None = None, limit: int | None = None
    ) -> AsyncGenerator[Batch]:
        """Your batches, the newest first, at most `limit` of them, without their errors."""
        async for batch in self._listed("batches", Page[Batch], {"label": label}, limit):
            yield batch

    async def wait_batch(
        self,
        batch: BatchLike,
        timeout: float | None = None,
        on_progress: Callable[[Batch], object] | None = None,
    ) -> Batch:
        """Waits until no job of the batch is left to run; as `wait`."""
        seconds = WATCHED_POLL if on_progress else LONG_POLL
        try:
            async with asyncio.timeout(timeout):
                while True:
                    latest = await self.get_batch(batch, wait=seconds)
                    if on_progress:
                        on_progress(latest)
                    if latest.done:
                        return latest
                    await asyncio.sleep(PAUSE)
        except TimeoutError as error:
            raise WaitTimeout(
                f"Batch {id_of(batch)} was not done within {timeout:g} s; it goes on, wait again."
            ) from error

    async def cancel_batch(self, batch: BatchLike) -> Batch:
        """Asks for an end of every job of the batch that is not done."""
        response = await self._transport.ask("POST", path("batches", id_of(batch), "cancel"))
        return self._transport.read(Batch, response)

    async def delete_batch(self, batch: BatchLike) -> None:
        """Deletes a batch that is done: its jobs, what they found, and images that came along."""
        await self._delete("batches", id_of(batch))

    async def iter_results(self, batch: BatchLike) -> AsyncGenerator[ItemResult]:
        """The jobs of a batch that are done, with their results, in order of their index.

        They come as the service sends them: memory holds one at a time, whatever their number.
        """
        seen: set[int] = set()

        async def connect() -> AsyncGenerator[ItemResult]:
            url = path("batches", id_of(batch), "results.jsonl")
            async with self._transport.stream(url, {}) as response:
                async for line in lines(response):
                    item = ItemResult.model_validate_json(line)
                    if item.index not in seen:
                        seen.add(item.index)
                        yield item

        async with aclosing(self._transport.resumed(connect)) as items:
            async for item in items:
                yield item

    async def results_csv(self, batch: BatchLike) -> str:
        """A table of the jobs of a batch that are done, in order of their index."""
        url = path("batches", id_of(batch), "results.csv")
        return (await self._transport.ask("GET", url, wait=BATCH_SECONDS)).text

    async def download_results(self, batch: BatchLike, file: str | Path) -> Path:
        """Writes the results of a batch's jobs that are done: as a table into `....csv`,
        else as JSON lines. An earlier file stays until all of them are here.
        """
        file = Path(file)
        with naming(file), TemporaryDirectory(dir=file.parent, prefix=".polycollide-") as new:
            part = Path(new, file.name)
            with part.open("w", encoding="utf-8", newline="") as lines:
                if file.suffix == ".csv":
                    lines.write(await self.results_csv(batch))
                else:
                    async for item in self.iter_results(batch):
                        lines.write(f"{item.model_dump_json()}\n")
            return part.replace(file)


def read_body(
    items: Items | None, grid: Mapping[str, Any] | None, deadline_seconds: float | None
) -> dict[str, Any]:
    """What to post for items or a grid, in containers of its own."""
    own = {} if deadline_seconds is None else {"deadline_seconds": deadline_seconds}
    if (items is None) == (grid is None):
        raise InvalidInput("A batch takes either items or grid=, not both and not neither.")
    if isinstance(items, str | Path):
        items = read_jsonl(Path(items))
    if items is not None:
        return {"items": [own | dict(item) for item in items]}
    grid = dict(grid or {})
    for side in ("sources", "targets"):
        if isinstance(grid.get(side), str | Path):
            raise InvalidInput(f"A grid's {side} are a list of images; put yours in brackets.")
    sides = {side: list(grid.get(side, ())) for side in ("sources", "targets")}
    return {"grid": grid | sides, **own}


def image_places(body: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Where images stand in a body: `container[key]` is one."""
    if "items" in body:
        parts = ("source", "target")
        return [(item, part) for item in body["items"] for part in parts if part in item]
    sides = (body["grid"]["sources"], body["grid"]["targets"])
    return [(images, i) for images in sides for i in range(len(images))]


def _first_place(body: dict[str, Any], image: ImageLike) -> str:
    """Where an image stands, in words."""
    for index, item in enumerate(body.get("items", ())):
        if identity(image) in (identity(item.get("source")), identity(item.get("target"))):
            return f"Item {index}"
    return "The grid"


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The items of a file of JSON lines; paths of images in it are taken from its folder."""
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"{str(file)!r} cannot be read ({reason}); check the path.") from error
    return parse_jsonl(content, name=file.name, folder=file.parent)


def parse_jsonl(content: bytes, *, name: str, folder: Path) -> list[dict[str, Any]]:
    """The items in `content`, one a line. Raises InvalidInput, which names a line that is none."""
    items, readable = [], set[Path]()
    try:
        text = content.decode("utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        wrong = content[: error.start].count(b"\n") + 1
        raise InvalidInput(f"Line {wrong} of {name} is not UTF-8; save it as UTF-8.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(_parse_item(line, folder, readable))
        except InvalidInput as error:
            where = f"Line {number} of {name}"
            raise InvalidInput(f"{where}: {error} Nothing was submitted.") from error
    if not items:
        raise InvalidInput(f"{name} has no items.")
    return items


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise InvalidInput(f"It has {number}, and JSON has finite numbers only.")
    return value


def _parse_item(line: str, folder: Path, readable: set[Path]) -> dict[str, Any]:
    """An item, whose own images can be read; `readable` are those that were tried before."""
    try:
        item = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        hint = "a line ends without a comma: " if line.rstrip().endswith("},") else ""
        hint = hint or ("a line has one object, no list: " if line.startswith("[") else "")
        raise InvalidInput(f"This is no JSON: {hint}{error}.") from error
    if not isinstance(item, dict):
        raise InvalidInput("This is no JSON object; write {...}.")
    for part in ("source", "target"):
        image = item.get(part)
        if image is not None and not isinstance(image, str):
            raise InvalidInput(f"{part} is {json.dumps(image)[:40]}; give the path of an image.")
        if isinstance(image, str) and not image.startswith(REFERENCES):
            item[part] = folder / image
            if item[part] not in readable:
                given(item[part])
                readable.add(item[part])
    return item
