"""Jobs of patches on real workers, whose patch sets come, go and are built again."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from service import WITHIN, Service
from sqlalchemy import text

from core import images
from core.job import Subject
from core.models import ASSETS
from core.outcome import run_alone
from core.patches import neighbours, sets
from core.patches.sets import Geometry, PatchSet
from core.spec import CollisionSpec
from store import blobs

PHOTOS = sorted((ASSETS / "photos").glob("*.jpg"))
SMALL = Geometry(size=16, stride=4, resize=64)
PAIR = {"source": "sample:photos/animal_panda", "target": "sample:photos/fish_fish25"}
SPEC: dict[str, Any] = {
    "model": "tiny",
    "layer": "1",
    "corners": 2,
    "parametrization": "patches",
    "patches": {"set": "photos", "stride": 8, "surround": 4},
    "max_steps": 40,
    "learning_rate": 0.1,
    "interpolation": {"samples": 20},
    "ball_samples": 20,
    "worst_starts": 0,
    "figures": False,
}
# Runs until it is stopped, or for so many seconds.
ENDLESS = SPEC | {"l_pos_threshold": 1e-12, "learning_rate": 1e-9, "max_steps": 1_000_000}
NETWORK = """
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 40, 24), nn.ReLU(), nn.Linear(24, 5))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models.toml with a colour network that takes no time."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.py").write_text(NETWORK)
    torch.manual_seed(0)
    network: dict[str, Any] = {}
    exec(NETWORK, network)
    save_file(network["build"]().state_dict(), folder / "tiny.safetensors")
    (folder / "models.toml").write_text(f"""
        [[models]]
        name = "tiny"
        factory = "tiny:build"
        weights = "tiny.safetensors"
        sha256 = "{blobs.digest((folder / "tiny.safetensors").read_bytes())}"
        classes = {json.dumps(list("abcde"))}
        [models.preprocessing]
        resize = 40
        crop = 40
    """)
    return folder / "models.toml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where a worker's patch sets are; there are none."""
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets"


@pytest.fixture
def service(whole: Service) -> Iterator[Service]:
    yield whole
    whole.stop_workers()
    with whole.database.begin() as connection:
        for table in ("jobs", "workers", "patch_sets", "unserved_kinds"):
            connection.execute(text(f"TRUNCATE {table} CASCADE"))


@pytest.fixture
def env(models: Path, root: Path) -> dict[str, str]:
    """What a worker needs to know."""
    return {"POLYCOLLIDE_MODELS": str(models), "POLYCOLLIDE_PATCHES": str(root)}


def build(root: Path, name: str = "photos", *, photos: int = 6, exact: bool = True) -> PatchSet:
    """A patch set of so many of the packaged photographs."""
    folder = root.parent / f"{name}-{photos}"
    folder.mkdir(exist_ok=True)
    for photo in PHOTOS[-photos:]:
        shutil.copy(photo, folder)
    indexer = neighbours.indexer() if exact else neighbours.indexer(exact_up_to=0)
    return sets.build(folder, name, SMALL, indexer, root=root)


def submit(service: Service, spec: dict[str, Any] = SPEC, **patches: Any) -> str:
    spec = spec | {"patches": spec["patches"] | patches}
    answer = service.client.post("/v1/jobs", json=PAIR | {"spec": spec})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def listed(service: Service) -> dict[str, dict[str, Any]]:
    """The patch sets that the service has, by name."""
    found = service.client.get("/v1/patch-sets").json()["patch_sets"]
    return {each["name"]: each for each in found}


def steps(service: Service, job: str) -> None:
    """Returns when a job has its patches, and takes steps."""
    service.until(lambda: (service.job(job)["progress"] or {}).get("steps"), WITHIN, "it steps")


def grace_is_over(service: Service) -> bool:
    """Whether a set is missed; it then has been for long enough."""
    with service.database.begin() as connection:
        missed = connection.execute(text("UPDATE unserved_kinds SET since = '-infinity'"))
        return missed.rowcount > 0


def set_of(job: dict[str, Any]) -> str:
    return str(job["result"]["provenance"]["patch_set_sha256"])


def test_corners_are_those_of_a_run_without_a_service_and_name_the_set(
    service: Service,
    env: dict[str, str],
    root: Path,
    gone: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches = build(root, exact=False)
    worker = service.start_worker(**env)
    (job,) = service.all_succeed([submit(service)])
    assert set_of(job) == patches.sha256
    corners = service.client.get(job["urls"]["corners_npz"])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    spec = CollisionSpec.model_validate(SPEC)
    subject = Subject.open(spec, torch.device("cpu"))
    loaded = [
        images.load(*images.read(PAIR[which]), subject.model.preprocessing)
        for which in ("source", "target")
    ]
    _, outcome = run_alone(subject, spec, *loaded)
    with np.load(io.BytesIO(corners.content)) as arrays:
        np.testing.assert_allclose(arrays["corners"], outcome.corners, atol=1e-5)
    assert job["result"]["steps"] == outcome.result.steps
    # A worker that ends takes along what searched for it.
    faiss = [
        process
        for process in psutil.Process(worker.pid).children(recursive=True)
        if "faiss_process" in " ".join(process.cmdline())
    ]
    assert len(faiss) == 1
    psutil.Process(worker.pid).terminate()
    assert gone(faiss, WITHIN)
    service.until(lambda: listed(service) == {}, WITHIN, "its sets have left with it")


def test_a_set_that_is_put_there_or_deleted_is_seen_within_seconds(
    service: Service, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    patches = build(tmp_path / "elsewhere")
    job = submit(service)  # nobody is there who could know
    service.start_worker(**env)
    assert listed(service) == {} and service.job(job)["status"] == "queued"
    shutil.copytree(patches.folder, root / "photos")
    service.until(lambda: listed(service), WITHIN, "the set is seen")
    assert listed(service)["photos"] == {
        **{"name": "photos", "sha256": patches.sha256, "images": 6, "patches": 6 * 13 * 13},
        **{"size": 16, "stride": 4, "resize": 64, "index": "exact"},
        **{"workers": 1, "differs": False, "url": "/v1/patch-sets/photos"},
    }
    assert set_of(service.all_succeed([job])[0]) == patches.sha256
    sets.delete("photos", root)
    service.until(lambda: not listed(service), WITHIN, "it is gone")
    refused = service.client.post("/v1/jobs", json=PAIR | {"spec": SPEC})
    assert refused.status_code == 422 and "no patch set 'photos'" in refused.text


def test_a_job_whose_set_is_deleted_fails_where_it_waits_and_goes_on_where_it_runs(
    service: Service, env: dict[str, str], root: Path
) -> None:
    patches = build(root)
    build(root, "photos2")
    service.start_worker(**env, POLYCOLLIDE_JOBS_AT_ONCE="1")
    runs = submit(service, ENDLESS | {"max_seconds": 18})
    steps(service, runs)
    waits = [submit(service), submit(service, set="photos2")]
    sets.delete("photos", root)
    service.until(lambda: grace_is_over(service), WITHIN, "the set is missed")
    job = service.ended(waits[0])
    assert job["status"] == "failed" and job["error"]["code"] == "patch_set_missing"
    assert "no patch set 'photos'; did you mean 'photos2'?" in job["error"]["message"]
    assert service.job(runs)["status"] == "running"
    ended = service.ended(runs), service.ended(waits[1])
    assert [each["status"] for each in ended] == ["succeeded", "succeeded"]
    assert set_of(ended[0]) == patches.sha256
    service.check()


def test_workers_take_the_jobs_whose_sets_they_have(
    service: Service, env: dict[str, str], tmp_path: Path
) -> None:
    jobs, expected = [], []
    for name, photos in (("birds", 2), ("photos", 6)):
        root = tmp_path / name
        expected += [build(root, name, photos=photos).sha256] * 3
        service.start_worker(**env | {"POLYCOLLIDE_PATCHES": str(root)})
    for name in ("birds", "photos"):
        jobs += [submit(service, SPEC | {"seed": i}, set=name) for i in range(3)]
    ended = service.all_succeed(jobs)
    assert [set_of(job) for job in ended] == expected
    assert {job["attempt"] for job in ended} == {1}
    with service.database.begin() as connection:
        who = "SELECT array_agg(DISTINCT worker_id) FROM jobs GROUP BY patch_set"
        took = connection.scalars(text(who)).all()
    assert [len(workers) for workers in took] == [1, 1] and took[0] != took[1]


def test_a_set_that_was_built_anew_between_two_attempts_makes_the_job_begin_anew(
    service: Service, env: dict[str, str], root: Path
) -> None:
    build(root)
    worker = service.start_worker(**env)
    job = submit(service, ENDLESS | {"max_seconds": 4})
    steps(service, job)
    psutil.Process(worker.pid).terminate()
    service.until(lambda: service.job(job)["status"] == "queued", WITHIN, "it is handed back")
    with service.database.begin() as connection:
        saved = connection.scalar(text("SELECT checkpoint_sha256 FROM jobs"))
    assert saved is not None
    sets.delete("photos", root)
    other = build(root, photos=4)
    service.start_worker(**env)
    (ended,) = service.all_succeed([job])
    assert (set_of(ended), ended["attempt"]) == (other.sha256, 2)
    assert "a checkpoint does not fit: the job begins anew" in service.log()


def test_a_job_whose_set_goes_after_it_was_claimed_is_handed_back(
    service: Service, env: dict[str, str], root: Path, tmp_path: Path
) -> None:
    """As if it had been deleted between the claim and the search."""
    build(root)
    (folder := tmp_path / "site").mkdir()
    (folder / "sitecustomize.py").write_text(
        "from core.patches.library import Library\n"
        "from core.errors import UnknownName\n"
        "real = Library.neighbours\n"
        "def neighbours(self, name):\n"
        "    Library.neighbours = real\n"
        "    raise UnknownName('patch set', name, [])\n"
        "Library.neighbours = neighbours\n"
    )
    service.start_worker(**env, PYTHONPATH=f"{folder}:{Path(__file__).parents[2]}")
    (job,) = service.all_succeed([submit(service)])
    assert job["attempt"] == 2
    with service.database.begin() as connection:
        told = "SELECT data->>'status_reason' FROM job_events WHERE type = 'status'"
        assert any("no patch set" in each for each in connection.scalars(text(told)) if each)
