"""The tables. What people filter and sort by has a typed column; the rest is JSON."""

import uuid
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    desc,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.lifecycle import FINAL, LEASED, Status

Json = dict[str, Any]


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy, never written
        datetime: TIMESTAMP(timezone=True),
        str: Text,
        Json: JSONB,
        list[str]: ARRAY(Text),
        bytes: LargeBinary,
    }


def _in(statuses: frozenset[Status]) -> str:
    return "status IN ({})".format(", ".join(f"'{status}'" for status in sorted(statuses)))


def _now() -> Any:
    return mapped_column(server_default=func.now())


def _job_id() -> Any:
    return mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))


class ApiKey(Base):
    """Who may use the service. The key itself is shown once and kept only as a hash."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[bytes | None]  # null: no secret opens it
    created_at: Mapped[datetime] = _now()
    revoked_at: Mapped[datetime | None]


class Blob(Base):
    """Bytes by their hash. `last_used_at` is renewed whenever somebody stores them again."""

    __tablename__ = "blobs"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    media_type: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[bytes]
    last_used_at: Mapped[datetime] = _now()

    __table_args__ = (
        CheckConstraint("sha256 ~ '^[0-9a-f]{64}$'", name="sha256"),
        Index(None, "last_used_at", "sha256"),  # the order in which they are swept
    )


class Image(Base):
    """Which key may see and use which blob as an image."""

    __tablename__ = "images"

    key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    name: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    created_at: Mapped[datetime] = _now()
    inline: Mapped[bool] = mapped_column(server_default="false")  # it goes with its last job

    __table_args__ = (PrimaryKeyConstraint("key_id", "sha256"),)


class Spec(Base):
    """What jobs ask for, presets applied: once, by its hash, however many jobs ask for it."""

    __tablename__ = "specs"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[Json]
    size: Mapped[int]
    last_used_at: Mapped[datetime] = _now()

    __table_args__ = (Index(None, "last_used_at", "sha256"),)


class Batch(Base):
    """Jobs that were submitted together. `errors` tells of the items that were refused.

    `bytes` are what it takes itself: the specs of its jobs, labels and errors.
    """

    __tablename__ = "batches"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    seq: Mapped[int] = mapped_column(BigInteger, Identity(), unique=True)
    key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    labels: Mapped[list[str]]
    total: Mapped[int]
    errors: Mapped[list[Json]] = mapped_column(JSONB)
    bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = _now()
    cancel_requested_at: Mapped[datetime | None]

    __table_args__ = (Index(None, "key_id", "seq"),)


class Job(Base):
    """One job, from its submission to its final status.

    `seq` is its age. `schema_version` is that of its settings' form. `crashes` counts attempts that
    ended with their worker, since a checkpoint last got further than `checkpoint_steps`. While it
    is leased, only who knows `lease_token` may write to it. `checkpoint_sha256` names a blob or,
    for a large one, a file on the volume of the worker that wrote it. `keep`: its owner wants no
    more of it than what it has found. `spec` is of older jobs, which have no
    `spec_sha256`. `file_bytes` are those of its files: at most, until it has ended.
    """

    __tablename__ = "jobs"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    seq: Mapped[int] = mapped_column(BigInteger, Identity(), unique=True)
    key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    batch_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    batch_index: Mapped[int | None]
    custom_id: Mapped[str | None]
    request_id: Mapped[str | None]

    status: Mapped[str] = mapped_column(server_default=Status.QUEUED)
    status_reason: Mapped[str | None]
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    labels: Mapped[list[str]]
    created_at: Mapped[datetime] = _now()
    queued_at: Mapped[datetime] = _now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    deadline_seconds: Mapped[float]

    spec: Mapped[Json | None]
    spec_sha256: Mapped[str | None] = mapped_column(ForeignKey("specs.sha256"), index=True)
    spec_bytes: Mapped[int] = mapped_column(server_default="0")  # 0 where its batch counts them
    file_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    schema_version: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    model: Mapped[str]
    corners: Mapped[int]
    batch_key: Mapped[str]
    patch_set: Mapped[str | None]
    source_sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    source_name: Mapped[str]
    target_sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    target_name: Mapped[str]

    attempt: Mapped[int] = mapped_column(server_default="0")
    crashes: Mapped[int] = mapped_column(server_default="0")
    lease_token: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[datetime | None]
    worker_id: Mapped[uuid.UUID | None]
    cancel_requested_at: Mapped[datetime | None]
    keep: Mapped[bool] = mapped_column(server_default="false")
    progress: Mapped[Json | None]
    checkpoint_sha256: Mapped[str | None]
    checkpoint_steps: Mapped[int | None]
    error: Mapped[Json | None]

    __table_args__ = (
        CheckConstraint(_in(frozenset(Status)), name="status"),
        CheckConstraint(f"({_in(LEASED)}) = (lease_token IS NOT NULL)", name="leased"),
        CheckConstraint(f"({_in(FINAL)}) = (finished_at IS NOT NULL)", name="finished"),
        CheckConstraint("(status = 'failed') = (error IS NOT NULL)", name="error"),
        CheckConstraint("corners > 0", name="corners"),
        CheckConstraint("spec IS NOT NULL OR spec_sha256 IS NOT NULL", name="spec"),
        # Claims: the kinds that wait, the keys that wait for a kind, the order within each.
        Index(
            "ix_jobs_queue",
            *("batch_key", "key_id", desc("priority"), "seq"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_kinds",
            *("batch_key", desc("priority"), "seq"),
            postgresql_where=text("status = 'queued'"),
        ),
        # Places in the queue: each key's own order.
        Index(
            "ix_jobs_turns",
            *("key_id", desc("priority"), "seq"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index("ix_jobs_leased", "worker_id", postgresql_where=text(_in(LEASED))),
        # Lists.
        Index(None, "key_id", "seq"),
        Index(None, "key_id", "status", "seq"),
        Index(None, "batch_id", "status", postgresql_where=text("batch_id IS NOT NULL")),
        Index(
            None,
            *("batch_id", "batch_index"),
            unique=True,
            postgresql_where=text("batch_id IS NOT NULL"),
        ),
        Index("ix_jobs_labels", "labels", postgresql_using="gin"),
        # What a key keeps: this index alone is read.
        Index("ix_jobs_bytes", "key_id", postgresql_include=["spec_bytes", "file_bytes"]),
        # Retention.
        Index(None, "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index(
            "ix_jobs_checkpoint_sha256",
            "checkpoint_sha256",
            postgresql_where=text("checkpoint_sha256 IS NOT NULL"),
        ),
        # Room on each page, so that heartbeats need not touch the indexes.
        {"postgresql_with": {"fillfactor": 70}},
    )


class Corner(Base):
    """A corner of a finished job. `details` is its `CornerResult`."""

    __tablename__ = "corners"

    job_id: Mapped[uuid.UUID] = _job_id()
    index: Mapped[int] = mapped_column(SmallInteger)
    png_sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    converged: Mapped[bool]
    label: Mapped[int]
    probability: Mapped[float]
    l_pos: Mapped[float]
    violation: Mapped[float]
    relative_residual: Mapped[float]
    distance_to_source: Mapped[float]
    distance_to_target: Mapped[float]
    details: Mapped[Json]

    __table_args__ = (PrimaryKeyConstraint("job_id", "index"),)


class Metrics(Base):
    """The measures of a finished job. `details` is its `Result` without the corners."""

    __tablename__ = "metrics"

    job_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
    )
    converged: Mapped[bool]
    steps: Mapped[int]
    seconds: Mapped[float]
    spread: Mapped[float]
    accuracy: Mapped[float | None]
    accuracy_8bit: Mapped[float | None]
    min_probability: Mapped[float | None]
    details: Mapped[Json]
    size: Mapped[int | None]  # bytes of the result as JSON, corners included


class Artifact(Base):
    """A file of a job, by name: `samples.npz`, `figure.png`, `snapshots/120.png`."""

    __tablename__ = "artifacts"

    job_id: Mapped[uuid.UUID] = _job_id()
    name: Mapped[str]
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)

    __table_args__ = (
        PrimaryKeyConstraint("job_id", "name"),
        Index("ix_artifacts_snapshots", "job_id", postgresql_where=text("name LIKE 'snapshots/%'")),
    )


class JobEvent(Base):
    """What happened to a job, for those who watch it. Of one job, ids grow in order of commits."""

    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[uuid.UUID] = _job_id()
    type: Mapped[str]
    data: Mapped[Json]
    created_at: Mapped[datetime] = _now()

    __table_args__ = (
        Index(None, "job_id", "id"),
        Index("ix_job_events_progress", "created_at", postgresql_where=text("type = 'progress'")),
        Index("ix_job_events_created_at", "created_at", postgresql_using="brin"),
    )


class IdempotencyKey(Base):
    """What a client's `Idempotency-Key` has created: the unique index is the arbiter."""

    __tablename__ = "idempotency_keys"

    key_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    value: Mapped[str]
    body_sha256: Mapped[str]
    created_id: Mapped[uuid.UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)

    __table_args__ = (PrimaryKeyConstraint("key_id", "value"),)


class Worker(Base):
    """A process that runs jobs, one for each GPU. In its `slot` it replaces the one before.

    It is taken for gone when it was not heard of for as long as it wants to be `fresh_for`.
    `draining` tells it to hand back what it has. It reads settings up to its `schema_version`.
    """

    __tablename__ = "workers"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    slot: Mapped[str] = mapped_column(index=True)
    device: Mapped[str]
    started_at: Mapped[datetime] = _now()
    heartbeat_at: Mapped[datetime] = _now()
    fresh_for: Mapped[timedelta] = mapped_column(server_default=text("'10 seconds'"))
    draining: Mapped[bool] = mapped_column(server_default="false")
    steps_per_second: Mapped[float] = mapped_column(server_default="0")
    schema_version: Mapped[int] = mapped_column(SmallInteger, server_default="1")


class Model(Base):
    """A network that workers of a slot can serve. `layers` is null until one has looked."""

    __tablename__ = "models"

    slot: Mapped[str]
    name: Mapped[str]
    weights: Mapped[list[str]]
    input_shape: Mapped[list[int]] = mapped_column(JSONB)
    classes: Mapped[list[str] | None] = mapped_column(JSONB)
    origin: Mapped[str]
    ready: Mapped[bool]
    layers: Mapped[list[Json] | None] = mapped_column(JSONB)
    reported_at: Mapped[datetime] = _now()

    __table_args__ = (PrimaryKeyConstraint("slot", "name"),)


class PatchSet(Base):
    """A patch set that the worker of a slot can use. `index` is the kind of its index."""

    __tablename__ = "patch_sets"

    slot: Mapped[str]
    name: Mapped[str]
    sha256: Mapped[str]
    images: Mapped[int]
    patches: Mapped[int] = mapped_column(BigInteger)
    size: Mapped[int]
    stride: Mapped[int]
    resize: Mapped[int]
    index: Mapped[str]
    reported_at: Mapped[datetime] = _now()

    __table_args__ = (PrimaryKeyConstraint("slot", "name"),)


class Refusal(Base):
    """A kind of jobs whose network the worker of a slot cannot load, and why."""

    __tablename__ = "refusals"

    slot: Mapped[str]
    batch_key: Mapped[str]
    reason: Mapped[str]
    since: Mapped[datetime] = _now()

    __table_args__ = (PrimaryKeyConstraint("slot", "batch_key"),)


class UnservedKind(Base):
    """A kind of jobs that wait, and that no live worker has been able to run `since`."""

    __tablename__ = "unserved_kinds"

    batch_key: Mapped[str] = mapped_column(primary_key=True)
    since: Mapped[datetime] = _now()


class MissingPatchSet(Base):
    """What reconcilers of before `unserved_kinds` write; to go when none of them can be left."""

    __tablename__ = "missing_patch_sets"

    name: Mapped[str] = mapped_column(primary_key=True)
    since: Mapped[datetime] = _now()


class Counter(Base):
    """What has happened since the beginning: `claims`, `lease_losses`."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
