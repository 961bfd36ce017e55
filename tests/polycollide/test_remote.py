"""The commands that speak to a service, as a user runs them, against a real HTTP server."""

import codecs
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from polycollide import live
from polycollide.cli import app

from .conftest import ScriptedService, drop, job, late, problem, reply, stream

PAIR = ("--source", "sample:mnist/3-0", "--target", "sample:mnist/7-0")
ID, OTHER = "4f7f2b1e-0000-4000-8000-000000000001", "4f7f2b1e-0000-4000-8000-000000000002"
RESULT = {
    **{"converged": True, "steps": 83, "polytope": {"spread": 0.2345}},
    **{"interpolation": {"accuracy": 0.9987}, "new": 1},
}
BATCH = {"id": "b", "status": "in_progress", "errors": []}
BATCH["request_counts"] = {"total": 3, "refused": 0, "queued": 2, "running": 1}
ENDED = BATCH | {"status": "completed", "request_counts": {"total": 3, "succeeded": 3}}
Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "INTERVAL", 0.05)


@pytest.fixture
def call(service: ScriptedService) -> Call:
    """Calls the command in a terminal 80 columns wide, with the service in its environment."""
    env = {"COLUMNS": "80", "POLYCOLLIDE_URL": service.url, "POLYCOLLIDE_API_KEY": "pc_secret"}

    def invoke(*arguments: str, input: str | bytes | None = None) -> Result:
        result = CliRunner(env=env).invoke(app, arguments, input=input)
        assert "pc_secret" not in result.output
        return result

    return invoke


TABLE = "index,custom_id,job_id,status,error_code,error_message,warnings,notes\n"


def succeeded(id: str = ID, **remarks: list[str]) -> dict:
    return job(id, "succeeded", result=RESULT | remarks)


def failed(id: str = OTHER) -> dict:
    return job(id, "failed", error={"code": "diverged", "message": "It diverged; lower the rate."})


def test_submit_prints_the_id_and_nothing_else(service, call):
    service.on("POST /v1/jobs", reply(job(ID), 202))
    settings = ("--model", "m", "--corners", "3", "--set", "beta.relative=2", "--set", "units=[1]")
    more = ("--label", "a", "--label", "b", "--priority", "5", "--deadline", "60")
    result = call("submit", *PAIR, *settings, *more)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{ID}\n", "")
    (received,) = service.received
    assert received.headers["authorization"] == "Bearer pc_secret"
    assert received.json == {
        **{"source": PAIR[1], "target": PAIR[3], "labels": ["a", "b"], "priority": 5},
        **{"deadline_seconds": 60.0},
        "spec": {"model": "m", "corners": 3, "beta": {"relative": 2}, "units": [1]},
    }


def test_submit_can_wait_and_print_json(service, call):
    service.on("POST /v1/jobs", reply(job(ID), 202))
    service.on(f"GET /v1/jobs/{ID}", reply(job(ID, "running")), reply(succeeded()))
    assert json.loads(call("submit", *PAIR, "--json").stdout)["status"] == "queued"
    assert json.loads(call("submit", *PAIR, "--json", "--wait").stdout)["result"] == RESULT
    assert call("submit", *PAIR, "--wait").stdout.startswith(f"{ID}\n")


def test_wait_prints_how_jobs_ended_aligned_and_fails_if_one_did(service, call):
    service.on(f"GET /v1/jobs/{ID}", reply(job(ID, "running")), reply(succeeded()))
    service.on(f"GET /v1/jobs/{OTHER}", reply(failed()))
    good, both = call("wait", ID), call("wait", ID, OTHER)
    assert (good.exit_code, both.exit_code) == (0, 1)
    header, _, first, second = filter(str.strip, both.stdout.splitlines())
    assert first.split() == [ID, "succeeded", "yes", "0.234", "99.9", "%"]
    assert second.split() == [OTHER, "failed"]
    assert header.index("status") == first.index("succeeded") == second.index("failed")
    assert max(map(len, both.stdout.splitlines())) <= 80
    assert both.stderr == f"{OTHER}: It diverged; lower the rate.\n"
    listed = json.loads(call("wait", ID, OTHER, "--json").stdout)
    assert [job["status"] for job in listed] == ["succeeded", "failed"]


def test_what_results_warn_of_and_note_stands_under_the_table_once(service, call):
    both = {"warnings": ["No cut."], "notes": ["Resized."]}
    service.on(f"GET /v1/jobs/{ID}", reply(succeeded(**both)))
    service.on(f"GET /v1/jobs/{OTHER}", reply(succeeded(OTHER, warnings=["No cut."], notes=[])))
    assert call("wait", ID).stdout.splitlines()[-2:] == ["Warning: No cut.", "Note: Resized."]
    several = ["Warning: No cut. (2 of 2 jobs)", f"Note: Resized. ({ID})"]
    assert call("wait", ID, OTHER).stdout.splitlines()[-2:] == several
    assert call("watch", ID, OTHER).stdout.splitlines()[1:] == several
    service.on("GET /v1/jobs", reply({"jobs": [job(ID, "succeeded"), job(OTHER, "succeeded")]}))
    assert call("watch", "--label", "l").stdout.splitlines()[1:] == several
    service.on("POST /v1/jobs", reply(job(ID), 202))
    assert call("submit", *PAIR, "--wait").stdout.splitlines()[-2:] == [
        *("Warning: No cut.", "Note: Resized.")
    ]


def test_ids_that_are_none_of_jobs_are_told_for_what_they_are(service, call, tmp_path):
    wrong = [{"loc": "path.job_id", "message": "Input should be a valid UUID"}]
    service.on("GET /v1/jobs/abc", problem(422, "invalid_request", errors=wrong))
    for command in (("wait", "abc"), ("watch", "abc"), ("fetch", "abc", "--out", str(tmp_path))):
        result = call(*command)
        assert result.exit_code == 1
        assert result.stderr == "Error: abc is no job's id; see `polycollide list`.\n"
    unknown = problem(404, "unknown_job", "There is no such job.")
    service.on(f"GET /v1/jobs/{ID}", unknown)
    service.on(f"POST /v1/jobs/{ID}/cancel", unknown)
    assert call("wait", ID).stderr == "Error: There is no such job.\n"
    service.on(f"GET /v1/batches/{ID}", reply(BATCH | {"id": ID}))
    for command, instead in (
        (("wait", ID), f"watch --batch {ID}"),
        (("watch", ID), f"watch --batch {ID}"),
        (("cancel", ID), f"cancel --batch {ID}"),
        (("fetch", ID, "--out", str(tmp_path)), f"fetch {ID} --out results.jsonl"),
    ):
        said = call(*command).stderr.removeprefix("Error: ")
        assert said == f"{ID} is a batch; type `polycollide {instead}`.\n"


def test_wait_gives_up_after_its_timeout(service, call):
    service.on(f"GET /v1/jobs/{ID}", reply(job(ID, "running")))
    result = call("wait", ID, "--timeout", "0.3")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Not every job was done within 0.3 s (1 running)")
    assert result.stderr.count("\n") == 1
    service.on(f"GET /v1/jobs/{ID}", late(2, reply(job(ID))))
    nothing_yet = call("wait", ID, "--timeout", "0.2").stderr
    assert nothing_yet.startswith("Error: Not every job was done within 0.2 s; they go on")


def test_watch_ends_with_the_counts_of_what_was_named(service, call):
    service.on(f"GET /v1/jobs/{ID}", reply(job(ID)), drop, reply(succeeded()))
    service.on(f"GET /v1/jobs/{OTHER}", reply(job(OTHER, "running")), reply(failed()))
    result = call("watch", ID, OTHER)
    assert result.exit_code == 1
    assert result.stdout == "2 of 2 done: 1 succeeded, 1 failed\n"


def test_watch_follows_a_label_a_batch_or_all_that_waits_and_runs(service, call):
    page, end = {"jobs": [job(ID, "running")]}, {"jobs": [succeeded()]}
    service.on("GET /v1/jobs", reply(page), reply(end))
    assert call("watch", "--label", "l").stdout == "1 of 1 done: 1 succeeded\n"
    assert service.received[0].query["label"] == "l"

    service.on("GET /v1/jobs", reply(page))
    service.on("GET /v1/batches/b", reply(BATCH), reply(ENDED))
    service.on("GET /v1/batches/b/results.csv", reply(TABLE.encode()))
    assert call("watch", "--batch", "b").stdout == "3 of 3 done: 3 succeeded\n"

    service.on("GET /v1/jobs", reply({"jobs": []}), reply(page), reply({"jobs": []}))
    service.on(f"GET /v1/jobs/{ID}", reply(succeeded()))
    assert call("watch").stdout == "1 of 1 done: 1 succeeded\n"
    assert call("watch").stdout == "No job waits or runs.\n"
    nobody = call("watch", "--label", "nobody")
    assert (nobody.exit_code, nobody.stdout) == (1, "")
    assert nobody.stderr == "Error: There is no job with label 'nobody'.\n"


def test_list_is_a_table_or_json(service, call):
    spec = {"model": "mnist-mlp", "layer": "fc1"}
    ago = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7300))
    more = {"spec": spec, "created_at": ago}
    jobs = [job(ID, labels=["x", "[y]"], status_reason="No worker is running.", **more)]
    jobs.append(job(OTHER, "succeeded", **more))
    pages = ({"jobs": jobs[:1], "next_cursor": "1"}, {"jobs": jobs[1:], "next_cursor": "2"})
    service.on("GET /v1/jobs", *map(reply, pages))
    result = call("list", "--limit", "2", "--status", "queued", "--batch", "b")
    lines = result.stdout.splitlines()
    assert lines[3].split() == [ID, "queued", "mnist-mlp", "fc1", "2", "h", "x,", "[y]"]
    assert lines[-1] == "queued: No worker is running."
    assert max(map(len, lines)) <= 80
    assert service.received[0].query == {"status": "queued", "batch": "b", "limit": "2"}
    assert [received.query["limit"] for received in service.received] == ["2", "1"]
    listed = json.loads(call("list", "--json", "--limit", "1").stdout)
    assert [job["id"] for job in listed] == [OTHER]
    assert "result" not in listed[0]


def test_in_a_narrow_table_ids_and_words_stay_whole_and_labels_end_in_an_ellipsis(service, call):
    spec = {"model": "squeezenet1_0", "layer": "features.12.squeeze"}
    one = job(ID, "succeeded", spec=spec, labels=["a-label-that-goes-on", "and-on-and-on"])
    service.on("GET /v1/jobs", reply({"jobs": [one]}))
    lines = [line for line in call("list").stdout.splitlines() if line.strip()]
    assert len(lines) == 3 and max(map(len, lines)) <= 80
    assert lines[2].split()[:2] == [ID, "succeeded"]
    assert lines[2].rstrip().endswith("…")


def test_batches_are_listed_by_their_labels(service, call):
    batch = BATCH | {"id": ID, "labels": ["pilot"]}
    batch["request_counts"] = {"total": 9, "refused": 1, "queued": 2, "succeeded": 5, "failed": 1}
    service.on("GET /v1/batches", reply({"batches": [batch], "next_cursor": None}))
    result = call("list", "--batches", "--label", "pilot", "--limit", "7")
    assert service.received[0].query == {"label": "pilot", "limit": "7"}
    assert result.stdout.splitlines()[3].split() == [ID, "6", "of", "8", "1", "1", "pilot"]
    (listed,) = json.loads(call("list", "--batches", "--json").stdout)
    assert listed["id"] == ID and "errors" not in listed
    assert call("list", "--batches", "--status", "failed").exit_code == 2


def test_cancel_goes_on_after_a_job_that_cannot_be(service, call):
    service.on(f"POST /v1/jobs/{ID}/cancel", problem(404, "unknown_job", "There is no such job."))
    service.on(f"POST /v1/jobs/{OTHER}/cancel", reply(job(OTHER, "canceling"), 202))
    result = call("cancel", ID, OTHER)
    assert result.exit_code == 1
    assert result.stdout == f"{OTHER} canceling\n"
    assert result.stderr == f"{ID}: There is no such job.\n"
    service.on("POST /v1/batches/b/cancel", reply(ENDED, 202))
    assert call("cancel", "--batch", "b").stdout == "3 of 3 done: 3 succeeded\n"


def test_delete_takes_jobs_images_and_batches_and_goes_on_after_one_that_cannot_be(service, call):
    hash = "f" * 64
    service.on(f"DELETE /v1/jobs/{ID}", problem(409, "job_not_final", "Cancel it first."))
    service.on(f"DELETE /v1/jobs/{OTHER}", reply(b"", 204))
    service.on(f"DELETE /v1/images/{hash}", reply(b"", 204))
    result = call("delete", ID, OTHER, f"sha256:{hash}")
    assert result.exit_code == 1
    assert result.stdout == f"{OTHER} deleted\nsha256:{hash} deleted\n"
    assert result.stderr == f"{ID}: Cancel it first.\n"
    service.on("DELETE /v1/images/abc", problem(422, "invalid_request", "No hash."))
    assert call("delete", "sha256:abc").stderr == "sha256:abc: No hash.\n"
    service.on("DELETE /v1/batches/b", reply(b"", 204))
    assert call("delete", "--batch", "b").stdout == "b deleted\n"
    assert call("delete").stderr == "Error: Name either ids, or a batch.\n"
    service.on(f"DELETE /v1/jobs/{ID}", problem(404, "unknown_job", "There is no such job."))
    service.on(f"GET /v1/batches/{ID}", reply(BATCH | {"id": ID}))
    said = call("delete", ID).stderr
    assert said == f"{ID} is a batch; type `polycollide delete --batch {ID}`.\n"


def test_fetch_writes_the_files_of_run(service, call, tmp_path):
    urls = {"corners": ["x"], "corners_npz": "x"}
    service.on(f"GET /v1/jobs/{ID}", reply(succeeded() | {"urls": urls}))
    service.on(f"GET /v1/jobs/{ID}/corners/0.png", reply(b"png"))
    service.on(f"GET /v1/jobs/{ID}/corners.npz", reply(b"npz"))
    out = tmp_path / "new" / "folder"
    result = call("fetch", ID, "--out", str(out))
    assert result.stdout == f"{out}: result.json, corner-0.png, corners.npz\n"
    assert json.loads((out / "result.json").read_text()) == RESULT
    assert (out / "corner-0.png").read_bytes() == b"png"


def test_fetch_writes_the_results_of_a_batch(service, call, tmp_path):
    line = {"index": 0, "job_id": "x", "status": "succeeded"}
    rows = f"{TABLE}0,one,x,succeeded,,,No cut.,\n1,,y,failed,diverged,It diverged.,,\n"
    service.on("GET /v1/batches/b", reply(ENDED))
    service.on("GET /v1/batches/b/results.jsonl", stream(f"{json.dumps(line)}\n"))
    service.on("GET /v1/batches/b/results.csv", reply(rows.encode()))
    for name in ("results.jsonl", "results.csv"):
        result = call("fetch", "b", "--out", str(tmp_path / name))
        assert result.exit_code == 0
        said = [f"{tmp_path / name}: 3 of 3 done: 3 succeeded", "Warning: No cut."]
        assert result.stdout.splitlines() == said
        assert result.stderr == "Item 1 failed: It diverged. [diverged]\n"
    assert (tmp_path / "results.csv").read_text() == rows
    assert json.loads((tmp_path / "results.jsonl").read_text())["job_id"] == "x"


@pytest.mark.parametrize("state", [job(ID, "running"), failed(ID)])
def test_fetch_says_why_there_is_nothing(service, call, tmp_path, state):
    service.on(f"GET /v1/jobs/{ID}", reply(state))
    result = call("fetch", ID, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: Job {ID} ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_batch_sends_lines_and_writes_every_result(service, call, tmp_path):
    (tmp_path / "3.png").write_bytes(b"own")
    item = {"source": "3.png", "target": PAIR[3], "spec": {}}
    (tmp_path / "jobs.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    service.on("POST /v1/images", reply({"sha256": "f" * 64}, 201))
    service.on("POST /v1/batches", drop, reply(BATCH, 202))
    service.on("GET /v1/batches/b", reply(BATCH), reply(ENDED))
    lines = [{"index": i, "job_id": "x", "status": "succeeded", "later": i} for i in range(3)]
    texts = [f"{json.dumps(line)}\n" for line in lines]
    service.on("GET /v1/batches/b/results.jsonl", stream(*texts[:1], cut=True), stream(*texts))
    service.on("GET /v1/batches/b/results.csv", reply(TABLE.encode()))
    out = tmp_path / "results.jsonl"
    result = call("batch", str(tmp_path / "jobs.jsonl"), "--label", "l", "--out", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "b\n3 of 3 done: 3 succeeded\n"
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["later"] for line in written] == [0, 1, 2]
    assert len(service.to("POST /v1/images")) == 1
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"3.png", "jobs.jsonl", "results.jsonl"}
    sentence = call("batch", str(out), "--out", str(out)).stderr
    assert "--out is" in sentence and "name another file" in sentence
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"source": 5}', "Line 2 of standard input: source is 5; give the path of an image."),
        ('{"spec": {"beta": NaN}}', "Line 2 of standard input: It has NaN"),
        ('{"spec": {"beta": 1e999}}', "Line 2 of standard input: It has 1e999"),
        ('{"spec": {}},', "This is no JSON: a line ends without a comma"),
        ('{"spec": {},}', "This is no JSON: Expecting property name"),
        ('[{"spec": {}}', "This is no JSON: a line has one object, no list"),
        ('{"source": "\xff"}', "Line 2 of standard input is not UTF-8"),
    ],
)
def test_a_line_that_is_none_is_named_and_nothing_is_sent(service, call, line, said):
    result = call("batch", "-", input=b"{}\n" + line.encode("latin1"))
    assert result.exit_code == 1
    assert said in result.stderr and result.stderr.count("\n") == 1
    assert not service.received


def test_a_byte_order_mark_ends_of_lines_and_blank_ones_are_taken_from_anywhere(
    service, call, tmp_path
):
    service.on("POST /v1/batches", reply(BATCH, 202))
    item = json.dumps({"source": PAIR[1], "target": PAIR[3], "spec": {}, "labels": ["\u00e9 🎉"]})
    text = codecs.BOM_UTF8 + f"\r\n{item}\r\n\r\n  \r\n{item}".encode()
    (tmp_path / "jobs.jsonl").write_bytes(text)
    assert call("batch", "-", input=text).stdout == "b\n"
    assert call("batch", str(tmp_path / "jobs.jsonl")).stdout == "b\n"
    bodies = [received.json for received in service.received]
    assert bodies == [{"items": [json.loads(item)] * 2, "labels": [], "priority": 0}] * 2


def test_batch_says_why_jobs_failed_and_what_results_warn_of(service, call):
    failed = [f"{i},n{i},x,failed,diverged,It diverged.,,\n" for i in range(25)]
    warned = [f"{i},,x,succeeded,,,No cut. Plain.,\n" for i in range(25, 27)]
    ended = {"total": 27, "succeeded": 2, "failed": 25}
    service.on("POST /v1/batches", reply(BATCH, 202))
    service.on("GET /v1/batches/b", reply(ENDED | {"request_counts": ended}))
    table = "".join([TABLE, *failed, *warned])
    service.on("GET /v1/batches/b/results.csv", reply(table.encode()))
    line = json.dumps({"source": PAIR[1], "target": PAIR[3], "spec": {}})
    result = call("batch", "-", "--wait", input=line)
    assert result.exit_code == 1
    said = result.stderr.splitlines()
    assert said[0] == "Item 0 (n0) failed: It diverged. [diverged]"
    assert (len(said), said[-1]) == (21, "... and 5 more.")
    assert result.stdout.splitlines()[-1] == "Warning: No cut. Plain. (2 of 2 jobs)"
    quiet = call("batch", "-", "--wait", "--json", input=line)
    assert json.loads(quiet.stdout)["id"] == "b"


def test_batch_reads_standard_input_and_tells_what_was_refused(service, call):
    errors = [{"index": i, "custom_id": "x", "code": "c", "message": "No."} for i in range(12)]
    service.on("POST /v1/batches", reply(BATCH | {"errors": errors}, 202))
    line = json.dumps({"source": PAIR[1], "target": PAIR[3], "spec": {}})
    result = call("batch", "-", "--json", input=f"{line}\n{line}\n")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["id"] == "b"
    assert result.stderr.splitlines()[0] == "Item 0 (x) was refused: No."
    assert result.stderr.splitlines()[10:] == ["... and 2 more."]
    assert len(service.received[0].json["items"]) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("submit", *PAIR, "--set", "beta"), "--set takes NAME=VALUE, not 'beta'."),
        (("submit", *PAIR[:3], "none.png"), "'none.png' cannot be read"),
        (("watch", "a", "--batch", "b"), "Name either ids, or a batch, or a label."),
        (("cancel",), "Name either ids, or a batch."),
        (("batch", "no[/b].jsonl"), "'no[/b].jsonl' cannot be read"),
        (("batch", "-", "--out", "/no/such/file"), "/no/such/file cannot be used"),
        (("batch", "-"), "standard input has no items."),
        (("wait", "nothing"), "nothing is no job's id"),
        (("list", "--url", "foo"), "'foo' is no URL"),
        (("list", "--url", "http://127.0.0.1:9"), "start a server with `polycollide up`"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(service, call, arguments, sentence):
    service.on("GET /v1/jobs/nothing", problem(404, "unknown_job", "There is no such job."))
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def in_terminal(service: ScriptedService, *arguments: str, until: bytes) -> tuple[int, bytes]:
    """Runs the command in a terminal of its own and presses Ctrl-C once `until` is shown."""
    env = os.environ | {"POLYCOLLIDE_URL": service.url, "COLUMNS": "120", "TERM": "xterm"}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "polycollide", *arguments]
    with subprocess.Popen(
        command, stdout=theirs, stderr=theirs, start_new_session=True, env=env
    ) as process:
        os.close(theirs)
        shown = b""
        while until not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # the terminal's end
            pass
        os.close(ours)
        return process.wait(), shown


def test_watch_shows_bars_and_ctrl_c_leaves_the_jobs_running(service):
    progress = {"steps": 321, "rows_left": 4, "worst_l_pos": 7.77, "steps_per_second": 55.0}
    running = job(ID, "running", spec={"max_steps": 2000}, progress=progress)
    service.on(f"GET /v1/jobs/{ID}", reply(running))
    service.on(f"GET /v1/jobs/{OTHER}", reply(job(OTHER)))
    code, shown = in_terminal(service, "watch", ID, OTHER, until=b"7.77")
    assert code == 130
    for words in (b"0 of 2 done: 1 running, 1 queued", b"321/2000", b"4", b"55"):
        assert words in shown
    assert b"The jobs go on; `polycollide watch " in shown
    assert {received.method for received in service.received} == {"GET"}


def test_ctrl_c_in_the_middle_of_a_long_poll_ends_the_wait_at_once(service):
    service.on(f"GET /v1/jobs/{ID}", late(40, reply(job(ID))))
    began = time.monotonic()
    code, shown = in_terminal(service, "wait", ID, until=b"done")
    assert code == 130
    assert f"`polycollide wait {ID}` comes back to them".encode() in shown
    assert time.monotonic() - began < 35


def test_of_many_jobs_those_that_run_get_a_line_as_far_as_the_screen_goes():
    jobs = [live.Job(id=f"j{i}", status="running" if i < 60 else "queued") for i in range(200)]
    view = live._view(jobs)
    assert str(view) == "0 of 200 done: 60 running, 140 queued"
    rows = live._bars(view).row_count
    assert rows == min(60, max(1, live.aside.height - 6)) + 1
    later = live._view([*jobs[:100], *(live.Job(id="x", status="succeeded") for _ in range(100))])
    assert live._pace(view, later, 50.0) == "; 2 jobs/s, 0:00:50 left"


def test_results_and_settings_go_to_files_of_their_own(tmp_path: Path):
    from polycollide.settings import merge

    assert merge({"a": None, "b": 1}, ["c.d=x", "c.e=[1]", "b=2", "n=null", "t="]) == {
        **{"b": 2, "c": {"d": "x", "e": [1]}, "n": None, "t": ""},
    }


def test_patch_sets_of_the_service_are_listed_where_it_is_asked_for(service, call, monkeypatch):
    monkeypatch.setenv("POLYCOLLIDE_PATCHES", "/nowhere")
    geometry = {"images": 6, "patches": 1014, "size": 16, "stride": 4, "resize": 64}
    common = geometry | {"sha256": "a", "index": "exact", "workers": 2, "differs": False}
    sets = [common | {"name": "birds", "differs": True, "workers": 1}, common | {"name": "photos"}]
    service.on("GET /v1/patch-sets", reply({"patch_sets": sets}))
    result = call("patches", "list", "--service")
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["photos", "6", "1014", "16", "4", "64", "exact", "2"] in rows
    assert result.stderr == "birds: other workers have another set under this name.\n"
    assert "photos" not in call("patches", "list").stdout  # this machine's
