"""What can go wrong between a user and the service. Each message is a sentence to act on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polycollide.answers import Job


SHOWN = 5  # of the fields that are wrong


class PolycollideError(Exception):
    """The service could not do what was asked."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or type(self).__doc__)


class InvalidInput(PolycollideError):
    """What was given cannot be sent."""


class Unreachable(PolycollideError):
    """No server answers."""


class ApiError(PolycollideError):
    """The service refused the request, in the words of its problem+json.

    `code` is what programs compare, such as "idempotency_key_reused"; `errors` lists
    `{"loc", "message"}` for each field that is wrong; `retry_after` is in seconds, `attempts` is
    how often the request was sent.
    """

    attempts = 1

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        errors: Sequence[dict[str, Any]] = (),
        *,
        retry_after: float = 0.0,
    ) -> None:
        self.status, self.code, self.detail, self.errors = status, code, detail, list(errors)
        self.retry_after = retry_after
        wrong = [f"{_field(error)}: {error.get('message', '')}" for error in self.errors]
        general = detail.partition("; `errors`")[0].rstrip(".")
        listed = "; ".join(wrong[:SHOWN]) + ("; ..." if len(wrong) > SHOWN else "")
        super().__init__(f"{general}: {listed}" if wrong else detail)

    def __reduce__(self) -> Any:
        return type(self), (self.status, self.code, self.detail, self.errors)


class JobFailed(PolycollideError):
    """A job ended without a result."""

    def __init__(self, job: "Job") -> None:
        self.job = job
        why = job.error.message if job.error else f"it was {job.status}."
        super().__init__(f"Job {job.id} has no result: {why}")

    def __reduce__(self) -> Any:
        return type(self), (self.job,)


class WaitTimeout(PolycollideError, TimeoutError):
    """What was waited for is not done yet; it goes on.

    `jobs` are those that are not done, as far as the service has told of them.
    """

    def __init__(self, message: str, jobs: "Sequence[Job]" = ()) -> None:
        self.jobs = list(jobs)
        super().__init__(message)

    @property
    def job(self) -> "Job | None":
        """The first of `jobs`."""
        return self.jobs[0] if self.jobs else None


def _field(error: dict[str, Any]) -> str:
    """A field by its name, without the part of the request that it was in."""
    part, dot, field = str(error.get("loc", "")).partition(".")
    return field if dot and part in ("body", "path", "query", "header") else part + dot + field
