"""What a forward pass computes, operation by operation: its course, as torch's dispatcher sees it.

The network itself runs, on plain tensors, so nothing about a course is guessed from its code. Run
on tensors that have a shape and no values (`hollow`), a course cannot depend on values; where the
same network takes it on real tensors, too, it takes it for every image of the shape. What escapes
is code that hides what it reads from torch, as an extension in C may, or that counts its calls.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

IMAGE = 0

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class Value:
    """A tensor of a course by its number; the image is 0."""

    number: int


@dataclass(frozen=True)
class Operation:
    """`function` (relu, for relu_ as well) of `options`, by the names that torch's schema has.

    Tensors among these are `Value`s; `outputs` are numbers.
    """

    function: str
    options: dict[str, Any]
    outputs: tuple[int, ...]
    is_view: bool

    @property
    def inputs(self) -> list[int]:
        return _numbers_in(self.options)


class Course(TorchDispatchMode):
    """Records what is computed while it is entered.

    `image` is the image's tensor, `constants` are the network's own tensors by name: `names` has
    those that were used. A number of `descends` depends on the image, for all that is known. One of
    `strange` is of a tensor that nothing made here, or that was overwritten through another one.
    `script` says in plain values what is computed: courses with the same one compute the same.
    `outline` leaves out the settings, which may hold the batch's size.
    """

    def __init__(self, image: Tensor, constants: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.script: list[Any] = []
        self.outline: list[Any] = []
        self.values: list[Tensor] = []  # kept, so that no other can take an identity
        self.descends: set[int] = set()
        self.strange: set[int] = set()
        self.names: dict[int, str] = {}
        self._constants = {id(tensor): name for name, tensor in reversed(constants.items())}
        self._numbers: dict[int, int] = {}
        self._sharing: dict[int, dict[int, Tensor]] = {}
        self._new(image, descends=True)

    def number_of(self, tensor: Tensor) -> int:
        known = self._numbers.get(id(tensor))
        if known is not None:
            return known
        name = self._constants.get(id(tensor))
        number = self._new(tensor, descends=name is None)
        if name is None:
            self.strange.add(number)
        else:
            self.names[number] = name
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():  # what is asked here is no concern of other modes
            return self._record(func, args, kwargs or {})

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        arguments = func._schema.arguments
        options = {a.name: a.default_value for a in arguments}
        options |= dict(zip(options, args, strict=False)) | kwargs
        told = tree_map_only(Tensor, lambda tensor: Value(self.number_of(tensor)), options)
        written = [options[a.name] for a in arguments if a.alias_info and a.alias_info.is_write]
        result = func(*args, **kwargs)
        # Chance is no function of anything: it counts as something that may be all.
        chance = torch.Tag.nondeterministic_seeded in func.tags
        descends = chance or not self.descends.isdisjoint(_numbers_in(told))
        for tensor in tree_leaves(written):
            self._overwrite(tensor, descends)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        outputs = tuple(self._new(tensor, descends=descends) for tensor in made)
        function = func._schema.name.partition("::")[2].removesuffix("_")
        self.operations.append(Operation(function, told, outputs, func.is_view))
        self._write_down(function, told, made)
        return result

    def _new(self, tensor: Tensor, *, descends: bool) -> int:
        number = len(self.values)
        self.values.append(tensor)
        self._numbers[id(tensor)] = number
        self._sharing.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
        if descends:
            self.descends.add(number)
        return number

    def _overwrite(self, written: Tensor, descends: bool) -> None:
        """Whatever shares its memory is another tensor now; so is `written`, until it is made."""
        for other in list(self._sharing[written.untyped_storage()._cdata].values()):
            depends = descends or self._numbers[id(other)] in self.descends
            self.strange.add(self._new(other, descends=depends))

    def _write_down(self, function: str, told: dict[str, Any], made: list[Tensor]) -> None:
        if function in RESHAPES | COPIES:  # which of them, strides decide
            function, told = "reshape", {"self": told["self"]}
        tensors = [self._readable(Value(number)) for number in _numbers_in(told)]
        settings = [(name, self._readable(value)) for name, value in told.items()]
        self.outline.append((function, tensors))
        # Of the first only: of others, such as what training would need, kernels make their own.
        self.script.append((function, settings, [tuple(tensor.shape) for tensor in made[:1]]))

    def _readable(self, value: Any) -> Any:
        if isinstance(value, Value):
            if value.number in self.strange:
                return object()  # like no other
            return self.names.get(value.number, value.number)
        if isinstance(value, (list, tuple)):
            return [self._readable(part) for part in value]
        # The same network in another type or on another device has other ones of these.
        return value if isinstance(value, (bool, int, float, str)) else None


# What gives the same numbers another shape, and what leaves even that.
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze"}
COPIES = {"clone", "alias", "detach", "lift_fresh"}

# Ways to values that pass the dispatcher by.
_READS = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage"}


class _Reads(TorchFunctionMode):
    """Sees whether values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen |= getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


class ReadsValues(Exception):
    """The network looks at the numbers that it computes."""


@torch.no_grad()
def follow(
    run: Callable[[Tensor], Tensor], image: Tensor, network: nn.Module
) -> tuple[Course, Tensor]:
    """The course of `run` on `image`, in which `network` has a part, and what it gives.

    Raises:
        ReadsValues: values were read where the dispatcher does not see it. Else whatever it raises.
    """
    course, reads = Course(image, constants(network)), _Reads()
    with course, reads:
        result = run(image)
    if reads.seen:
        raise ReadsValues()
    return course, result


def constants(network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters and buffers by name."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def hollow(network: _Network) -> _Network:
    """A copy whose parameters and buffers have no values; none are copied."""
    kept: dict[int, Any] = {}
    for tensor in constants(network).values():
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
        kept[id(tensor)] = empty
    return copy.deepcopy(network, kept)


def _numbers_in(options: dict[str, Any]) -> list[int]:
    return [leaf.number for leaf in tree_leaves(options) if isinstance(leaf, Value)]
