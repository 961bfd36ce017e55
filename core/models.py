"""The networks by name: an eval-mode classifier of [0, 1] images, its preprocessing, its classes.

Three kinds stand side by side: the MNIST networks that the project trains itself
(scripts/train_mnist.py), every torchvision classifier, and the operator's own, described in the
file that POLYCOLLIDE_MODELS names (docs/models.md). No file is unpickled freely: weights are
safetensors, or torchvision's files, checked against their hash and read with `weights_only`.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import pickle
import socket
import sys
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Self

import torch
import torchvision.models as zoo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from core.errors import ModelUnavailable, UnknownName
from core.images import Preprocessing

Channels = Literal["L", "RGB", "BGR"]

ASSETS = Path(__file__).parent / "assets"


class Normalize(nn.Module):
    """[0, 1] pixels -> what the network was trained on: `(scale * pixels - mean) / std`.

    `channels` is the order that the network wants; pixels always come as RGB or grey. `mean` and
    `std` follow the network's order, on the scaled values; one number serves every channel.
    """

    gain: Tensor
    offset: Tensor

    def __init__(
        self,
        channels: Channels,
        *,
        scale: float = 1.0,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
    ) -> None:
        super().__init__()
        means, stds = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self.register_buffer("gain", (scale / stds).float(), persistent=False)
        self.register_buffer("offset", (-means / stds).float(), persistent=False)
        self.reverse = channels == "BGR"
        self.identity = scale == 1 and set(mean) == {0} and set(std) == {1}

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` in [0, 1] -> the same shape."""
        if self.reverse:
            images = images.flip(1)
        return images if self.identity else torch.addcmul(self.offset, images, self.gain)


class Classifier(nn.Module):
    """Normalisation, then the network, in eval mode and without gradients on its weights.

    Layer names elsewhere are module paths inside `network`.
    """

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """`[N, C, H, W]` in [0, 1] -> logits `[N, classes]`."""
        logits: Tensor = self.network(self.normalize(images))
        return logits


@dataclass(frozen=True)
class Model:
    """A network, ready to use."""

    name: str
    classifier: Classifier
    preprocessing: Preprocessing
    classes: tuple[str, ...]  # not unique: ImageNet has two cranes
    weights: str  # "IMAGENET1K_V1", or the file's name
    weights_sha256: str  # of names, types, shapes and bytes of the network's state dict

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return _input_shape(self.preprocessing)


@dataclass(frozen=True)
class Listed:
    """What is known of a network without building it."""

    name: str
    weights: tuple[str, ...]  # the default first
    input_shape: tuple[int, int, int]  # with the default weights
    classes: int
    origin: str  # "shipped", "torchvision" or the path of the models.toml
    ready: bool  # whether the default weights are on this machine


def load(name: str, *, weights: str | None = None, device: str | torch.device = "cpu") -> Model:
    """The network `name` on `device`, with its default weights or those named.

    torchvision's weights are downloaded unless they are in its cache. Nothing is kept here: a
    caller keeps what it loads. Raises UnknownName (of a model or of weights) and ModelUnavailable.
    """
    if name in SHIPPED:
        model = _load_shipped(name, weights)
    elif name in _torchvision_names():
        model = _load_torchvision(name, weights)
    else:
        path, own = _read_own()
        if name not in own:
            raise UnknownName("model", name, [*SHIPPED, *_torchvision_names(), *own])
        model = _load_own(own[name], path, weights)
    # Convolutions take channels last faster, on the CPU too (benchmarks/precision.py).
    model.classifier.to(device).to(memory_format=torch.channels_last)
    return model


def listed() -> list[Listed]:
    """Every network that `load` knows. Raises ModelUnavailable where models.toml is unreadable."""
    found = [
        Listed(name, (f"{name}.safetensors",), (1, 28, 28), 10, "shipped", True) for name in SHIPPED
    ]
    for name in _torchvision_names():
        members = _torchvision_weights(name)
        default = next(iter(members.values()))
        shape = _input_shape(_torchvision_preprocessing(default))
        classes, ready = len(default.meta["categories"]), _cached(default).is_file()
        found.append(Listed(name, tuple(members), shape, classes, "torchvision", ready))
    path, own = _read_own()
    for entry in own.values():
        file = path.parent / entry.weights
        shape, classes = _input_shape(entry.preprocessing.outside()), len(entry.class_names())
        found.append(Listed(entry.name, (file.name,), shape, classes, str(path), file.is_file()))
    return found


# The networks that the project trains itself


def mnist_mlp() -> nn.Sequential:
    """The paper's 784-256-256-10 network of grey digits `[N, 1, 28, 28]`."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 256),
            relu1=nn.ReLU(),
            fc2=nn.Linear(256, 256),
            relu2=nn.ReLU(),
            fc3=nn.Linear(256, 10),
        )
    )


def mnist_cnn() -> nn.Sequential:
    """A small cousin of VGG for the same digits; its fc1 stands where VGG has FC-6."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * 7 * 7, 256),
            relu3=nn.ReLU(),
            fc2=nn.Linear(256, 128),
            relu4=nn.ReLU(),
            fc3=nn.Linear(128, 10),
        )
    )


SHIPPED: dict[str, Callable[[], nn.Sequential]] = {"mnist-mlp": mnist_mlp, "mnist-cnn": mnist_cnn}


def _load_shipped(name: str, weights: str | None) -> Model:
    file = ASSETS / f"{name}.safetensors"
    _only(file.name, weights)
    network = SHIPPED[name]()
    return Model(
        name=name,
        weights_sha256=_fill(name, network, file),
        classifier=Classifier(Normalize("L"), network),
        preprocessing=Preprocessing(mode="L", size=(28, 28)),
        classes=tuple("0123456789"),
        weights=file.name,
    )


# torchvision's


def _load_torchvision(name: str, weights: str | None) -> Model:
    members = _torchvision_weights(name)
    chosen = next(iter(members)) if weights is None else weights
    if chosen not in members:
        raise UnknownName("weights", chosen, members)
    member = members[chosen]
    _download(name, member)
    # The builder knows what its weights ask of the network (image size, input transform, renamed
    # keys), but unpickles them freely, unless the weights themselves refuse.
    member.get_state_dict = functools.partial(
        type(member).get_state_dict, member, weights_only=True
    )
    try:
        with _SkipInit():
            network = zoo.get_model(name, weights=member, progress=False)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ModelUnavailable(
            f"{_cached(member)} holds no weights of {name}: remove it."
        ) from error
    settings = member.transforms()
    normalize = Normalize("RGB", mean=tuple(settings.mean), std=tuple(settings.std))
    return Model(
        name=name,
        classifier=Classifier(normalize, network),
        preprocessing=_torchvision_preprocessing(member),
        classes=tuple(member.meta["categories"]),
        weights=chosen,
        weights_sha256=_tensor_hash(network.state_dict()),
    )


class _SkipInit(TorchFunctionMode):
    """Leaves out random starts that are about to be replaced (VGG-16 spends 2 s on them).

    Only whole initialisers: truncated normals draw until all numbers lie within bounds, which never
    ends where the drawing itself is left out.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _torchvision_names() -> list[str]:
    """Detection, segmentation, video and quantised networks live in submodules, so not here."""
    return list(zoo.list_models(module=zoo))


def _torchvision_weights(name: str) -> dict[str, Any]:
    """Members of the weights enum by name, default first, without those that do not classify."""
    enum = zoo.get_model_weights(name)
    # The classifier of VGG-16's IMAGENET1K_FEATURES is full of NaN; it names no categories.
    return {member.name: member for member in (enum.DEFAULT, *enum) if member.meta["categories"]}


def _torchvision_preprocessing(member: Any) -> Preprocessing:
    settings = member.transforms()
    (crop,), (resize,) = settings.crop_size, settings.resize_size
    interpolation = settings.interpolation.value
    return Preprocessing("RGB", size=(crop, crop), resize=resize, interpolation=interpolation)


def _cached(member: Any) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", member.url.rpartition("/")[2])


def _download(name: str, member: Any) -> None:
    """See to it that the file is in torch's cache and has the hash that its name begins."""
    file = _cached(member)
    prefix = file.stem.rpartition("-")[2]
    if file.is_file():
        if not _file_hash(file).startswith(prefix):
            raise ModelUnavailable(f"The sha256 of {file} does not begin with {prefix}: remove it.")
        return
    patience = socket.getdefaulttimeout()
    try:
        # Behind a firewall that drops packets, each of the host's addresses would take minutes.
        socket.setdefaulttimeout(10)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(member.url, str(file), prefix, progress=False)
    except (OSError, HTTPException, RuntimeError) as error:
        raise ModelUnavailable(
            f"The weights {member.name} of {name!r} are not on this machine and cannot be "
            f"downloaded ({error}): put {file.name} from {member.url} into {file.parent}."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)


# The operator's own


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class _OwnPreprocessing(_Table):
    crop: Size | Annotated[list[Size], Field(min_length=2, max_length=2)]
    resize: Size | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bilinear"
    channels: Channels = "RGB"
    scale: Positive = 1.0
    mean: list[float] = [0.0]
    std: list[Positive] = [1.0]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not {len(self.mean), len(self.std)} <= {1, 1 if self.channels == "L" else 3}:
            raise ValueError("mean and std take one number, or one for each channel")
        self.outside()
        return self

    def outside(self) -> Preprocessing:
        """What is done to an image before it is a tensor."""
        mode: Literal["L", "RGB"] = "L" if self.channels == "L" else "RGB"
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        return Preprocessing(mode, (height, width), self.resize, self.interpolation)

    def inside(self) -> Normalize:
        """What the network does to the tensor."""
        mean, std = tuple(self.mean), tuple(self.std)
        return Normalize(self.channels, scale=self.scale, mean=mean, std=std)


class _Own(_Table):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    factory: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    arguments: dict[str, Any] = {}
    weights: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    preprocessing: _OwnPreprocessing
    classes: list[str] | Literal["imagenet"]

    def class_names(self) -> tuple[str, ...]:
        if self.classes == "imagenet":
            return tuple(zoo.AlexNet_Weights.DEFAULT.meta["categories"])
        return tuple(self.classes)


class _ModelsToml(_Table):
    models: list[_Own]


def _read_own() -> tuple[Path, dict[str, _Own]]:
    """The models.toml and its entries by name; no entries where POLYCOLLIDE_MODELS is not set."""
    setting = os.environ.get("POLYCOLLIDE_MODELS")
    if not setting:
        return Path(), {}
    path = Path(setting).expanduser().absolute()
    try:
        entries = _ModelsToml.model_validate(tomllib.loads(path.read_text("utf-8"))).models
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelUnavailable(f"{path} is wrong at {where}: {first['msg']}.") from error
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} (POLYCOLLIDE_MODELS) cannot be read: {error}.") from error
    names = [*SHIPPED, *_torchvision_names()]
    for entry in entries:
        if entry.name in names:
            raise ModelUnavailable(f"{path}: the name {entry.name!r} is taken.")
        names.append(entry.name)
    return path, {entry.name: entry for entry in entries}


def _load_own(entry: _Own, path: Path, weights: str | None) -> Model:
    file = path.parent / entry.weights
    _only(file.name, weights)
    try:
        network = _factory(entry, path)()
    except Exception as error:  # the operator's code may raise anything
        reason = f"the factory {entry.factory!r} of {entry.name!r} failed: {_brief(error)}"
        raise ModelUnavailable(f"{path}: {reason}.") from error
    if not isinstance(network, nn.Module):
        raise ModelUnavailable(f"{path}: {entry.factory!r} returns no torch.nn.Module.")
    model = Model(
        name=entry.name,
        weights_sha256=_fill(entry.name, network, file, entry.sha256),
        classifier=Classifier(entry.preprocessing.inside(), network),
        preprocessing=entry.preprocessing.outside(),
        classes=entry.class_names(),
        weights=file.name,
    )
    _check_logits(model)
    return model


def _factory(entry: _Own, path: Path) -> Callable[[], Any]:
    module, _, attribute = entry.factory.partition(":")
    if module == "torchvision":
        builder = zoo.get_model_builder(attribute)
        return functools.partial(builder, weights=None, **entry.arguments)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: a file beside models.toml hides no package
    loaded = _beside(path.parent / f"{module}.py") or importlib.import_module(module)
    return functools.partial(getattr(loaded, attribute), **entry.arguments)


def _beside(file: Path) -> ModuleType | None:
    """The module in a file, which goes before a package of that name, as ours are, and hides none.

    None where there is no such file.
    """
    name = f"beside_models_toml_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def _check_logits(model: Model) -> None:
    """Refuse a network that does not give an image of its size one logit per class name."""
    wanted = (1, len(model.classes))
    try:
        logits = model.classifier(torch.zeros(1, *model.input_shape))
    except Exception as error:  # the operator's code may raise anything
        reason = f"cannot read images of shape {model.input_shape}: {_brief(error)}"
        raise ModelUnavailable(f"{model.name!r} {reason}.") from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != wanted:
        reason = f"{wanted[1]} class names, but gives {got} instead of {wanted} for one image"
        raise ModelUnavailable(f"{model.name!r} has {reason}.")


# Weights


def _fill(name: str, network: nn.Module, file: Path, sha256: str | None = None) -> str:
    """Copy a safetensors file into the network, which must fit key by key; the tensors' hash."""
    if not file.is_file():
        raise ModelUnavailable(f"The weights of {name!r} are missing: there is no file {file}.")
    if sha256 and _file_hash(file) != sha256:
        raise ModelUnavailable(f"{file} has not the sha256 that models.toml gives for {name!r}.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelUnavailable(f"{file} cannot be read as safetensors: {error}.") from error
    own = network.state_dict()
    misshapen = {key for key in state.keys() & own.keys() if state[key].shape != own[key].shape}
    fitting = {key: value for key, value in state.items() if key not in misshapen}
    left = network.load_state_dict(fitting, strict=False)
    problems = {
        "lacks": set(left.missing_keys) - misshapen,
        "has too much:": set(left.unexpected_keys),
        "has in another shape:": misshapen,
    }
    found = [f"{what} {_few(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ModelUnavailable(f"{file} does not fit {name!r}: it {'; it '.join(found)}.")
    return _tensor_hash(network.state_dict())


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def _few(keys: set[str]) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


def _only(available: str, weights: str | None) -> None:
    if weights not in (None, available):
        raise UnknownName("weights", str(weights), [available])


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensor_hash(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _input_shape(preprocessing: Preprocessing) -> tuple[int, int, int]:
    return (1 if preprocessing.mode == "L" else 3, *preprocessing.size)
