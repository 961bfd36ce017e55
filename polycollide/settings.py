"""`--set NAME=VALUE` as it is typed. Knows no names: the core, or the service, knows them."""

import json
from collections.abc import Iterable, Mapping
from typing import Any


def merge(named: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Named options, those that are None left out, and over them `NAME=VALUE` settings.

    Values are JSON or plain words; `a.b=1` sets b inside a. Raises ValueError for what has no "=".

    >>> merge({"model": "mnist-mlp", "layer": None}, ["beta.relative=2", "units=[3,17]"])
    {'model': 'mnist-mlp', 'beta': {'relative': 2}, 'units': [3, 17]}
    """
    merged = {name: value for name, value in named.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {setting!r}.")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, or a number of thousands of digits
            value = text
        first, *rest = name.split(".")
        for part in reversed(rest):
            value = {part: value}
        both = isinstance(value, dict) and isinstance(merged.get(first), dict)
        merged[first] = merged[first] | value if both else value
    return merged
