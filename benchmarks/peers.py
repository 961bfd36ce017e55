"""The engine against ART's FeatureAdversariesPyTorch and plenoptic's Metamer: same Adam.

Five photographs are each brought to the activations of another at SqueezeNet's
`features.12.squeeze`, by Adam at one rate for equal steps, from the same pixels: equation 1, which
is the objective of both peers. All three watch the squared distance of the activations behind the
ReLU, summed, so that Adam's epsilon weighs the same. Start-up is left out; each of them keeps its
own ways inside the loop:

- ART 1.20.1 knows layers by the names of top-level modules only, so the network is rewrapped with
  the layer as one; it goes on to the logits, and passes the guide images again at every step.
- plenoptic 2.1.1 takes any module as the model, so it is given one that ends at the layer; it
  keeps pixels near [0, 1] by its default penalty and takes norms of the image at every step.
- The engine clamps to [0, 1] and looks at its losses every tenth step.

Time to a residual, ||f(x) - f(t)|| / ||f(t)|| averaged over the images, is the steps that one long
run of each takes to it times the median step of the short runs in turn, which noise spares.
An Adam that notes time and pixels every tenth step serves both peers, snapshots serve the engine.
"""

import contextlib
import copy
import io
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import plenoptic
import torch
from art.attacks.evasion import FeatureAdversariesPyTorch
from art.estimators.classification import PyTorchClassifier
from subjects import Net, squeezenet
from timing import Floats, Report, console, duration, quick_asked, table
from torch import Tensor, nn

from core.engine import STRIDE, Engine, Group
from core.objective import Losses, Target
from core.spec import CollisionSpec

IMAGES, RATE = 5, 0.01
# Seconds since the first step began, and pixels [5, C, H, W], every tenth step.
Trail = list[tuple[float, Tensor]]


class NotingAdam(torch.optim.Adam):
    """Adam that leaves a trail."""

    trail: Trail

    def step(self, closure: Any = None) -> Any:
        (pixels,) = self.param_groups[0]["params"]
        if not hasattr(self, "began"):
            self.began, self.taken, NotingAdam.trail = time.perf_counter(), 0, []
        if self.taken % STRIDE == 0:
            self.trail.append((time.perf_counter() - self.began, pixels.detach().clone()))
        self.taken += 1
        return super().step(closure)


class Layered(nn.Module):
    """SqueezeNet with the activation that is to be matched as a top-level module."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        # Laid out as torchvision has it: channels last is the registry's doing.
        network = copy.deepcopy(net.model.classifier.network).to(
            memory_format=torch.contiguous_format
        )
        fire = network.features[12]
        self.before = nn.Sequential(
            net.model.classifier.normalize, network.features[:12], fire.squeeze
        )
        self.matched = nn.ReLU()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(fire.expand1x1, nn.ReLU()),
                nn.Sequential(fire.expand3x3, nn.ReLU()),
            ]
        )
        self.after = network.classifier

    def forward(self, images: Tensor) -> Tensor:
        matched = self.matched(self.before(images))
        logits: Tensor = self.after(torch.cat([branch(matched) for branch in self.branches], 1))
        return logits.flatten(1)


def art(net: Net, sources: Tensor, targets: Tensor, steps: int) -> Trail:
    """FeatureAdversariesPyTorch with Adam, no bound but [0, 1]."""
    classifier = PyTorchClassifier(
        model=Layered(net),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(sources.shape[1:]),
        nb_classes=len(net.model.classes),
        clip_values=(0.0, 1.0),
    )
    attack = FeatureAdversariesPyTorch(
        classifier,
        delta=1.0,
        optimizer=NotingAdam,
        optimizer_kwargs={"lr": RATE},
        layer="matched",
        max_iter=steps + 1,
        verbose=False,
    )
    attack.generate(sources.numpy(), targets.numpy())
    # Noted before ART clips them.
    return [(seconds, pixels.clamp(0, 1)) for seconds, pixels in NotingAdam.trail]


def metamer(net: Net, sources: Tensor, targets: Tensor, steps: int) -> Trail:
    """Metamer of the network up to the layer, at its default penalty."""
    layered = Layered(net)
    model = nn.Sequential(OrderedDict(before=layered.before, matched=layered.matched)).eval()
    plenoptic.remove_grad(model)
    made = plenoptic.Metamer(targets, model, loss_function=lambda a, b: (a - b).square().sum())
    made.setup(sources, optimizer=NotingAdam, optimizer_kwargs={"lr": RATE})
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        made.synthesize(steps + 1, stop_criterion=0.0)
    return NotingAdam.trail


def engine(net: Net, sources: Tensor, targets: Tensor, steps: int) -> Trail:
    """Five jobs of one corner."""
    tap = net.tap()
    spec = CollisionSpec(
        model=net.model.name,
        layer=net.layer,
        corners=1,
        objective="plain",
        learning_rate=RATE,
        max_steps=steps,
        snapshots=64,
    )
    with torch.no_grad():
        goals = [Target(pre, tap.layer.activation) for pre in tap(targets)]
    running = Engine(tap, spec.optimizer)
    groups = [
        Group(str(i), spec, source, Losses.of_plain(goal, 1, alpha=1.0), 1e-9 * goal.energy)
        for i, (source, goal) in enumerate(zip(sources, goals, strict=True))
    ]
    for group in groups:
        running.admit(group)
    began, seconds = time.perf_counter(), []
    while running.groups or not seconds:
        seconds.append(time.perf_counter() - began)
        running.advance()
    images = [
        torch.cat(values) for values in zip(*(g.snapshots.values for g in groups), strict=True)
    ]
    return list(zip(seconds, images, strict=True))


def main() -> None:
    quick = quick_asked(__doc__)
    net = squeezenet()
    photos = net.photos(IMAGES + 1)
    sources, targets = photos[:IMAGES], photos[1:]
    step = _steps(net, sources, targets, turns=2 if quick else 12)
    long_runs = {
        name: run(net, sources, targets, 20 if quick else 100) for name, run in RUNS.items()
    }
    _show_residuals(net, long_runs, targets, step)


def _steps(net: Net, sources: Tensor, targets: Tensor, turns: int) -> dict[str, float]:
    """Prints and gives seconds a step, from short runs in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for turn in range(turns):
        for name in RUNS if turn % 2 == 0 else reversed(RUNS):
            (first, _), (second, _) = RUNS[name](net, sources, targets, STRIDE)
            seconds[name].append((second - first) / STRIDE)
    taken = {name: np.array(values) for name, values in seconds.items()}
    report = Report(f"A step at five images, {net.title}", "peer", "engine")
    for name in PEERS:
        report.add(name, taken[name], taken["engine"], (">=", 1.0))
    report.show()
    return {name: float(np.median(values)) for name, values in taken.items()}


def _show_residuals(
    net: Net, trails: dict[str, Trail], targets: Tensor, step: dict[str, float]
) -> None:
    """When each first was under residuals that all of them reach."""
    tap = net.tap()
    courses = {name: _course(tap, trail, targets) for name, trail in trails.items()}
    worst = max(course.min() for course in courses.values())
    first = max(course[0] for course in courses.values())
    made = table("Time to the same residual", "residual", *RUNS, *(f"{n} / engine" for n in PEERS))
    for goal in (np.sqrt(first * worst), worst):
        steps = {name: STRIDE * int(np.argmax(courses[name] <= goal)) for name in RUNS}
        taken = {name: steps[name] * step[name] for name in RUNS}
        cells = [f"{duration(taken[name])}, {steps[name]} steps" for name in RUNS]
        ratios = [f"{taken[name] / taken['engine']:.2f}" for name in PEERS]
        made.add_row(f"{goal:.3f}", *cells, *ratios)
    console.print(made)


def _course(tap: Any, trail: Trail, targets: Tensor) -> Floats:
    """The mean residual at every note."""
    f = tap.layer.activation
    with torch.no_grad():
        wanted = f(tap(targets))
        missed = [(f(tap(pixels)) - wanted).norm(dim=1) / wanted.norm(dim=1) for _, pixels in trail]
    return torch.stack(missed).mean(1).double().numpy()


RUNS: dict[str, Callable[[Net, Tensor, Tensor, int], Trail]] = {
    "engine": engine,
    "ART": art,
    "plenoptic": metamer,
}
PEERS = ("ART", "plenoptic")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="art|plenoptic")
    main()
