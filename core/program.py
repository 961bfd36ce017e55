"""A network as a list of steps, each of which is affine, moves numbers about, or bends at known
places: what bounds and exact analysis work on.

The list is read from the course of a float64 copy on the CPU (`core.course`): from what the network
itself computes, by one reader for each operation. That it takes the same course for every image is
shown by the same network without values. What is read is trusted no further than it agrees with
the network itself on images.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from core.course import (
    COPIES,
    IMAGE,
    RESHAPES,
    Course,
    Operation,
    ReadsValues,
    Value,
    follow,
    hollow,
)
from core.errors import CoreError
from core.taps import Layer, Tap, seems_affine

# Numbers in the activations of images that are evaluated together: 256 MB.
NUMBERS = 2**25


class UnsupportedNetwork(CoreError):
    """The network does something that no relaxation is known for."""

    code = "unsupported_network"


@dataclass(frozen=True)
class Affine:
    """`linear(*xs) + bias` of a batch [N, ...], and what bounding it takes.

    `absolute` is `linear` with the absolute values of its weights; `bias_size` no less than the
    sizes of what was added up to the bias. An output is a sum of `terms` products, counting the
    roundings that made the weights. `transpose` takes gradients at the output to the inputs.
    """

    linear: Callable[..., Tensor]
    absolute: Callable[..., Tensor]
    transpose: Callable[[Tensor], Sequence[Tensor]]
    terms: int
    bias: Tensor
    bias_size: Tensor


@dataclass(frozen=True)
class Step:
    """One operation of the network, `operation` naming what is known of it.

    `inputs` are indices of earlier steps; step 0 is the image. `shape` and `shapes` are of one
    output and of the inputs, without the batch. Of `affine`, `apply` and `high` each operation has
    its own: `apply` moves numbers about unchanged, or picks the greatest with their indices;
    `high` is where a clipping function ends.
    """

    name: str
    operation: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    affine: Affine | None = None
    apply: Callable[..., Any] | None = None
    windows: Tensor | None = None
    high: float = math.inf


@dataclass(frozen=True)
class Program:
    """A network as a list of steps, each after its inputs; the last gives the logits."""

    steps: tuple[Step, ...]

    @cached_property
    def refined(self) -> dict[int, int]:
        """Fully connected layers that `forward` refines, each with the second affine step before.

        From one affine step to the next, backward bounds are what forward bounds are. The logits
        are left to `margin_bounds`.
        """
        affine = [i for i, step in enumerate(self.steps) if step.affine is not None]
        return {
            i: before
            for before, i in zip(affine[1:], affine[3:-1], strict=False)
            if len(self.steps[i].shape) == 1
        }

    @property
    def floats(self) -> int:
        """Numbers in one image's activations, all steps together."""
        return sum(math.prod(step.shape) for step in self.steps)

    @property
    def widest(self) -> int:
        """Numbers in the largest activation."""
        return max(math.prod(step.shape) for step in self.steps)

    @property
    def terms(self) -> int:
        """More than any sum of products has here, forward or backward."""
        products = (step.affine.terms for step in self.steps if step.affine)
        return max(self.widest, *products, 0) + 4 * len(self.steps)


# Reading a network


@dataclass(frozen=True)
class Call:
    """An operation that the course has: `options` by name, inputs among them as `Value`s."""

    step: Step
    options: dict[str, Any]

    def demand(self, known: bool) -> None:
        if not known:
            raise UnsupportedNetwork(
                f"No relaxation is known for {self.step.operation} ({self.step.name}) with these "
                "settings, so nothing can be proved about this network."
            )

    def constant(self, name: str) -> Any:
        """An option that the image has no part in."""
        self.demand(not isinstance(self.options[name], Value))
        return self.options[name]

    def affine(
        self,
        linear: Callable[..., Tensor],
        terms: int,
        *,
        absolute: Callable[..., Tensor] | None = None,
        transpose: Callable[[Tensor], Sequence[Tensor]] | None = None,
        bias: Tensor | None = None,
        bias_size: Tensor | None = None,
    ) -> Step:
        """Without `absolute` the weights of `linear` are their own absolute values."""
        offset = torch.zeros((), dtype=torch.float64) if bias is None else bias
        affine = Affine(
            linear=linear,
            absolute=absolute or linear,
            transpose=transpose or transposed(linear, self.step.shapes),
            terms=terms,
            bias=offset,
            bias_size=offset.abs() if bias_size is None else bias_size,
        )
        return replace(self.step, operation="affine", affine=affine)

    def rearrange(self, apply: Callable[..., Tensor]) -> Step:
        return replace(self.step, operation="rearrange", apply=apply)


@torch.no_grad()
def read(
    normalize: nn.Module,
    network: nn.Module,
    shape: tuple[int, ...],
    images: Tensor | None = None,
) -> Program:
    """The steps of a classifier of images of `shape` (C, H, W), on a float64 copy on the CPU.

    Compared with the network itself on two random images and on `images` [N, C, H, W].

    Raises:
        UnsupportedNetwork: it cannot be followed, its course is not the same for every image, or it
            does something that no relaxation is known for.
    """
    whole = copy.deepcopy(nn.Sequential(normalize, network))
    whole.to("cpu").to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        own = next((p.dtype for p in whole.parameters()), torch.float32)
        as_it_is, _ = follow(whole, probe.to(own, copy=True), whole)
        whole.to(torch.float64)
        course, logits = follow(whole, probe.double(), whole)
        alone, _ = follow(whole, probe[:1].double(), whole)
    except ReadsValues as error:
        raise _depends("it reads what it computes") from error
    except Exception as error:  # what a network does is anyone's guess
        raise UnsupportedNetwork(f"This network cannot be followed: {_brief(error)}.") from error
    try:
        empty = hollow(whole)
        without_values, _ = follow(empty, probe.double().to("meta"), empty)
    except Exception as error:  # as what has no value can give none
        raise _depends(_brief(error)) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UnsupportedNetwork("This network returns more than its logits.")
    program = _translate(course, course.number_of(logits), shape)
    if not as_it_is.script == course.script == without_values.script:
        raise _depends("it takes another course")
    if alone.outline != course.outline:
        raise _depends("one image alone takes another course")
    looked_at = probe.double()
    if images is not None:
        looked_at = torch.cat([looked_at, images.to("cpu", torch.float64)])
    size = max(1, NUMBERS // program.floats)
    for part in looked_at.split(size):
        logits = torch.cat([whole(image[None].clone()) for image in part])
        # The readers are trusted no further than this.
        if not torch.allclose(evaluate(program, part)[-1], logits):
            raise UnsupportedNetwork("This network, as it was read, computes something else.")
    return program


def evaluate(program: Program, images: Tensor) -> list[Tensor]:
    """What each step gives for `images` [N, C, H, W], the logits [N, classes] last."""
    values = [images]
    for step in program.steps[1:]:
        inputs = [values[i] for i in step.inputs]
        if step.affine is not None:
            values.append(step.affine.linear(*inputs) + step.affine.bias)
        elif step.apply is not None:
            moved = step.apply(*inputs)
            values.append(moved[0] if step.operation == "max_pool" else moved)
        else:
            values.append(inputs[0].clamp(0, step.high))
    return values


def is_affine(tap: Tap, probes: Tensor) -> bool:
    """Whether the layer is affine in the image: proved, and tested on `probes` [2, C, H, W]."""
    return affine_script(tap, tuple(probes.shape[1:])) is not None and seems_affine(tap, probes)


def affine_script(tap: Tap, shape: tuple[int, ...]) -> list[Any] | None:
    """The script of the way from images [2, *shape] to the layer, if all of it is affine.

    Nothing is computed: the network is followed, without values, as far as the layer.
    """
    try:
        course, pre = _follow_hollow(tap, shape, lambda tap, image: tap(image))
        steps = _translate(course, course.number_of(pre), shape).steps
    except Exception:  # what a network does without values is anyone's guess
        return None
    wanted = {len(steps) - 1}
    for index in range(len(steps) - 1, 0, -1):
        if index in wanted:
            if steps[index].operation not in ("affine", "rearrange"):
                return None
            wanted.update(steps[index].inputs)
    return course.script


def proves_cut(tap: Tap, shape: tuple[int, ...]) -> bool:
    """Whether the image has no way to the logits but through what the layer's activation takes in.

    The network is followed, without values, with the layer's pre-activation replaced.
    """

    def pin(tap: Tap, image: Tensor) -> Tensor:
        return tap.pinned(image, torch.empty(1, tap.layer.units, device="meta"))

    try:
        course, logits = _follow_hollow(tap, shape, pin)
    except Exception:  # what a network does without values is anyone's guess
        return False
    return course.number_of(logits) not in course.descends


def proves_mixing(tap: Tap, first: Layer, shape: tuple[int, ...]) -> bool:
    """Whether `tap.observe_mixtures` is right, but for a network that remembers its batch's size.

    `first` is the layer of the first activation: it must be affine in the image, and a cut.
    """
    beginning = replace(tap, layer=first)
    return affine_script(beginning, shape) is not None and proves_cut(beginning, shape)


def _follow_hollow(
    tap: Tap, shape: tuple[int, ...], run: Callable[[Tap, Tensor], Tensor]
) -> tuple[Course, Tensor]:
    normalize, network = empty = hollow(nn.ModuleList([tap.normalize, tap.network]))
    inside = replace(tap, normalize=normalize, network=network)
    images = torch.empty(2, *shape, dtype=tap.dtype, device="meta")
    return follow(lambda image: run(inside, image), images, empty)


def _depends(reason: str) -> UnsupportedNetwork:
    return UnsupportedNetwork(
        "What this network computes depends on more than the shape of an image, as by a branch "
        f"on its values, so nothing can be proved about it ({reason})."
    )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def _translate(course: Course, result: int, shape: tuple[int, ...]) -> Program:
    """The steps from the image to number `result` of `course`."""
    steps = [Step("image", "image", (), shape, ())]
    places = {IMAGE: 0}
    constants = {number: course.values[number] for number in course.names}
    for count, operation in enumerate(course.operations):
        if result in places:
            break
        if course.descends.isdisjoint(operation.outputs):
            # Weights as they are; what is computed from them is not known to all digits.
            kept = operation.is_view or operation.function in COPIES
            if kept and constants.keys() >= set(operation.inputs):
                constants |= {number: course.values[number] for number in operation.outputs}
            continue
        call = _call(course, operation, count, places, constants, steps)
        step = READERS[call.step.operation](call)
        if step is None:
            places[operation.outputs[0]] = call.step.inputs[0]
        else:
            places[operation.outputs[0]] = len(steps)
            steps.append(step)
    if result not in places:
        raise UnsupportedNetwork("What this network returns does not depend on the image.")
    return Program(tuple(steps[: places[result] + 1]))


def _call(
    course: Course,
    operation: Operation,
    count: int,
    places: dict[int, int],
    constants: dict[int, Tensor],
    steps: list[Step],
) -> Call:
    name = f"{operation.function}_{count}"
    if operation.function not in OPERATIONS or not operation.outputs:
        raise UnsupportedNetwork(
            f"No relaxation is known for {operation.function} ({name}), so nothing can be proved "
            "about this network."
        )
    inputs = tuple(places[number] for number in operation.inputs if number in places)
    output = course.values[operation.outputs[0]]
    call = Call(
        Step(
            name=name,
            operation=OPERATIONS[operation.function],
            inputs=inputs,
            shape=tuple(output.shape[1:]),
            shapes=tuple(steps[i].shape for i in inputs),
        ),
        {
            option: constants.get(value.number, value) if isinstance(value, Value) else value
            for option, value in operation.options.items()
        },
    )
    known = all(number in places or number in constants for number in operation.inputs)
    call.demand(bool(inputs) and known and output.shape[:1] == course.values[IMAGE].shape[:1])
    return call


def transposed(
    linear: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]]
) -> Callable[[Tensor], Sequence[Tensor]]:
    """The transpose of a linear function of tensors of `shapes`, from its derivative."""

    def transpose(coefficients: Tensor) -> Sequence[Tensor]:
        zeros = [coefficients.new_zeros(len(coefficients), *shape) for shape in shapes]
        parts: Sequence[Tensor] = torch.func.vjp(linear, *zeros)[1](coefficients)
        return parts

    return transpose


# Readers: a call -> its step, or None where the output is the input.


def _read_linear(call: Call) -> Step:
    """x @ weight, with a bias or without."""
    x = "mat1" if "mat1" in call.options else "self"
    call.demand(isinstance(call.options[x], Value) and len(call.step.shape) == 1)
    call.demand(call.options.get("beta", 1) == call.options.get("alpha", 1) == 1)
    weight = call.constant("mat2")
    return call.affine(
        lambda x: x @ weight,
        weight.shape[0],
        absolute=lambda x: x @ weight.abs(),
        transpose=lambda c: [c @ weight.T],
        bias=call.constant("self") if x == "mat1" else None,
    )


def _read_convolution(call: Call) -> Step:
    (shape,), weight, bias = call.step.shapes, call.constant("weight"), call.constant("bias")
    call.demand(not call.options["transposed"] and weight.dim() == 4)
    settings = [call.options[name] for name in ("stride", "padding", "dilation", "groups")]
    absolute = weight.abs()
    return call.affine(
        lambda x: functional.conv2d(x, weight, None, *settings),
        weight[0].numel(),
        absolute=lambda x: functional.conv2d(x, absolute, None, *settings),
        transpose=lambda c: [conv2d_input((len(c), *shape), weight, c, *settings)],
        bias=None if bias is None else bias.view(-1, 1, 1),
    )


def _read_batch_norm(call: Call) -> Step:
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    call.demand(not call.options["training"] and mean is not None)
    gain, shift = 1 / (variance + call.options["eps"]).sqrt(), torch.zeros_like(variance)
    if (weight := call.constant("weight")) is not None:
        gain = gain * weight
    if (bias := call.constant("bias")) is not None:
        shift = bias
    channels = (-1, *[1] * (len(call.step.shape) - 1))
    gain, shift, moved = (x.view(channels) for x in (gain, shift, mean * gain))
    return _scale(call, gain, shift - moved, shift.abs() + moved.abs())


def _read_addcmul(call: Call) -> Step:
    """Normalisation: offset + x gain."""
    call.demand(call.options["value"] == 1 and isinstance(call.options["tensor1"], Value))
    return _scale(call, _number(call, "tensor2"), _number(call, "self"))


def _scale(call: Call, gain: Tensor, bias: Tensor, bias_size: Tensor | None = None) -> Step:
    """Number by number. The constants are rounded up to six times."""
    call.demand(call.step.shapes == (call.step.shape,))
    return call.affine(
        lambda x: x * gain,
        8,
        absolute=lambda x: x * gain.abs(),
        bias=bias,
        bias_size=bias.abs() if bias_size is None else bias_size,
    )


def _number(call: Call, name: str) -> Tensor:
    """A constant, of a shape that suits each output."""
    value = call.constant(name)
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    if value.dim() > len(call.step.shape):
        call.demand(len(value) == 1)
        value = value[0]
    return value


def _read_add(call: Call) -> Step:
    """x + y, x - y, and either with a constant."""
    call.demand(call.options["alpha"] == 1)
    subtracts = call.step.operation == "subtract"
    if len(call.step.inputs) == 2:
        call.demand(call.step.shapes == (call.step.shape,) * 2)
        if subtracts:
            return call.affine(torch.sub, 2, absolute=torch.add)
        return call.affine(torch.add, 2)
    one = torch.ones((), dtype=torch.float64)
    if isinstance(call.options["other"], Value):
        return _scale(call, -one if subtracts else one, _number(call, "self"))
    other = _number(call, "other")
    return _scale(call, one, -other if subtracts else other)


def _read_turned(call: Call) -> Step:
    """A constant minus x."""
    call.demand(call.options["alpha"] == 1 and isinstance(call.options["self"], Value))
    return _scale(call, -torch.ones((), dtype=torch.float64), _number(call, "other"))


def _read_multiply(call: Call) -> Step:
    name = "self" if isinstance(call.options["other"], Value) else "other"
    return _scale(call, _number(call, name), torch.zeros((), dtype=torch.float64))


def _read_divide(call: Call) -> Step:
    call.demand(call.options.get("rounding_mode") is None)
    return _scale(call, 1 / _number(call, "other"), torch.zeros((), dtype=torch.float64))


def _read_cat(call: Call) -> Step:
    dim = call.options["dim"] % (len(call.step.shape) + 1)
    call.demand(dim > 0 and len(call.options["tensors"]) == len(call.step.inputs))
    return call.rearrange(lambda *xs: torch.cat(xs, dim))


def _read_reshape(call: Call) -> Step:
    """Whatever leaves the batch alone: the values stay in their order."""
    shape = call.step.shape
    call.demand(math.prod(shape) == math.prod(call.step.shapes[0]))
    return call.rearrange(lambda x: x.reshape(len(x), *shape))


def _read_flip(call: Call) -> Step:
    dims = [dim % (len(call.step.shape) + 1) for dim in call.options["dims"]]
    call.demand(0 not in dims)
    return call.rearrange(lambda x: x.flip(dims))


def _read_average_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    call.demand(call.options["divisor_override"] is None)
    options = {name: call.options[name] for name in names}
    terms = math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.avg_pool2d(x, **options), terms)


def _read_adaptive_average_pool(call: Call) -> Step:
    """A mean over windows; that they may overlap changes nothing."""
    size, terms = call.options["output_size"], math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.adaptive_avg_pool2d(x, size), terms)


def _read_mean(call: Call) -> Step:
    rank = len(call.step.shapes[0]) + 1
    dims = [dim % rank for dim in call.options.get("dim") or [0]]
    call.demand(0 not in dims and call.options["dtype"] is None)
    keepdim = call.options["keepdim"]
    return call.affine(lambda x: x.mean(dims, keepdim=keepdim), math.prod(call.step.shapes[0]))


def _read_relu(call: Call) -> Step:
    return replace(call.step, operation="clip")


def _read_clip(call: Call) -> Step:
    low, high = call.options["min_val"], call.options["max_val"]
    call.demand(low == 0 and high > 0)
    return replace(call.step, operation="clip", high=float(high))


def _read_max_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    options = {name: call.options[name] for name in names}
    return replace(
        call.step,
        operation="max_pool",
        apply=lambda x: functional.max_pool2d(x, **options, return_indices=True),
        windows=_windows(call.step, **options),
    )


def _windows(
    step: Step,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """[H' W', entries]: what each window sees, as indices into H x W; -1 is padding."""
    (_, height, width), (_, rows, columns) = step.shapes[0], step.shape
    kernel, strides, paddings, dilations = (
        (value, value) if isinstance(value, int) else (value[0], value[-1])
        for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    # In ceil mode the last windows reach past the padding.
    ends = [
        max(0, (windows - 1) * s + d * (k - 1) + 1 - size - pad)
        for windows, s, d, k, size, pad in zip(
            (rows, columns), strides, dilations, kernel, (height, width), paddings, strict=True
        )
    ]
    places = torch.arange(1.0, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    places = functional.pad(places, (paddings[1], ends[1], paddings[0], ends[0]))
    return functional.unfold(places, kernel, dilations, 0, strides)[0].T.long() - 1


def _read_nothing(call: Call) -> None:
    """A copy."""


READERS: dict[str, Callable[[Call], Step | None]] = {
    "linear": _read_linear,
    "convolution": _read_convolution,
    "batch_norm": _read_batch_norm,
    "addcmul": _read_addcmul,
    "relu": _read_relu,
    "clip": _read_clip,
    "max_pool": _read_max_pool,
    "average_pool": _read_average_pool,
    "adaptive_average_pool": _read_adaptive_average_pool,
    "mean": _read_mean,
    "add": _read_add,
    "subtract": _read_add,
    "turned": _read_turned,
    "multiply": _read_multiply,
    "divide": _read_divide,
    "cat": _read_cat,
    "flip": _read_flip,
    "reshape": _read_reshape,
    "copy": _read_nothing,
}

# What torch's dispatcher calls them, in eval mode.
OPERATIONS: dict[str, str] = {
    "addmm": "linear",
    "mm": "linear",
    "convolution": "convolution",
    "native_batch_norm": "batch_norm",
    "addcmul": "addcmul",
    "relu": "relu",
    "hardtanh": "clip",
    "max_pool2d_with_indices": "max_pool",
    "avg_pool2d": "average_pool",
    "_adaptive_avg_pool2d": "adaptive_average_pool",
    "mean": "mean",
    "add": "add",
    "sub": "subtract",
    "rsub": "turned",
    "mul": "multiply",
    "div": "divide",
    "cat": "cat",
    "flip": "flip",
    **dict.fromkeys(RESHAPES, "reshape"),
    **dict.fromkeys(COPIES, "copy"),
}
