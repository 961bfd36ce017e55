"""What the client fetches: lists, events, results, batches; faults included."""

import io

import numpy as np
import pytest

from polycollide import (
    ApiError,
    PolycollideError,
    WaitTimeout,
    images,
    results,
)
from polycollide.errors import InvalidInput

from .conftest import (
    END,
    JOB,
    PAIR,
    RUNNING,
    STEP,
    ScriptedService,
    drop,
    event,
    job,
    parts,
    problem,
    reply,
    stream,
)

EVENTS = "GET /v1/jobs/a/events"


def test_lists_go_through_all_pages(service, client):
    pages = [{"jobs": [job("a"), job("b")], "next_cursor": "2"}, {"jobs": [job("c")]}]
    service.on("GET /v1/jobs", *map(reply, pages))
    assert [job.id for job in client.jobs(status="queued", label="x y")] == ["a", "b", "c"]
    first, second = service.received
    assert first.query == {"status": "queued", "label": "x y", "limit": "200"}
    assert second.query == {**first.query, "cursor": "2"}


def test_models_are_read_with_their_layers(service, client):
    model = {"name": "m", "weights": ["w"], "input_shape": [1, 28, 28], "classes": 10}
    service.on("GET /v1/models", reply({"models": [model]}))
    layers = [{"name": "fc1", "shape": [256], "units": 256, "cut": True}]
    service.on("GET /v1/models/m", reply(model | {"layers": layers, "class_names": ["a"]}))
    assert [m.name for m in client.models()] == ["m"]
    assert client.model("m").layers[0].cut is True


def test_patch_sets_are_read(service, client):
    photos = {
        **{"name": "photos", "sha256": "a", "images": 6, "patches": 1014, "size": 16, "stride": 4},
        **{"resize": 64, "index": "exact", "workers": 1, "differs": False, "url": "later"},
    }
    service.on("GET /v1/patch-sets", reply({"patch_sets": [photos]}))
    (found,) = client.patch_sets()
    assert (found.name, found.size, found.workers, found.differs) == ("photos", 16, 1, False)


def test_deleting_twice_because_an_answer_was_lost_is_no_error(service, client):
    service.on("DELETE /v1/jobs/a", drop, problem(404, "unknown_job"))
    client.delete("a")
    with pytest.raises(ApiError):
        client.delete("b")


# Events


def test_events_go_on_after_the_last_one_when_the_connection_breaks(service, client):
    half = event(3, "progress", '{"steps": 20}')
    service.on(
        EVENTS,
        problem(503, "unavailable"),
        stream(": hello\n\n", RUNNING, STEP, half[:20], cut=True),
        drop,
        stream(half, cut=True),
        stream(": nothing yet\n\n"),
        stream(END),
    )
    service.on(JOB, reply(job(status="running")))
    events = list(client.events("a"))
    assert [(e.id, e.event) for e in events] == [
        *(("1", "status"), ("2", "progress"), ("3", "progress"), ("4", "status"))
    ]
    assert events[2].data == {"steps": 20}
    after = [received.headers.get("last-event-id") for received in service.to(EVENTS)]
    assert after == [None, None, "2", "2", "3", "3"]


def test_events_of_a_job_whose_events_are_gone_end(service, client):
    service.on(EVENTS, stream(": nothing\n\n"))
    service.on(JOB, reply(job(status="succeeded")))
    assert list(client.events("a")) == []


def test_a_stream_that_ends_between_news_and_the_end_of_the_job_does_not_hide_that_end(
    service, client
):
    service.on(EVENTS, stream(RUNNING), stream(END))
    service.on(JOB, reply(job(status="succeeded")))
    assert [e.id for e in client.events("a")] == ["1", "4"]


def test_events_are_split_where_the_protocol_splits_them(service, client):
    odd = 'id: 1\r\nevent:progress\r\ndata: {"class": "a\u2028b\x85c",\r\ndata: "x": 1}\r\n\r\n'
    service.on(EVENTS, stream(odd[:30], odd[30:], END))
    first, last = client.events("a")
    assert first.data == {"class": "a\u2028b\x85c", "x": 1}
    assert last.final


def test_leaving_a_stream_early_closes_its_connection(service, client):
    service.on(EVENTS, stream(RUNNING, STEP, END))
    for seen in client.events("a"):
        assert seen.id == "1"
        break
    service.on(JOB, reply(job()))
    assert client.job("a").id == "a"


# Results


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_corners_and_samples_come_as_arrays(service, client):
    corners = np.random.default_rng(0).random((5, 1, 28, 28), np.float32)
    service.on(f"{JOB}/corners.npz", reply(npz(corners=corners)))
    service.on(f"{JOB}/samples.npz", reply(npz(weights=np.eye(3), probability=np.ones(3))))
    fetched = client.corners("a")
    assert fetched.dtype == np.float32
    assert np.array_equal(fetched, corners)
    assert set(client.samples("a")) == {"weights", "probability"}


def test_nothing_that_came_is_unpickled(service, client):
    service.on(f"{JOB}/corners.npz", reply(npz(corners=np.array([{}], dtype=object))))
    with pytest.raises(ValueError, match="allow_pickle"):
        client.corners("a")


def test_a_download_replaces_an_earlier_result_and_nothing_else(service, client, tmp_path):
    urls = {"self": "/v1/jobs/a", "corners": ["0", "1"], "corners_npz": "x", "figure_png": "x"}
    urls |= {"samples_npz": None, "../../evil_png": "x"}
    service.on(JOB, reply(job(status="succeeded", result={"converged": True}, urls=urls)))
    names = {"corner-0.png": "corners/0.png", "corner-1.png": "corners/1.png"}
    names |= {name: name for name in ("corners.npz", "figure.png")}
    for name, path in names.items():
        service.on(f"{JOB}/{path}", reply(name.encode()))
    earlier = dict.fromkeys(("corner-7.png", "samples.npz", "result.json"), b"")
    results.write(tmp_path, earlier)
    (tmp_path / "my.png").write_bytes(b"")
    written = client.download("a", tmp_path)
    assert {file.name for file in written} == {"result.json", *names}
    left = {"result.json", "my.png", results.LIST, *names}
    assert {file.name for file in tmp_path.iterdir()} == left
    assert all((tmp_path / name).read_bytes() == name.encode() for name in names)


def test_a_download_leaves_the_users_own_files_unless_forced(service, client, tmp_path):
    service.on(JOB, reply(job(status="succeeded", result={}, urls={"corners": ["0"]})))
    service.on(f"{JOB}/corners/0.png", reply(b"png"))
    (tmp_path / "corner-0.png").write_bytes(b"own")
    with pytest.raises(InvalidInput, match=r"has corner-0\.png that no earlier result left"):
        client.download("a", tmp_path)
    assert not service.to(f"{JOB}/corners/0.png")
    assert (tmp_path / "corner-0.png").read_bytes() == b"own"
    client.download("a", tmp_path, force=True)
    assert (tmp_path / "corner-0.png").read_bytes() == b"png"


def test_a_download_that_breaks_leaves_the_earlier_result(service, client, tmp_path):
    urls = {"corners": ["0"]}
    service.on(JOB, reply(job(status="succeeded", result={}, urls=urls)))
    results.write(tmp_path, {"result.json": b"{}"})
    with pytest.raises(ApiError):
        client.download("a", tmp_path)
    assert (tmp_path / "result.json").exists()


# Batches

BATCHES = "POST /v1/batches"
BATCH = {"id": "b", "status": "in_progress", "request_counts": {"total": 2, "queued": 2}}


def uploads(service: ScriptedService) -> list[bytes]:
    return [
        parts(received)["file"].get_payload(decode=True)
        for received in service.to("POST /v1/images")
    ]


def test_a_batch_uploads_every_image_once(service, client, tmp_path):
    (tmp_path / "3.png").write_bytes(b"three")
    array = np.zeros((2, 2))
    service.on("POST /v1/images", drop, reply({"sha256": "f" * 64}, 201))
    service.on(BATCHES, problem(503, "x"), reply(BATCH | {"errors": []}, 202))
    up = []
    items = [{"source": tmp_path / "3.png", "target": array, "spec": {}} for _ in range(50)]
    items.append({"source": PAIR[0], "target": array})
    batch = client.batch(items, labels=["l"], on_upload=lambda *done: up.append(done))
    assert (batch.id, batch.done) == ("b", False)
    assert sorted(set(uploads(service))) == sorted({b"three", images.to_png(array)})
    assert len(uploads(service)) == 3  # one of them was dropped
    assert up == [(1, 2), (2, 2)]
    first, again = service.to(BATCHES)
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]
    assert again.json["labels"] == ["l"]
    sources = {item["source"] for item in again.json["items"]}
    assert sources == {f"sha256:{'f' * 64}", PAIR[0]}
    assert items[0]["source"] == tmp_path / "3.png"


def test_jsonl_names_images_from_its_own_folder(service, client, tmp_path):
    (tmp_path / "3.png").write_bytes(b"three")
    lines = ['{"custom_id": "x", "source": "3.png", "target": "sample:mnist/7-0"}', "", "  "]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    service.on("POST /v1/images", reply({"sha256": "f" * 64}, 201))
    service.on(BATCHES, reply(BATCH, 202))
    client.batch(tmp_path / "jobs.jsonl")
    (sent,) = service.to(BATCHES)
    item = {"custom_id": "x", "source": f"sha256:{'f' * 64}", "target": PAIR[1]}
    assert sent.json["items"] == [item]


def test_a_grid_goes_out_with_references(service, client):
    service.on("POST /v1/images", reply({"sha256": "f" * 64}, 201))
    service.on(BATCHES, reply(BATCH, 202))
    grid = {"sources": [PAIR[0], b"bytes"], "targets": (PAIR[1],), "layers": ["fc1"]}
    client.batch(grid=grid, priority=-1, deadline_seconds=60)
    (sent,) = service.to(BATCHES)
    assert sent.json == {
        "grid": {**grid, "sources": [PAIR[0], f"sha256:{'f' * 64}"], "targets": [PAIR[1]]},
        **{"labels": [], "priority": -1, "deadline_seconds": 60},
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1}\nnot json', "Line 2 of jobs.jsonl: This is no JSON.*Nothing was submitted"),
        ("[1]", "Line 1 of jobs.jsonl: This is no JSON object.*Nothing was submitted"),
        (
            '{"source": "sample:a"}\n\n{"source": "none.png"}',
            "Line 3 of jobs.jsonl: .*none.png' cannot be read .*check the path. Nothing was submit",
        ),
        ("\n \n", "jobs.jsonl has no items"),
        (None, "jobs.jsonl' cannot be read"),
    ],
)
def test_a_file_that_cannot_be_sent_is_said_in_one_sentence(client, tmp_path, text, sentence):
    if text:
        (tmp_path / "jobs.jsonl").write_text(text)
    with pytest.raises(PolycollideError, match=sentence):
        client.batch(tmp_path / "jobs.jsonl")


def test_an_image_that_the_service_cannot_use_is_told_with_its_item(service, client, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    items = [{"source": PAIR[0], "target": PAIR[1]}, {"source": tmp_path / "broken.png"}]
    service.on("POST /v1/images", problem(422, "invalid_image", "broken.png is empty."))
    with pytest.raises(
        PolycollideError, match=r"Item 1: broken\.png is empty\. Nothing was submit"
    ):
        client.batch(items)
    assert not service.to(BATCHES)


def test_a_batch_is_waited_for(service, client):
    done = BATCH | {"status": "completed", "request_counts": {"total": 2, "succeeded": 2}}
    service.on("GET /v1/batches/b", reply(BATCH), drop, reply(done))
    assert client.wait_batch("b").request_counts["succeeded"] == 2
    service.on("GET /v1/batches/b", reply(BATCH))
    with pytest.raises(WaitTimeout, match="Batch b"):
        client.wait_batch("b", timeout=0.3)


def test_results_of_a_batch_come_once_each_when_the_connection_breaks(service, client):
    lines = [
        f'{{"index": {i}, "job_id": "j{i}", "status": "succeeded", "result": {{"n": "\u2028"}}}}\n'
        for i in range(4)
    ]
    service.on(
        "GET /v1/batches/b/results.jsonl",
        stream(*lines[:2], lines[2][:9], cut=True),
        stream(*lines[:3], lines[3].strip()),
    )
    found = list(client.iter_results("b"))
    assert [result.index for result in found] == [0, 1, 2, 3]
    assert found[0].result == {"n": "\u2028"}
