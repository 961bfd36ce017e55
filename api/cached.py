"""Answers that may be a little old, asked for once however many want them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class Cached(Generic[T]):
    """What `ask` answers, at most `max_age` seconds old, where it answers within `patience`.

    Where it takes longer, the last answer has to do if a `stale` one is better than none. A
    question is never canceled half-way, and none is asked twice at a time: a server that hangs
    holds one connection, however often somebody looks.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[T]],
        *,
        max_age: float = 0.0,
        patience: float = 1.0,
        stale: bool = False,
    ) -> None:
        self._ask, self._max_age, self._patience, self._stale = ask, max_age, patience, stale
        self._asking: asyncio.Task[T | None] | None = None
        self._value: T | None = None
        self._until = 0.0

    async def get(self) -> T | None:
        """The answer; None while there is none to be had."""
        if asyncio.get_running_loop().time() < self._until:
            return self._value
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._refresh())
        asking = self._asking
        await asyncio.wait({asking}, timeout=self._patience)
        if asking.done():
            return asking.result()
        return self._value if self._stale else None

    async def _refresh(self) -> T | None:
        try:
            self._value = await self._ask()
        except Exception as error:  # whatever the other side and its client have
            _log.warning("no answer", error=repr(error))
            return None
        self._until = asyncio.get_running_loop().time() + self._max_age
        return self._value
