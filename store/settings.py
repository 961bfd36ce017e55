"""The service's settings: one class, read from `POLYCOLLIDE_*` variables and secret files."""

from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url

# What a doorbell says, and where it hangs: the name of a list in Redis.
DRAIN_TASK, QUEUE = "polycollide.drain", "polycollide"

DEFAULT_PASSWORD = "polycollide"  # noqa: S105 - refused outside local mode


class Settings(BaseSettings):
    """Raises pydantic's ValidationError on a default secret outside local mode."""

    model_config = SettingsConfigDict(
        env_prefix="POLYCOLLIDE_",
        secrets_dir="/run/secrets" if Path("/run/secrets").is_dir() else None,
        extra="ignore",
        hide_input_in_errors=True,  # it holds secrets
    )

    mode: Literal["local", "server"] = Field(
        "server", description="`local` is one user's own machine: default secrets are allowed."
    )
    host: str = Field("127.0.0.1", description="Where the API listens.")
    port: int = Field(8000, ge=0, lt=2**16)

    database_url: str = "postgresql://polycollide@localhost/polycollide"
    database_direct_url: str | None = Field(
        None,
        description="Where `database_url` leads to a pooler such as PgBouncer: the server behind "
        "it, for notices and migrations, which need a connection of their own.",
    )
    prepare_statements: bool = Field(
        True, description="False behind a pooler that does not know prepared statements."
    )
    database_password: SecretStr = SecretStr(DEFAULT_PASSWORD)
    redis_url: SecretStr = SecretStr("redis://localhost:6379/0")

    # Three beats may be missed before a worker is taken for gone, and its jobs wait for longer.
    heartbeat: timedelta = Field(timedelta(seconds=1), gt=timedelta(0))
    fresh_for: timedelta = Field(
        timedelta(seconds=10),
        description="A worker that was not heard of for so long is taken for gone: at least three "
        "heartbeats, and at most a lease.",
    )
    lease: timedelta = timedelta(seconds=30)
    # A stride of many rows of a large network takes minutes on a CPU.
    stall_after: timedelta = Field(
        timedelta(minutes=5), description="A worker without a step for so long is taken for hung."
    )
    jobs_at_once: int = Field(128, ge=1, description="That a worker holds.")
    max_crashes: int = Field(
        3, ge=1, description="Attempts that may end with their worker, before the job fails."
    )
    patch_set_grace: timedelta = Field(
        timedelta(minutes=10),
        description="Jobs fail that wait for a patch set which no worker has had for so long.",
    )
    # Beyond what the spec allows the optimisation: loading, measuring, drawing.
    deadline_grace: timedelta = timedelta(hours=1)
    checkpoint_every: timedelta = timedelta(seconds=60)
    checkpoint_dir: Path = Field(
        Path("checkpoints"),
        description="Of a worker's volume: checkpoints too large for the store.",
    )
    reconcile_every: timedelta = timedelta(seconds=2)
    pulse_file: Path | None = Field(
        None, description="Touched at each turn of reconciler or sweeper, for health checks."
    )

    watch_for: timedelta = Field(
        timedelta(minutes=15),
        description="A stream of events ends then; clients come back with `Last-Event-ID`.",
    )

    header_timeout: timedelta = Field(
        timedelta(seconds=10), description="A connection ends on which no whole request came."
    )
    body_timeout: timedelta = Field(
        timedelta(seconds=30), description="A body ends of which nothing came for so long."
    )
    max_connections: int = Field(2000, ge=1, description="Of an API process; more get 503.")
    max_waits: int = Field(
        1000, ge=1, description="Streams and held-back answers of a key at a time; more get 429."
    )
    max_queued_jobs: int = Field(100_000, description="That a key may have waiting.")
    max_body_bytes: int = 100 * 2**20  # two images of the largest size, in base64
    max_parameters: int = Field(
        2**26,
        description="Rows of a job times pixels and channels: 445 corners of 224 x 224. Of a job "
        "of patches, also its corners times their control parameters.",
    )
    max_batch_items: int = 10_000
    max_batch_spec_bytes: int = Field(
        64 * 2**20, description="Of the different specs of a batch, together."
    )
    max_result_bytes: int = Field(
        512 * 2**20,
        ge=2**20,
        le=2**29,  # a file of 1 GiB is more than Postgres takes
        description="That the files of one result may come to.",
    )
    max_key_bytes: int = Field(
        100 * 2**30,
        description="That a key may keep: images, specs and results, those to come included.",
    )

    keep_jobs: timedelta | None = Field(
        None, description="Finished ones, with all that is theirs; unset: until they are deleted."
    )
    keep_images: timedelta = Field(
        timedelta(days=30), description="Sent so long ago, and used by no job."
    )
    keep_checkpoints: timedelta = Field(timedelta(hours=1), description="Of finished jobs.")
    keep_snapshots: timedelta = Field(timedelta(days=7), description="Of finished jobs.")
    # One a second of each job that runs: a hundred times what else happens to it.
    keep_progress: timedelta = Field(timedelta(hours=1), description="Of finished jobs.")
    keep_events: timedelta = Field(timedelta(days=7), description="Of finished jobs.")
    keep_idempotency_keys: timedelta = timedelta(hours=24)
    # More than the hour in which `blobs.put` takes a blob for safe.
    keep_unreferenced_blobs: timedelta = Field(timedelta(days=1), ge=timedelta(hours=2))
    keep_workers: timedelta = Field(timedelta(days=1), description="Since their last heartbeat.")

    @model_validator(mode="after")
    def _workers_are_missed_in_order(self) -> Self:
        if not 3 * self.heartbeat <= self.fresh_for <= self.lease:
            raise ValueError(
                "Workers would be taken for gone between two heartbeats, or after their leases: "
                "set POLYCOLLIDE_FRESH_FOR to three times POLYCOLLIDE_HEARTBEAT or more, and "
                "POLYCOLLIDE_LEASE to no less than that."
            )
        return self

    @model_validator(mode="after")
    def _no_default_secret(self) -> Self:
        if self.mode != "local" and (self.sqlalchemy_url.password or "").strip() in (
            "",
            DEFAULT_PASSWORD,
        ):
            raise ValueError(
                "The database has the default password, or none; set "
                "POLYCOLLIDE_DATABASE_PASSWORD, or POLYCOLLIDE_MODE=local on a machine of your own."
            )
        return self

    @property
    def sqlalchemy_url(self) -> URL:
        """`database_url` with our driver, and `database_password` unless it has one of its own."""
        return self._url(self.database_url)

    @property
    def direct_sqlalchemy_url(self) -> URL:
        """The same to the database itself, whatever pooler stands before it."""
        return self._url(self.database_direct_url or self.database_url)

    def _url(self, given: str) -> URL:
        url = make_url(given).set(drivername="postgresql+psycopg")
        password = self.database_password.get_secret_value()
        return url if url.password is not None else url.set(password=password)

    @property
    def keyless(self) -> bool:
        """Whether requests need no API key: in local mode, on the loopback interface."""
        loopback = self.host == "localhost" or _is_loopback(self.host)
        return self.mode == "local" and loopback


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@cache
def settings() -> Settings:
    """This process's settings."""
    return Settings()
