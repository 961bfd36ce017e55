"""The results of a batch, as lines of JSON or as a table: streamed, in bounded memory."""

import asyncio
import csv
import io
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncConnection

from api.order import in_order
from core.result import Result
from store import batches

# What a page is to weigh: a result of 5 corners has 7 KB, one of 256 corners 1.5 MB.
_PAGE_BYTES = 2**20
_MAX_PAGE = 256
# What begins a formula, in wide letters too, at the start of a cell: of one that a spreadsheet ends
# at semicolons, as some languages' do, too.
_FORMULA = re.compile(r"(^|;)(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
Connect = Callable[[], AbstractAsyncContextManager[AsyncConnection]]


async def jsonl(connect: Connect, batch_id: UUID) -> AsyncIterator[str]:
    """A JSON object a line; no connection is held while the client reads."""
    after = -1
    while True:
        async with connect() as connection:
            found = await batches.results(
                connection, batch_id, after=after, limit=_MAX_PAGE, most=_PAGE_BYTES
            )
        if not found:
            return
        after = found[-1][0]
        yield await asyncio.to_thread(_lines, [line for _, line in found])


def _lines(found: list[str]) -> str:
    lines = [from_json(line) for line in found]
    for line in lines:
        line["result"] = in_order(line["result"], Result)
    return "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)


async def table(connect: Connect, batch_id: UUID) -> AsyncIterator[str]:
    """CSV with a header; text that a spreadsheet would take for a formula is made harmless."""
    after, columns = -1, list(batches.TABLE_COLUMNS)
    yield _csv([columns])
    while True:
        async with connect() as connection:
            found = await batches.table(connection, batch_id, after=after, limit=_MAX_PAGE)
        if not found:
            return
        after = found[-1]["index"]
        yield _csv([[_cell(row[column]) for column in columns] for row in found])


def _csv(rows: list[list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join(_cell(each) for each in value)
    if isinstance(value, bool):
        return str(value).lower()
    return _FORMULA.sub(r"\1'", value) if isinstance(value, str) else value
