"""A job for this machine as it was typed, checked before torch is opened, which takes seconds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from core import complaints, images
from core.errors import CoreError
from core.spec import CollisionSpec
from polycollide.listing import fail
from polycollide.settings import merge


@dataclass(frozen=True)
class Asked:
    """A job's settings, and its images: a name and the bytes of each."""

    spec: CollisionSpec
    source: tuple[str, bytes]
    target: tuple[str, bytes]


def read(source: str, target: str, named: Mapping[str, Any], settings: Iterable[str]) -> Asked:
    """The job as it was typed; what is wrong with it ends the command with a sentence."""
    try:
        spec = CollisionSpec.model_validate(merge(named, settings))
        return Asked(spec, images.read(source), images.read(target))
    except ValidationError as error:
        fail(complaints.sentence(error, CollisionSpec))
    except (CoreError, ValueError) as error:  # ValueError: a setting without a value
        fail(str(error))
