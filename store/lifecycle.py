"""The life of a job: its statuses and the events that move it from one to the next. Pure.

SQL that moves a job gets both its `WHERE status IN` and its new status from here.
"""

from enum import StrEnum


class Status(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


class Event(StrEnum):
    """What can befall a job."""

    CLAIM = "claim"  # a worker takes it
    SUCCEED = "succeed"  # its worker has a result
    FAIL = "fail"  # its worker says why there is none
    RELEASE = "release"  # its worker hands it back
    LOSE = "lose"  # its lease ran out
    GIVE_UP = "give_up"  # its lease ran out once too often
    STRAND = "strand"  # what it needs is on no worker any more
    CANCEL = "cancel"  # its owner wants it no more


FINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})
LEASED = frozenset({Status.RUNNING, Status.CANCELING})

_AFTER: dict[Event, dict[Status, Status]] = {
    Event.CLAIM: {Status.QUEUED: Status.RUNNING},
    Event.SUCCEED: {Status.RUNNING: Status.SUCCEEDED, Status.CANCELING: Status.CANCELED},
    Event.FAIL: {Status.RUNNING: Status.FAILED, Status.CANCELING: Status.CANCELED},
    Event.RELEASE: {Status.RUNNING: Status.QUEUED, Status.CANCELING: Status.CANCELED},
    Event.LOSE: {Status.RUNNING: Status.QUEUED, Status.CANCELING: Status.CANCELED},
    Event.GIVE_UP: {Status.RUNNING: Status.FAILED, Status.CANCELING: Status.CANCELED},
    Event.STRAND: {Status.QUEUED: Status.FAILED},
    Event.CANCEL: {Status.QUEUED: Status.CANCELED, Status.RUNNING: Status.CANCELING},
}


def after(event: Event, status: Status) -> Status:
    """Where `event` leaves a job; a job that it does not concern stays where it is."""
    return _AFTER[event].get(status, status)


def sources(event: Event) -> list[Status]:
    """The statuses that `event` changes."""
    return list(_AFTER[event])


def sql_after(event: Event) -> str:
    """`after` as an SQL expression on the column `status`."""
    cases = " ".join(f"WHEN '{old}' THEN '{new}'" for old, new in _AFTER[event].items())
    return f"CASE status {cases} END"
