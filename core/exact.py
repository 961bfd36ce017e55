"""Exact collisions: corners of the polytope of pixels that share the target's activations.

In order of use:

    affine = affine_map(tap, probes)                     # once for a network and layer
    polytope = LayerPolytope.of(affine, tap.layer.activation, source, target, budget=0.8)
    corners = find_corners(polytope, unit_objectives(polytope, units))
    errors = collision_error(tap, polytope, affine.images(corners))

Every interpolation of corners is in the polytope too, because a polytope is convex. Pixels are
flattened, [d] in float64, and in [0, 1].
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from scipy import linalg, sparse

from core.errors import CoreError, InvalidSpec
from core.polytope import ENDLESS, SIDE, Booleans, Clock, Floats, LayerPolytope

# Of the distance to a constraint, or a multiplier. HiGHS's own 1e-7 would let f' miss by more than
# float32 does.
FEASIBLE = 1e-9
# A constraint that no point of the polytope can leave by more than this is an equality.
LOOSE, SLACK = 1e-7, 1e-4
# Budgets nearer to the least than this leave too little for the solvers to find.
TIGHT = 1e-6
# How many units and pixels a conflict names.
NAMED = 5


class SolverFailed(CoreError):
    """The exact solver found no answer that can be relied on."""

    code = "solver_failed"


@dataclass(frozen=True)
class Conflict:
    """A constraint that keeps the least budget up: a `unit`, (u,), or a `pixel`, (c, y, x).

    `multiplier` is how much the least budget falls for each 1 by which the constraint gives way.
    """

    kind: str
    index: tuple[int, ...]
    multiplier: float


class InfeasibleBudget(CoreError):
    """No image within the budget shares the target's activations."""

    code = "infeasible_budget"

    def __init__(self, budget: float, least: float, conflicts: Sequence[Conflict]) -> None:
        self._given = budget, least, conflicts
        self.budget, self.least, self.conflicts = budget, least, list(conflicts)
        units = ", ".join(str(c.index[0]) for c in conflicts if c.kind == "unit")
        pixels = ", ".join(str(c.index) for c in conflicts if c.kind == "pixel")
        enough = math.ceil((least + TIGHT) * 1e4) / 1e4
        super().__init__(
            f"No image whose pixels all stay within {budget:g} of the source's shares the target's "
            f"activations at this layer; allow at least {enough:g}. "
            f"In conflict above all: units {units} with the budget at pixels {pixels}."
        )

    def __reduce__(self) -> tuple[type["InfeasibleBudget"], tuple[Any, ...]]:
        return type(self), self._given


def unit_objectives(polytope: LayerPolytope, units: Sequence[tuple[int, ...]]) -> Floats:
    """[K, d]: the sum of f' over each set of units; saturated ones with a minus, to be raised.

    Raises:
        InvalidSpec: f' of a unit is the same in all of the polytope.
    """
    for unit in sorted({unit for chosen in units for unit in chosen}):
        if polytope.equal[unit]:
            raise InvalidSpec(
                f"Unit {unit} has the target's f' in the whole polytope, so no corner can push it "
                "away; list inactive units."
            )
    rows = [polytope.lengths[list(chosen)] @ polytope.matrix[list(chosen)] for chosen in units]
    return np.asarray(rows, np.float64)


def random_objectives(polytope: LayerPolytope, corners: int, seed: int) -> Floats:
    """[K, d]: random directions, for a polytope in which no unit is free."""
    return np.random.default_rng([seed, 0]).standard_normal((corners, len(polytope.source)))


def find_corners(
    polytope: LayerPolytope,
    objectives: Floats,
    *,
    clock: Clock = ENDLESS,
    on_corner: Callable[[int, Floats], None] = lambda index, corner: None,
) -> Floats:
    """The corners [K, d] where `objectives` [K, d] are least, each a vertex of the polytope.

    Each is solved from the start, so that it does not depend on which others are asked for (warm
    starts gain a fifth at most). `on_corner` gets each when found.

    Raises:
        InfeasibleBudget: the budget leaves no image.
        OutOfTime, Stopped: as `clock` says.
    """
    alone = polytope.excess(polytope.target) <= FEASIBLE and _is_point(polytope, clock)
    corners = []
    for objective in objectives:
        corner = polytope.target if alone else _minimise(polytope, objective, clock)
        if polytope.excess(corner) > 10 * FEASIBLE:
            corner = nearest(polytope, corner, clock=clock).pixels
        corners.append(corner)
        on_corner(len(corners) - 1, corner)
    return np.stack(corners)


def sweep_budgets(
    polytope: LayerPolytope,
    objectives: Floats,
    budgets: Sequence[float | None],
    *,
    clock: Clock = ENDLESS,
) -> Iterator[tuple[float | None, Floats | None]]:
    """Each of `budgets` with its corners [K, d], as soon as they are known; None: too small."""
    for budget in budgets:
        corners = None
        with suppress(InfeasibleBudget):
            corners = find_corners(polytope.within(budget), objectives, clock=clock)
        yield budget, corners


@dataclass(frozen=True)
class LeastBudget:
    """The least `budget` that leaves an image, that image [d], and what keeps it so large."""

    budget: float
    pixels: Floats
    conflicts: list[Conflict]


def least_budget(polytope: LayerPolytope, *, clock: Clock = ENDLESS) -> LeastBudget:
    """The least L-infinity distance of the polytope from the source; its own budget is ignored.

    The least e with |x - s| <= e, by a linear program. At its solution the multipliers of the
    constraints are an infeasibility proof of every smaller budget: those not 0 are in conflict.
    """
    units, pixels = polytope.matrix.shape
    source, eye = polytope.source, sparse.eye_array(pixels)
    e = sparse.csr_array(np.ones((pixels, 1)))
    matrix = sparse.block_array(
        [[polytope.matrix, sparse.csr_array((units, 1))], [eye, -e], [-eye, -e]], format="csr"
    )
    found, duals = _linear_program(
        cost=np.eye(1, pixels + 1, pixels)[0],
        matrix=matrix,
        limit=np.concatenate([polytope.limit, source, -source]),
        equal=np.concatenate([polytope.equal, np.full(2 * pixels, False)]),
        lower=np.zeros(pixels + 1),
        upper=np.ones(pixels + 1),
        clock=clock,
    )
    strength = {"unit": duals[:units], "pixel": duals[units:].reshape(2, -1).sum(0)}
    shape = {"unit": (units,), "pixel": polytope.affine.shape}
    conflicts = []
    for kind, values in strength.items():
        for i in np.argsort(-np.abs(values), kind="stable")[:NAMED]:
            if abs(values[i]) > FEASIBLE:
                index = tuple(int(part) for part in np.unravel_index(i, shape[kind]))
                per = polytope.lengths[i] if kind == "unit" else 1.0  # of f' or of the pixel
                conflicts.append(Conflict(kind, index, float(abs(values[i]) / per)))
    return LeastBudget(float(found[-1]), found[:-1], conflicts)


@dataclass(frozen=True)
class Nearest:
    """The point `pixels` [d] of a polytope that is nearest to some image, at `distance`.

    No point of the polytope is nearer than `bound`, by duality.
    """

    pixels: Floats
    distance: float
    bound: float


def nearest(polytope: LayerPolytope, image: Floats, *, clock: Clock = ENDLESS) -> Nearest:
    """The point of the polytope with the least Euclidean distance to `image` [d].

    The quadratic program is solved by augmented Lagrangians, each minimised over the box of pixels
    by projected Newton steps: 0.1 s for mnist-mlp, where HiGHS's active-set solver takes 14 s and
    leaves f' 5e-6 off.

    Raises:
        InfeasibleBudget: the budget leaves no image.
        OutOfTime, Stopped: as `clock` says.
    """
    program = _NearestProgram(polytope, image)
    multipliers, penalty = np.zeros(len(program.limit)), 10.0
    pixels = np.clip(image, polytope.lower, polytope.upper)
    # No pixel can be farther: a greater bound proves that the polytope is empty.
    farthest = linalg.norm(np.maximum(polytope.upper - image, image - polytope.lower)) + 1e-3
    bound, excess = 0.0, math.inf
    for _ in range(2000):  # the nearer the budget is to the least, the more
        pixels = program.minimise(pixels, multipliers, penalty, clock)
        multipliers = penalty * program.pull(pixels, multipliers, penalty)
        bound = max(bound, program.bound(multipliers))
        before, excess = excess, polytope.excess(pixels)
        if excess < FEASIBLE:
            return Nearest(pixels, float(linalg.norm(pixels - image)), bound)
        if bound > farthest:
            break
        if excess > before / 4:
            penalty = min(5 * penalty, 1e6)  # above it rounding stalls the Newton steps
    _refuse_if_empty(polytope, clock)
    raise SolverFailed("The point of the polytope nearest to an image was not found.")


@dataclass(frozen=True)
class Dimension:
    """How large a polytope of images with `pixels` pixels is: `dimension`, that of its affine hull.

    `paper` is the paper's bound d - n_p, which takes equations for independent and everything else
    for slack; `equations` is d - `rank`. Less than that it is where the inequalities leave no room:
    `stuck_pixels` and `stuck_units` lie at their bound in the whole polytope.
    """

    pixels: int
    active: int
    paper: int
    rank: int
    equations: int
    stuck_pixels: int
    stuck_units: int
    dimension: int


def dimension(polytope: LayerPolytope, *, clock: Clock = ENDLESS) -> Dimension:
    """The dimension of the polytope's affine hull.

    Raises:
        InfeasibleBudget: the budget leaves no image.
        OutOfTime, Stopped: as `clock` says.
    """
    stuck_units, stuck_pixels = _stuck(polytope, clock)
    pixels, active = len(polytope.source), int(polytope.equal.sum())
    rank = _rank(polytope.matrix[polytope.equal], clock)
    held = polytope.matrix[polytope.equal | stuck_units][:, ~stuck_pixels]
    free = int((~stuck_pixels).sum())
    return Dimension(
        pixels=pixels,
        active=active,
        paper=pixels - active,
        rank=rank,
        equations=pixels - rank,
        stuck_pixels=pixels - free,
        stuck_units=int(stuck_units.sum()),
        dimension=free - _rank(held, clock),
    )


def unbounded(
    polytope: LayerPolytope, units: Sequence[tuple[int, ...]], *, clock: Clock = ENDLESS
) -> list[bool]:
    """For each set of units, whether f' would have no bound there if pixels had none.

    It has none if some direction changes no equality, lets no inequality grow, and lowers f' of
    the set: a linear program over the directions in [-1, 1].
    """
    ones = np.ones(len(polytope.source))
    answers = []
    for objective in unit_objectives(polytope, units):
        direction, _ = _linear_program(
            cost=objective,
            matrix=polytope.matrix,
            limit=np.zeros(len(polytope.limit)),
            equal=polytope.equal,
            lower=-ones,
            upper=ones,
            clock=clock,
        )
        # Against what the direction could do were it free: less than that is rounding.
        answers.append(bool(objective @ direction < -1e-6 * np.abs(objective).sum()))
    return answers


def _is_point(polytope: LayerPolytope, clock: Clock) -> bool:
    """Whether the equations leave the target alone, as those of a first convolution often do."""
    pixels = len(polytope.target)
    if polytope.equal.sum() < pixels:
        return False
    return _rank(polytope.matrix[polytope.equal], clock) == pixels


def _minimise(polytope: LayerPolytope, cost: Floats, clock: Clock) -> Floats:
    try:
        pixels, _ = _linear_program(
            cost=cost,
            matrix=polytope.matrix,
            limit=polytope.limit,
            equal=polytope.equal,
            lower=polytope.lower,
            upper=polytope.upper,
            clock=clock,
        )
    except _Infeasible:
        _refuse_if_empty(polytope, clock)
        raise
    return pixels


def _refuse_if_empty(polytope: LayerPolytope, clock: Clock) -> None:
    if polytope.budget is not None:
        least = least_budget(polytope, clock=clock)
        if least.budget > polytope.budget - TIGHT:
            raise InfeasibleBudget(polytope.budget, least.budget, least.conflicts)


class _Infeasible(SolverFailed):
    """The linear program has no solution."""


# Presolve saves no time here, and takes a convolution's dependent equations for a contradiction.
# The number of threads stays HiGHS's own: it is the process's, and another one is refused.
_SETTINGS: dict[str, Any] = {
    "solver": "simplex",
    "presolve": "off",
    "parallel": "off",
    "random_seed": 0,
    "primal_feasibility_tolerance": FEASIBLE,
}


def _linear_program(
    *,
    cost: Floats,
    matrix: sparse.csr_array,
    limit: Floats,
    equal: Booleans,
    lower: Floats,
    upper: Floats,
    clock: Clock,
) -> tuple[Floats, Floats]:
    """The least of `cost` x with `matrix` x = `limit` where `equal`, else <=, and its multipliers.

    Serial simplex from a fixed seed: the same input gives the same vertex.
    """
    clock.check()
    program = highspy.HighsLp()
    program.num_row_, program.num_col_ = matrix.shape
    # The solver's tolerances are absolute: the scale of weights in the cost must not matter.
    size = float(linalg.norm(cost)) or 1.0
    program.col_cost_, program.col_lower_, program.col_upper_ = cost / size, lower, upper
    program.row_lower_, program.row_upper_ = np.where(equal, limit, -np.inf), limit
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = matrix.indptr
    program.a_matrix_.index_ = matrix.indices
    program.a_matrix_.value_ = matrix.data
    solver = _new_solver()
    for name, value in _SETTINGS.items():
        solver.setOptionValue(name, value)
    solver.passModel(program)
    reasons: list[CoreError] = []

    def look(event: highspy.HighsCallbackEvent) -> None:
        # Raised in here, the reason would come back as an error of the solver's.
        try:
            clock.check()
        except CoreError as reason:
            reasons.append(reason)
            event.interrupt()

    solver.cbSimplexInterrupt += look
    solver.run()
    if reasons:
        raise reasons[0]
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        raise _Infeasible()
    if status != highspy.HighsModelStatus.kOptimal:
        raise SolverFailed(f"The linear program ended as {solver.modelStatusToString(status)!r}.")
    solution = solver.getSolution()
    return np.clip(solution.col_value, lower, upper), size * np.asarray(solution.row_dual)


_banner_to_come, _banner_lock = True, threading.Lock()


def _new_solver() -> highspy.Highs:
    """A solver that prints nothing.

    The first of a process prints a banner before it can be told to be silent, which would stand
    before what a command prints as JSON: descriptor 1 leads nowhere meanwhile.
    """
    global _banner_to_come
    with _banner_lock:
        if _banner_to_come:
            with suppress(OSError):  # there is no standard output
                stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                try:
                    highspy.Highs()  # type: ignore[no-untyped-call]
                finally:
                    os.dup2(stdout, 1)
                    os.close(stdout)
                    os.close(nowhere)
            _banner_to_come = False
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    return solver


class _NearestProgram:
    """min |x - image|^2 / 2 over a polytope, whose rows have unit length: one penalty fits all."""

    def __init__(self, polytope: LayerPolytope, image: Floats) -> None:
        rows = polytope.matrix
        dense = rows.nnz > 0.1 * math.prod(rows.shape)
        self.rows: Any = rows.toarray() if dense else rows
        self.limit, self.equal = polytope.limit, polytope.equal
        self.image, self.lower, self.upper = image, polytope.lower, polytope.upper

    def pull(self, pixels: Floats, multipliers: Floats, penalty: float) -> Floats:
        """What the penalty pulls at each row, over `penalty`."""
        past: Floats = self.rows @ pixels - self.limit + multipliers / penalty
        return np.where(self.equal, past, np.maximum(past, 0))

    def bound(self, multipliers: Floats) -> float:
        """The Lagrangian's least value over the box as a distance: no point is nearer."""
        pixels = np.clip(self.image - self.rows.T @ multipliers, self.lower, self.upper)
        squared = ((pixels - self.image) ** 2).sum()
        squared += 2 * multipliers @ (self.rows @ pixels - self.limit)
        return math.sqrt(max(0.0, squared))

    def minimise(self, pixels: Floats, multipliers: Floats, penalty: float, clock: Clock) -> Floats:
        """The augmented Lagrangian's minimum over the box, from `pixels`."""
        for _ in range(200):
            clock.check()
            pull = self.pull(pixels, multipliers, penalty)
            slope = pixels - self.image + penalty * (self.rows.T @ pull)
            held = (pixels <= self.lower) & (slope > 0) | (pixels >= self.upper) & (slope < 0)
            if np.abs(slope[~held]).max(initial=0) < 1e-11 * penalty:
                break
            step = np.zeros_like(pixels)
            step[~held] = -_newton(
                self.rows[self.equal | (pull > 0)][:, ~held], slope[~held], penalty
            )
            value = self._value(pixels, pull, penalty)
            for halvings in range(30):
                tried = np.clip(pixels + step / 2**halvings, self.lower, self.upper)
                pull = self.pull(tried, multipliers, penalty)
                if self._value(tried, pull, penalty) <= value - 1e-4 * slope @ (pixels - tried):
                    break
            else:  # as low as rounding lets it come
                break
            pixels = tried
        return pixels

    def _value(self, pixels: Floats, pull: Floats, penalty: float) -> float:
        return float(((pixels - self.image) ** 2).sum() + penalty * (pull**2).sum()) / 2


def _newton(rows: Any, slope: Floats, penalty: float) -> Floats:
    """(1 + penalty rows^T rows)^-1 slope, by the smaller of the two Gram matrices."""
    count, pixels = rows.shape
    if not count:
        return slope

    if count < pixels:
        inner = _dense(rows @ rows.T) + np.eye(count) / penalty
        return np.asarray(slope - rows.T @ linalg.solve(inner, rows @ slope, assume_a="pos"))
    outer = penalty * _dense(rows.T @ rows) + np.eye(pixels)
    return np.asarray(linalg.solve(outer, slope, assume_a="pos"))


def _stuck(polytope: LayerPolytope, clock: Clock) -> tuple[Booleans, Booleans]:
    """Which inactive or saturated units [U], and which pixels [d], have no slack anywhere.

    The sum of their slacks is greatest at 0 only if all of them are stuck. What is loose there is
    struck off, until nothing is. A slack counts to `SLACK` alone, so that many are loose at once.
    """
    units, pixels = polytope.matrix.shape
    eye = sparse.eye_array(pixels)
    matrix = sparse.vstack([polytope.matrix, -eye, eye], format="csr")
    limit = np.concatenate([polytope.limit, -polytope.lower, polytope.upper])
    every = np.arange(len(limit)) < units
    equal = np.concatenate([polytope.equal, np.full(2 * pixels, False)])
    # Most constraints are loose near the middle of the box, which spares linear programs.
    point = nearest(polytope, (polytope.lower + polytope.upper) / 2, clock=clock).pixels
    stuck = ~equal & (limit - matrix @ point <= LOOSE)
    while stuck.any():
        rows, count = every | stuck, int(stuck.sum())
        slack = sparse.eye_array(len(limit), format="csr")[rows][:, stuck]
        found, _ = _linear_program(
            cost=np.concatenate([np.zeros(pixels), -np.ones(count)]),
            matrix=sparse.hstack([matrix[rows], slack], format="csr"),
            limit=limit[rows],
            equal=equal[rows],
            lower=np.concatenate([polytope.lower, np.zeros(count)]),
            upper=np.concatenate([polytope.upper, np.full(count, SLACK)]),
            clock=clock,
        )
        loose = stuck & (limit - matrix @ found[:pixels] > LOOSE)
        if not loose.any():
            break
        stuck &= ~loose
    in_units, low, high = np.split(stuck, [units, units + pixels])
    return in_units, low | high


def _rank(matrix: sparse.csr_array, clock: Clock) -> int:
    """The rank, from the singular values of the triangle that QR leaves of blocks of rows.

    The Gram matrix has their squares, which tell full rank much sooner where it is beyond doubt.
    """
    if matrix.shape[0] < matrix.shape[1]:
        matrix = sparse.csr_array(matrix.T)
    rows, side = matrix.shape
    clock.check()
    if side:
        squares = linalg.eigvalsh(_dense(matrix.T @ matrix))
        if squares[0] > 1e-8 * squares[-1]:
            return side
    triangle = np.zeros((0, side))
    for start in range(0, rows, SIDE):
        clock.check()
        block = np.vstack([triangle, _dense(matrix[start : start + SIDE])])
        triangle = np.asarray(np.linalg.qr(block, mode="r"))
    values = linalg.svdvals(triangle) if triangle.size else np.zeros(1)
    return int((values > values[0] * max(rows, side) * np.finfo(np.float64).eps).sum())


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix if isinstance(matrix, np.ndarray) else matrix.toarray())
