"""A hull against formulas written out again; in the engine alone, interrupted and in company."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from core import certify, interpolate
from core.engine import CONVERGED, DIVERGED, MAX_STEPS, Engine
from core.hull import MINDED, Hull, ascend
from core.images import load, read
from core.job import Job, Subject, prepare
from core.objective import Losses, Target, l_neg, l_pos
from core.spec import CollisionSpec
from core.spec import Hull as Settings
from core.taps import Clip

CPU = torch.device("cpu")
SETTINGS = {
    "model": "mnist-mlp",
    "layer": "fc2",
    "objective": "hull",
    "beta": {"relative": 0.1},
    "hull": {"diversity": 1.0},
    "learning_rate": 0.02,
    "schedule": "cosine",
    "max_steps": 400,
    "snapshots": 0,
    "interpolation": {"samples": 0},
    "ball_samples": 0,
    "figures": False,
}


@pytest.fixture(scope="module")
def mlp() -> Subject:
    return Subject.open(CollisionSpec.model_validate(SETTINGS), CPU)


def job_of(subject: Subject, source: str = "3-0", target: str = "7-0", **settings) -> Job:
    spec = CollisionSpec.model_validate(SETTINGS | settings)
    pair = [
        load(*read(f"sample:mnist/{name}"), subject.model.preprocessing)
        for name in (source, target)
    ]
    return prepare(subject, spec, *pair, key=f"{source} {target} {settings}")


def finish(engine: Engine, *jobs: Job) -> None:
    for job in jobs:
        engine.admit(job.group)
    while engine.groups:
        engine.advance()


def small_hull(**settings) -> Hull:
    target = Target(torch.tensor([1.0, -1.0]), Clip())
    none = torch.zeros(5, 2, dtype=torch.bool)
    losses = Losses.of_corners(target, none, alpha=1.0, beta=1.0, negative="hinge")
    return Hull(
        Settings(**settings),
        losses,
        natural=2.0,
        energy=3.0,
        label=1,
        margin=8.0,
        seed=4,
        max_steps=100,
    )


def test_points_are_in_the_simplex_and_the_same_at_the_same_step():
    hull = small_hull(points=64)
    weights = hull.weights(30, 5)
    assert weights.shape == (64, 5)
    assert torch.allclose(weights.sum(1), torch.ones(64))
    assert (weights >= 0).all()
    assert torch.equal(weights, hull.weights(30, 5))
    assert not torch.equal(weights, hull.weights(40, 5))


def test_spread_is_that_of_the_result():
    corners = torch.rand(4, 3, 5, 5)
    measured = interpolate.measure_polytope(corners, (2.0, "numbers"))
    assert float(small_hull().spread(corners)) == pytest.approx(measured.spread, rel=1e-5)
    assert float(small_hull().spread(corners[:1])) == 0


@pytest.mark.parametrize(
    ("age", "worst", "left"),
    [(0, 7.5, 1.0), (0, 8.75, 0.5), (99, 0.75, 1.0), (50, 0.875, 0.5), (60, 1.2, 0.0)],
)
def test_the_drive_is_a_gradient_that_fades_as_the_loss_is_spent(age, worst, left):
    hull = small_hull(diversity=0.7, goal=10.0, source=0.4)
    corners = torch.rand(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    source = torch.rand(1, 2, 2, dtype=torch.float64)
    spread = torch.pdist(corners.flatten(1)).mean() / 2
    home = (corners - source).flatten(1).square().sum(1).mean() / 2**2
    (expected,) = torch.autograd.grad(3 * (0.4 * home - 0.7 * left * spread), corners)
    drive = hull.drive(corners.detach(), source, age, torch.tensor(worst))
    assert torch.allclose(drive, expected, atol=1e-6)


def test_a_coarse_drive_is_the_gradient_of_what_a_gaussian_leaves_of_the_spread():
    """The Gaussian is torch's: reflected at the borders, edge pixels twice, to eight sigma."""
    hull = small_hull(diversity=0.7, goal=10.0, low_pass=1.5)
    corners = torch.rand(3, 2, 14, 17, dtype=torch.float64, requires_grad=True)
    weights = torch.exp(-(torch.arange(-12, 13, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    kernel = (weights[:, None] * weights / weights.sum() ** 2)[None, None]
    mirrored = [corners.flip(axis) for axis in (2, 3)]
    rows = torch.cat([mirrored[0], corners, mirrored[0]], 2)
    wide = torch.cat([rows.flip(3), rows, rows.flip(3)], 3)[..., 14 - 12 : 28 + 12, 17 - 12 : 46]
    coarse = functional.conv2d(wide.reshape(6, 1, *wide.shape[2:]), kernel).view(3, -1)
    spread = torch.pdist(coarse).mean() / 2
    (expected,) = torch.autograd.grad(-3 * 0.7 * spread, corners)
    drive = hull.drive(corners.detach(), torch.zeros(2, 14, 17), 0, torch.tensor(0.0))
    assert torch.allclose(drive, expected, atol=1e-4 * float(expected.abs().max()))
    fine = small_hull(diversity=0.7, goal=10.0)
    assert not torch.allclose(
        drive, fine.drive(corners.detach(), corners[0].detach(), 0, torch.tensor(0.0))
    )


def test_margins_below_the_floor_are_pulled_up_and_others_left():
    """The floor is a quarter of the target's margin, 8."""
    hull = small_hull(margin=0.25)
    logits = torch.tensor([[1.0, 2.5, 0.0], [0.0, 9.0, 1.0], [4.0, 1.0, 0.0]], requires_grad=True)
    margins = logits[:, 1] - logits[:, [0, 2]].amax(1)
    assert margins.tolist() == [1.5, 8.0, -3.0]
    lacking = MINDED * 3 * (1 - margins / 2).relu().mean()
    (expected,) = torch.autograd.grad(lacking, logits)
    assert torch.allclose(hull.off_class(logits.detach()), expected)
    missing = [(8 - 1.5) / 6, 0.0, (8 + 3) / 6]
    assert hull.shortfall(logits.detach()).tolist() == pytest.approx(missing)


def test_a_hull_that_minds_its_class_keeps_its_margin(mlp):
    """Where losses may be so large, and the drive is so strong, that the class would go."""
    loose = {"l_pos_threshold": {"relative": 3.0}, "violation_threshold": {"relative": 3.0}}
    least = []
    for margin in (0.0, 0.5):
        job = job_of(mlp, hull={"diversity": 100.0, "goal": 9.0, "margin": margin}, **loose)
        finish(mlp.engine(job.spec), job)
        found = certify.worst_point(mlp.tap, job.group.corners, job.seen_target.label)
        least.append(found.margin / job.group.hull.margin)
    assert least[0] < 0 < 0.2 < least[1]


def test_nothing_is_driven_beyond_the_goal_nor_where_corners_are_equal():
    corners, source = torch.rand(3, 1, 2, 2), torch.zeros(1, 2, 2)
    done = small_hull(goal=0.01)
    assert not done.drive(corners, source, 0, torch.tensor(0.0)).any()
    equal = corners[:1].expand(3, 1, 2, 2)
    assert not small_hull().drive(equal, source, 0, torch.tensor(0.0)).any()


def test_worst_points_climb():
    weights = torch.full((1, 3), 1 / 3)
    for _ in range(20):
        weights = ascend(weights, torch.tensor([[0.0, 5.0, -1.0]]))
    assert torch.allclose(weights, torch.tensor([[0.0, 1.0, 0.0]]))


def test_the_engine_steps_along_the_gradient_of_corners_points_and_drive(mlp):
    """Against autograd through the losses as the paper writes them, in one sum."""
    job = job_of(
        mlp, optimizer="gd", learning_rate=1e-3, pixel_range="free", corners=3, max_steps=1
    )
    group, goal = job.group, job.goal
    group.source = group.source + 0  # its own
    engine = mlp.engine(job.spec)
    engine.admit(group)
    engine._join()
    generator = torch.Generator().manual_seed(0)
    start = engine._rows.parameters.clone()
    start += 0.1 * torch.rand(start.shape, generator=generator)
    engine._rows.parameters = start.clone()
    engine._draw_points()
    seen = engine._forward()
    found = engine._gradient(seen)[:3]

    corners = start[:3].clone().requires_grad_()
    hull = group.hull
    between = torch.tensordot(hull.weights(0, 3), corners, dims=1)
    beta = 0.1 * float(goal.pre[goal.active].square().mean().sqrt())

    def loss(images, units):
        chosen = torch.zeros(len(images), len(goal.pre), dtype=torch.bool)
        for row, unit in enumerate(units):
            chosen[row, unit] = True
        own = mlp.tap(images)
        return (l_pos(own, goal) + beta * l_neg(own, goal, chosen, "hinge")).sum()

    whole = loss(corners, [list(unit) for unit in job.units]) + 3 / 5 * loss(between, [])
    (expected,) = torch.autograd.grad(whole, corners)
    with torch.no_grad():
        worst = engine._worst(engine._points[0], slice(len(start), len(start) + 5), seen)
        expected += hull.drive(corners, group.source, 0, worst)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_whole_hull_collides_and_spreads_where_corners_alone_stay_close(mlp):
    wide, alone = job_of(mlp), job_of(mlp, objective="corners")
    finish(mlp.engine(wide.spec), wide, alone)
    group = wide.group
    # It collides, but its spread is short of the goal of 1: that is no end by convergence.
    assert set(group.reason) == {MAX_STEPS}
    assert group.converged.all()
    assert len(set(group.steps)) == 1
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.dirichlet(np.ones(5), 500)).float()
    pre, logits = interpolate.observe(mlp.tap, torch.tensordot(points, group.corners, dims=1))
    assert (l_pos(pre, wide.goal) < 0.015 * wide.goal.energy).all()  # of unseen points
    assert (logits.argmax(1) == wide.seen_target.label).all()
    near, far = (float(wide.group.hull.spread(j.group.corners)) for j in (alone, wide))
    assert far > 0.5 > 2 * near


def test_a_hull_ends_at_its_goal(mlp):
    job = job_of(mlp, hull={"diversity": 1.0, "goal": 0.3})
    finish(mlp.engine(job.spec), job)
    assert set(job.group.reason) == {CONVERGED}
    assert job.group.age < 400
    assert 0.3 <= float(job.group.hull.spread(job.group.corners)) < 0.4


def test_a_hull_that_never_collides_keeps_its_nearest_state(mlp):
    job = job_of(mlp, l_pos_threshold={"relative": 1e-9}, max_steps=50)
    finish(mlp.engine(job.spec), job)
    assert set(job.group.reason) == {MAX_STEPS}
    assert not job.group.converged.any()
    assert job.group.steps.max() > 0


def test_one_corner_that_is_nan_ends_the_hull_and_no_other_job(mlp):
    broken, sound = job_of(mlp), job_of(mlp, "4-0", "9-0", max_steps=60)
    engine = mlp.engine(broken.spec)
    engine.admit(broken.group)
    engine.admit(sound.group)
    engine.advance()
    engine._rows.parameters[2] = torch.nan
    while engine.groups:
        engine.advance()
    assert set(broken.group.reason) == {DIVERGED}
    assert broken.group.corners.isfinite().all()
    alone = job_of(mlp, "4-0", "9-0", max_steps=60)
    finish(mlp.engine(alone.spec), alone)
    assert torch.allclose(alone.group.corners, sound.group.corners, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "worst"])
def test_company_and_interruption_change_nothing(mlp, sampling):
    settings = {"hull": {"diversity": 1.0, "sampling": sampling}, "max_steps": 60}
    alone, moved = job_of(mlp, **settings), job_of(mlp, **settings)
    finish(mlp.engine(alone.spec), alone)
    first, second = mlp.engine(moved.spec), mlp.engine(moved.spec)
    first.admit(job_of(mlp, "4-0", "9-0", objective="corners").group)
    first.admit(moved.group)
    for _ in range(3):
        first.advance()
    again = job_of(mlp, **settings)
    second.admit(job_of(mlp, "5-0", "1-0", **settings).group)
    second.admit(again.group, first.withdraw(moved.group.key))
    while second.groups:
        second.advance()
    assert np.array_equal(again.group.steps, alone.group.steps)
    assert torch.allclose(again.group.corners, alone.group.corners, atol=1e-5)


def test_worst_points_lie_worse_than_uniform_ones(mlp):
    """After one stride of ascent from the same draws, between the same corners."""
    job = job_of(mlp, hull={"diversity": 1.0, "sampling": "worst"}, max_steps=200)
    engine = mlp.engine(job.spec)
    engine.admit(job.group)
    worse = []
    for _ in range(19):
        engine.advance()
        (points,) = engine._points
        drawn = points.hull.weights(points.group.age - 10, 5)
        means = [
            float(
                l_pos(mlp.tap(torch.tensordot(w, engine._rows.parameters[:5], 1)), job.goal).mean()
            )
            for w in (drawn, points.weights)
        ]
        worse.append(means[1] > means[0])
    assert np.mean(worse[5:]) > 0.9  # once corners differ
