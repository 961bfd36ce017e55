"""The app does what its OpenAPI says."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from store.settings import Settings

from .conftest import JOB, MODEL, PATCH_SET, Worker, png, serve, serving

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")


def test_the_page_of_the_docs_needs_nothing_from_afar(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(linked) == 3  # script, style, icon
    for url in linked:
        assert url.startswith("/") and client.get(url).status_code == 200
    assert "http" not in page.text


@pytest.mark.timeout(400)
def test_schemathesis_finds_nothing(new_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = new_settings(mode="server", watch_for=timedelta(seconds=1))
    with (
        serve(settings) as service,
        serving(service.engine, MODEL, patch_sets=[PATCH_SET]),
    ):
        with service.client("schemathesis") as client:
            job = client.post("/v1/jobs", json=JOB).json()
        files = {"corners_npz": b"PK", "samples_npz": b"PK", "figure_png": png()}
        worker = Worker(service.engine)
        with service.engine.begin() as connection:  # alive until the end, without a heartbeat
            connection.execute(text("UPDATE workers SET heartbeat_at = 'infinity'"))
        worker.succeed(worker.claim(job), **files, snapshots_png=png(), curves_png=png())
        environment = {"SCHEMATHESIS_HOOKS": str(HOOKS), "JOB_ID": job["id"], "COLUMNS": "120"}
        run = subprocess.run(
            [
                *(Path(sys.executable).with_name("schemathesis"), "--config-file"),
                *(Path(__file__).with_name("schemathesis.toml"), "--no-color"),
                *("run", f"{service.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {service.key('schemathesis')}"),
                *("--max-examples", "20", "--request-timeout", "10", "--continue-on-failure"),
            ],
            cwd=tmp_path,  # it leaves files behind
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
    print(run.stdout)
    assert run.returncode == 0
