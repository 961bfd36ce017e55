"""Settings that have to agree with each other, and with what operators read."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from store.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "given",
    [
        {"heartbeat": 4},  # three in 12 s, and fresh for 10
        {"fresh_for": 2},
        {"lease": 9},
        {"fresh_for": 31},
        {"heartbeat": 0},
    ],
)
def test_workers_are_not_taken_for_gone_between_heartbeats_nor_after_their_leases(
    given: dict[str, int],
) -> None:
    with pytest.raises(ValidationError, match=r"FRESH_FOR|greater than 0"):
        Settings(mode="local", **{name: timedelta(seconds=s) for name, s in given.items()})
    Settings(mode="local", heartbeat=timedelta(seconds=10), fresh_for=timedelta(seconds=30))


def test_env_example_has_settings_that_there_are_with_their_defaults() -> None:
    compose = "".join(
        (ROOT / name).read_text() for name in ("docker-compose.yml", "docker/worker.yml")
    )
    lines = re.findall(r"^#POLYCOLLIDE_(\w+)=(.+)$", (ROOT / ".env.example").read_text(), re.M)
    assert len(lines) > 20
    for name, value in lines:
        assert f"POLYCOLLIDE_{name}" in compose
        field = Settings.model_fields.get(name.lower())
        if field is None:
            assert name in ("PUBLISH", "SECRETS")  # of compose itself
        elif field.default is not None:
            assert TypeAdapter(field.annotation).validate_python(value) == field.default, name
