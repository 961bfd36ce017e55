"""What is wrong with settings, in words for whoever set them. Torch-free; all rooms read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from core.errors import UnknownName
from core.spec import Strict

MOST = 100  # of what pydantic finds; the nearest names to one that is unknown take a millisecond
Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Complaint:
    """What is wrong at `loc`: names of fields, and places in lists. `unknown`: no such field."""

    loc: Location
    message: str
    unknown: bool


def complaints(error: ValidationError, model: type[BaseModel]) -> list[Complaint]:
    """What pydantic has against a `model`: one complaint a field, under the field's own name.

    Of a field that takes this or that, pydantic tells what each alternative has against it. The
    one that speaks is the one that got furthest, or else the first; an unknown name comes before
    what is missing beside it.
    """
    spoken: dict[Location, Complaint] = {}
    for wrong in error.errors(include_url=False)[:MOST]:
        field, complaint = _read(wrong, model)
        if field not in spoken or _rank(complaint) > _rank(spoken[field]):
            spoken[field] = complaint
    return list(spoken.values())


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """All complaints in one sentence."""
    listed = []
    for complaint in complaints(error, model):
        where = complaint.loc[:-1] if complaint.unknown else complaint.loc
        prefix = f"{'.'.join(map(str, where))}: " if where else ""
        listed.append(prefix + complaint.message)
    return "; ".join(listed)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def _read(wrong: ErrorDetails, model: type[BaseModel]) -> tuple[Location, Complaint]:
    """The field that it is about, up to where alternatives begin, and the complaint."""
    models = [model]
    loc: list[str | int] = []
    field: Location | None = None
    message = wrong["msg"].removeprefix("Value error, ")
    if wrong["type"] == "missing":
        message = "it is missing; give it"
    unknown = wrong["type"] == "extra_forbidden"
    last = len(wrong["loc"]) - 1
    for place, part in enumerate(wrong["loc"]):
        holder = next((each for each in models if part in each.model_fields), None)
        if isinstance(part, int) or (unknown and place == last):
            loc.append(part)
        elif holder is not None:
            loc.append(part)
            models = list(models_in(holder.model_fields[part].annotation))
        else:  # the name of an alternative
            field = tuple(loc) if field is None else field
            models = [each for each in models if each.__name__ == part] or models
    if unknown:
        kind = "setting" if any(issubclass(each, Strict) for each in models) else "field"
        known = [name for each in models for name in each.model_fields]
        message = str(UnknownName(kind, str(loc[-1]), known))
    complaint = Complaint(tuple(loc), message, unknown)
    return complaint.loc if field is None else field, complaint


def _rank(complaint: Complaint) -> tuple[bool, int]:
    return complaint.unknown, len(complaint.loc)
