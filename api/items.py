"""An item of a batch: from a line of JSON, or an object, to a job, or to why it is refused."""

import codecs
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from api.batch_schemas import MAX_CUSTOM_ID, BatchItem
from api.errors import ApiError, field_errors
from api.schemas import PRINTABLE
from core.errors import CoreError
from core.spec import CollisionSpec

CHUNK = 200  # items checked, or images written, in one go
CHUNK_BYTES = 2**20  # ... or fewer, where they are large
# Pictures of ten thousand results, unasked for, take longer to draw than the results.
UNILLUSTRATED = {"figures": False, "snapshots": 0}
_MAX_MESSAGE = 500
_CUSTOM_ID = re.compile(PRINTABLE)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why an item was not accepted."""

    index: int
    custom_id: str | None
    code: str
    message: str


class TooManySpecs(ApiError):
    """The different specs of the batch are too long together; send several batches."""

    status, code, title = 422, "too_many_specs", "Specs too long"


class _Unusable(Exception):
    """An item, or its spec, is not what it has to be."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Items:
    """The items of one batch, as far as they can be judged by themselves and by each other.

    Specs that repeat are checked once, and items share them.
    """

    def __init__(self, max_spec_bytes: int) -> None:
        self._max_spec_bytes = max_spec_bytes
        self._custom_ids: set[str] = set()
        self._specs: dict[str, CollisionSpec | _Unusable] = {}
        self.spec_bytes = 0  # of the different specs, together
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        """The same for the same items, however they were written."""
        return self._sha256.digest()

    def check(self, index: int, raw: Any) -> BatchItem | Refused:
        """An item, given as a line of JSON or parsed already."""
        custom_id = None
        try:
            given = self._parse(raw) if isinstance(raw, bytes) else raw
            self._sha256.update(json.dumps(given, sort_keys=True).encode() + b"\n")
            if not isinstance(given, dict):
                raise _Unusable("invalid_item", "An item is a JSON object.")
            custom_id = _usable(given.get("custom_id"))
            self._enter(custom_id)
            if isinstance(given.get("spec"), dict):
                given = given | {"spec": self._spec(given["spec"])}
            return BatchItem.model_validate(given)
        except _Unusable as error:
            return Refused(index, custom_id, error.code, str(error))
        except ValidationError as error:
            return Refused(index, custom_id, "invalid_item", _sentence(error, BatchItem))

    def _parse(self, line: bytes) -> Any:
        try:
            return from_json(line, allow_inf_nan=False)
        except ValueError:
            self._sha256.update(line + b"\n")
            raise _Unusable("invalid_json", "The line is no JSON.") from None

    def _enter(self, custom_id: str | None) -> None:
        if custom_id in self._custom_ids:
            raise _Unusable("duplicate_custom_id", "An earlier item has the same custom_id.")
        if custom_id is not None:
            self._custom_ids.add(custom_id)

    def _spec(self, given: dict[str, Any]) -> CollisionSpec:
        text = json.dumps(UNILLUSTRATED | given, sort_keys=True)
        if text not in self._specs:
            # A grid of a few lines could ask for gigabytes of them.
            self.spec_bytes += len(text)
            if self.spec_bytes > self._max_spec_bytes:
                raise TooManySpecs(
                    f"The different specs of a batch have {self._max_spec_bytes:,} bytes together "
                    "at most; send several batches, or list fewer units."
                )
            try:
                # As JSON, which is how strict a single job's is, too.
                self._specs[text] = CollisionSpec.model_validate_json(text, strict=True)
            except ValidationError as error:
                self._specs[text] = _Unusable(
                    "invalid_spec", _sentence(error, CollisionSpec, "spec")
                )
        known = self._specs[text]
        if isinstance(known, _Unusable):
            raise known.with_traceback(None)
        return known


def refused(index: int, custom_id: str | None, error: ApiError | CoreError) -> Refused:
    """An item that failed for a reason with a name."""
    return Refused(index, custom_id, error.code, _printable(str(error)))


async def lines(stream: AsyncIterator[bytes]) -> AsyncIterator[list[tuple[int, bytes]]]:
    """The lines of a body with their numbers, from 0, in chunks; empty ones are left out."""
    begun: list[bytes] = []
    ready: list[tuple[int, bytes]] = []
    number = size = 0
    async for data in _ended(stream):
        *whole, rest = data.split(b"\n")
        for end in whole:
            line = b"".join([*begun, end]).strip()
            line = line if number else line.removeprefix(codecs.BOM_UTF8)
            begun = []
            if line:
                ready.append((number, line))
                size += len(line)
            number += 1
            if len(ready) == CHUNK or size > CHUNK_BYTES:
                yield ready
                ready, size = [], 0
        begun.append(rest)
    if ready:
        yield ready


async def _ended(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The stream, with an end to its last line."""
    async for data in stream:
        yield data
    yield b"\n"


def _usable(custom_id: Any) -> str | None:
    """A custom_id that can be kept, also where it is only to name what was refused."""
    if not isinstance(custom_id, str) or len(custom_id) > MAX_CUSTOM_ID:
        return None
    return custom_id if _CUSTOM_ID.fullmatch(custom_id) else None


def _sentence(error: ValidationError, model: type[BaseModel], *location: str) -> str:
    """The first of what pydantic found, and how much else."""
    errors = field_errors(error, model, *location)
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    said = f"{errors[0].loc}: {errors[0].message.rstrip('.')}{more}"
    return _printable(said if said.endswith("?") else f"{said}.")


def _printable(message: str) -> str:
    """What is told of somebody's input, fit for the store and for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in message)[:_MAX_MESSAGE]
