"""The order of keys, which Postgres's jsonb forgets: an answer reads like `result.json`."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import BaseModel

from core.complaints import models_in


def in_order(value: Any, *models: type[BaseModel]) -> Any:
    """JSON of one of `models` with its keys as that lists its fields, all the way down.

    Keys that are no fields come last, by name, which is also the order of free keys.
    """
    if isinstance(value, list):
        return [in_order(each, *models) for each in value]
    if not isinstance(value, dict):
        return value
    fields = _fields(models)
    names = [name for name in fields if name in value]
    names += sorted(value.keys() - fields.keys())
    return {name: in_order(value[name], *fields.get(name, ())) for name in names}


@cache
def _fields(models: Iterable[type[BaseModel]]) -> dict[str, tuple[type[BaseModel], ...]]:
    """What keys are called, and the models of what they hold."""
    return {
        field.alias or name: tuple(models_in(field.annotation))
        for model in models
        for name, field in model.model_fields.items()
    }
