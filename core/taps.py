"""The pre-activations f' of a named layer, read where its activation takes them in.

A forward pass calls activations (ReLU, ReLU6, max pools) a number of times: as a module or a
function, in place or not, through one shared module or many. A layer is one of those calls.
Watching the calls instead of hooking modules makes all these cases alike, and leaves nothing behind
on the network.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from core.errors import UnknownName, UntappableLayer

# Relative errors below this are rounding (1e-6 is usual); layers that are no cut, not affine or do
# not mix show 0.1 and more.
ROUNDING = 1e-3


class Pieces(NamedTuple):
    """What an activation f leaves free around a target's f' [U]; all are [U].

    f is the target's wherever f' is the target's on `active` units and `side` (f' - `bound`) <= 0.
    `side` is 0 for active units, and for units that f does not look at.
    """

    active: Tensor
    side: Tensor
    bound: Tensor


@dataclass(frozen=True)
class Clip:
    """The activation that clamps to [0, high], `high` infinite for ReLU and 6 for ReLU6."""

    high: float = math.inf

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.clamp(0, self.high)

    @property
    def kind(self) -> str:
        return "relu" if math.isinf(self.high) else f"relu{self.high:g}"

    def pieces(self, pre: Tensor) -> Pieces:
        """Inactive units have side 1 and bound 0, saturated ones -1 and `high`.

        Active is f'(t) >= 0 (the paper's), and below where the activation saturates.
        """
        inactive, saturated = pre < 0, pre >= self.high
        side = inactive.float() - saturated.float()
        return Pieces(side == 0, side, torch.where(saturated, self.high, 0.0))

    def gradient(self, pre: Tensor, target: Tensor) -> Tensor:
        """Of ||f(pre) - f(target)||^2 / 2 with respect to `pre`; both [R, U]."""
        return (pre - self(target)).mul_((pre > 0) & (pre < self.high))


@dataclass(frozen=True)
class MaxPool:
    """The activation that takes the maximum of each window; f' [U] is [C, H, W], as in `shape`.

    Sizes are (rows, columns), and mean what they mean to `functional.max_pool2d`.
    """

    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    kind: ClassVar[str] = "max_pool"

    def __call__(self, pre: Tensor) -> Tensor:
        """[..., U] -> [..., V]."""
        return self._windows(pre)[0].view(*pre.shape[:-1], -1)

    def pieces(self, pre: Tensor) -> Pieces:
        """Who wins a window is active, of equals the first; others have side 1.

        Their bound is the least maximum of the windows that see them; who is seen by none is free.
        Behind a ReLU nothing falls below 0, so what must not rise above 0 is active as well: it has
        no room that a corner could use.
        """
        maxima, winners = self._windows(pre)
        bound = self._least_seen(maxima[0]).flatten()
        won = torch.zeros_like(bound, dtype=torch.bool).view(self.shape).flatten(1)
        active = won.scatter_(1, winners[0].flatten(1), True).flatten()
        if (pre >= 0).all():
            active |= bound <= 0
        flat = ~active & bound.isfinite()
        return Pieces(active, flat.float(), bound.where(flat, 0))

    def gradient(self, pre: Tensor, target: Tensor) -> Tensor:
        """Of ||f(pre) - f(target)||^2 / 2 with respect to `pre`; both [R, U]."""
        maxima, winners = self._windows(pre)
        missed = maxima - self._windows(target)[0]
        planes = torch.zeros_like(pre).view(*winners.shape[:2], -1)
        return planes.scatter_add_(2, winners.flatten(2), missed.flatten(2)).view_as(pre)

    def _windows(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of each window, and where in its plane it is; both [R, C, rows, columns]."""
        maxima, winners = functional.max_pool2d(
            pre.reshape(-1, *self.shape),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            return_indices=True,
        )
        return maxima, winners

    def _least_seen(self, maxima: Tensor) -> Tensor:
        """For each unit [C, H, W] the least of the windows' `maxima` that see it; infinity if none.

        This is the pool transposed: windows begin at the places of `starts`, and a unit looks back
        from where it is.
        """
        ends = [(n - 1) * step + 1 for n, step in zip(maxima.shape[1:], self.stride, strict=True)]
        starts = maxima.new_full((len(maxima), *ends), -math.inf)
        starts[:, :: self.stride[0], :: self.stride[1]] = -maxima
        margins: list[int] = []
        for axis in (1, 0):  # the last first, as `pad` takes them
            before = (self.kernel[axis] - 1) * self.dilation[axis] - self.padding[axis]
            after = self.shape[axis + 1] + self.padding[axis] - ends[axis]
            margins += before, after
        starts = functional.pad(starts, margins, value=-math.inf)
        return -functional.max_pool2d(starts, self.kernel, 1, 0, self.dilation)


Activation = Clip | MaxPool


@dataclass(frozen=True)
class Layer:
    """A layer that can be tapped: the `call`-th activation, from 0, that a forward pass calls.

    `names` are all it answers to, the first being how we call it: the module whose output is
    clipped (`classifier.0`), or the call itself (`layer4.2.relu#2`, the third run of a shared
    module; `block.relu()`, a function called by `block`; max pools have no other). `shape` is one
    image's f'. `places` are where that activation and those before it were called from: every pass
    must come by there.
    """

    names: tuple[str, ...]
    call: int
    activation: Activation
    shape: tuple[int, ...]
    producer: tuple[str, int] | None
    places: "tuple[Place, ...]" = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def units(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Tap:
    """A network opened at one layer.

    `normalize` and `network` are the halves of a `core.models.Classifier`. The network may be a
    copy in another `dtype`: normalised images are cast to it, what comes out is float32 again.
    Images are [N, C, H, W] in [0, 1]; pre-activations are flattened, [N, U].
    """

    normalize: nn.Module
    network: nn.Module
    layer: Layer
    dtype: torch.dtype = torch.float32

    def __call__(self, images: Tensor) -> Tensor:
        """f' of `images`; nothing behind the layer is computed."""

        seen: list[Tensor] = []

        def stop(pre: Tensor) -> Tensor:
            seen.append(pre)
            raise _Reached

        with suppress(_Reached):
            self._forward(images, {self.layer.call: stop})
        return seen[0].flatten(1).float()

    def logits(self, images: Tensor) -> Tensor:
        """The logits [N, classes] of `images`."""
        logits: Tensor = self.network(self.normalize(images).to(self.dtype))
        return logits.float()

    def observe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """f' and the logits [N, classes] of `images`, in one pass."""
        seen, record = _recorder()
        logits = self._forward(images, {self.layer.call: record})
        return seen[0], logits.float()

    def observe_mixtures(self, corners: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `observe`, for the mixtures `weights` [N, K] of `corners` [K, C, H, W].

        What comes before the first activation is computed for the corners only and mixed
        there: right where that much is affine in the image, which `mixes` tells.
        """
        seen, record = _recorder()

        def mix(pre: Tensor) -> Tensor:
            mixed: Tensor = torch.tensordot(weights.to(pre.dtype), pre, dims=1)
            return mixed

        if self.layer.call == 0:
            logits = self._forward(corners, {0: lambda pre: record(mix(pre))})
        else:
            logits = self._forward(corners, {0: mix, self.layer.call: record})
        return seen[0], logits.float()

    def pinned(self, images: Tensor, pre: Tensor) -> Tensor:
        """Logits of `images` with the layer's pre-activation replaced by `pre` [1, U]."""

        def pin(own: Tensor) -> Tensor:
            return pre.to(own.dtype).view(1, *own.shape[1:]).expand_as(own).clone()

        return self._forward(images, {self.layer.call: pin}).float()

    def _forward(self, images: Tensor, actions: "_Actions") -> Tensor:
        normalized = self.normalize(images).to(self.dtype)
        with _AtCalls(actions, self) as calls:
            logits: Tensor = self.network(normalized)
        if calls.call < max(actions):
            raise self.lost()
        return logits

    @cached_property
    def paths(self) -> dict[int, str]:
        """The network's modules by identity."""
        return {id(module): path for path, module in self.network.named_modules()}

    def lost(self) -> UntappableLayer:
        return UntappableLayer(
            f"Which activations this network calls depends on the image: this time it did not come "
            f"to {self.layer.name!r} as before; take a layer before its first branch, or a network "
            "that calls the same ones for every image."
        )


def tappable(network: nn.Module, normalized: Tensor) -> list[Layer]:
    """Every layer of `network` that can be tapped, in the order of its forward pass.

    `normalized` is one image [1, C, H, W] as the network takes it.
    """
    with torch.no_grad(), _watching(network) as trace:
        network(normalized)
    return trace.layers


def open_tap(normalize: nn.Module, network: nn.Module, name: str, probe: Tensor) -> Tap:
    """The tap of the layer called `name`, once it has been seen to be true on `probe` [1, C, H, W].

    Raises:
        UnknownName: the network has no such layer.
        UntappableLayer: the layer is no max pool, and what it gives is not clipped, or goes on
            unclipped as well.
    """
    normalized = normalize(probe)
    layers = tappable(network, normalized)
    for layer in layers:
        if name in layer.names:
            break
    else:
        raise _no_such_layer(network, name, layers)
    if name not in (layer.names[-1], true_name(network, normalized, layer)):
        raise UntappableLayer(
            f"What layer {name!r} gives is clipped in one place and used as it is in another, "
            "so its activations do not decide what follows; "
            + _advice(name, [other for other in layers if other != layer])
        )
    return Tap(normalize, network, layer)


def true_name(network: nn.Module, normalized: Tensor, layer: Layer) -> str:
    """The name by which `open_tap` opens `layer`: the module's, if all that it gives is clipped."""
    shared = layer.producer and not _all_clipped(network, normalized, layer)
    return layer.names[-1] if shared else layer.name


@torch.no_grad()
def is_cut(tap: Tap, target: Tensor, probes: Tensor) -> bool:
    """Whether the layer's activation decides the logits, tested on images.

    The test: each of `probes` [N, C, H, W], pinned to the activation of `target` [1, C, H, W], must
    get the logits of `target`. The error is measured against how far apart the images' own logits
    are, so that a network that hardly answers to its input does not seem all cuts.
    """
    pre, logits = tap.observe(torch.cat([target, probes]))
    apart = float((logits[1:] - logits[:1]).norm(dim=1).max())
    return pins(tap, pre[:1], logits[:1], probes, apart=apart)


@torch.no_grad()
def pins(tap: Tap, pre: Tensor, logits: Tensor, probes: Tensor, *, apart: float) -> bool:
    """Whether all of `probes` [N, C, H, W], pinned to `pre` [1, U], get `logits` [1, classes].

    But for rounding, where logits of unrelated images are `apart`.
    """
    missed = (tap.pinned(probes, pre) - logits).norm(dim=1)
    return float(missed.max()) < ROUNDING * apart


@torch.no_grad()
def seems_affine(tap: Tap, probes: Tensor) -> bool:
    """Whether the layer is affine in the image, tested on the midpoint of `probes` [2, C, H, W]."""
    midpoint = tap(probes.mean(0, keepdim=True))
    return _relative_error(midpoint, tap(probes).mean(0, keepdim=True)) < ROUNDING


@torch.no_grad()
def mixes(tap: Tap, probes: Tensor) -> bool:
    """Whether `observe_mixtures` is right for this network, tried on `probes` [K, C, H, W]."""
    k = len(probes)
    weights = torch.full((k + 1, k), 1 / k, device=probes.device)
    weights[:k] = (torch.eye(k) * 0.5 + 0.5 / k).to(probes)
    plain = tap.observe(torch.tensordot(weights, probes, dims=1))
    try:
        mixed = tap.observe_mixtures(probes, weights)
    except RuntimeError:  # the network remembers the size of the batch that came in
        return False
    return all(
        m.shape == p.shape and _relative_error(m, p) < ROUNDING
        for m, p in zip(mixed, plain, strict=True)
    )


@contextmanager
def matmul_precision(*, tf32: bool) -> Iterator[None]:
    """Whether CUDA may round the inputs of products to TF32; the setting is global, so put back."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


_Actions = Mapping[int, Callable[[Tensor], Tensor]]


class _Reached(Exception):
    """Ends a forward pass that need not go on."""


# Where an activation is called: paths of the modules around the call, and between them the code
# that is at work, with how far it has come in it.
Place = tuple[Any, ...]
_TORCH = os.path.dirname(torch.__file__) + os.sep
_MODULE_CALL = nn.Module._call_impl.__code__


def _place(network: nn.Module, paths: Mapping[int, str]) -> Place:
    """Where the activation that is being called now is called from, inside `network`.

    torch's own code is left out: hooks lead through other lines of it.
    """
    place: list[Any] = []
    frame = sys._getframe(1)
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code is _MODULE_CALL:
            module = frame.f_locals["self"]
            place.append(paths.get(id(module)))
            if module is network:
                break
        elif not code.co_filename.startswith(_TORCH):
            place += code, frame.f_lasti
    return tuple(place)


class _AtCalls(TorchFunctionMode):
    """Passes f' of chosen calls through an action, then calls the activation on what it returns.

    Raises UntappableLayer where an activation is called from another place than `tap` knows.
    """

    def __init__(self, actions: _Actions, tap: Tap) -> None:
        super().__init__()
        self.actions, self.tap, self.call, self.last = actions, tap, -1, max(actions)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS and _activation_of(func, args, kwargs):
            self.call += 1
            if self.call <= self.last and self.tap.layer.places[self.call] != _place(
                self.tap.network, self.tap.paths
            ):
                raise self.tap.lost()
            if action := self.actions.get(self.call):
                pre, rest, kwargs = _split(args, kwargs)
                return func(action(pre), *rest, **kwargs)
        return func(*args, **kwargs)


class _Trace(TorchFunctionMode):
    """Lists the activations that a forward pass calls, with the modules around them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.paths = network, {id(m): path for path, m in network.named_modules()}
        self.layers: list[Layer] = []
        self.inside: list[tuple[str, nn.Module]] = [("", nn.Identity())]
        self.runs: Counter[str] = Counter()
        self.taken: set[str] = set()
        # By identity of the tensor; it is kept, so that no other can take its identity.
        self.outputs: dict[int, tuple[Tensor, int, tuple[str, int]]] = {}

    def enter(self, path: str, module: nn.Module) -> None:
        self.inside.append((path, module))

    def leave(self, output: Any) -> None:
        path, _ = self.inside.pop()
        if isinstance(output, Tensor):
            by = (path, self.runs[path])
            known = self.outputs.get(id(output))
            if known is None or known[1] != output._version:
                self.outputs[id(output)] = (output, output._version, by)
        self.runs[path] += 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS and (activation := _activation_of(func, args, kwargs)):
            self._note(activation, _split(args, kwargs)[0], _place(self.network, self.paths))
        return func(*args, **kwargs)

    def _note(self, activation: Activation, pre: Tensor, place: Place) -> None:
        pools = isinstance(activation, MaxPool)
        # What a pool takes in is mostly a ReLU's output, which is another layer's activation.
        made = None if pools else self.outputs.get(id(pre))
        # Another version: changed in place since, as by a residual addition.
        producer = made[2] if made and made[1] == pre._version else None
        path, module = self.inside[-1]
        if isinstance(module, nn.MaxPool2d if pools else _CLIP_MODULES):
            own = _numbered(path, self.runs[path])
        else:
            call = f"{path}.{'max_pool2d' if pools else 'relu'}()".lstrip(".")
            own = _numbered(call, self.runs[call])
            self.runs[call] += 1
        names = [_numbered(*producer), own] if producer else [own]
        names = [name for name in names if name not in self.taken]
        self.taken.update(names)
        places = (*(self.layers[-1].places if self.layers else ()), place)
        self.layers.append(
            Layer(
                *(tuple(names), len(self.layers), activation, tuple(pre.shape[1:]), producer),
                places=places,
            )
        )


@contextmanager
def _watching(network: nn.Module) -> Iterator[_Trace]:
    trace = _Trace(network)
    handles = []
    for path, module in network.named_modules():

        def enter(module: nn.Module, _: Any, path: str = path) -> None:
            trace.enter(path, module)

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            trace.leave(output)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        with trace:
            yield trace
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _all_clipped(network: nn.Module, normalized: Tensor, layer: Layer) -> bool:
    """Whether the logits stay when the producing module gives its clipped output to everyone."""
    assert layer.producer
    path, run = layer.producer
    runs = 0

    def clipped(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return layer.activation(output) if runs == run + 1 else output

    logits = network(normalized)
    handle = network.get_submodule(path).register_forward_hook(clipped)
    try:
        return _relative_error(network(normalized), logits) < ROUNDING
    finally:
        handle.remove()


def _recorder() -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    seen: list[Tensor] = []

    def record(pre: Tensor) -> Tensor:
        # A copy: the activation that follows may work in place.
        seen.append(pre.flatten(1).to(torch.float32, copy=True))
        return pre

    return seen, record


_CLIP_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_RELUS = {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_HARDTANHS = {functional.hardtanh, functional.hardtanh_}
_CLAMPS = {torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_}
_CLAMPS |= {torch.clip, torch.clip_, Tensor.clip, Tensor.clip_}
_CLAMP_MINS = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_POOLS = {functional.max_pool2d, torch.max_pool2d}
_ACTIVATIONS = {*_RELUS, functional.relu6, *_HARDTANHS, *_CLAMPS, *_CLAMP_MINS, *_POOLS}


def _activation_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Activation | None:
    """The activation that a call is; None where it does not clamp to [0, high]."""
    if func in _POOLS:
        return _pool_of(*args, **kwargs)
    if func in _RELUS:
        return Clip()
    if func is functional.relu6:
        return Clip(6.0)
    if func in _HARDTANHS:
        low, high = _bounds(args, kwargs, "min_val", "max_val", (-1.0, 1.0))
    else:
        low, high = _bounds(args, kwargs, "min", "max", (None, None))
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low != 0:
        return None
    return Clip(math.inf if high is None else float(high))


def _pool_of(
    input: Tensor,  # by the name that a call may give it
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,  # never true: that is another function
) -> MaxPool | None:
    """The max pool that a call with these arguments is; None where it is not over images."""
    if input.dim() != 4 or not input.is_floating_point():
        return None
    _, channels, height, width = input.shape
    return MaxPool(
        shape=(channels, height, width),
        kernel=_pair(kernel_size),
        stride=_pair(stride or kernel_size),
        padding=_pair(padding),
        dilation=_pair(dilation),
        ceil_mode=bool(ceil_mode),
    )


def _pair(size: Any) -> tuple[int, int]:
    pair = size if isinstance(size, Sequence) else (size,)
    return int(pair[0]), int(pair[-1])


def _bounds(
    args: Any, kwargs: dict[str, Any], low: str, high: str, default: tuple[Any, Any]
) -> tuple[Any, Any]:
    given = [*args[1:3], *default[len(args[1:3]) :]]
    return kwargs.get(low, given[0]), kwargs.get(high, given[1])


def _split(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """The tensor that a call takes in, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("input"), (), rest


def _numbered(path: str, run: int) -> str:
    return f"{path}#{run}" if run else path


def _relative_error(value: Tensor, truth: Tensor) -> float:
    scale = truth.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((value - truth).norm() / scale)


def _no_such_layer(
    network: nn.Module, name: str, layers: list[Layer]
) -> UnknownName | UntappableLayer:
    if name.partition("#")[0] not in dict(network.named_modules()):
        return UnknownName("layer", name, [n for layer in layers for n in layer.names])
    return UntappableLayer(
        f"Layer {name!r} is not followed by ReLU or ReLU6, nor is it a max pool that can be "
        f"tapped; {_advice(name, layers)}"
    )


def _advice(name: str, layers: list[Layer]) -> str:
    near = get_close_matches(name, [layer.name for layer in layers], 3, 0.0)
    return f"take {' or '.join(map(repr, near))}." if near else "there is none to take instead."
