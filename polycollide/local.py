"""Jobs on this machine without a server: the commands that open `core` themselves."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from core import artifacts, images, job
from core import models as registry
from core.engine import Group
from core.errors import CoreError, InvalidSpec
from core.objective import Target
from core.outcome import Outcome, run_alone
from core.result import Result, claims
from core.spec import CollisionSpec
from core.taps import matmul_precision, open_tap
from polycollide import results
from polycollide.asked import Asked
from polycollide.errors import PolycollideError
from polycollide.listing import aside, console, cut, fail, listing, say_missing, show_json, unusable

OUT_OF_MEMORY = "The device's memory does not hold this job; ask for fewer corners."


def run(asked: Asked, *, out: Path | None, force: bool, json: bool, device: str | None) -> None:
    """One job; prints its result and writes it to out (`results.write` says what `force` does).

    Ctrl-C ends the optimisation; what it has found is measured, printed and written all the same.
    """
    spec = asked.spec
    with in_one_sentence(), first_interrupt_asks() as interrupted:
        if out:  # before the work, not after it
            results.prepare(out, force=force)
        subject = job.Subject.open(spec, pick_device(device))
        prepare = subject.model.preprocessing
        source_image = images.load(*asked.source, prepare)
        target_image = images.load(*asked.target, prepare)
        with progress_bar(spec) as on_progress:
            done, outcome = run_alone(
                subject, spec, source_image, target_image, on_progress, interrupted
            )
        if json:
            show_json(outcome.result.model_dump_json(indent=2))
        else:
            show(outcome.result)
        if out:
            files = write(out, done, outcome, force=force)
            if not json:
                say_missing(outcome.result.missing)
                console.print(f"{out}: {', '.join(files)}", highlight=False, soft_wrap=True)
        if interrupted():
            raise typer.Exit(130)


def models() -> None:
    """Prints the registry."""
    others = ("input", "out", "origin", "here")
    table = listing("model", "weights", *others, whole=("model", *others))
    with in_one_sentence():
        for listed in registry.listed():
            shape = "x".join(map(str, listed.input_shape)) if listed.input_shape else ""
            weights = cut("\n".join(listed.weights))
            here = "yes" if listed.ready else ""
            table.add_row(
                listed.name, weights, shape, str(listed.classes or ""), listed.origin, here
            )
    console.print(table)


def layers(model: str, weights: str | None, target: str | None, *, device: str | None) -> None:
    """Prints the layers that can be tapped; with a target image, the units active for it."""
    with in_one_sentence():
        opened = registry.load(model, weights=weights, device=pick_device(device))
        image = images.load(*images.read(target), opened.preprocessing) if target else None
        columns = ("active", "dimension at most") if image else ()
        table = listing("layer", "kind", "shape", "units", "cut", *columns, whole=("layer",))
        with Progress(console=aside, transient=True, disable=not aside.is_terminal) as bar:
            for layer in bar.track(job.describe(opened), description="layers"):
                shape = " x ".join(map(str, layer.shape))
                cut = ("yes" if layer.cut_proved else "tested") if layer.cut else "no"
                counts = _target_columns(opened, layer, image) if image else ()
                table.add_row(layer.name, layer.kind, shape, str(layer.units), cut, *counts)
    console.print(table)


@torch.no_grad()
@matmul_precision(tf32=False)
def _target_columns(
    model: registry.Model, layer: job.LayerInfo, target: images.Loaded
) -> tuple[str, str]:
    """Active units n_p, and d - n_p for a layer that is affine in the image (section 2)."""
    classifier = model.classifier
    image = torch.from_numpy(target.pixels)[None].to(next(classifier.parameters()).device)
    tap = open_tap(classifier.normalize, classifier.network, layer.name, image)
    active = int(Target(tap(image)[0], tap.layer.activation).positive.sum())
    return str(active), str(max(0, image.numel() - active)) if layer.affine else ""


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; unnamed, the GPU where there is one."""
    cuda = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda") or (name == "cuda" and not cuda):
        raise InvalidSpec(f"There is no device {name!r} here; take cpu{' or cuda' * cuda}.")
    return torch.device(name or ("cuda" if cuda else "cpu"))


def write(out: Path, done: job.Job, outcome: Outcome, *, force: bool = False) -> list[str]:
    """Writes everything a result has into the folder `out`, and returns the names of the files.

    It takes the place of an earlier result, as `results.write` says.
    """
    files = artifacts.encode(done, outcome)
    if done.spec.figures:
        files |= artifacts.pictures(done, outcome)()
    files[results.RESULT] = outcome.result.model_dump_json(indent=2).encode()
    results.write(out, files, force=force)
    return list(files)


def show(result: Result) -> None:
    """Prints a result as tables."""
    target = result.target
    probability = f"P({target.class_})"
    table = listing(
        *("#", "unit", "steps", "L_pos", "violation", "label", probability, "8-bit"),
        *("to source", "to target"),
        justify="right",
        whole=("#", "steps", "L_pos", "violation"),
    )
    for c in result.corners:
        unit = "" if c.unit is None else str(c.unit)
        table.add_row(
            str(c.index),
            unit,
            f"{c.steps}",
            f"{c.l_pos:.3g}",
            f"{c.violation:.3g}",
            c.class_,
            f"{c.probability:.4f}",
            f"{c.probability_8bit:.4f}",
            f"{c.distance_to_source:.2f}",
            f"{c.distance_to_target:.2f}",
        )
    console.print(table)
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, text in _facts(result):
        facts.add_row(name, text)
    console.print(facts)
    for warning in result.warnings:
        console.print(Text.assemble(("Warning:", "yellow"), " ", warning))


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    source, target, polytope = result.source, result.target, result.polytope
    yield "source", f"{source.class_} (probability {source.probability:.4f})"
    yield "target", f"{target.class_} (probability {target.probability:.4f})"
    if result.converged:
        yield "converged", f"every corner, in {result.steps} steps and {result.seconds:.2f} s"
    else:
        ends = Counter(c.reason for c in result.corners)
        told = ", ".join(f"{count} {reason}" for reason, count in ends.items())
        if result.goal_reached is False:
            collides = "every corner collides" if result.collides else "not every corner collides"
            goal = result.provenance.spec.hull.goal
            told = f"{collides}, and the spread is short of its goal of {goal:g} ({told})"
        yield "converged", f"no: {told}"
    yield (
        "spread",
        f"{polytope.spread:.3f} = mean pairwise distance {polytope.mean_pairwise_distance:.3f} / "
        f"{polytope.natural_distance:.2f} between {polytope.natural_distance_of}",
    )
    looks = {
        "SSIM": polytope.mean_ssim,
        "low-pass share": polytope.mean_low_pass_share,
        "LPIPS": polytope.mean_perceptual,
    }
    if len(result.corners) > 1:
        yield (
            "between corners",
            ", ".join(f"{n} {'-' if v is None else f'{v:.3f}'}" for n, v in looks.items()),
        )
    if between := result.interpolation:
        yield (
            f"{between.samples} interpolations",
            f"{percent(between.accuracy, between.accuracy_interval)} seen as {target.class_}, mean "
            f"probability {between.mean_probability:.4f}, least {between.min_probability:.4f}",
        )
        yield (
            "the same in 8 bits",
            f"{percent(between.accuracy_8bit, between.accuracy_interval_8bit)}, mean probability "
            f"{between.mean_probability_8bit:.4f}, least {between.min_probability_8bit:.4f}",
        )
        if between.under_thresholds is not None and between.max_over_threshold is not None:
            yield (
                "their features",
                f"{100 * between.under_thresholds:.1f} % under the corners' thresholds, the worst "
                f"at {between.max_over_threshold:.2f} of them; relative residual "
                f"{between.relative_residual:.3f}, at most {between.max_relative_residual:.3f}",
            )
    if ball := result.ball:
        told = percent(ball.accuracy, ball.accuracy_interval)
        if ball.clipped and ball.mean_radius is not None:
            told += (
                f"; clipped to valid pixels, its points lie at {ball.least_radius:.2f} to "
                f"{ball.largest_radius:.2f}, {ball.mean_radius:.2f} on average"
            )
        yield f"ball, radius {ball.radius:.2f}", told
    for name, text in claims(result):
        yield name[0].lower() + name[1:], text
    for note in result.notes:
        yield "note", note


def percent(fraction: float, interval: tuple[float, float]) -> str:
    """A fraction with its interval, as `100.0 % (99.8 to 100.0)`."""
    low, high = interval
    return f"{100 * fraction:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


@contextmanager
def progress_bar(spec: CollisionSpec) -> Iterator[Callable[[Group], None]]:
    """A live bar of steps, worst L_pos, rows left and rate; gives what updates it."""
    columns = "{task.fields[worst]}", "{task.fields[left]}", "{task.fields[rate]}"
    with Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        console=aside,
        transient=True,
        disable=not aside.is_terminal,
    ) as bar:
        task = bar.add_task("", total=spec.max_steps, worst="", left="", rate="")
        began = time.perf_counter()

        def update(group: Group) -> None:
            worst = np.nanmax(group.latest[:, 0], initial=-np.inf)
            bar.update(
                task,
                completed=min(group.age, spec.max_steps),
                worst=f"worst L_pos {worst:.3g}",
                left=f"{group.running.sum()} rows left",
                rate=f"{group.age / (time.perf_counter() - began):.0f} steps/s",
            )

        yield update


@contextmanager
def first_interrupt_asks() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C only asks to stop, which what it gives then tells; the second one stops."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        aside.print("Stopping; what is done is kept. Ctrl-C again to give up.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Errors that a user can act on end the command with a sentence, not a traceback."""
    try:
        yield
    except (CoreError, PolycollideError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not job.is_out_of_memory(error):
            raise
        message = OUT_OF_MEMORY
    except OSError as error:
        message = unusable(error)
    else:
        return
    fail(message)
