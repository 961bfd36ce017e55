"""Approximate feature collisions: what a user holds. Nothing here imports torch.

>>> from polycollide import Client
>>> client = Client()  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polycollide.answers import Batch, Job
    from polycollide.client import AsyncClient, Client
    from polycollide.errors import ApiError, JobFailed, PolycollideError, WaitTimeout

__all__ = [
    "ApiError",
    "AsyncClient",
    "Batch",
    "Client",
    "Job",
    "JobFailed",
    "PolycollideError",
    "WaitTimeout",
]
_WHERE = {"AsyncClient": "client", "Client": "client", "Batch": "answers", "Job": "answers"}


def __getattr__(name: str) -> Any:
    """Opens the module that has `name` when it is asked for: the command starts sooner."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE.get(name, 'errors')}"), name)
