"""Files of a job: served by their hash, and explained where there are none."""

import httpx

from .conftest import JOB, SPEC, Worker, png


def test_files_are_served_with_names_and_cached_for_good(
    client: httpx.Client, worker: Worker
) -> None:
    job = client.post("/v1/jobs", json=JOB).json()
    files = {"corners_npz": b"PK1", "samples_npz": b"PK2", "snapshots_npz": b"PK3"}
    files |= {"figure_png": png(seed=50), "worst_png": png(seed=51), "hull_png": png(seed=52)}
    files["regions_png"] = png(seed=53)
    worker.succeed(worker.claim(job), **files)
    urls = client.get(job["urls"]["self"]).json()["urls"]
    for name, content in files.items():
        response = client.get(urls[name])
        assert response.status_code == 200 and response.content == content
        expected = "image/png" if name.endswith("png") else "application/zip"
        assert response.headers["content-type"] == expected
        assert response.headers["cache-control"] == "private, max-age=31536000, immutable"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert f"{job['id']}-" in response.headers["content-disposition"]
        etag = response.headers["etag"]
        head = client.head(urls[name])
        assert (head.status_code, head.content) == (200, b"") and head.headers["etag"] == etag
        assert head.headers["content-length"] == str(len(content))
        assert client.get(urls[name], headers={"If-None-Match": etag}).status_code == 304
        assert client.get(urls[name], headers={"If-None-Match": "*"}).status_code == 304
    corners = [client.get(url) for url in urls["corners"]]
    assert [corner.content for corner in corners] == [png(seed=0), png(seed=1)]
    assert client.head(urls["corners"][0]).status_code == 200
    assert client.put(urls["figure_png"]).headers["allow"] == "GET, HEAD"
    for missing in ("corners/2.png", "curves.png", "snapshots/7.png"):
        response = client.get(f"{urls['self']}/{missing}")
        assert response.status_code == 404 and response.json()["code"] == "no_such_file"
    for wrong in ("corners/x.png", "corners/-1.png", "corners/256.png", "secret.npz"):
        assert client.get(f"{urls['self']}/{wrong}").status_code == 422
    assert client.get(f"{urls['self']}/secret.txt").status_code == 404


def test_where_there_is_no_file_the_answer_says_why(client: httpx.Client, worker: Worker) -> None:
    def why(job: dict[str, dict[str, str]]) -> str:
        response = client.get(f"{job['urls']['self']}/figure.png")
        assert response.status_code == 404
        detail: str = response.json()["detail"]
        return detail

    job = client.post("/v1/jobs", json=JOB).json()
    assert "queued" in why(job)
    claimed = worker.claim(job)
    assert "running" in why(job)
    worker.fail(claimed, "diverged", "It diverged.")
    assert "failed" in why(job)
    job = client.post("/v1/jobs", json=JOB).json()
    client.post(job["urls"]["cancel"])
    assert "canceled" in why(job)
    job = client.post("/v1/jobs", json=JOB | {"spec": SPEC | {"figures": False}}).json()
    worker.succeed(worker.claim(job))
    assert "figures" in why(job)
