"""The items of a batch on their way in: read, checked, counted, and written in one go.

What takes long happens in threads and in chunks, and what repeats is done once. An item that
cannot be accepted is told of, and keeps no other out.
"""

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from api import pictures
from api.batch_schemas import BatchItem, GridBatch, ItemsBatch
from api.errors import ApiError, FieldError, SameImage, TooManyQueuedJobs
from api.items import CHUNK, CHUNK_BYTES, Items, Refused, lines, refused
from api.pictures import INLINE, Known
from api.quota import Quota
from api.submission import stored
from api.turns import Turn
from core.errors import CoreError
from core.spec import CollisionSpec
from store import batches, catalog, images, jobs
from store.batches import Item
from store.blobs import digest
from store.images import Picture
from store.settings import Settings

Role = Literal["source", "target"]
_TURN = 0.5  # s of decoding, after which another key may be waiting


class TooManyItems(ApiError):
    """The batch has more items than this service takes at once; send several batches."""

    status, code, title = 422, "too_many_items", "Too many items"


class NoItemAccepted(ApiError):
    """No item of the batch can be accepted; `errors` lists the first of them."""

    status, code, title = 422, "no_item_accepted", "No item accepted"


@dataclass(frozen=True, slots=True)
class _Draft:
    """An item as far as it can be checked without the store."""

    index: int
    custom_id: str | None
    spec: CollisionSpec
    source: Picture | Known
    target: Picture | Known
    priority: int
    labels: tuple[str, ...]
    deadline_seconds: float | None


class Intake:
    """Takes the items of one batch, and in the end writes them."""

    def __init__(self, settings: Settings, decoding: Turn) -> None:
        self._settings, self._decoding = settings, decoding
        # More than a key may have waiting would never find room.
        self._most = min(settings.max_batch_items, settings.max_queued_jobs)
        self._labels: Sequence[str] = ()
        self._priority = 0
        self._count = 0
        self._items = Items(settings.max_batch_spec_bytes)
        self._images: dict[tuple[Role, str], Picture | Known | CoreError] = {}
        self._drafts: list[_Draft] = []
        self._refused: list[Refused] = []

    @property
    def sha256(self) -> str:
        """The same for bodies that ask for the same thing."""
        head = json.dumps([list(self._labels), self._priority]).encode()
        return hashlib.sha256(head + self._items.digest).hexdigest()

    async def add_lines(self, stream: AsyncIterator[bytes]) -> None:
        """Takes a body with an item a line; a line's number is its index. Raises TooManyItems."""
        async for chunk in lines(stream):
            await self._add(chunk)

    async def add_all(self, asked: ItemsBatch | GridBatch) -> None:
        """Takes a body that was parsed already. Raises TooManyItems."""
        if len(asked) > self._most:
            raise self._too_many()
        self._labels, self._priority = asked.labels, asked.priority
        numbered = enumerate(asked.each())
        while chunk := list(islice(numbered, CHUNK)):
            await self._add(chunk)

    async def _add(self, chunk: Sequence[tuple[int, Any]]) -> None:
        self._count += len(chunk)
        if self._count > self._most:
            raise self._too_many()
        rest = deque(chunk)
        while rest:
            async with self._decoding:  # one slot and one thread for the images of many items
                items = await asyncio.to_thread(self._check, rest)
            for index, item in items:
                try:
                    self._drafts.append(await self._draft(index, item))
                except (ApiError, CoreError) as error:
                    self._refused.append(refused(index, item.custom_id, error))

    def _too_many(self) -> TooManyItems:
        return TooManyItems(f"A batch has at most {self._most:,} items; send several batches.")

    def _check(self, rest: deque[tuple[int, Any]]) -> list[tuple[int, BatchItem]]:
        """Takes items off `rest`, until it is somebody else's turn to decode."""
        items, end = [], time.monotonic() + _TURN
        while rest and time.monotonic() < end:
            index, raw = rest.popleft()
            item = self._items.check(index, raw)
            if isinstance(item, Refused):
                self._refused.append(item)
                continue
            self._decode("source", item.source)
            self._decode("target", item.target)
            items.append((index, item))
        return items

    def _decode(self, role: Role, reference: str) -> None:
        if not reference.startswith(INLINE) or (key := _key(role, reference)) in self._images:
            return
        try:
            self._images[key] = pictures.inline(role, reference)
        except CoreError as error:
            self._images[key] = error

    async def _draft(self, index: int, item: BatchItem) -> _Draft:
        source = await self._image("source", item.source)
        target = await self._image("target", item.target)
        if source.sha256 == target.sha256 and item.spec.patch_set is None:
            raise SameImage
        return _Draft(
            index=index,
            custom_id=item.custom_id,
            spec=item.spec,
            source=source,
            target=target,
            priority=item.priority if "priority" in item.model_fields_set else self._priority,
            labels=tuple(item.labels),
            deadline_seconds=item.deadline_seconds,
        )

    async def _image(self, role: Role, reference: str) -> Picture | Known:
        key = _key(role, reference)
        if key not in self._images:
            try:
                self._images[key] = await pictures.resolve(reference, role, self._decoding)
            except CoreError as error:
                self._images[key] = error
        known = self._images[key]
        if isinstance(known, CoreError):
            raise known.with_traceback(None)
        return known

    async def write(
        self,
        connection: AsyncConnection,
        *,
        key_id: UUID,
        batch_id: UUID,
        request_id: str | None,
        quota: Quota,
    ) -> None:
        """Writes the batch, its images and its jobs.

        Raises NoItemAccepted, QuotaExceeded or TooManyQueuedJobs.
        """
        given = [image for draft in self._drafts for image in (draft.source, draft.target)]
        hashes = {image.sha256 for image in given if isinstance(image, Known)}
        names = await images.names(connection, key_id, hashes)
        specs = list({id(draft.spec): draft.spec for draft in self._drafts}.values())
        known = await catalog.read(
            connection,
            specs,
            max_parameters=self._settings.max_parameters,
            max_result_bytes=self._settings.max_result_bytes,
        )
        items, used = await asyncio.to_thread(self._accept, names, known)
        self._refused.sort(key=lambda refused: refused.index)
        if not items:
            first = [FieldError(loc=f"items.{r.index}", message=r.message) for r in self._refused]
            raise NoItemAccepted(errors=first[:50])
        limit = self._settings.max_queued_jobs
        if not await jobs.has_room(connection, key_id=key_id, jobs=len(items), limit=limit):
            raise TooManyQueuedJobs
        more = sum(len(image.content) for image in used) + sum(item.file_bytes for item in items)
        await quota.take(connection, key_id, more + self._items.spec_bytes)
        for some in _bounded(used):
            await images.put(connection, key_id, some, inline=True)
        await batches.create(
            connection,
            batch_id=batch_id,
            key_id=key_id,
            labels=self._labels,
            items=items,
            errors=[asdict(refused) for refused in self._refused],
            request_id=request_id,
        )

    def _accept(
        self, names: dict[str, str], known: catalog.Catalog
    ) -> tuple[list[Item], list[Picture]]:
        """Items that can be written, and the pictures they need, in order of their hashes."""
        refusals: dict[int, CoreError | None] = {}
        sizes: dict[int, int] = {}
        items, used = [], {}
        for draft in self._drafts:
            if id(draft.spec) not in refusals:
                refusals[id(draft.spec)] = _refusal(known, draft.spec)
                sizes[id(draft.spec)] = known.file_bytes(draft.spec)
            try:
                if (refusal := refusals[id(draft.spec)]) is not None:
                    raise refusal.with_traceback(None)
                items.append(self._item(draft, names, sizes[id(draft.spec)]))
            except (ApiError, CoreError) as error:
                self._refused.append(refused(draft.index, draft.custom_id, error))
                continue
            for image in (draft.source, draft.target):
                if isinstance(image, Picture):
                    used[image.sha256] = image
        return items, [used[sha256] for sha256 in sorted(used)]

    def _item(self, draft: _Draft, names: dict[str, str], file_bytes: int) -> Item:
        """Raises UnknownImage."""
        grace = self._settings.deadline_grace.total_seconds()
        return Item(
            index=draft.index,
            custom_id=draft.custom_id,
            spec=draft.spec,
            source=stored(draft.source, names),
            target=stored(draft.target, names),
            priority=draft.priority,
            labels=draft.labels,
            deadline_seconds=draft.deadline_seconds or draft.spec.max_seconds + grace,
            file_bytes=file_bytes,
        )


def _key(role: Role, reference: str) -> tuple[Role, str]:
    """An image by the hash of its reference: what came inline need not be kept twice."""
    return role, reference if len(reference) < 100 else digest(reference.encode())


def _refusal(known: catalog.Catalog, spec: CollisionSpec) -> CoreError | None:
    try:
        known.check(spec)
    except CoreError as error:
        return error
    return None


def _bounded(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """The pictures in parts that the event loop can send without keeping others waiting."""
    part: list[Picture] = []
    size = 0
    for picture in pictures:
        if part and (len(part) == CHUNK or size + len(picture.content) > CHUNK_BYTES):
            yield part
            part, size = [], 0
        part.append(picture)
        size += len(picture.content)
    if part:
        yield part
