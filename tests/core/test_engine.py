"""The engine against loops written out by hand, and against itself in other company."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from core.engine import (
    CONVERGED,
    DIVERGED,
    MAX_SECONDS,
    MAX_STEPS,
    STOPPED,
    STRIDE,
    Engine,
    Group,
    Record,
    UnfitState,
)
from core.errors import UnknownName
from core.images import load, read, sample_names
from core.job import Job, Subject, prepare
from core.objective import Losses, Target
from core.spec import CollisionSpec
from core.taps import Clip, Tap, open_tap

CPU = torch.device("cpu")
QUICK = {"snapshots": 0, "interpolation": {"samples": 0}, "ball_samples": 0, "figures": False}


@pytest.fixture(scope="module")
def mlp() -> Subject:
    return Subject.open(CollisionSpec(preset="paper-mnist"), CPU)


def job_of(subject: Subject, source: str, target: str, key: str = "job", **settings) -> Job:
    spec = CollisionSpec.model_validate({"preset": "paper-mnist"} | QUICK | settings)
    pair = [
        load(*read(f"sample:mnist/{name}"), subject.model.preprocessing)
        for name in (source, target)
    ]
    return prepare(subject, spec, *pair, key)


def finish(engine: Engine, *groups: Group) -> list[Group]:
    for group in groups:
        engine.admit(group)
    done = engine.advance()
    while engine.groups:
        done += engine.advance()
    return done


def digit_pairs(count: int) -> list[tuple[str, str]]:
    names = [name.removeprefix("mnist/") for name in sample_names() if name.startswith("mnist/")]
    pairs = [(s, t) for s, t in itertools.permutations(names, 2) if s[0] != t[0]]
    return pairs[:: len(pairs) // count][:count]


def tiny_tap(weight: torch.Tensor) -> Tap:
    """A network of one linear layer and ReLU over images [1, 1, d]."""
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False), nn.ReLU()
    )
    network.requires_grad_(False)
    with torch.no_grad():
        network[1].weight.copy_(weight)
    return open_tap(nn.Identity(), network, "2", torch.zeros(1, 1, 1, weight.shape[1]))


def tiny_group(tap: Tap, optimizer: str, **settings) -> Group:
    corners = settings.pop("corners", 2)
    spec = CollisionSpec.model_validate(
        {
            "model": "m",
            "layer": "1",
            "corners": corners,
            "alpha": 0.7,
            "beta": 0.3,
            "optimizer": optimizer,
        }
        | QUICK
        | settings
    )
    target = Target(torch.tensor([1.0, 0.5, -0.2, -0.4]), Clip())
    chosen = torch.zeros(corners, 4, dtype=torch.bool)
    chosen[torch.arange(corners), 2 + torch.arange(corners) % 2] = True
    losses = Losses.of_corners(target, chosen, alpha=0.7, beta=0.3, negative="absolute")
    source = torch.linspace(0.2, 0.8, 6).view(1, 1, 6)
    return Group("tiny", spec, source, losses, l_pos_threshold=1e-9)


def by_hand(optimizer: str, rate: float, steps: int, *, valid: bool, schedule: str = "constant"):
    """The same optimisation in float64 numpy, one corner after another."""
    weight = WEIGHT.double().numpy()
    target = np.array([1.0, 0.5, -0.2, -0.4], np.float32).astype(float)
    finals = []
    for unit, other in ((2, 3), (3, 2)):
        x = torch.linspace(0.2, 0.8, 6).double().numpy()
        mean, square = np.zeros(6), np.zeros(6)
        for t in range(steps):
            f = weight @ x
            g = np.zeros(4)
            g[:2] = 0.7 * 2 * (f[:2] - target[:2])
            g[unit] = 0.3
            g[other] = 0.3 * np.sign(f[other])
            grad = weight.T @ g
            r = (
                rate
                * {
                    "constant": 1.0,
                    "rising": (t + 1) / steps,
                    "cosine": 0.5 * (1 + math.cos(math.pi * t / steps)),
                }[schedule]
            )
            if optimizer == "gd":
                x = x - r * grad
            elif optimizer == "momentum":
                mean = 0.99 * mean + 0.01 * grad
                x = x - r * mean
            else:
                mean = 0.9 * mean + 0.1 * grad
                square = 0.999 * square + 0.001 * grad**2
                m, v = mean / (1 - 0.9 ** (t + 1)), square / (1 - 0.999 ** (t + 1))
                x = x - r * m / (np.sqrt(v) + 1e-8)
            if valid:
                x = x.clip(0, 1)
        finals.append(x)
    return np.stack(finals)


WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)) / 2


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("schedule", ["constant", "rising", "cosine"])
@pytest.mark.parametrize(("optimizer", "rate"), [("gd", 0.05), ("momentum", 0.5), ("adam", 0.02)])
def test_steps_are_those_of_a_loop_in_float64(optimizer, rate, schedule, valid):
    tap = tiny_tap(WEIGHT)
    steps = 25  # not a multiple of the stride: the last steps must not be taken
    group = tiny_group(
        tap,
        optimizer,
        learning_rate=rate,
        schedule=schedule,
        max_steps=steps,
        pixel_range="valid" if valid else "free",
    )
    engine = Engine(tap, optimizer)
    engine.admit(group)
    for _ in range(3):
        assert engine.advance() == []
    state = engine.state_of("tiny")["parameters"].flatten(1)
    expected = by_hand(optimizer, rate, steps, valid=valid, schedule=schedule)
    assert state.numpy() == pytest.approx(expected, abs=2e-5)
    assert [g.reason.tolist() for g in finish(engine)] == [[MAX_STEPS, MAX_STEPS]]


def test_the_best_checked_state_is_kept_when_no_threshold_is_reached():
    tap = tiny_tap(WEIGHT)
    group = tiny_group(tap, "gd", learning_rate=0.9, max_steps=200, pixel_range="free")
    engine = Engine(tap, "gd")
    engine.admit(group)
    seen = []
    while not engine.advance():
        seen.append(group.latest[:, 0].copy())
    best = np.nanmin([*seen, group.latest[:, 0]], axis=0)
    kept = group.losses.l_pos(tap(group.corners)).numpy()
    assert not group.converged.any()
    assert kept == pytest.approx(best, rel=1e-4)
    assert group.score == pytest.approx(best / 1e-9, rel=1e-4)


def test_a_row_stops_at_its_own_threshold_and_its_corner_meets_it(mlp):
    job = job_of(mlp, "3-0", "7-0", beta=0.3)
    finish(mlp.engine(job.spec), job.group)
    assert (job.group.reason == CONVERGED).all()
    assert len(set(job.group.steps)) > 1
    l_pos = job.group.losses.l_pos(mlp.tap(job.group.corners))
    assert (l_pos < 5).all()
    assert l_pos.numpy() / 5 == pytest.approx(job.group.score, rel=1e-3)


def test_violation_is_tested_too_where_it_has_a_threshold(mlp):
    free = job_of(mlp, "3-0", "7-0", negative="hinge")
    bound = job_of(mlp, "3-0", "7-0", negative="hinge", violation_threshold=0.5, max_steps=3000)
    for job in (free, bound):
        finish(mlp.engine(job.spec), job.group)
    violations = [j.group.losses.violation(mlp.tap(j.group.corners)).max() for j in (free, bound)]
    assert violations[0] > 0.5 > violations[1]
    assert bound.group.converged.all()


def test_company_changes_no_step_and_no_pixel(mlp):
    pairs = digit_pairs(64)
    settings = [{"beta": 0.15 + 0.01 * (i % 9), "max_steps": 200 + i} for i in range(64)]
    alone = [job_of(mlp, s, t, f"{i}", **settings[i]).group for i, (s, t) in enumerate(pairs)]
    for group in alone:
        finish(mlp.engine(group.spec), group)
    company = [job_of(mlp, s, t, f"{i}", **settings[i]).group for i, (s, t) in enumerate(pairs)]
    engine = mlp.engine(company[0].spec)
    for i, group in enumerate(company):  # a few at the start, the others one by one
        engine.admit(group)
        if i > 5:
            engine.advance()
    finish(engine)
    assert sum(g.converged.all() for g in alone) > 32
    for one, other in zip(alone, company, strict=True):
        assert one.steps.tolist() == other.steps.tolist()
        assert one.reason.tolist() == other.reason.tolist()
        assert (one.corners - other.corners).abs().max() <= 1e-5


def test_on_a_deep_layer_company_leaves_losses_and_labels_as_they_are():
    spec = CollisionSpec(model="mnist-cnn", layer="fc1", max_steps=150, **QUICK)
    subject = Subject.open(spec, CPU)
    plain = {"preset": None, **spec.model_dump(exclude={"preset"})}
    pairs = digit_pairs(8)
    alone = [job_of(subject, s, t, f"{i}", **plain).group for i, (s, t) in enumerate(pairs)]
    company = [job_of(subject, s, t, f"{i}", **plain).group for i, (s, t) in enumerate(pairs)]
    for group in alone:
        finish(subject.engine(spec), group)
    finish(subject.engine(spec), *company)
    for one, other in zip(alone, company, strict=True):
        (pre, logits), (pre_other, logits_other) = (
            subject.tap.observe(g.corners) for g in (one, other)
        )
        assert torch.allclose(one.losses.l_pos(pre), other.losses.l_pos(pre_other), rtol=0.05)
        assert logits.argmax(1).tolist() == logits_other.argmax(1).tolist()


class NoMemoryError(Exception):
    """Raised where these tests pull the plug."""


def assert_same_end(one: Group, other: Group) -> None:
    assert torch.equal(one.corners, other.corners)
    for name in ("steps", "reason", "score"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert one.age == other.age
    for name in ("curves", "snapshots"):
        mine, others = getattr(one, name), getattr(other, name)
        assert mine.steps == others.steps
        pairs = zip(mine.values, others.values, strict=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def through_a_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(safetensors.torch.save(state))


OPTIMIZERS = {
    "gd": {},
    "momentum": {"learning_rate": 0.05},
    "adam": {},
}


def company_of(mlp: Subject, optimizer: str, count: int = 6) -> list[Group]:
    """Groups whose rows end at different steps."""
    settings = {"optimizer": optimizer, "beta": 0.3, "max_steps": 130, "snapshots": 3}
    settings |= OPTIMIZERS[optimizer]
    pairs = [("3-0", "7-0"), ("1-0", "4-1"), *digit_pairs(count)][:count]
    return [job_of(mlp, s, t, f"{i}", **settings).group for i, (s, t) in enumerate(pairs)]


@pytest.fixture(scope="module", params=OPTIMIZERS)
def undisturbed(request, mlp) -> tuple[str, list[Group]]:
    groups = company_of(mlp, request.param)
    finish(mlp.engine(groups[0].spec), *groups)
    return request.param, groups


def test_a_group_taken_out_and_admitted_again_ends_bitwise_as_if_left_alone(mlp, undisturbed):
    """In the same engine after a while, and from a file, in one where others are under way."""
    optimizer, unbroken = undisturbed
    groups = company_of(mlp, optimizer)
    first = mlp.engine(groups[0].spec)
    for group in groups:
        first.admit(group)
    while all(group.running.all() for group in groups):
        first.advance()
    left = [group.key for group in first.groups]
    assert len(left) > 2

    away, moved = left[0], left[1]
    state = first.withdraw(away)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    moving = through_a_file(first.withdraw(moved))
    assert {group.key for group in first.groups} == set(left[2:])
    first.advance()
    second_groups = company_of(mlp, optimizer)
    second = mlp.engine(groups[0].spec)
    for group in second_groups:
        if group.key not in (away, moved):
            second.admit(group)
    second.advance()
    resumed = second_groups[int(moved)]
    second.admit(resumed, moving)
    assert_same_state(through_a_file(second.state_of(moved)), moving)
    again = company_of(mlp, optimizer)[int(away)]
    first.admit(again, state)
    finish(first)
    finish(second)
    assert_same_state(state, kept)  # a state does not follow the engine
    ended = {group.key: group for group in groups} | {away: again}
    ended.pop(moved)
    for key, group in ended.items():
        assert_same_end(group, unbroken[int(key)])
    for group in second_groups:
        if group.key != away:
            assert_same_end(group, unbroken[int(group.key)])


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value.nan_to_num(), other[name].nan_to_num()), name


@pytest.mark.parametrize("failing_step", range(STRIDE))
def test_a_step_that_fails_moves_nothing_and_half_the_groups_go_on_exactly(
    mlp, undisturbed, failing_step
):
    optimizer, unbroken = undisturbed
    groups = company_of(mlp, optimizer)
    countdown = [math.inf]

    def on_step() -> None:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise NoMemoryError

    engine = mlp.engine(groups[0].spec, on_step)
    for group in groups:
        engine.admit(group)
    done = []
    for _ in range(3 + failing_step):  # rows end at other checks each time
        done += engine.advance()
    before = {group.key: engine.state_of(group.key) for group in engine.groups}
    countdown[0] = failing_step
    with pytest.raises(NoMemoryError):
        engine.advance()
    countdown[0] = math.inf
    assert {group.key for group in engine.groups} == before.keys()  # the finished ones, too
    for key, state in before.items():
        now = engine.state_of(key)
        for name in ("parameters", "mean", "square", "clock"):
            running = now["reason"] == 0 if name != "clock" else slice(None)
            assert torch.equal(now[name][running], state[name][running])
    waiting = list(before)[::2]
    states = {key: engine.withdraw(key) for key in waiting}
    for _ in range(4):
        done += engine.advance()
    for key in waiting:
        groups[int(key)] = company_of(mlp, optimizer)[int(key)]
        engine.admit(groups[int(key)], states[key])
    done += finish(engine)
    assert len(done) == len(groups)
    for one, other in zip(groups, unbroken, strict=True):
        assert_same_end(one, other)


@pytest.mark.parametrize("method", ["_forward", "_judge", "_retire", "_keep"])
def test_whatever_else_fails_in_a_stride_may_be_tried_again(mlp, undisturbed, monkeypatch, method):
    optimizer, unbroken = undisturbed
    groups = company_of(mlp, optimizer)
    engine = mlp.engine(groups[0].spec)
    for group in groups:
        engine.admit(group)
    whole, calls = getattr(engine, method), itertools.count()

    def flaky(*args):
        if next(calls) in (0, 3, 17, 44):
            raise NoMemoryError
        return whole(*args)

    monkeypatch.setattr(engine, method, flaky)
    done, failures = [], 0
    while engine.groups:
        try:
            done += engine.advance()
        except NoMemoryError:
            failures += 1
    assert failures > 0
    assert len(done) == len(groups)
    for one, other in zip(groups, unbroken, strict=True):
        assert_same_end(one, other)


def test_life_is_told_after_each_step(mlp):
    told = []
    group = job_of(mlp, "3-0", "7-0").group
    engine = mlp.engine(group.spec, lambda: told.append(group.age))
    engine.admit(group)
    engine.advance()
    engine.advance()
    assert told == [0] * STRIDE + [STRIDE] * STRIDE


def test_a_group_may_be_taken_out_before_it_joins_and_after_it_ended(mlp):
    group, other = job_of(mlp, "3-0", "7-0", "a").group, job_of(mlp, "3-0", "7-0", "b").group
    engine = mlp.engine(group.spec)
    engine.admit(group)
    state = engine.withdraw("a")
    assert engine.groups == []
    with pytest.raises(UnknownName, match="no running job 'a'"):
        engine.withdraw("a")
    engine.admit(job_of(mlp, "3-0", "7-0", "again").group, state)
    assert engine.stop("again").reason.tolist() == [STOPPED] * 5
    finish(engine, other)
    alone = mlp.engine(other.spec)
    alone.admit(group)
    while group.running.any():
        state = alone.state_of("a")
        done = alone.advance()
    state["reason"][:] = CONVERGED  # as if the plug had been pulled between its end and its return
    ended = job_of(mlp, "3-0", "7-0", "ended").group
    alone.admit(ended, state)
    assert alone.groups == [ended]
    assert alone.state_of("ended")["reason"].tolist() == [CONVERGED] * 5
    assert (done, alone.advance(), alone.groups) == ([group], [ended], [])


def test_a_state_of_another_job_is_refused_at_once(mlp):
    engine = mlp.engine(CollisionSpec(preset="paper-mnist"))
    engine.admit(job_of(mlp, "3-0", "7-0", "a").group)
    state = engine.state_of("a")
    running = job_of(mlp, "1-0", "7-0", "running").group
    engine.admit(running)
    for other in ({"corners": 3}, {"source": "3-1"}, {"target": "7-1"}):
        settings = {"source": "3-0", "target": "7-0"} | other
        group = job_of(mlp, settings.pop("source"), settings.pop("target"), "b", **settings).group
        with pytest.raises(UnfitState, match="given for job 'b' is that of a job with other"):
            engine.admit(group, state)
        assert group.age == 0 and group.running.all()
    older = {name: tensor for name, tensor in state.items() if name != "kept"}
    with pytest.raises(UnfitState, match="saved for job 'b' lacks 'kept'"):
        engine.admit(job_of(mlp, "3-0", "7-0", "b").group, older)
    assert [group.key for group in engine.groups] == ["a", "running"]
    finish(engine)
    assert running.converged.all()


def test_a_group_that_cannot_join_leaves_those_here_as_they_were(mlp):
    good, bad = job_of(mlp, "3-0", "7-0", "good").group, job_of(mlp, "1-0", "7-0", "bad").group
    bad.losses = replace(bad.losses, target=bad.losses.target[:, :10])
    engine = mlp.engine(good.spec)
    engine.admit(good)
    engine.advance()
    engine.admit(bad)
    with pytest.raises(RuntimeError):
        engine.advance()
    assert engine.groups == [good, bad]
    engine.withdraw("bad")
    finish(engine)
    assert good.converged.all()


def test_only_a_running_group_can_be_stopped(mlp):
    with pytest.raises(UnknownName, match="no running job 'x'"):
        mlp.engine(CollisionSpec(preset="paper-mnist")).stop("x")


def test_a_diverging_row_ends_with_a_finite_state_and_leaves_its_company_alone(mlp):
    wild = job_of(mlp, "3-0", "7-0", "wild", learning_rate=1e6, pixel_range="free").group
    calm, alone = (job_of(mlp, "1-0", "7-0", "calm").group for _ in range(2))
    finish(mlp.engine(wild.spec), wild, calm)
    finish(mlp.engine(alone.spec), alone)
    assert (wild.reason == DIVERGED).all()
    assert wild.corners.isfinite().all()
    assert np.isfinite(wild.score).all()
    assert calm.converged.all()
    assert torch.equal(calm.corners, alone.corners)


def test_a_row_that_is_nan_from_the_start_keeps_its_source():
    tap = tiny_tap(WEIGHT * math.nan)
    group = tiny_group(tap, "gd")
    finish(Engine(tap, "gd"), group)
    assert (group.reason == DIVERGED).all()
    assert torch.equal(group.corners, group.source.expand_as(group.corners))


def test_seconds_are_a_limit(mlp):
    group = job_of(mlp, "3-0", "7-0", l_pos_threshold=1e-6, max_steps=10**6, max_seconds=0.05).group
    finish(mlp.engine(group.spec), group)
    assert (group.reason == MAX_SECONDS).all()
    assert 0.05 <= group.seconds < 5


def test_a_stopped_group_keeps_its_best_state_and_others_go_on(mlp):
    stopped, other = (job_of(mlp, "3-0", "7-0", key).group for key in ("a", "b"))
    engine = mlp.engine(stopped.spec)
    engine.admit(stopped)
    engine.admit(other)
    for _ in range(3):
        engine.advance()
    assert engine.stop("a") is stopped
    assert (stopped.reason == STOPPED).all()
    assert stopped.steps.tolist() == [2 * STRIDE] * 5
    assert not torch.equal(stopped.corners, stopped.source.expand_as(stopped.corners))
    finish(engine)
    assert other.converged.all()


def test_valid_pixels_stay_in_range_beside_free_ones(mlp):
    valid = job_of(mlp, "3-0", "7-0", "valid").group
    free = job_of(mlp, "3-0", "7-0", "free", pixel_range="free").group
    finish(mlp.engine(valid.spec), valid, free)
    assert valid.corners.min() >= 0
    assert valid.corners.max() <= 1
    assert free.corners.min() < 0


def test_steps_between_checks_do_no_work_per_row(mlp, monkeypatch):
    """The number of torch calls in a stride is the same for 1 job and for 40."""
    from torch.overrides import TorchFunctionMode

    class Counter(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Counter.calls += 1
            return func(*args, **(kwargs or {}))

    def calls_in_a_step(jobs: int) -> int:
        engine = mlp.engine(CollisionSpec(preset="paper-mnist"))
        for i, (s, t) in enumerate(digit_pairs(jobs)):
            engine.admit(job_of(mlp, s, t, f"{i}").group)
        engine.advance()
        seen = engine._forward()
        rates, epsilons = engine._rates()
        Counter.calls = 0
        with Counter():
            engine._step(seen, rates[0], epsilons[0], engine._bounds())
            engine._forward()
        return Counter.calls

    assert 0 < calls_in_a_step(1) == calls_in_a_step(40)


def test_records_of_any_length_stay_small_and_evenly_spaced():
    record = Record(5)
    for step in range(0, 10_000, STRIDE):
        record.note(step, lambda: torch.zeros(1))
    assert 5 <= len(record.steps) <= 10
    assert len({b - a for a, b in itertools.pairwise(record.steps)}) == 1
    assert Record(0).values == []


def test_equation_1_pulls_where_the_activation_lets_it(mlp):
    job = job_of(mlp, "3-0", "7-0", objective="plain", corners=1, max_steps=300)
    before = job.group.losses.l_pos(mlp.tap(job.group.source[None]))
    finish(mlp.engine(job.spec), job.group)
    assert job.units is None
    assert job.group.losses.l_pos(mlp.tap(job.group.corners)) < before / 10


def test_bf16_steps_come_near_fp32(mlp):
    subject = Subject.open(CollisionSpec(preset="paper-mnist", precision="bf16"), CPU)
    half, full = job_of(subject, "3-0", "7-0", precision="bf16"), job_of(mlp, "3-0", "7-0")
    finish(subject.engine(half.spec), half.group)
    finish(mlp.engine(full.spec), full.group)
    assert half.group.corners.dtype == torch.float32
    assert (half.group.corners - full.group.corners).flatten(1).norm(dim=1).max() < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_gpu_finds_collisions_as_the_cpu_does(precision):
    spec = CollisionSpec(preset="paper-mnist", precision=precision)
    subject = Subject.open(spec, torch.device("cuda"))
    job = job_of(subject, "3-0", "7-0", precision=precision)
    finish(subject.engine(spec), job.group)
    assert job.group.converged.all()
