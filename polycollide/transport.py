"""One request to the service and its answer: addresses, retries, and errors from problem+json."""

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError
from pydantic_core import from_json
from tenacity import RetryCallState, retry_if_exception, wait_random_exponential
from tenacity.asyncio import AsyncRetrying

from polycollide.answers import Answer
from polycollide.errors import ApiError, InvalidInput, PolycollideError, Unreachable

URL, API_KEY = "POLYCOLLIDE_URL", "POLYCOLLIDE_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
LAST_PORT = 65_535
# Breaks that another try may mend. Every request of ours may be sent twice: posts carry a key.
BROKEN = (
    *(httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError),
    httpx.DecodingError,  # a compressed answer that was cut
)
BUSY = (429, 502, 503, 504)
BACKOFF = wait_random_exponential(multiplier=0.5, max=10)
LONGEST_PAUSE = 60.0  # A server that asks for more, as for a used-up quota, is not waited for.
FIRST_CONTACT = 3  # A server that never answered is rather absent than restarting.
# Seconds for which the server may hold back an answer, unless a proxy is less patient; and of
# silence after which a break is taken for the proxy's doing.
LONG_POLL, SILENCE = 30.0, 1.0
# A server that does not hold answers back is still not asked without a pause.
PAUSE = 0.1
OUTAGE = 120.0  # What is waited for outlives a server that is away for so long.
_SHA256 = re.compile(r'(?:W/)?"([0-9a-f]{64})"')

A = TypeVar("A", bound=Answer)
T = TypeVar("T")
logger = logging.getLogger("polycollide")


class Transport:
    """Sends requests, again where that can help."""

    def __init__(
        self, base_url: str | None, api_key: str | None, timeout: float, max_retries: int
    ) -> None:
        url = base_url or os.environ.get(URL) or DEFAULT_URL
        key = (api_key or os.environ.get(API_KEY) or "").strip()
        if not (key.isascii() and (key + "_").isprintable()):
            raise InvalidInput(f"The API key has characters that no key has; check {API_KEY}.")
        self.base_url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.max_retries = timeout, max_retries
        self._met = False
        self._heard = 0.0
        self._hold = LONG_POLL
        try:
            parsed = httpx.URL(self.base_url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise ValueError("it begins with neither http:// nor https://")
            if parsed.port is not None and parsed.port > LAST_PORT:
                raise ValueError(f"{parsed.port} is no port")
        except (httpx.InvalidURL, ValueError) as error:
            raise InvalidInput(f"{self.base_url!r} is no URL ({error}); check {URL}.") from error
        try:
            self.http = httpx.AsyncClient(
                base_url=parsed,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                # A proxy of the environment has no way back to this machine.
                trust_env=not _is_here(parsed.host),
                limits=httpx.Limits(max_keepalive_connections=32),
            )
        except (httpx.InvalidURL, ImportError, ValueError) as error:
            why = str(error).partition("; ")[0].rstrip(".")
            if isinstance(error, ImportError):
                why = "for a SOCKS proxy, pip install socksio"
            raise InvalidInput(
                f"The proxy that the environment names cannot be used ({why}); check ALL_PROXY, "
                "HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
            ) from error

    def _patience(self, wait: float = 0.0) -> httpx.Timeout:
        """Time limits for an answer that the server may hold back for `wait` seconds."""
        connect = min(self.timeout, 10.0)
        return httpx.Timeout(self.timeout, read=self.timeout + wait, connect=connect, pool=None)

    async def ask(
        self,
        method: str,
        path: str,
        *,
        wait: float = 0.0,
        held: bool = False,
        body: Any = None,
        **request: Any,
    ) -> httpx.Response:
        """The good answer to a request; raises ApiError or Unreachable. `body` goes as JSON.

        It may take `wait` seconds longer than others: `held`, because the server is asked for that.
        """
        if body is not None:
            request["content"] = to_json(body)
            request["headers"] = {"Content-Type": "application/json"} | request.get("headers", {})

        async def send() -> httpx.Response:
            response = await self.http.request(
                method, path, timeout=self._patience(wait), **request
            )
            await self._check(response)
            _check_whole(response)
            self._heard = time.monotonic()
            return response

        async def hold() -> httpx.Response:
            nonlocal wait
            wait = min(wait, self._hold)
            request["params"] = request.get("params", {}) | {"wait": wait}
            began = time.monotonic()
            try:
                response = await send()
            except (ApiError, *BROKEN) as error:
                silent = time.monotonic() - began
                if _passes(error) and silent >= SILENCE:
                    self._met = True  # by somebody who took the request
                    self._hold = max(SILENCE, silent / 2)
                raise
            self._hold = min(LONG_POLL, self._hold * 1.1)  # it may have been a restart
            return response

        retrying = self._retrying(waiting=held)
        try:
            return await retrying(hold if held else send)
        except ApiError as error:
            error.attempts = retrying.statistics["attempt_number"]
            raise
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        except UnicodeEncodeError as error:
            raise _no_text(error) from error

    async def wait(self, model: type[A], path: str, seconds: float, done: Callable[[A], bool]) -> A:
        """What `path` shows once it is `done`, or after so many seconds.

        The server holds its answer back. Where a proxy on the way ends a silent request sooner,
        it is asked in shorter parts.
        """
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            part = min(left, self._hold)
            answer = self.read(model, await self.ask("GET", path, wait=part, held=True))
            split = part < left or self._hold < part
            if done(answer) or not split or time.monotonic() >= end:
                return answer
            await asyncio.sleep(PAUSE)

    @asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """A good answer whose body is still to be read."""
        silence = self._patience()
        async with self.http.stream("GET", path, headers=headers, timeout=silence) as response:
            await self._check(response)
            began = time.monotonic()
            try:
                yield response
            except BROKEN:
                if time.monotonic() - began >= SILENCE:  # silent for too long, for some proxy
                    self._heard = time.monotonic()
                raise

    async def resumed(self, connect: Callable[[], AsyncGenerator[T]]) -> AsyncGenerator[T]:
        """What `connect` streams. Where that breaks it is connected again, and goes on.

        `connect` itself remembers what it gave already. Tries are counted until something comes.
        """

        async def begin() -> tuple[AsyncGenerator[T], T | None]:
            stream = connect()
            return stream, await anext(stream, None)

        try:
            while True:
                first: tuple[AsyncGenerator[T], T | None] = await self._retrying(waiting=True)(
                    begin
                )
                stream, item = first
                async with aclosing(stream):
                    try:
                        while item is not None:
                            yield item
                            item = await anext(stream, None)
                        return
                    except BROKEN:
                        logger.info("%s broke off; connecting again", self.base_url)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error

    def _retrying(self, *, waiting: bool = False) -> AsyncRetrying:
        """Tries again with growing, random pauses, none shorter than the server asked for.

        When `waiting`, until the server has been away for OUTAGE seconds.
        """
        began = time.monotonic()

        def enough(state: RetryCallState) -> bool:
            if not self._met:
                return state.attempt_number > min(self.max_retries, FIRST_CONTACT)
            silent = time.monotonic() - max(began, self._heard)
            goes_on = waiting and self.max_retries > 0 and silent < OUTAGE
            return not goes_on and state.attempt_number > self.max_retries

        return AsyncRetrying(
            retry=retry_if_exception(_passes),
            wait=_pause,
            stop=enough,
            before_sleep=_say,
            reraise=True,
        )

    async def _check(self, response: httpx.Response) -> None:
        """Raises ApiError unless the answer is a good one."""
        self._met = True
        if response.is_success:
            return
        await response.aread()
        try:
            problem = from_json(response.content)
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {"detail": self._stranger(response)}
        raise ApiError(
            response.status_code,
            problem.get("code") or "http_error",
            problem.get("detail") or problem.get("title") or self._stranger(response),
            problem.get("errors") or (),
            retry_after=_seconds(response.headers.get("Retry-After", "")),
        )

    def read(self, model: type[A], response: httpx.Response) -> A:
        """What the body says."""
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise ApiError(
                response.status_code, "unexpected_answer", self._stranger(response)
            ) from error

    def _stranger(self, response: httpx.Response) -> str:
        answered = f"{response.status_code} {response.reason_phrase}".strip()
        return f"{self.base_url} answered {answered}, not as polycollide does; check {URL}."

    def _unreachable(self, error: httpx.RequestError) -> PolycollideError:
        """The same as a sentence."""
        why = str(error) or type(error).__name__
        return Unreachable(
            f"No answer from {self.base_url} ({why}); start a server with `polycollide up`, "
            f"or set {URL} to the address of one."
        )


def path(*parts: str) -> str:
    """The path of what `parts` name, whatever characters an id has."""
    return "/v1/" + "/".join(quote(part, safe="", errors="surrogateescape") for part in parts)


def to_json(value: Any) -> bytes:
    """Strict JSON; numpy's numbers and arrays are taken for what they hold.

    Raises InvalidInput for what JSON has no form for.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, default=_plain)
        return text.encode()
    except UnicodeEncodeError as error:
        raise _no_text(error) from error
    except (RecursionError, ValueError) as error:  # a number that is none, or endless nesting
        where = next(_endless(value), None)
        raise InvalidInput(
            f"{where}, which JSON has no form for; give a finite number."
            if where
            else "What was given has no form in JSON: it is nested too deep, or holds itself."
        ) from error


def _endless(value: Any, *place: str) -> Iterator[str]:
    """Where numbers are that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{'.'.join(place) or 'The value'} is {value}"
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _endless(inner, *place, str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _endless(inner, *place, str(i))
    elif hasattr(value, "tolist"):
        yield from _endless(value.tolist(), *place)


def _no_text(error: UnicodeEncodeError) -> InvalidInput:
    part = error.object[error.start : error.end]
    return InvalidInput(f"{part!r} has characters that are no text; write it in UTF-8.")


def _is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        return host == "localhost" or ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _check_whole(response: httpx.Response) -> None:
    """Raises RemoteProtocolError where less came than was sent, which HTTP does not always tell."""
    content, tag = response.content, _SHA256.fullmatch(response.headers.get("ETag", ""))
    whole = tag is None or hashlib.sha256(content).hexdigest() == tag[1]
    if response.headers.get("Content-Type", "").startswith("application/json"):
        try:
            from_json(content)
        except ValueError:
            whole = False
    if not whole:
        raise httpx.RemoteProtocolError("the answer broke off", request=response.request)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise InvalidInput(f"{value!r} has no form in JSON; give numbers, words, lists or dicts.")


def _passes(error: BaseException) -> bool:
    """Whether the same request may fare better later."""
    if isinstance(error, ApiError):
        return error.status in BUSY and error.retry_after <= LONGEST_PAUSE
    return isinstance(error, BROKEN)


def _say(state: RetryCallState) -> None:
    """Pauses that a person notices are explained."""
    error, pause = state.outcome and state.outcome.exception(), state.upcoming_sleep
    level = logging.WARNING if pause > 5 else logging.INFO
    logger.log(level, "%s Trying again in %.1f s.", str(error) or type(error).__name__, pause)


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ApiError) else 0.0
    return asked + BACKOFF(state)


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for, in seconds or as a date."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
