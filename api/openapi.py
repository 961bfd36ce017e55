"""OpenAPI for what FastAPI does not see: bodies that routes read themselves, and problems."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api.errors import Problem

_REF = "#/components/schemas/"
_bodies: list[type[BaseModel]] = []


def body(
    kinds: Mapping[str, type[BaseModel] | dict[str, Any]],
    examples: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The `openapi_extra=` of a route that reads its body itself.

    Per media type a model, or a media type object; examples are of the first kind.
    """
    content: dict[str, dict[str, Any]] = {
        media_type: kind if isinstance(kind, dict) else {"schema": ref(kind)}
        for media_type, kind in kinds.items()
    }
    if examples:
        content[next(iter(kinds))]["examples"] = dict(examples)
    return {"requestBody": {"required": True, "content": content}}


def ref(model: type[BaseModel]) -> dict[str, str]:
    """A reference to the schema of a body, or of a part of one."""
    _bodies.append(model)
    return {"$ref": f"{_REF}{model.__name__}"}


def install(app: FastAPI) -> None:
    """Completes what `app.openapi` says."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(app: FastAPI) -> dict[str, Any]:
    complete: dict[str, Any] = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    known: dict[str, Any] = complete.setdefault("components", {}).setdefault("schemas", {})
    asked = [(model, "validation") for model in _bodies]
    for model, mode in [(Problem, "serialization"), *asked]:
        _, found = models_json_schema([(model, mode)], ref_template=_REF + "{model}")  # type: ignore[list-item]
        own = found["$defs"]
        # What is asked for has defaults, what is answered has every field: two schemas, two names.
        names = {
            name: f"{name}Input" if known.get(name, schema) != schema else name
            for name, schema in own.items()
        }
        known |= {names[name]: _renamed(schema, names) for name, schema in own.items()}
    return complete


def _renamed(schema: Any, names: Mapping[str, str]) -> Any:
    """The schema with references to the new names."""
    if isinstance(schema, list):
        return [_renamed(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {key: _renamed(part, names) for key, part in schema.items()}
    if isinstance(to := schema.get("$ref"), str):
        renamed["$ref"] = _REF + names[to.removeprefix(_REF)]
    return renamed
