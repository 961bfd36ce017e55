"""What a job takes, as told before it starts, beside what a process of its own really takes."""

import gc
import multiprocessing
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from core import images, memory
from core.engine import Group
from core.errors import CoreError
from core.images import Preprocessing
from core.job import Job, Subject, prepare
from core.memory import MemoryBusy, TooLittleMemory, most
from core.models import Classifier, Model, Normalize
from core.outcome import measure, run_alone
from core.patches.composite import Patches
from core.patches.windows import Windows
from core.spec import CollisionSpec

SIDE = 64
WINDOWS = Windows((SIDE, SIDE), window=32, stride=4, surround=16)
STATUS = Path("/proc/self/status")
SETTINGS: dict[str, Any] = {
    "model": "conv",
    "layer": "5",
    "corners": 4,
    "max_steps": 10,
    "l_pos_threshold": {"relative": 1e-9},
    "violation_threshold": None,
    "ball_samples": 0,
    "interpolation": {"samples": 0},
    "worst_starts": 0,
    "snapshots": 0,
    "figures": False,
}
PATCHES = {"corners": 5, "optimizer": "adam", "gamma": 0.1}
STEPPED: dict[str, dict[str, Any]] = {
    "pixels": {"corners": 32, "optimizer": "momentum"},
    "early layer": {"corners": 12, "optimizer": "gd", "layer": "2"},
    "hull": {"corners": 12, "objective": "hull", "hull": {"points": 20, "margin": 0.2}},
    "patches": PATCHES,
    "checkpoints": PATCHES | {"max_steps": 20},
}
MEASURED: dict[str, dict[str, Any]] = {
    "samples": {"interpolation": {"samples": 100}, "ball_samples": 100},
    "worst point": {"worst_starts": 40},
}


def conv() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * SIDE * SIDE, 96), nn.ReLU(), nn.Linear(96, 5)),
    )
    classifier = Classifier(Normalize("RGB", mean=(0.5,) * 3, std=(0.2,) * 3), network).eval()
    return Model(
        name="conv",
        # As `models.load` lays them out: with others, convolutions copy what they take in.
        classifier=classifier.to(memory_format=torch.channels_last),
        preprocessing=Preprocessing("RGB", (SIDE, SIDE), SIDE),
        classes=tuple("abcde"),
        weights="random",
        weights_sha256="0" * 64,
    )


def photo(subject: Subject, name: str) -> images.Loaded:
    return images.load(*images.read(f"sample:photos/{name}"), subject.model.preprocessing)


def job_of(subject: Subject, spec: CollisionSpec, windows: Windows | None = None) -> Job:
    pair = photo(subject, "animal_panda"), photo(subject, "fish_fish25")
    job = prepare(subject, spec, *pair, key="job")
    if windows is None:
        return job
    m = windows.source_size
    patches = Patches(torch.rand(windows.count, 3, m, m), windows)
    return replace(job, group=replace(job.group, patches=patches))


def step(subject: Subject, group: Group) -> None:
    engine = subject.engine(group.spec)
    engine.admit(group)
    kept: list[object] = []
    while not engine.advance():
        if subject.footprint.checkpoints and not kept:  # beside the second stride
            state = engine.state_of(group.key)
            kept += [state, save(state)]


def told_and_taken() -> dict[str, tuple[int, int]]:
    """Bytes of all that is stepped and measured, as told and as the resident set grew."""
    torch.set_num_threads(1)
    model, small = conv(), CollisionSpec.model_validate(SETTINGS)
    subject = Subject.of(model, small)
    warm = job_of(subject, small)
    step(subject, warm.group)
    measure(subject, warm)
    found = {}
    for name, settings in (STEPPED | MEASURED).items():
        spec = CollisionSpec.model_validate(SETTINGS | settings)
        subject = Subject.of(model, spec)
        subject.footprint.checkpoints = name == "checkpoints"
        windows = WINDOWS if spec.gamma else None
        if name in STEPPED:
            told = subject.footprint.steps(spec, windows)
            before = resident()
            step(subject, job_of(subject, spec, windows).group)
        else:
            told = subject.footprint.measuring(spec)
            job = job_of(subject, spec)
            step(subject, job.group)
            before = resident()
            measure(subject, job)
        found[name] = told, peak() - before
    return found


def resident() -> int:
    """Bytes now; from here on `peak` counts."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found
    return 1024 * int(found[1])


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, int]]:
    with pytest.MonkeyPatch.context() as patch:
        # Blocks of memory are then given back when they are free, and not kept for later.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(told_and_taken)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("name", [*STEPPED, *MEASURED])
def test_jobs_take_what_was_told(name: str, found: dict[str, tuple[int, int]]) -> None:
    told, taken = found[name]
    assert taken == pytest.approx(told, rel=0.25)


def test_memory_that_just_holds_a_job_is_enough_and_one_byte_less_is_refused(monkeypatch):
    spec = CollisionSpec.model_validate(SETTINGS | {"corners": 32})
    subject = Subject.of(conv(), spec)
    needed = subject.footprint.steps(spec)
    assert needed > subject.footprint.measuring(spec)
    monkeypatch.setattr(memory, "free", lambda device: needed)
    pair = (photo(subject, "animal_panda"), photo(subject, "fish_fish25"))
    run_alone(subject, spec, *pair)
    monkeypatch.setattr(memory, "free", lambda device: needed - 1)
    with pytest.raises(TooLittleMemory, match=r"takes \d+ MiB .*\d+ MiB are free; .*fewer corners"):
        run_alone(subject, spec, *pair)


def test_what_other_jobs_hold_refuses_no_job_for_good(monkeypatch):
    spec = CollisionSpec.model_validate(SETTINGS)
    subject = Subject.of(conv(), spec)
    needed = subject.footprint.steps(spec)
    monkeypatch.setattr(memory, "free", lambda device: needed - 10)
    monkeypatch.setattr(memory, "_own", lambda device: 10)
    with pytest.raises(MemoryBusy):
        subject.footprint.check(spec, promised=0)
    monkeypatch.setattr(memory, "_own", lambda device: 9)
    with pytest.raises(TooLittleMemory):
        subject.footprint.check(spec, promised=0)


def test_what_other_jobs_were_promised_is_not_free(monkeypatch):
    spec = CollisionSpec.model_validate(SETTINGS)
    footprint = Subject.of(conv(), spec).footprint
    monkeypatch.setattr(memory, "free", lambda device: footprint.steps(spec) + 10)
    footprint.check(spec, promised=10)
    with pytest.raises(MemoryBusy):
        footprint.check(spec, promised=11)


@pytest.mark.parametrize(
    ("settings", "composed", "advice"),
    [
        ({"worst_starts": 64}, False, "fewer worst_starts"),
        ({}, True, "larger patches.stride"),
        ({"interpolation": {"samples": 2000}}, False, "a smaller network"),
    ],
)
def test_a_refusal_says_what_takes_the_memory(settings, composed, advice, monkeypatch):
    spec = CollisionSpec.model_validate(SETTINGS | settings)
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(TooLittleMemory, match=advice) as refused:
        Subject.of(conv(), spec).footprint.check(spec, WINDOWS if composed else None)
    assert isinstance(refused.value, CoreError)
    assert refused.value.code == "out_of_memory"


def test_the_exact_solver_is_left_to_its_own_limits():
    spec = CollisionSpec.model_validate(SETTINGS | {"solver": "exact", "layer": "0"})
    assert Subject.of(conv(), spec).footprint.steps(spec) == 0


def test_only_what_is_made_and_still_there_counts():
    there = torch.zeros(1000)

    def run() -> None:
        first = there + 1  # 4000 bytes
        first.view(10, 100).mul_(2)
        there.add_(1)
        second = first.double()  # 8000 more
        del first
        second.sum()
        torch.ones(500)  # 2000, after 4000 are free again

    assert most(run) == 12_000


def test_what_a_pass_keeps_for_its_way_back_counts():
    leaf = torch.rand(1000, requires_grad=True)

    def run() -> None:
        made = leaf.exp().exp().exp()  # each keeps its result
        torch.autograd.grad(made, leaf, torch.ones_like(made))

    assert 16_000 <= most(run) <= 24_000


def test_a_container_gives_no_more_than_it_has_and_what_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    before = memory.free(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("10000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 500\nactive_file 300\n")
    assert memory.free(torch.device("cpu")) == 6800
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu")) > before / 2
