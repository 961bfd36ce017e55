"""Stations without a service: what company and small batches change, and what patches weigh."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from core import images
from core.images import Preprocessing
from core.job import Job, Subject, prepare
from core.models import Classifier, Model, Normalize
from core.patches.composite import Patches
from core.patches.windows import Windows
from core.spec import CollisionSpec
from worker import station
from worker.station import Station

SIDE = 32
WINDOWS = Windows((SIDE, SIDE), window=8, stride=2, surround=4)
FEW = Windows((SIDE, SIDE), window=16, stride=8, surround=4)
PAIRS = [
    ("animal_panda", "fish_fish25"),
    ("fish_fish25", "farm_dog"),
    ("farm_dog", "animal_koala"),
    ("animal_koala", "animal_panda"),
]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 49, 32), nn.ReLU(), nn.Linear(32, 5)),
    )
    return Model(
        name="conv",
        classifier=Classifier(Normalize("RGB", mean=(0.5,) * 3, std=(0.2,) * 3), network).eval(),
        preprocessing=Preprocessing("RGB", (SIDE, SIDE), SIDE),
        classes=tuple("abcde"),
        weights="random",
        weights_sha256="0" * 64,
    )


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(station, "THREADS", before)
    yield
    torch.set_num_threads(before)


def opened(model: Model, **settings: Any) -> tuple[Subject, CollisionSpec]:
    spec = CollisionSpec.model_validate(
        {
            "model": "conv",
            "layer": "5",
            "corners": 3,
            "optimizer": "adam",
            "learning_rate": 0.02,
            "l_pos_threshold": {"relative": 0.01},
            "ball_samples": 0,
            "interpolation": {"samples": 0},
        }
        | settings
    )
    subject = Subject.of(model, spec)
    subject.footprint.checkpoints = True  # as a station does
    return subject, spec


def jobs_of(
    subject: Subject, spec: CollisionSpec, count: int, windows: Windows | None
) -> list[Job]:
    made = []
    for i in range(count):
        source, target = (
            images.load(*images.read(f"sample:photos/{name}"), subject.model.preprocessing)
            for name in PAIRS[i % len(PAIRS)]
        )
        job = prepare(subject, spec, source, target, key=f"{i}")
        if windows:
            m, drawn = windows.source_size, torch.Generator().manual_seed(i)
            sources = torch.rand(windows.count, 3, m, m, generator=drawn)
            group = replace(job.group, patches=Patches(sources, windows))
            job = replace(job, group=group)
        made.append(job)
    return made


def drain(here: Station, jobs: list[Job], *, halve: bool = False) -> int:
    """Runs all; the most jobs that were in the engine at once."""
    for job in jobs:
        here.admit(job, None)
    done, most = 0, 0
    while done < len(jobs):
        finished, broken = here.advance()
        assert not broken
        done += len(finished)
        most = max(most, sum(here.runs(job.group) for job in jobs))
        if halve:
            here.shrink()
            halve = False
    return most


@pytest.mark.parametrize("windows", [None, FEW], ids=["pixels", "patches"])
def test_jobs_alone_together_and_in_small_batches_end_alike(
    model: Model, windows: Windows | None
) -> None:
    subject, spec = opened(model, max_steps=30)
    here, ends = Station(subject, spec, lambda: None), []
    for way in ("alone", "together", "small"):
        jobs = jobs_of(subject, spec, 4, windows)
        if way == "alone":
            for job in jobs:
                drain(here, [job])
        else:
            assert drain(here, jobs, halve=way == "small") == 4
        ends.append(jobs)
    for alone, *others in zip(*ends, strict=True):
        start = alone.group.parametrization.images(alone.group.parametrization.start(1))
        assert (alone.group.corners - start).abs().max() > 0.05
        for other in others:
            assert other.group.steps.tolist() == alone.group.steps.tolist()
            torch.testing.assert_close(other.group.corners, alone.group.corners, rtol=0, atol=1e-4)


def test_jobs_of_patches_count_as_what_they_take(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, spec = opened(model, max_steps=10)
    jobs = jobs_of(subject, spec, 10, WINDOWS)
    taken = subject.footprint.steps(spec, WINDOWS)
    assert taken > 4 * subject.footprint.steps(spec)
    monkeypatch.setattr(station, "free", lambda device: 2.5 * taken / station.SHARE)
    here = Station(subject, spec, lambda: None)
    before = here.room
    for job in jobs[:1]:
        here.admit(job, None)
    assert here.room * taken / spec.rows <= 1.5 * taken < before * taken / spec.rows
    here.withdraw(jobs[0].group)
    assert drain(here, jobs) == 2


def test_what_jobs_may_take_is_promised_until_they_hold_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, spec = opened(model, max_steps=20)
    taken = subject.footprint.steps(spec, FEW)
    monkeypatch.setattr(station, "free", lambda device: 2.5 * taken / station.SHARE)
    here = Station(subject, spec, lambda: None)
    jobs, promised = jobs_of(subject, spec, 3, FEW), [here.promised]
    for job in jobs:
        here.admit(job, None)
        promised.append(here.promised)
    # The third waits until others are gone.
    assert promised == pytest.approx([0, taken, 2 * taken, 2.5 * taken], abs=1)
    here.advance()
    # Six rows and two fillers: parameters, their best state, and two averages.
    rows = 4 * jobs[0].group.parametrization.start(8).nbytes
    assert promised[-1] - here.promised == pytest.approx(rows, rel=0.01)
    while here.rows:
        here.advance()
    assert here.promised == 0


def test_a_job_of_patches_that_takes_more_than_a_stations_share_runs_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, spec = opened(model, max_steps=10)
    taken = subject.footprint.steps(spec, WINDOWS)
    monkeypatch.setattr(station, "free", lambda device: 0.5 * taken / station.SHARE)
    here = Station(subject, spec, lambda: None)
    assert drain(here, jobs_of(subject, spec, 3, WINDOWS)) == 1
