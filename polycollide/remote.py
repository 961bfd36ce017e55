"""What the commands that speak to a service do."""

import csv
import io
import json as jsonlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from polycollide import live, settings
from polycollide.answers import Batch, Failure, Job
from polycollide.batches import parse_jsonl
from polycollide.client import Client
from polycollide.errors import ApiError, InvalidInput, PolycollideError
from polycollide.listing import aside, console, cut, fail, listing, say_missing, show_json, unusable

SHOWN_REFUSED, SHOWN_FAILED, SHOWN_REMARKS = 10, 20, 20
READ = 200  # results that are read for the sake of what they warn of
REMARKS = {"warnings": "Warning", "notes": "Note"}  # of a result, and of a row of results.csv


@contextmanager
def connected(url: str | None, api_key: str | None) -> Iterator[Client]:
    """A client; errors that a user can act on end the command with a sentence."""
    try:
        with Client(url, api_key) as client:
            yield client
    except PolycollideError as error:
        fail(str(error))
    except OSError as error:
        fail(unusable(error))


def read_spec(named: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """The settings as they were typed; the service knows whether they are good."""
    try:
        return settings.merge(named, given)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def submit(
    client: Client,
    source: str,
    target: str,
    spec: dict[str, Any],
    *,
    labels: list[str],
    priority: int,
    deadline: float | None,
    wait: bool,
    json: bool,
) -> None:
    """Submits a job and prints its id at once; waits for it where asked."""
    job = client.submit(
        *(source, target),
        spec=spec,
        labels=labels,
        priority=priority,
        deadline_seconds=deadline,
    )
    if wait:
        if not json:
            console.print(job.id, highlight=False, soft_wrap=True)
        _end(_wait(client, [job.id], None), json=json, one=True)
    elif json:
        _print_json(job.model_dump(mode="json"))
    else:
        console.print(job.id, highlight=False, soft_wrap=True)


def wait(client: Client, ids: list[str], *, timeout: float | None, json: bool) -> None:
    """Waits for jobs and prints how they ended."""
    with _ids_of_jobs(client, ids, "watch --batch {}"):
        ended = _wait(client, ids, timeout)
    _end(ended, json=json)


def watch(client: Client, ids: list[str], *, batch: str | None, label: str | None) -> None:
    """Shows jobs until they are done."""
    if sum(map(bool, (ids, batch, label))) > 1:
        raise InvalidInput("Name either ids, or a batch, or a label.")
    if not (ids or batch or label):
        states = ("queued", "running", "canceling")
        ids = [job.id for status in states for job in client.jobs(status=status)]
        if not ids:
            console.print("No job waits or runs.")
            return
    if batch:
        look, again = live.at_batch(client, batch), f"--batch {batch}"
    elif label:
        look, again = live.at_label(client, label), f"--label {label}"
    else:
        look, again = live.at_jobs(client, ids), " ".join(ids[:3])
    with (
        _interruptible(f"polycollide watch {again}"),
        _ids_of_jobs(client, ids, "watch --batch {}"),
    ):
        view = live.follow(look)
    if not view.counts.total():
        fail(f"There is no job with label {label!r}." if label else "There is no such job.")
    console.print(str(view), highlight=False, soft_wrap=True)
    if batch:
        _say_ends_of_batch(client, batch)
    else:
        # Those of a list come without their results.
        ends = live.at_jobs(client, [job.id for job in view.jobs[:READ]])() if label else view
        _say_failures((job.id, job.error) for job in ends.jobs)
        _say_remarks((job.id, job.result) for job in ends.jobs)
    _fail_if(view.counts["succeeded"] < view.counts.total())


def list_jobs(
    client: Client,
    *,
    status: str | None,
    batch: str | None,
    label: str | None,
    limit: int,
    json: bool,
) -> None:
    """Prints jobs."""
    jobs = list(client.jobs(status=status, batch=batch, label=label, limit=limit))
    if json:
        _print_json([job.model_dump(mode="json", exclude={"result"}) for job in jobs])
        return
    whole = ("job", "status", "age")
    table = listing("job", "status", "model", "layer", "age", "labels", whole=whole)
    for job in jobs:
        names = [cut(str(job.spec.get(name, ""))) for name in ("model", "layer")]
        labels = cut(", ".join(job.labels))
        table.add_row(job.id, job.status, *names, _age(job.created_at), labels)
    console.print(table)
    reasons = {job.status_reason for job in jobs if job.status == "queued" and job.status_reason}
    for reason in sorted(reasons):
        console.print(f"queued: {reason}", highlight=False, soft_wrap=True)


def list_batches(client: Client, *, label: str | None, limit: int, json: bool) -> None:
    """Prints batches."""
    batches = list(client.batches(label=label, limit=limit))
    if json:
        _print_json([batch.model_dump(mode="json", exclude={"errors"}) for batch in batches])
        return
    whole = ("batch", "age", "done", "failed", "refused")
    table = listing("batch", "age", "done", "failed", "refused", "labels", whole=whole)
    for batch in batches:
        view = live.View(live.counts_of(batch), [])
        refused = batch.request_counts.get("refused", 0)
        counts = (f"{view.done} of {view.counts.total()}", view.counts["failed"], refused)
        labels = cut(", ".join(batch.labels))
        table.add_row(batch.id, _age(batch.created_at), *map(str, counts), labels)
    console.print(table)


def list_patch_sets(client: Client) -> None:
    """Prints the patch sets that workers have, and which of them are not everywhere the same."""
    table = listing("set", "images", "patches", "size", "stride", "resize", "index", "workers")
    found = client.patch_sets()
    for each in found:
        geometry = each.size, each.stride, each.resize
        numbers = map(str, (each.images, each.patches, *geometry))
        table.add_row(each.name, *numbers, each.index, str(each.workers))
    console.print(table)
    for each in found:
        if each.differs:
            text = f"{each.name}: other workers have another set under this name."
            aside.print(text, highlight=False, soft_wrap=True)


def cancel(client: Client, ids: list[str], *, batch: str | None) -> None:
    """Cancels jobs, each whether or not another one could be."""
    if bool(ids) == bool(batch):
        raise InvalidInput("Name either ids, or a batch.")
    if batch:
        canceled = client.cancel_batch(batch)
        console.print(_counts(canceled), highlight=False, soft_wrap=True)
        return
    _each(client, ids, "cancel --batch {}", lambda id: client.cancel(id).status)


def delete(client: Client, ids: list[str], *, batch: str | None) -> None:
    """Deletes jobs and images, each whether or not another one could be, or a batch."""
    if bool(ids) == bool(batch):
        raise InvalidInput("Name either ids, or a batch.")
    if batch:
        client.delete_batch(batch)
        console.print(f"{batch} deleted", highlight=False, soft_wrap=True)
        return

    def act(id: str) -> str:
        if id.startswith("sha256:"):
            client.delete_image(id)
        else:
            client.delete(id)
        return "deleted"

    _each(client, ids, "delete --batch {}", act)


def _each(client: Client, ids: list[str], of_batch: str, act: Callable[[str], str]) -> None:
    """Does so with each id, and prints what it is then; fails at the end if one could not be."""
    failed = False
    for id in ids:
        try:
            if id.startswith("sha256:"):
                state = act(id)
            else:
                with _ids_of_jobs(client, [id], of_batch):
                    state = act(id)
        except PolycollideError as error:
            failed = True
            text = str(error)
            text = text if text.startswith(id) else f"{id}: {text}"
            aside.print(Text(text), soft_wrap=True)  # no markup: ":abc:" would be an emoji
        else:
            console.print(Text(f"{id} {state}"), soft_wrap=True)
    _fail_if(failed)


def fetch(client: Client, id: str, out: Path, *, force: bool = False) -> None:
    """Writes all that a job found into a folder, or a batch's results into a file."""
    if out.suffix in (".csv", ".jsonl"):
        client.download_results(id, out)
        console.print(f"{out}: {_counts(client.get_batch(id))}", highlight=False, soft_wrap=True)
        _say_ends_of_batch(client, id)
        return
    with _ids_of_jobs(client, [id], "fetch {} --out results.jsonl"):
        files = client.download(id, out, force=force)
    names = ", ".join(file.name for file in files)
    console.print(f"{out}: {names}", highlight=False, soft_wrap=True)
    result = jsonlib.loads((out / "result.json").read_bytes())
    say_missing(result.get("missing") or {})
    _say_remarks([(id, result)])


def batch(
    client: Client,
    file: str,
    *,
    labels: list[str],
    priority: int,
    wait: bool,
    out: Path | None,
    json: bool,
) -> None:
    """Submits many jobs and prints the id of their batch; waits and writes results where asked."""
    if out:  # before the work, not after it
        if out.exists() and file != "-" and out.samefile(file):
            raise InvalidInput(f"--out is {file} itself; name another file for the results.")
        out.open("a").close()
    items: Any = Path(file)
    if file == "-":
        items = parse_jsonl(sys.stdin.buffer.read(), name="standard input", folder=Path())
    with _bar("uploaded") as bar:
        task = bar.add_task("", total=None, visible=False)
        submitted = client.batch(
            items,
            labels=labels,
            priority=priority,
            on_upload=lambda done, total: bar.update(
                task, completed=done, total=total, visible=True
            ),
        )
    _say_refused(submitted)
    if not json:
        console.print(submitted.id, highlight=False, soft_wrap=True)
    if wait or out:
        submitted = _wait_batch(client, submitted)
        if not json:
            console.print(_counts(submitted), highlight=False, soft_wrap=True)
        if out:
            client.download_results(submitted, out)
        _say_ends_of_batch(client, submitted.id, remarks=not json)
    if json:
        _print_json(submitted.model_dump(mode="json"))
    counts = live.counts_of(submitted)
    _fail_if(bool(submitted.errors or counts["failed"] or counts["canceled"]))


def _wait(client: Client, ids: Sequence[str], timeout: float | None) -> list[Job]:
    done: set[str] = set()
    with _interruptible(f"polycollide wait {' '.join(ids)}"), _bar("done") as bar:
        task = bar.add_task("", total=len(set(ids)))

        def show(job: Job) -> None:
            if job.done:
                done.add(job.id)
            bar.update(task, completed=len(done))

        return client.wait(ids, timeout, show)


def _wait_batch(client: Client, submitted: Batch) -> Batch:
    with _interruptible(f"polycollide watch --batch {submitted.id}"), _bar("done") as bar:
        task = bar.add_task("", total=None)

        def show(batch: Batch) -> None:
            view = live.View(live.counts_of(batch), [])
            bar.update(task, completed=view.done, total=view.counts.total())

        return client.wait_batch(submitted, None, show)


@contextmanager
def _interruptible(again: str) -> Iterator[None]:
    """Ctrl-C ends the waiting, not what is waited for."""
    try:
        yield
    except KeyboardInterrupt:
        aside.print(
            f"The jobs go on; `{again}` comes back to them.", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None


def _bar(what: str) -> Progress:
    return Progress(
        *(MofNCompleteColumn(), TextColumn(what), BarColumn(), TimeElapsedColumn()),
        console=aside,
        transient=True,
        disable=not aside.is_terminal,
    )


def _end(jobs: list[Job], *, json: bool, one: bool = False) -> None:
    """Prints how jobs ended; fails if one of them did."""
    if json:
        dumped = [job.model_dump(mode="json") for job in jobs]
        _print_json(dumped[0] if one else dumped)
    else:
        columns = ("job", "status", "converged", "spread", "colliding")
        table = listing(*columns, whole=columns)
        for job in jobs:
            table.add_row(job.id, job.status, *_measures(job.result or {}))
        console.print(table)
        _say_remarks((job.id, job.result) for job in jobs)
    for job in jobs:
        if job.error:
            aside.print(f"{job.id}: {job.error.message}", highlight=False, soft_wrap=True)
    _fail_if(not all(job.succeeded for job in jobs))


def _measures(result: dict[str, Any]) -> Iterator[str]:
    """What a table of results shows of one, as far as it is there."""
    if result:
        short = result.get("collides") and result.get("goal_reached") is False
        yield "yes" if result.get("converged") else "short of its goal" if short else "no"
        spread = (result.get("polytope") or {}).get("spread")
        yield "" if spread is None else f"{spread:.3f}"
        accuracy = (result.get("interpolation") or {}).get("accuracy")
        yield "" if accuracy is None else f"{100 * accuracy:.1f} %"


def _say_remarks(results: Iterable[tuple[str, Mapping[str, Any] | None]]) -> None:
    """What results, by their names, warn of and note; once what several say."""
    said: dict[tuple[str, str], list[str]] = {}
    measured = [(name, result) for name, result in results if result]
    for field, kind in REMARKS.items():
        for name, result in measured:
            for remark in result.get(field) or ():
                said.setdefault((kind, remark), []).append(name)
    for (kind, remark), names in islice(said.items(), SHOWN_REMARKS):
        whose = names[0] if len(names) == 1 else f"{len(names)} of {len(measured)} jobs"
        of = f" ({whose})" if len(measured) > 1 else ""
        console.print(Text.assemble((f"{kind}:", "yellow"), f" {remark}{of}"), soft_wrap=True)
    if len(said) > SHOWN_REMARKS:
        console.print(f"... and {len(said) - SHOWN_REMARKS} more.", highlight=False)


def _say_failures(failures: Iterable[tuple[str, Failure | None]]) -> None:
    """Why jobs, by their names, failed."""
    failed = [(name, error) for name, error in failures if error]
    for name, error in failed[:SHOWN_FAILED]:
        text = f"{name} failed: {error.message} [{error.code}]"
        aside.print(text, highlight=False, soft_wrap=True)
    if len(failed) > SHOWN_FAILED:
        aside.print(f"... and {len(failed) - SHOWN_FAILED} more.")


def _say_ends_of_batch(client: Client, id: str, *, remarks: bool = True) -> None:
    """Why jobs of a batch failed, and what the results of the others say beside their numbers."""
    rows = list(csv.DictReader(io.StringIO(client.results_csv(id))))
    for row in rows:
        row["name"] = f"Item {row['index']}" + (f" ({row['custom_id']})" * bool(row["custom_id"]))
    _say_failures(
        (row["name"], Failure(code=row["error_code"], message=row.get("error_message") or ""))
        for row in rows
        if row["error_code"]
    )
    if remarks:
        succeeded = [row for row in rows if row["status"] == "succeeded"]
        _say_remarks(
            (row["name"], {field: filter(None, [row.get(field)]) for field in REMARKS})
            for row in succeeded
        )


@contextmanager
def _ids_of_jobs(client: Client, ids: Iterable[str], of_batch: str) -> Iterator[None]:
    """Where the service knows no such job, says what an id is instead, and what to type."""
    try:
        yield
    except ApiError as error:
        if error.status not in (404, 422):
            raise
        for id in ids:
            try:
                UUID(id)
            except ValueError:
                raise InvalidInput(f"{id} is no job's id; see `polycollide list`.") from error
            try:
                client.get_batch(id)
            except PolycollideError:
                continue
            command = f"polycollide {of_batch.format(id)}"
            raise InvalidInput(f"{id} is a batch; type `{command}`.") from error
        raise


def _say_refused(batch: Batch) -> None:
    for refused in batch.errors[:SHOWN_REFUSED]:
        name = f" ({refused.custom_id})" if refused.custom_id else ""
        text = f"Item {refused.index}{name} was refused: {refused.message}"
        aside.print(text, highlight=False, soft_wrap=True)
    if len(batch.errors) > SHOWN_REFUSED:
        aside.print(f"... and {len(batch.errors) - SHOWN_REFUSED} more.")


def _counts(batch: Batch) -> str:
    refused = batch.request_counts.get("refused", 0)
    return f"{live.View(live.counts_of(batch), [])}{f', {refused} refused' if refused else ''}"


def _age(time: datetime | None) -> str:
    """How long ago, in the unit that suits."""
    if time is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - time).total_seconds()))
    units = (("d", 86400), ("h", 3600), ("min", 60))
    return next((f"{seconds // size} {u}" for u, size in units if seconds >= size), f"{seconds} s")


def _print_json(value: Any) -> None:
    show_json(jsonlib.dumps(value, indent=2))


def _fail_if(failed: bool) -> None:
    if failed:
        raise typer.Exit(1)
