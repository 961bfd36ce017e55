"""A step of the engine at five rows against the same step written by hand.

Both do the same forward pass up to the layer, the paper's loss, the backward pass, a gradient step
and the clamp, in float32 with the same threads, and look at the losses every tenth step. The hand-
written loop (`subjects.HandLoop`) keeps no best states, curves or snapshots: that is the engine's
extra, and counts against it. A hull's step has five points between the corners besides, and what
drives them apart.
"""

from functools import partial

from subjects import HandLoop, Net, endless_group, first_inactive, mnist_mlp, squeezenet, vgg16
from timing import Goal, Report, alternate, quick_asked

from core.engine import STRIDE, Engine
from core.job import prepare
from core.spec import CollisionSpec

# Rates small enough that random weights do not blow up; they change no time.
RATES = {"mnist-mlp": 0.01, "vgg16": 1e-8, "squeezenet1_0": 1e-11}


def compare(report: Report, net: Net, goal: Goal, turns: int, strides: int = 1) -> None:
    """Adds one line: `strides` times ten steps of each in every turn."""
    spec = CollisionSpec(
        preset="paper-mnist",
        model=net.model.name,
        layer=net.layer,
        learning_rate=RATES[net.model.name],
        max_steps=1_000_000,
    )
    tap = net.tap()
    engine = Engine(tap, spec.optimizer)
    group = endless_group(net, tap, spec)
    engine.admit(group)
    units = partial(first_inactive, count=spec.corners)
    loop = HandLoop(net.forward, *net.photos(2), units, spec)

    def engine_steps() -> None:
        for _ in range(strides):
            engine.advance()

    def hand_steps() -> None:
        for _ in range(strides):
            loop.stride()

    # The first stride shows that both do the same; later, rounding and |f'| part them.
    engine.advance()
    loop.stride()
    apart = (engine.state_of(group.key)["parameters"] - loop.x).abs().max()
    assert apart < 1e-4, f"after ten steps the two are {apart:.1e} apart"
    times = alternate(engine_steps, hand_steps, turns=turns)
    assert group.running.all(), "rows ended, so the engine did less than the loop"
    report.add(net.title, *times, goal, per=STRIDE * strides)


def compare_hull(report: Report, net: Net, samples: tuple[str, str], turns: int) -> None:
    """Adds one line: a step of five corners and five points, against that of the corners alone."""
    engines = []
    for objective in ("hull", "corners"):
        spec = CollisionSpec(
            preset="hull",
            objective=objective,
            model=net.model.name,
            layer=net.layer,
            l_pos_threshold=1e-9,
            max_steps=1_000_000,
        )
        subject = net.subject(spec)
        engine = subject.engine(spec)
        engine.admit(prepare(subject, spec, *map(net.loaded, samples), key=objective).group)
        engines.append(engine)
    times = alternate(*(engine.advance for engine in engines), turns=turns)
    assert all(engine.groups for engine in engines), "rows ended"
    report.add(net.title, *times, per=STRIDE)


def main() -> None:
    quick = quick_asked(__doc__)
    report = Report("One step at five rows", "engine", "by hand")
    compare(report, mnist_mlp(), ("<=", 1.5), turns=50 if quick else 400, strides=5)
    compare(report, squeezenet(), ("<=", 1.05), turns=3 if quick else 15)
    compare(report, vgg16(64 if quick else 224), ("<=", 1.05), turns=3 if quick else 5)
    report.show()
    hulls = Report("One step with a hull", "hull", "corners alone")
    photos = ("photos/animal_panda", "photos/farm_dog")
    compare_hull(hulls, mnist_mlp(), ("mnist/3-0", "mnist/7-0"), turns=50 if quick else 400)
    compare_hull(hulls, squeezenet(), photos, turns=3 if quick else 15)
    hulls.show()


if __name__ == "__main__":
    main()
