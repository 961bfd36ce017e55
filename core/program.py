"""A network as a list of steps, each of which is affine, moves numbers about, or bends at known
places: what bounds and exact analysis work on.

The list is read from a trace of a float64 copy on the CPU, by one reader for each operation, and
is trusted no further than its logits agree with the network's own.
"""

import copy
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from core.errors import CoreError
from core.models import Normalize


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
    """A call that the trace met: of `module`, or of a function with `args` after its inputs."""

    step: Step
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def options(self, *names: str) -> dict[str, Any]:
        """What was given of the settings `names`, which stand in the function's order."""
        if self.module is not None:
            return {
                name: getattr(self.module, name) for name in names if hasattr(self.module, name)
            }
        options = dict(zip(names, self.args, strict=False)) | self.kwargs
        options.pop("inplace", None)
        self.demand(set(options) <= set(names) and len(self.args) <= len(names))
        return options

    def demand(self, known: bool) -> None:
        if not known:
            raise UnsupportedNetwork(
                f"No relaxation is known for {self.step.name}, {self.step.operation} with these "
                "settings, so nothing can be proved about this network."
            )

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


def read(normalize: nn.Module, network: nn.Module, shape: tuple[int, ...]) -> Program:
    """The steps of a classifier of images of `shape` (C, H, W), on a float64 copy on the CPU.

    Raises:
        UnsupportedNetwork: it cannot be traced, or does something that no relaxation is known for.
    """
    whole = copy.deepcopy(nn.Sequential(normalize, network))
    whole.to("cpu", torch.float64).to(memory_format=torch.contiguous_format)
    whole.eval().requires_grad_(False)
    probe = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    try:
        traced = fx.GraphModule(whole, _Tracer().trace(whole))
        interpreter = fx.Interpreter(traced, garbage_collect_values=False)
        logits = interpreter.run(probe.clone())
    except Exception as error:  # what a network does when it is traced is anyone's guess
        raise UnsupportedNetwork(f"This network cannot be traced: {error}") from error
    program = _translate(traced, interpreter.env, shape)
    # The trace and the readers are trusted no further than this.
    if not (isinstance(logits, Tensor) and torch.allclose(evaluate(program, probe)[-1], logits)):
        raise UnsupportedNetwork("This network, as it was traced, computes something else.")
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


def _translate(
    traced: fx.GraphModule, values: dict[fx.Node, Any], shape: tuple[int, ...]
) -> Program:
    steps = [Step("image", "image", (), shape, ())]
    places: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node.op == "output":
            (result,) = node.args
            if not isinstance(result, fx.Node) or result not in places:
                raise UnsupportedNetwork("This network returns more than its logits.")
            return Program(tuple(steps[: places[result] + 1]))
        if not isinstance(values[node], Tensor) or node.op == "get_attr":
            continue
        if node.op == "placeholder":
            places[node] = 0
            continue
        call = _call(traced, node, values, places, steps)
        step = READERS[call.step.operation](call)
        if step is None:
            places[node] = call.step.inputs[0]
        else:
            places[node] = len(steps)
            steps.append(step)
    raise UnsupportedNetwork("This network returns nothing.")


def _call(
    traced: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    places: dict[fx.Node, int],
    steps: list[Step],
) -> Call:
    module = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    kind = type(module) if module is not None else node.target
    if kind not in OPERATIONS:
        what = getattr(kind, "__name__", kind)
        raise UnsupportedNetwork(
            f"No relaxation is known for {what} ({node.name}), so nothing can be proved about this "
            "network."
        )
    first = node.args[0] if node.args else None
    sources = list(first) if isinstance(first, (list, tuple)) else [first]
    args = node.args[1:]
    if OPERATIONS[kind] == "add":
        sources, args = list(node.args), ()
    inputs = tuple(places[s] for s in sources if isinstance(s, fx.Node) and s in places)
    call = Call(
        Step(
            name=node.name,
            operation=OPERATIONS[kind],
            inputs=inputs,
            shape=tuple(values[node].shape[1:]),
            shapes=tuple(steps[i].shape for i in inputs),
        ),
        module,
        tuple(_concrete(arg, values) for arg in args),
        {name: _concrete(value, values) for name, value in node.kwargs.items()},
    )
    call.demand(len(inputs) == len(sources) and len(values[node]) == 2)
    if call.step.operation not in VIEWS:
        call.demand(_is_sole_user(node, values))
    if module is not None:  # whose hooks may change what comes out
        call.demand(not module._forward_hooks and not module._forward_pre_hooks)
    return call


def _concrete(argument: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(argument, lambda node: values[node])


def _storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


def _is_sole_user(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether nobody else sees what `node` overwrites, if it works in place, or a view of it."""
    seen: Any = node.args[0]
    while isinstance(seen, fx.Node) and _storage(values[seen]) == _storage(values[node]):
        if len(seen.users) > 1:
            return False
        seen = seen.args[0] if seen.args else None
    return True


class _Tracer(fx.Tracer):
    """Leaves whole whatever has a reader."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OPERATIONS or super().is_leaf_module(m, module_qualified_name)


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
    weight, bias = call.module.weight, call.module.bias
    return call.affine(
        lambda x: x @ weight.T,
        weight.shape[1],
        absolute=lambda x: x @ weight.abs().T,
        transpose=lambda c: [c @ weight],
        bias=bias,
    )


def _read_convolution(call: Call) -> Step:
    module, (shape,) = call.module, call.step.shapes
    call.demand(module.padding_mode == "zeros" and not isinstance(module.padding, str))
    weight, absolute = module.weight, module.weight.abs()
    settings = (module.stride, module.padding, module.dilation, module.groups)
    return call.affine(
        lambda x: functional.conv2d(x, weight, None, *settings),
        weight[0].numel(),
        absolute=lambda x: functional.conv2d(x, absolute, None, *settings),
        transpose=lambda c: [conv2d_input((len(c), *shape), weight, c, *settings)],
        bias=None if module.bias is None else module.bias.view(-1, 1, 1),
    )


def _read_batch_norm(call: Call) -> Step:
    module = call.module
    call.demand(module.running_mean is not None)
    gain = 1 / (module.running_var + module.eps).sqrt()
    shift = torch.zeros_like(gain)
    if module.affine:
        gain, shift = gain * module.weight, module.bias
    moved = module.running_mean * gain
    return _scale(call, gain.view(-1, 1, 1), shift - moved, shift.abs() + moved.abs())


def _read_normalize(call: Call) -> Step | None:
    module = call.module
    if module.identity and not module.reverse:
        return None
    order = (lambda x: x.flip(1)) if module.reverse else (lambda x: x)
    return _scale(call, module.gain, module.offset, module.offset.abs(), order)


def _scale(
    call: Call,
    gain: Tensor,
    bias: Tensor,
    bias_size: Tensor,
    order: Callable[[Tensor], Tensor] = lambda x: x,
) -> Step:
    """Channel by channel. Its constants are rounded up to six times."""
    return call.affine(
        lambda x: order(x) * gain,
        8,
        absolute=lambda x: order(x) * gain.abs(),
        bias=bias.view(-1, 1, 1),
        bias_size=bias_size.view(-1, 1, 1),
    )


def _read_add(call: Call) -> Step:
    call.demand(not call.kwargs and call.step.shapes == (call.step.shape,) * 2)
    return call.affine(operator.add, 2)


def _read_cat(call: Call) -> Step:
    dim = call.options("dim").get("dim", 0) % (len(call.step.shape) + 1)
    call.demand(dim > 0)
    return call.rearrange(lambda *xs: torch.cat(xs, dim))


def _read_reshape(call: Call) -> Step:
    """Whatever leaves the batch alone: the values stay in their order."""
    shape = call.step.shape
    return call.rearrange(lambda x: x.reshape(len(x), *shape))


def _read_average_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    options = call.options(*names, "divisor_override")
    call.demand(options.pop("divisor_override", None) is None)
    terms = math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.avg_pool2d(x, **options), terms)


def _read_adaptive_average_pool(call: Call) -> Step:
    """A mean over windows; that they may overlap changes nothing."""
    options = call.options("output_size")
    terms = math.prod(call.step.shapes[0])
    return call.affine(lambda x: functional.adaptive_avg_pool2d(x, **options), terms)


def _read_mean(call: Call) -> Step:
    options = call.options("dim", "keepdim")
    dims = options.get("dim", 0)
    rank = len(call.step.shapes[0]) + 1
    dims = [dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]
    call.demand(0 not in dims)
    keepdim = options.get("keepdim", False)
    return call.affine(lambda x: x.mean(dims, keepdim=keepdim), math.prod(call.step.shapes[0]))


def _read_relu(call: Call) -> Step:
    return replace(call.step, operation="clip")


def _read_clip(call: Call) -> Step:
    names = ("min_val", "max_val")
    options = call.options(*names)
    call.demand(options.get("min_val", -1) == 0 and options.get("max_val", 1) > 0)
    return replace(call.step, operation="clip", high=float(options["max_val"]))


def _read_relu6(call: Call) -> Step:
    return replace(call.step, operation="clip", high=6.0)


def _read_max_pool(call: Call) -> Step:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    options = call.options(*names)
    call.demand(not options.pop("return_indices", False))
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
        (value, value) if isinstance(value, int) else tuple(value)
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
    """In eval mode."""


def _read_dropout(call: Call) -> None:
    call.demand(call.module is not None or not call.options("p", "training").get("training", True))


READERS: dict[str, Callable[[Call], Step | None]] = {
    "linear": _read_linear,
    "convolution": _read_convolution,
    "batch_norm": _read_batch_norm,
    "normalize": _read_normalize,
    "relu": _read_relu,
    "relu6": _read_relu6,
    "clip": _read_clip,
    "max_pool": _read_max_pool,
    "average_pool": _read_average_pool,
    "adaptive_average_pool": _read_adaptive_average_pool,
    "mean": _read_mean,
    "add": _read_add,
    "cat": _read_cat,
    "reshape": _read_reshape,
    "identity": _read_nothing,
    "dropout": _read_dropout,
}

# Those whose result may be a view of the input; others that share its memory have written there.
VIEWS = {"reshape", "identity", "dropout", "normalize"}

# What a trace calls them: modules by type, functions, methods by name.
OPERATIONS: dict[Any, str] = {
    nn.Linear: "linear",
    nn.Conv2d: "convolution",
    nn.BatchNorm2d: "batch_norm",
    Normalize: "normalize",
    **dict.fromkeys((nn.ReLU, torch.relu, torch.relu_, functional.relu, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, functional.relu6), "relu6"),
    **dict.fromkeys((nn.Hardtanh, functional.hardtanh), "clip"),
    **dict.fromkeys((nn.MaxPool2d, functional.max_pool2d, torch.max_pool2d), "max_pool"),
    **dict.fromkeys((nn.AvgPool2d, functional.avg_pool2d), "average_pool"),
    nn.AdaptiveAvgPool2d: "adaptive_average_pool",
    functional.adaptive_avg_pool2d: "adaptive_average_pool",
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.cat, torch.concat), "cat"),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten", "view", "reshape"), "reshape"),
    **dict.fromkeys((nn.Identity, "contiguous"), "identity"),
    **dict.fromkeys(
        (nn.Dropout, nn.Dropout2d, functional.dropout, functional.dropout2d), "dropout"
    ),
}
