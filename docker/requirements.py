"""Prints what extras of pyproject.toml need from PyPI: `python docker/requirements.py worker`.

The images install this first. The list stays the same, and so does their layer of it, whatever else
changes in pyproject.toml.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def needs(extra: str) -> Iterator[str]:
    """With the extras that it includes."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{PROJECT['name']}\[(.+)]", requirement):
            for included in own[1].split(","):
                yield from needs(included.strip())
        else:
            yield requirement


wanted = {requirement for extra in sys.argv[1:] for requirement in needs(extra)}
print(*sorted({*PROJECT["dependencies"], *wanted}), sep="\n")
