"""What keys share, and how: each key has some of it at most, and those who wait come by turns."""

import asyncio
from collections import Counter, deque
from collections.abc import Hashable
from contextlib import suppress

from api.errors import ApiError


class TooManyRequests(ApiError):
    """You have too many requests under way; wait for some of them, and send fewer at a time."""

    status, code, title = 429, "too_many_requests", "Too many requests"
    headers = {"Retry-After": "1"}  # noqa: RUF012 - a constant


class Turns:
    """`slots` of something, of which one key holds up to `each`.

    Keys that wait are served in turn, so that nobody stands behind another's hundred. A key with
    `waiting` in line, or with one that has stood there for `patience` seconds, has TooManyRequests.
    """

    def __init__(self, slots: int, *, each: int, waiting: int, patience: float | None = None):
        self._free, self._each, self._waiting, self._patience = slots, each, waiting, patience
        self._held: Counter[Hashable] = Counter()
        self._lines: dict[Hashable, deque[asyncio.Future[None]]] = {}  # whose turn is next, first

    def of(self, key: Hashable) -> "Turn":
        """A slot for this key: `async with turns.of(key):`, as often as is wanted."""
        return Turn(self, key)

    async def take(self, key: Hashable) -> None:
        """Waits for a slot."""
        if self._free and self._held[key] < self._each:  # else somebody waits, perhaps of this key
            self._grant(key)
            return
        line = self._lines.setdefault(key, deque())
        if len(line) >= self._waiting:
            self._forget(key)
            raise TooManyRequests
        granted = asyncio.get_running_loop().create_future()
        line.append(granted)
        try:
            async with asyncio.timeout(self._patience):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.give_back(key)
            else:
                with suppress(ValueError):  # it was passed over
                    line.remove(granted)
                self._forget(key)
            if isinstance(error, TimeoutError):
                raise TooManyRequests from None
            raise

    def give_back(self, key: Hashable) -> None:
        """Leaves a slot to those who wait."""
        self._free += 1
        self._held[key] -= 1
        self._forget(key)
        while self._free and (next_key := self._next()) is not None:
            line = self._lines.pop(next_key)
            granted = line.popleft()
            if not granted.done():  # else who waited has just gone
                self._grant(next_key)
                granted.set_result(None)
            if line:
                self._lines[next_key] = line  # at the end: the others' turn comes first

    def _next(self) -> Hashable | None:
        return next((key for key in self._lines if self._held[key] < self._each), None)

    def _grant(self, key: Hashable) -> None:
        self._free -= 1
        self._held[key] += 1

    def _forget(self, key: Hashable) -> None:
        """Keys come and go: of one that neither holds nor waits nothing is kept."""
        if not self._held[key]:
            del self._held[key]
        if not self._lines.get(key, True):
            del self._lines[key]


class Turn:
    """A key's slots."""

    def __init__(self, turns: Turns, key: Hashable) -> None:
        self._turns, self._key = turns, key

    async def __aenter__(self) -> None:
        await self._turns.take(self._key)

    async def __aexit__(self, *_: object) -> None:
        self._turns.give_back(self._key)
