"""bfloat16 against float32 on networks of a usual size: time of a step, and its corners.

Also weights in channels-last order, as `core.models` lays them out, against torchvision's own; and
torch.compile, which needs a C++ compiler, against the same step without it. On a CPU the compiled
step took 1.7 times as long as the plain one, and minutes to compile: so nothing is compiled.

Both run the same engine on the same job for the same steps; bfloat16 runs a copy of the network,
pixels and losses stay in float32. What both have found is then measured by the float32 network, as
every job is: what the bfloat16 run believed of itself counts for nothing.
"""

from collections.abc import Callable
from functools import partial

import torch
from subjects import Net, squeezenet, vgg16
from timing import Report, alternate, clocked, console, duration, quick_asked, table
from torch import Tensor

from core import job
from core.engine import STRIDE, Engine
from core.outcome import measure
from core.spec import CollisionSpec, Interpolation

SOURCE, TARGET = "photos/farm_dog", "photos/animal_panda"
COLUMNS = ("L_pos / energy", "violation / energy", "residual", "corners", "mixtures", "in 8 bits")


def compare(report: Report, net: Net, turns: int, mixtures: int) -> None:
    """Adds a line of times; prints what the corners of both are worth after these steps."""
    steps = STRIDE * (turns + 1)  # one warm-up
    runs = {precision: _start(net, precision, mixtures) for precision in ("fp32", "bf16")}
    report.add(
        net.title, *alternate(*(e.advance for *_, e in runs.values()), turns=turns), per=STRIDE
    )
    made = table(f"{net.title}: after {steps} steps, seen in float32", "", *COLUMNS)
    for precision, (subject, prepared, engine) in runs.items():
        engine.stop(prepared.group.key)
        made.add_row(precision, *_worth(subject, prepared))
    console.print(made)


def layouts(report: Report, make: Callable[[], Net], turns: int) -> None:
    """Adds a line: a float32 step on torchvision's layout, and on channels last."""
    nets = make(), make()
    nets[0].model.classifier.to(memory_format=torch.contiguous_format)
    engines = [_start(net, "fp32", 0)[-1] for net in nets]
    report.add(nets[0].title, *alternate(*(e.advance for e in engines), turns=turns), per=STRIDE)


def compiled(report: Report, make: Callable[[], Net], turns: int) -> None:
    """Adds a line: forward to the layer and back to five images, plainly and compiled."""
    net = make()
    photos, fast = net.photos(5), torch.compile(net.forward)

    def step(forward: Callable[[Tensor], Tensor]) -> None:
        leaf = photos.detach().requires_grad_()
        torch.autograd.grad(forward(leaf).sum(), leaf)

    took = duration(clocked(partial(step, fast)))
    times = alternate(partial(step, net.forward), partial(step, fast), turns=turns)
    report.add(f"{net.title}; compiling took {took}", *times)


def _start(net: Net, precision: str, mixtures: int) -> tuple[job.Subject, job.Job, Engine]:
    spec = CollisionSpec.model_validate(
        {
            "model": net.model.name,
            "layer": net.layer,
            "precision": precision,
            "max_steps": 1_000_000,
            "l_pos_threshold": {"relative": 1e-9},
            "interpolation": Interpolation(samples=mixtures),
            "ball_samples": 0,
        }
    )
    subject = net.subject(spec)
    prepared = job.prepare(subject, spec, net.loaded(SOURCE), net.loaded(TARGET), precision)
    engine = subject.engine(spec)
    engine.admit(prepared.group)
    return subject, prepared, engine


def _worth(subject: job.Subject, prepared: job.Job) -> list[str]:
    """The worst corner's losses and residual, then how many are taken for the target."""
    result = measure(subject, prepared).result
    corners, between, energy = result.corners, result.interpolation, prepared.goal.energy
    assert between
    hits = sum(corner.label == result.target.label for corner in corners)
    return [
        f"{max(corner.l_pos for corner in corners) / energy:.4f}",
        f"{max(corner.violation for corner in corners) / energy:.4f}",
        f"{max(corner.relative_residual for corner in corners):.3f}",
        f"{hits} of {len(corners)}",
        f"{between.accuracy:.0%} at {between.mean_probability:.4f}",
        f"{between.accuracy_8bit:.0%} at {between.mean_probability_8bit:.4f}",
    ]


def main() -> None:
    quick = quick_asked(__doc__)
    report = Report("A step at five rows", "fp32", "bf16")
    # 1.5 is what a prototype gained; the float32 result is the measure of the other.
    compare(report, squeezenet(), turns=2 if quick else 20, mixtures=20 if quick else 200)
    compare(report, vgg16(64 if quick else 224), turns=2 if quick else 4, mixtures=20)
    report.show()
    report = Report("A step at five rows", "torchvision's layout", "channels last")
    layouts(report, squeezenet, turns=2 if quick else 10)
    layouts(report, partial(vgg16, 64 if quick else 224), turns=2 if quick else 4)
    report.show()
    report = Report("Forward and backward at five rows", "plain", "torch.compile")
    compiled(report, squeezenet, turns=2 if quick else 10)
    compiled(report, partial(vgg16, 64 if quick else 224), turns=2 if quick else 4)
    report.show()


if __name__ == "__main__":
    main()
