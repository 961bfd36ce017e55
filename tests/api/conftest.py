"""The real app on a real port, Postgres and Redis behind it, and a stand-in for workers."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest
import structlog
import uvicorn
from PIL import Image
from pydantic import SecretStr
from sqlalchemy import Engine, text

from api.serving import config
from core.spec import CollisionSpec
from polycollide import stack
from store import keys, queue, workers
from store.database import connect
from store.queue import Claimed, Finished
from store.settings import Settings

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # silence

SPEC = {"model": "mnist-mlp", "layer": "fc1", "corners": 2}
JOB = {"source": "sample:mnist/3-0", "target": "sample:mnist/7-0", "spec": SPEC}

MODEL = {
    "name": "mnist-mlp",
    "weights": ["shipped"],
    "input_shape": [1, 28, 28],
    "classes": list("0123456789"),
    "origin": "shipped",
    "ready": True,
    "layers": [
        {"name": name, "names": [name], "shape": [256], "units": 256, "cut": True}
        for name in ("fc1", "fc2")
    ],
}

PATCH_SET = {
    "name": "photos",
    "sha256": "a" * 64,
    "images": 6,
    "patches": 1014,
    "size": 16,
    "stride": 4,
    "resize": 64,
    "index": "exact",
}


@dataclass
class Service:
    """A running API and the database behind it."""

    url: str
    settings: Settings
    engine: Engine
    keys: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def client(self, name: str | None = None) -> Iterator[httpx.Client]:
        """A client without a key, or with one of its own name."""
        headers = {} if name is None else {"Authorization": f"Bearer {self.key(name)}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=30) as client:
            yield client

    def key(self, name: str) -> str:
        """The key of this name, made when it is first asked for."""
        if name not in self.keys:
            with self.engine.begin() as connection:
                self.keys[name] = keys.create(connection, name)[1]
        return self.keys[name]


@contextmanager
def serve(settings: Settings) -> Iterator[Service]:
    """Runs the app in a thread."""
    server = uvicorn.Server(config(settings, port=0, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    engine = connect(settings)
    try:
        yield Service(f"http://127.0.0.1:{port}", settings, engine)
    finally:
        server.should_exit = True
        thread.join()
        engine.dispose()


@pytest.fixture(scope="module")
def new_settings(new_database: Callable[[], str], redis: stack.Redis) -> Callable[..., Settings]:
    """Settings with a database of their own."""

    def new(**given: Any) -> Settings:
        own = {"mode": "local", "database_url": new_database(), "redis_url": SecretStr(redis.url)}
        return Settings(**own | given)

    return new


@pytest.fixture(scope="module")
def service(new_settings: Callable[..., Settings]) -> Iterator[Service]:
    """A service on somebody's own machine: it needs no keys."""
    with serve(new_settings()) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(new_settings: Callable[..., Settings]) -> Iterator[Service]:
    """A service that needs keys."""
    with serve(new_settings(mode="server")) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with service.client() as own:
        yield own


@dataclass
class Worker:
    """What a worker does to jobs, without computing anything."""

    engine: Engine
    id: UUID = field(default_factory=uuid4)

    def claim(self, job: dict[str, Any]) -> Claimed:
        """Takes this job, and whatever waits before it."""
        key = CollisionSpec(**job["spec"]).batch_key
        with self.engine.begin() as connection:
            claimed = queue.claim(
                connection,
                batch_key=key,
                rows=10_000,
                jobs=1_000,
                at_least_one=True,
                worker_id=self.id,
                lease=timedelta(minutes=1),
            )
        return next(own for own in claimed if str(own.lease.job_id) == job["id"])

    def progress(self, claimed: Claimed, **told: Any) -> None:
        with self.engine.begin() as connection:
            queue.report_progress(connection, {claimed.lease: told})

    def snapshot(self, claimed: Claimed, steps: int, content: bytes) -> None:
        with self.engine.begin() as connection:
            queue.keep_snapshot(connection, claimed.lease, steps, content)

    def succeed(self, claimed: Claimed, **files: bytes) -> dict[str, Any]:
        """Ends a job with a made-up result, which it returns."""
        result = made_up_result(claimed)
        finished = Finished(
            lease=claimed.lease,
            result=result,
            pngs=[png(seed=i) for i in range(len(result["corners"]))],
            files={name.replace("_", "."): content for name, content in files.items()},
        )
        with self.engine.begin() as connection:
            queue.succeed(connection, [finished])
        return result

    def fail(self, claimed: Claimed, code: str, message: str) -> None:
        with self.engine.begin() as connection:
            queue.fail(connection, claimed.lease, code, message)


@pytest.fixture
def worker(service: Service) -> Iterator[Worker]:
    own = Worker(service.engine)
    yield own
    with service.engine.begin() as connection:
        connection.execute(text("DELETE FROM workers"))


@contextmanager
def serving(
    engine: Engine, *models: dict[str, Any], patch_sets: Sequence[dict[str, Any]] = ()
) -> Iterator[None]:
    """A worker that is alive and has reported these models and patch sets."""
    worker_id, slot = uuid4(), "host-1/gpu-0"
    with engine.begin() as connection:
        workers.register(connection, worker_id, slot, "cpu")
        workers.report_models(connection, slot, models)
        workers.report_patch_sets(connection, slot, patch_sets)
        for model in models:
            connection.execute(
                text("UPDATE models SET layers = CAST(:layers AS jsonb) WHERE name = :name"),
                {"name": model["name"], "layers": json.dumps(model["layers"])},
            )
    try:
        yield
    finally:
        with engine.begin() as connection:
            workers.leave(connection, slot)


def png(size: tuple[int, int] = (28, 28), seed: int = 0) -> bytes:
    """An image that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def inline(content: bytes) -> str:
    """An image reference that is the image."""
    return f"base64:{base64.b64encode(content).decode()}"


def made_up_result(claimed: Claimed) -> dict[str, Any]:
    """A result as a worker gives it."""
    corner = {
        "unit": 1,
        "l_pos": 0.5,
        "l_neg": -3.0,
        "violation": 0.0,
        "relative_residual": 0.1,
        "steps": 120,
        "converged": True,
        "reason": "converged",
        "label": 7,
        "class": "7",
        "probability": 0.99,
        "label_8bit": 7,
        "probability_8bit": 0.98,
        "distance_to_source": 1.5,
        "distance_to_target": 9.5,
        "distance_ratio": 0.16,
    }
    count = claimed.spec["corners"]
    return {
        "schema_version": 1,
        "converged": True,
        "collides": True,
        "goal_reached": None,
        "steps": 120,
        "seconds": 1.5,
        "measuring_seconds": 0.2,
        "cut": True,
        "cut_proved": True,
        "warnings": [],
        "notes": [],
        "missing": {},
        "layer": {"name": "fc1", "shape": [256], "units": 256, "active": 60},
        "source": {"label": 3, "class": "3", "probability": 0.999},
        "target": {"label": 7, "class": "7", "probability": 0.999},
        "corners": [{"index": i} | corner for i in range(count)],
        "polytope": {
            "mean_pairwise_distance": 1.3,
            "pairwise_distance": [[0.0] * count] * count,
            "natural_distance": 10.2,
            "natural_distance_of": "MNIST images",
            "spread": 0.13,
            **dict.fromkeys(("mean_ssim", "mean_low_pass_share", "mean_perceptual")),
            **dict.fromkeys(("ssim", "low_pass_share", "perceptual", "perceptual_missing")),
        },
        "interpolation": None,
        "ball": None,
        "worst": None,
        "certificate": None,
        "exact": None,
        "provenance": {
            "versions": {"torch": "2.9"},
            "weights": "shipped",
            "weights_sha256": "0" * 64,
            "source_sha256": claimed.source[1],
            "target_sha256": claimed.target[1],
            "patch_set_sha256": None,
            "spec": claimed.spec,
            "seed": 0,
            "device": "cpu",
            "precision": "fp32",
        },
    }
