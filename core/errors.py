"""What can go wrong in the core. Torch-free, so that every room can name these errors."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class CoreError(Exception):
    """The core could not do what was asked."""

    code: ClassVar[str] = "core_error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or type(self).__doc__)


class InvalidSpec(CoreError):
    """The job's settings contradict each other, the network or the images."""

    code = "invalid_spec"


class InvalidImage(CoreError):
    """The image cannot be used."""

    code = "invalid_image"


class UnknownName(CoreError):
    """No such model, layer, class or sample."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        self._given = kind, name, names
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        else:
            hint = f"known: {', '.join(names[:8]) or 'none'}{', ...' if len(names) > 8 else ''}."
        super().__init__(f"There is no {kind} {name!r}; {hint}")

    def __reduce__(self) -> tuple[type["UnknownName"], tuple[str, str, list[str]]]:
        # Exceptions are copied and pickled by what they say, of which three arguments are not made.
        return type(self), self._given


class UntappableLayer(CoreError):
    """The layer's pre-activations cannot be read."""

    code = "untappable_layer"


class ModelUnavailable(CoreError):
    """The network or its weights cannot be loaded."""

    code = "model_unavailable"
