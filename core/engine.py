"""The optimisation loop: groups of rows are admitted, stepped together, and retired.

A group is one job; a row is one of its corners. All rows share each forward and backward pass,
whichever job they belong to. Nothing crosses from row to row and each row counts its own steps,
so company changes no job. Rows are checked every `STRIDE` of their own steps; groups join between
strides, so that the phases of all rows agree and the host waits for the device once a stride.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import CoreError, UnknownName
from core.hull import Hull, ascend
from core.objective import Losses, RowTensors
from core.parametrize import Bounds, Parametrization, Pixels, project_
from core.patches.composite import Patches
from core.spec import CollisionSpec
from core.taps import Tap, matmul_precision

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

STRIDE = 10
# Matrix kernels for a handful of rows round differently from those for many. Where an image is
# small enough to cost nothing, rows are filled up to a multiple of 8, which avoids such kernels.
SMALL_IMAGE, FILL = 4096, 8
CURVE_POINTS = 500
REASONS = ("running", "converged", "max_steps", "max_seconds", "diverged", "stopped")
RUNNING, CONVERGED, MAX_STEPS, MAX_SECONDS, DIVERGED, STOPPED = range(6)
# Decay of the gradient's average, and Adam's of its square.
DECAYS = {"gd": (0.0, 0.0), "momentum": (0.99, 0.0), "adam": (0.9, 0.999)}
EPSILON = 1e-8
# The names in a saved state: of rows, of what the host knows, of its records.
ROW_STATE = ("parameters", "mean", "square", "kept", "score")
HOST_STATE = ("job", "best", "steps", "reason", "clock")
RECORDS, PARTS = ("curves", "snapshots"), ("steps", "values")


class UnfitState(CoreError):
    """The saved state belongs to another job or another version."""

    code = "unfit_state"


@dataclass
class Record:
    """What a run of unknown length leaves behind: thinned, so that at most 2 `size` are kept."""

    size: int
    every: int = STRIDE
    steps: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def note(self, step: int, value: Callable[[], Tensor]) -> None:
        seen = self.steps and self.steps[-1] == step  # by a check that is made again
        if self.size and step % self.every == 0 and not seen:
            self.steps.append(step)
            self.values.append(value())
            if len(self.steps) > 2 * self.size:
                del self.steps[1::2], self.values[1::2]
                self.every *= 2


@dataclass(eq=False)
class Group:
    """One job in the engine: K rows, whose `losses` it brings, and what became of them.

    `corners` [K, C, H, W] are the best finite states that checks have seen, `steps` [K] how many
    steps led to them, and `reason` [K], an index into REASONS, why a row ended. Best is least in
    `score` [K], the larger of L_pos and violation over their thresholds: below 1 a row has
    converged. `latest` [K, 2] is L_pos and violation at the last check, NaN once retired; `curves`
    notes them and `snapshots` the images along the way. Rows are pixels, but with `patches`, where
    `gamma` weighs R(P).

    Rows of a group with a `hull` share one score and end together: while the worst of them, or of
    the points between them, is above a threshold that is its score, then what the spread lacks.
    """

    key: str
    spec: CollisionSpec
    source: Tensor
    losses: Losses
    l_pos_threshold: float
    violation_threshold: float = math.inf
    hull: Hull | None = None
    patches: Patches | None = None
    gamma: float = 0.0

    age: int = 0
    seconds: float = 0.0
    parametrization: Parametrization = field(init=False)
    corners: Tensor = field(init=False)
    score: Floats = field(init=False)
    latest: Floats = field(init=False)
    steps: Integers = field(init=False)
    reason: Integers = field(init=False)
    curves: Record = field(init=False)
    snapshots: Record = field(init=False)

    def __post_init__(self) -> None:
        k = self.spec.corners
        self.parametrization = self.patches or Pixels(self.source)
        self.corners = self.parametrization.images(self.parametrization.start(k))
        self.score, self.latest = np.full(k, np.inf), np.full((k, 2), np.nan)
        self.steps, self.reason = np.zeros(k, np.int64), np.zeros(k, np.int64)
        self.curves, self.snapshots = Record(CURVE_POINTS), Record(self.spec.snapshots)

    @property
    def converged(self) -> NDArray[np.bool_]:
        """[K]: the rows whose best state is under both thresholds."""
        return np.less(self.score, 1)

    @property
    def fingerprint(self) -> bytes:
        """A hash of settings, source and target: a saved state fits the job it was saved for."""
        arrays = [self.source, self.losses.target]
        if self.patches:
            arrays.append(self.patches.sources)
        content = [
            self.spec.model_dump_json(exclude_defaults=True).encode(),
            *(a.cpu().numpy().tobytes() for a in arrays),
        ]
        return hashlib.sha256(b"".join(content)).digest()

    @property
    def on_the_way(self) -> list[int]:
        """Places in `snapshots` of those that a result keeps: evenly spaced, as many as the spec
        asks for, between the start and the last step that led to a corner.
        """
        noted, last = self.snapshots.steps, self.steps.max()
        between = [i for i, step in enumerate(noted) if 0 < step < last]
        stride = -(-(len(between) + 1) // (self.spec.snapshots + 1))
        return between[stride - 1 :: stride]

    @property
    def running(self) -> NDArray[np.bool_]:
        """[K]: the rows that still take steps."""
        return np.equal(self.reason, RUNNING)


@dataclass
class _Rows(RowTensors):
    """What the device holds of R rows, fillers included: parameters, averages, best states."""

    parameters: Tensor
    mean: Tensor
    square: Tensor
    kept: Tensor
    score: Tensor
    thresholds: Tensor
    low: Tensor
    high: Tensor
    losses: Losses
    pixels: int  # of an image, all channels


@dataclass
class _Points:
    """Points between the corners of `group`, which lie at `where`: their weights [P, K]."""

    group: Group
    hull: Hull
    where: slice
    weights: Tensor


@dataclass(frozen=True)
class _Seen:
    """A pass over all rows and, behind them, all points: f' and, where a hull asks for it, logits.

    It depends on the parameters `leaf`, by way of the rows' `images`. `variation` [R] is their
    R(P), where a job minds it.
    """

    leaf: Tensor
    images: Tensor
    variation: Tensor | None
    pre: Tensor
    logits: Tensor | None


class Engine:
    """Steps any number of groups that share a batch key through one `tap`.

    `admit` groups at any time; `advance` until `groups` is empty. `on_step` is called after each
    step, for whoever watches whether this goes on.

    Whatever `advance` raises (no memory left, say, or what `on_step` raised), no row has moved:
    the next call goes on exactly, with all groups or without those withdrawn in between. What the
    stride's check has found (curves, best states, groups that ended) stays found: to look at the
    same rows again changes nothing.
    """

    def __init__(
        self,
        tap: Tap,
        optimizer: str,
        *,
        tf32: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.tap, self.optimizer, self.tf32, self.on_step = tap, optimizer, tf32, on_step
        self._groups: list[Group] = []
        # Those that join at the next stride, each with its rows and their corners' numbers.
        self._waiting: list[tuple[Group, _Rows, Integers]] = []
        self._finished: list[Group] = []
        # Of the first rows, without fillers: the group's place in `_groups`, the corner's number.
        self._owner: Integers = np.empty(0, np.int64)
        self._corner: Integers = np.empty(0, np.int64)
        self._rows: _Rows
        self._points: list[_Points] = []

    @property
    def groups(self) -> list[Group]:
        """All that are here: admitted, and not returned by `advance` or taken out since."""
        return [*self._groups, *(group for group, *_ in self._waiting), *self._finished]

    @property
    def held(self) -> int:
        """Bytes that rows hold on the device between two strides, but for their losses' terms."""
        if not self._groups:
            return 0
        return sum(getattr(self._rows, name).nbytes for name in ROW_STATE)

    def admit(self, group: Group, state: Mapping[str, Tensor] | None = None) -> None:
        """Lets `group` join at the next stride; anew, or from a `state_of` the same job.

        Raises:
            UnfitState: `state` is that of another job or version.
        """
        rows = self._fresh_rows(group, group.spec.corners)
        if state is not None:
            _restore(group, rows, state)
        if not group.running.any():
            self._finished.append(group)
            return
        corner = np.flatnonzero(group.running)
        self._waiting.append((group, rows.select(_index(corner, rows)), corner))

    def advance(self) -> list[Group]:
        """Takes all rows `STRIDE` steps further; returns the groups found finished on the way."""
        began = time.perf_counter()
        self._join()
        company = list(self._groups)
        with matmul_precision(tf32=self.tf32):
            if self._groups:
                self._draw_points()
                seen = self._forward()
                if self._check(seen):
                    self._retire()
                    if self._groups:
                        self._draw_points()
                        seen = self._forward()
            if self._groups:
                self._stride(seen)
        seconds = time.perf_counter() - began
        for group in company:
            group.seconds += seconds
        for group in self._groups:
            group.age += STRIDE
        finished, self._finished = self._finished, []
        return finished

    def stop(self, key: str) -> Group:
        """Ends the group called `key` and returns it, its best states kept.

        Raises:
            UnknownName: no group of that key is here.
        """
        group, rows, where, corner = self._share(key)
        group.corners[_index(corner, rows)] = group.parametrization.images(rows.kept[where])
        group.reason[group.running] = STOPPED
        self._drop(group)
        return group

    def withdraw(self, key: str) -> dict[str, Tensor]:
        """Takes the group called `key` out as it is and returns its state, as `state_of` does."""
        state = self.state_of(key)
        self._drop(self._share(key)[0])
        return state

    def state_of(self, key: str) -> dict[str, Tensor]:
        """All that the group called `key` needs to go on exactly, in any engine of its batch key.

        Plain tensors by name, on the CPU, that share nothing with the engine.

        Raises:
            UnknownName: no group of that key is here.
        """
        group, rows, where, corner = self._share(key)
        state: dict[str, Tensor] = {}
        for name in ROW_STATE:
            own = getattr(rows, name)[where]  # no copy, for want of memory
            whole = torch.zeros(group.spec.corners, *own.shape[1:], dtype=own.dtype)
            whole[torch.from_numpy(corner)] = own.cpu()
            state[name] = whole
        best = group.corners.clone()
        best[_index(corner, rows)] = group.parametrization.images(rows.kept[where])
        state["corners"] = best.cpu()
        host: dict[str, Any] = {
            "job": list(group.fingerprint),
            "best": group.score,
            "steps": group.steps,
            "reason": group.reason,
            "clock": np.array([group.age, group.seconds]),
        }
        state |= {name: torch.tensor(value) for name, value in host.items()}
        for name in RECORDS:
            record: Record = getattr(group, name)
            state[f"{name}.steps"] = torch.tensor([record.every, *record.steps])
            values = torch.stack(record.values) if record.values else torch.empty(0)
            state[f"{name}.values"] = values
        return state

    def _share(self, key: str) -> tuple[Group, _Rows, slice, Integers]:
        """The group called `key`, rows of the device, which of them are its own, and their corners'
        numbers.
        """
        for group, rows, corner in self._waiting:
            if group.key == key:
                return group, rows, slice(0, len(corner)), corner
        for group, where in self._places():
            if group.key == key:
                return group, self._rows, where, self._corner[where]
        for group in self._finished:
            if group.key == key:
                none = np.empty(0, np.int64)
                return group, self._fresh_rows(group, 0), slice(0, 0), none
        raise UnknownName("running job", key, [group.key for group in self.groups])

    def _drop(self, group: Group) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting[0] is not group]
        self._finished = [other for other in self._finished if other is not group]
        if group in self._groups:
            self._keep(self._owner != self._groups.index(group))

    def _keep(self, stay: NDArray[np.bool_]) -> None:
        """Takes all rows [R] off the device but those that `stay`, and groups without any left."""
        owners, owner = np.unique(self._owner[stay], return_inverse=True)
        if len(owners):  # first, since it may fail for want of memory
            self._rows = _filled(self._rows, np.flatnonzero(stay))
        else:  # who is idle holds no memory
            del self._rows
            self._points = []
        self._owner, self._corner = owner, self._corner[stay]
        self._groups = [self._groups[i] for i in owners]

    def _join(self) -> None:
        if not self._waiting:
            return
        groups, parts, corners = map(list, zip(*self._waiting, strict=True))
        if self._groups:
            parts.insert(0, self._rows.select(slice(len(self._owner))))
        owners = [np.full(len(own), len(self._groups) + i) for i, own in enumerate(corners)]
        owner = np.concatenate([self._owner, *owners])
        rows = _Rows.stack(parts)
        # Whatever may fail, for want of memory say, has not: all are as they were till now.
        self._rows = _filled(rows, np.arange(len(owner)))
        self._owner, self._corner = owner, np.concatenate([self._corner, *corners])
        self._groups, self._waiting = [*self._groups, *groups], []

    def _fresh_rows(self, group: Group, corners: int) -> _Rows:
        parameters = group.parametrization.start(corners)
        each = parameters.new_ones(corners)
        image = each.view(-1, *[1] * group.source.dim())
        free = group.spec.pixel_range == "free"
        mean, square = DECAYS[self.optimizer]
        thresholds = parameters.new_tensor([group.l_pos_threshold, group.violation_threshold])
        return _Rows(
            parameters=parameters,
            mean=torch.zeros_like(parameters) if mean else each,
            square=torch.zeros_like(parameters) if square else each,
            kept=parameters.clone(),
            score=each * math.inf,
            thresholds=thresholds.expand(len(each), 2),
            low=image * (-math.inf if free else 0.0),
            high=image * (math.inf if free else 1.0),
            losses=group.losses,
            pixels=group.source.numel(),
        )

    def _draw_points(self) -> None:
        self._points = []
        for group, where in self._places():
            if group.hull:
                weights = group.hull.weights(group.age, where.stop - where.start)
                weights = weights.to(self._rows.parameters)
                self._points.append(_Points(group, group.hull, where, weights))

    def _forward(self) -> _Seen:
        leaf = self._rows.parameters.detach().requires_grad_()
        images, variation = self._images(leaf)
        if not self._points:
            return _Seen(leaf, images, variation, self.tap(images), None)
        between = []
        for points in self._points:
            points.weights = points.weights.detach().requires_grad_(points.hull.seeks)
            between.append(torch.tensordot(points.weights, images[points.where], dims=1))
        missing = _missing(sum(map(len, between)), self._rows)
        between.append(images[:1].detach().expand(missing, *images.shape[1:]))
        whole = torch.cat([images, *between])
        if any(points.hull.settings.margin for points in self._points):
            return _Seen(leaf, images, variation, *self.tap.observe(whole))
        return _Seen(leaf, images, variation, self.tap(whole), None)

    def _images(self, parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of all rows, and R(P) [R] where it counts."""
        if not any(group.patches for group in self._groups):
            return parameters, None
        parts = [(g.parametrization, parameters[where]) for g, where in self._places()]
        if len(parameters) > len(self._owner):  # fillers, which are rows of the first group
            parts.append((parts[0][0], parameters[len(self._owner) :]))
        if not any(group.gamma for group in self._groups):
            return torch.cat([makes.images(own) for makes, own in parts]), None
        both = [makes.images_and_variation(own) for makes, own in parts]
        images, variation = (torch.cat(column) for column in zip(*both, strict=True))
        return images, variation

    def _between(self) -> Iterator[tuple[_Points, slice]]:
        """Each group's points, and where they are in a pass."""
        start = len(self._rows.score)
        for points in self._points:
            yield points, slice(start, start + len(points.weights))
            start += len(points.weights)

    @torch.no_grad()
    def _check(self, seen: _Seen) -> bool:
        """Keeps the best states, notes the curves, ends rows; whether any row ended."""
        rows = self._rows
        losses, score = _scores(rows.losses, seen.pre[: len(rows.score)], rows.thresholds)
        for points, part in self._between():
            worst = self._worst(points, part, seen)
            spread = points.hull.spread(seen.images[points.where])
            lacking = 1 - spread / points.hull.settings.goal
            score[points.where] = torch.where(worst < 1, lacking, worst)
        better = score < rows.score  # false for NaN
        best = torch.where(better, score, rows.score)
        kept = torch.where(_each_image(better, rows.kept), rows.parameters, rows.kept)
        # The one wait for the device in a stride.
        table = torch.cat([losses, score[:, None], better[:, None]], 1).cpu().double().numpy()
        ended = [self._judge(group, where, table[where]) for group, where in self._places()]
        # Last: had anything failed, the same states would have to be found better again.
        rows.score, rows.kept = best, kept
        return any(ended)

    @torch.no_grad()
    def _worst(self, points: _Points, part: slice, seen: _Seen) -> Tensor:
        """The largest loss over its threshold, of corners and the points between them."""
        where, hull = points.where, points.hull
        thresholds = self._rows.thresholds[where]
        own = self._rows.losses.select(where)
        found = [
            _scores(own, seen.pre[where], thresholds)[1],
            _scores(hull.losses, seen.pre[part], thresholds[:1])[1],
        ]
        if seen.logits is not None and hull.settings.margin:
            found += [hull.shortfall(seen.logits[rows]) for rows in (where, part)]
        return torch.cat(found).max()

    def _judge(self, group: Group, where: slice, table: Floats) -> bool:
        corner = self._corner[where]
        score, better = table[:, 2], table[:, 3] > 0
        group.score[corner[better]] = score[better]
        group.steps[corner[better]] = min(group.age, group.spec.max_steps)
        group.latest = np.full((group.spec.corners, 2), np.nan)
        group.latest[corner] = table[:, :2]
        group.curves.note(group.age, lambda: torch.from_numpy(group.latest))
        group.snapshots.note(group.age, lambda: self._snapshot(group, where))
        late = group.age >= group.spec.max_steps, group.seconds >= group.spec.max_seconds
        enough = score < (0 if group.hull else 1)
        over = [np.full(len(score), is_late) for is_late in late]
        reason = np.select(
            [enough, ~np.isfinite(score), *over],
            [CONVERGED, DIVERGED, MAX_STEPS, MAX_SECONDS],
            RUNNING,
        )
        group.reason[corner] = reason
        return not group.running[corner].all()

    def _snapshot(self, group: Group, where: slice) -> Tensor:
        images = group.corners.clone()
        corner = torch.from_numpy(self._corner[where])
        images[corner] = group.parametrization.images(self._rows.parameters[where])
        return images.cpu()

    def _retire(self) -> None:
        """Takes rows that have ended off the device, and groups without any left."""
        running = np.empty(len(self._owner), bool)
        for group, where in self._places():
            corner = self._corner[where]
            running[where] = group.running[corner]
            ended = torch.from_numpy(corner[~running[where]])
            kept = self._rows.kept[where][torch.from_numpy(~running[where])]
            group.corners[ended] = group.parametrization.images(kept)
        finished = [group for group in self._groups if not group.running.any()]
        self._keep(running)
        self._finished += finished

    def _places(self) -> Iterator[tuple[Group, slice]]:
        bounds = np.searchsorted(self._owner, np.arange(len(self._groups) + 1))
        for group, first, end in zip(self._groups, bounds[:-1], bounds[1:], strict=True):
            yield group, slice(int(first), int(end))

    def _stride(self, seen: _Seen) -> None:
        """Takes `STRIDE` steps, or none where one of them fails."""
        (rates, epsilons), bounds = self._rates(), self._bounds()
        start = self._rows
        moving = {name: getattr(start, name).clone() for name in ("parameters", "mean", "square")}
        self._rows = replace(start, **moving)
        try:
            for i in range(STRIDE):
                if i:
                    seen = self._forward()
                self._step(seen, rates[i], epsilons[i], bounds)
                self.on_step()
        except BaseException:
            self._rows = start
            raise

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Step sizes and Adam's epsilons, [STRIDE, R, 1, 1, 1]; 0 past a row's last step."""
        steps = np.arange(STRIDE)[:, None] + [group.age for group in self._groups]
        rates = np.stack([_rate(g.spec, steps[:, i]) for i, g in enumerate(self._groups)], 1)
        mean, square = DECAYS[self.optimizer]
        corrections = np.ones_like(rates)
        if square:
            corrections = np.sqrt(1 - square ** (steps + 1))
            rates *= corrections / (1 - mean ** (steps + 1))
        owner = np.resize(self._owner, len(self._rows.score))
        owner[len(self._owner) :] = 0  # fillers
        both = np.stack([rates, EPSILON * corrections])[:, :, owner]
        table = torch.from_numpy(both).to(self._rows.parameters)
        rate, epsilon = table.view(*table.shape, *[1] * (self._rows.parameters.dim() - 1))
        return rate, epsilon

    def _bounds(self) -> Bounds | None:
        """Where pixels are kept: numbers where rows agree, which is several times faster."""
        ranges = {"free" if g.patches else g.spec.pixel_range for g in self._groups}
        if ranges == {"free"}:
            return None
        return (0.0, 1.0) if ranges == {"valid"} else (self._rows.low, self._rows.high)

    @torch.no_grad()
    def _step(self, seen: _Seen, rate: Tensor, epsilon: Tensor, bounds: Bounds | None) -> None:
        rows = self._rows
        gradient = self._gradient(seen)
        mean, square = DECAYS[self.optimizer]
        direction = rows.mean.lerp_(gradient, 1 - mean) if mean else gradient
        if square:
            rows.square.mul_(square).addcmul_(gradient, gradient, value=1 - square)
            direction = direction / rows.square.sqrt().add_(epsilon)
        rows.parameters.addcmul_(rate, direction, value=-1)
        if bounds:
            project_(rows.parameters, bounds)

    def _gradient(self, seen: _Seen) -> Tensor:
        """d loss / d parameters [R, ...]; points that seek the worst move on."""
        gradient = self._at_images(seen)
        if seen.images is seen.leaf:
            return gradient
        outputs, aways = [seen.images], [gradient]
        if seen.variation is not None:
            outputs.append(seen.variation)
            aways.append(torch.zeros_like(seen.variation))
            for group, where in self._places():
                aways[1][where] = group.gamma
        (gradient,) = torch.autograd.grad(outputs, seen.leaf, aways)
        return gradient

    def _at_images(self, seen: _Seen) -> Tensor:
        """d loss / d images [R, C, H, W]."""
        losses, images, pre = self._rows.losses, seen.images, seen.pre.detach()
        if not self._points:
            (gradient,) = torch.autograd.grad(seen.pre, images, losses.gradient(pre))
            return gradient
        away = torch.zeros_like(pre)
        away[: len(images)] = losses.gradient(pre[: len(images)])
        for points, part in self._between():
            away[part] = points.hull.losses.gradient(pre[part])
        outputs, aways = [seen.pre], [away]
        if seen.logits is not None:
            outputs.append(seen.logits)
            aways.append(self._off_class(seen.logits.detach()))
        seeking = [points for points in self._points if points.hull.seeks]
        inputs = [images, *(points.weights for points in seeking)]
        gradient, *rising = torch.autograd.grad(outputs, inputs, aways)
        for points, rise in zip(seeking, rising, strict=True):
            points.weights = ascend(points.weights, rise)
        for points, part in self._between():
            corners, group = images.detach()[points.where], points.group
            worst = self._worst(points, part, seen)
            drive = points.hull.drive(corners, group.source, group.age, worst)
            gradient[points.where] += drive
        return gradient

    def _off_class(self, logits: Tensor) -> Tensor:
        """d loss / d logits [R + P, classes] of the hulls that mind their class."""
        away = torch.zeros_like(logits)
        for points, part in self._between():
            if points.hull.settings.margin:
                for rows in (points.where, part):
                    away[rows] = points.hull.off_class(logits[rows])
        return away


def _restore(group: Group, rows: _Rows, state: Mapping[str, Tensor]) -> None:
    """Puts a fresh `group` and its fresh `rows` where a `state_of` left them.

    Raises:
        UnfitState: as `Engine.admit` does; then nothing has changed.
    """
    own = {"corners", *ROW_STATE, *HOST_STATE, *(f"{r}.{part}" for r in RECORDS for part in PARTS)}
    if missing := sorted(own - state.keys()):
        raise UnfitState(f"The state saved for job {group.key!r} lacks {missing[0]!r}.")
    if state["job"].tolist() != list(group.fingerprint):
        raise UnfitState(
            f"The state given for job {group.key!r} is that of a job with other settings."
        )
    for name in ROW_STATE:
        setattr(rows, name, state[name].to(getattr(rows, name), copy=True))
    group.corners = state["corners"].to(group.corners, copy=True)
    group.score, group.steps, group.reason = (
        state[name].numpy().copy() for name in ("best", "steps", "reason")
    )
    age, group.seconds = state["clock"].tolist()
    group.age = int(age)
    for name in RECORDS:
        record: Record = getattr(group, name)
        record.every, *record.steps = state[f"{name}.steps"].tolist()
        record.values = list(state[f"{name}.values"])


def _filled(rows: _Rows, chosen: Integers) -> _Rows:
    """The `chosen` rows, filled up with copies of the first of them where images are small."""
    missing = _missing(len(chosen), rows)
    index = np.append(chosen, np.full(missing, chosen[0]))
    return rows.select(_index(index, rows))


def _scores(losses: Losses, pre: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """L_pos and violation [R, 2] of `pre`, and the larger of them over its threshold [R]."""
    both = torch.stack([losses.l_pos(pre), losses.violation(pre)], 1)
    return both, (both / thresholds).amax(1)


def _missing(count: int, rows: _Rows) -> int:
    """Fillers for so many images like those of `rows`."""
    return -count % FILL if rows.pixels <= SMALL_IMAGE else 0


def _index(places: Integers, rows: _Rows) -> Tensor:
    return torch.from_numpy(places).to(rows.parameters.device)


def _rate(spec: CollisionSpec, steps: NDArray[Any]) -> Floats:
    """The step size of each of `steps` (from 0), on [0, 1] pixels."""
    done = steps / spec.max_steps
    shape = {
        "constant": np.ones_like(done),
        "rising": done + 1 / spec.max_steps,
        "cosine": (1 + np.cos(math.pi * done)) / 2,
    }[spec.schedule]
    return spec.learning_rate * shape * (steps < spec.max_steps)


def _each_image(flags: Tensor, images: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (images.dim() - 1))
