"""The pre-activations f' of a named layer, read where a clipping function takes them in.

A forward pass calls ReLU or ReLU6 a number of times: as a module or a function, in place or not,
through one shared module or many. A layer is one of those calls. Watching the calls instead of
hooking modules makes all these cases alike, and leaves nothing behind on the network.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from core.errors import UnknownName, UntappableLayer

# Relative errors below this are rounding (1e-6 is usual); layers that are no cut, not affine or do
# not mix show 0.1 and more.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Clip:
    """The activation: clamp to [0, high], `high` infinite for ReLU and 6 for ReLU6."""

    high: float = math.inf

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.clamp(0, self.high)


@dataclass(frozen=True)
class Layer:
    """A layer that can be tapped: the `call`-th clipping call, from 0, of a forward pass.

    `names` are all it answers to, the first being how we call it: the module whose output is
    clipped (`classifier.0`), or the clipping call itself (`layer4.2.relu#2`, the third run of a
    shared module; `block.relu()`, a function called by `block`). `shape` is one image's f'.
    """

    names: tuple[str, ...]
    call: int
    clip: Clip
    shape: tuple[int, ...]
    producer: tuple[str, int] | None

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

        What comes before the first clipping call is computed for the corners only and mixed
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
        with _AtCalls(actions) as calls:
            logits: Tensor = self.network(normalized)
        if calls.call < max(actions):
            raise UntappableLayer(f"This time the network did not come to {self.layer.name!r}.")
        return logits


def tappable(network: nn.Module, normalized: Tensor) -> list[Layer]:
    """Every layer of `network` that can be tapped, in the order of its clipping calls.

    `normalized` is one image [1, C, H, W] as the network takes it.
    """
    with torch.no_grad(), _watching(network) as trace:
        network(normalized)
    return trace.layers


def open_tap(normalize: nn.Module, network: nn.Module, name: str, probe: Tensor) -> Tap:
    """The tap of the layer called `name`, once it has been seen to be true on `probe` [1, C, H, W].

    Raises:
        UnknownName: the network has no such layer.
        UntappableLayer: what that layer gives is not clipped, or goes on unclipped as well.
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
def is_cut(tap: Tap, target: Tensor, probe: Tensor) -> bool:
    """Whether the layer's activation decides the logits.

    The test: `probe`, pinned to the activation of `target` (both [1, C, H, W], and different),
    must get the logits of `target`. The error is measured against how far apart the two images'
    own logits are, so that a network that hardly answers to its input does not seem all cuts.
    """
    pre, logits = tap.observe(torch.cat([target, probe]))
    missed = tap.pinned(probe, pre[:1]) - logits[:1]
    return bool(missed.norm() < ROUNDING * (logits[1] - logits[0]).norm())


@torch.no_grad()
def is_affine(tap: Tap, probes: Tensor) -> bool:
    """Whether the layer is affine in the image, judged on the midpoint of `probes` [2, C, H, W]."""
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


class _AtCalls(TorchFunctionMode):
    """Passes f' of chosen clipping calls through an action, then clips what it returns."""

    def __init__(self, actions: _Actions) -> None:
        super().__init__()
        self.actions, self.call = actions, -1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CLIPS and _clip_of(func, args, kwargs):
            self.call += 1
            if action := self.actions.get(self.call):
                pre, rest, kwargs = _split(args, kwargs)
                return func(action(pre), *rest, **kwargs)
        return func(*args, **kwargs)


class _Trace(TorchFunctionMode):
    """Lists the clipping calls of a forward pass with the modules around them."""

    def __init__(self) -> None:
        super().__init__()
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
        if func in _CLIPS and (clip := _clip_of(func, args, kwargs)):
            self._note(clip, _split(args, kwargs)[0])
        return func(*args, **kwargs)

    def _note(self, clip: Clip, pre: Tensor) -> None:
        made = self.outputs.get(id(pre))
        # Another version: changed in place since, as by a residual addition.
        producer = made[2] if made and made[1] == pre._version else None
        path, module = self.inside[-1]
        if isinstance(module, _CLIP_MODULES):
            own = _numbered(path, self.runs[path])
        else:
            call = f"{path}.relu()".lstrip(".")
            own = _numbered(call, self.runs[call])
            self.runs[call] += 1
        names = [_numbered(*producer), own] if producer else [own]
        names = [name for name in names if name not in self.taken]
        self.taken.update(names)
        self.layers.append(
            Layer(tuple(names), len(self.layers), clip, tuple(pre.shape[1:]), producer)
        )


@contextmanager
def _watching(network: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()
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
        return layer.clip(output) if runs == run + 1 else output

    logits = network(normalized)
    handle = network.get_submodule(path).register_forward_hook(clipped)
    try:
        return _relative_error(network(normalized), logits) < ROUNDING
    finally:
        handle.remove()


def _recorder() -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    seen: list[Tensor] = []

    def record(pre: Tensor) -> Tensor:
        # A copy: the clipping that follows may work in place.
        seen.append(pre.flatten(1).to(torch.float32, copy=True))
        return pre

    return seen, record


_CLIP_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_RELUS = {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_HARDTANHS = {functional.hardtanh, functional.hardtanh_}
_CLAMPS = {torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_}
_CLAMPS |= {torch.clip, torch.clip_, Tensor.clip, Tensor.clip_}
_CLAMP_MINS = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_CLIPS = {*_RELUS, functional.relu6, *_HARDTANHS, *_CLAMPS, *_CLAMP_MINS}


def _clip_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Clip | None:
    """The clipping that a call does; None where it does not clamp to [0, high]."""
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


def _bounds(
    args: Any, kwargs: dict[str, Any], low: str, high: str, default: tuple[Any, Any]
) -> tuple[Any, Any]:
    given = [*args[1:3], *default[len(args[1:3]) :]]
    return kwargs.get(low, given[0]), kwargs.get(high, given[1])


def _split(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """The tensor that a call clips, and its other arguments."""
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
        f"Layer {name!r} is not followed by ReLU or ReLU6; {_advice(name, layers)}"
    )


def _advice(name: str, layers: list[Layer]) -> str:
    near = get_close_matches(name, [layer.name for layer in layers], 3, 0.0)
    return f"take {' or '.join(map(repr, near))}." if near else "there is none to take instead."
