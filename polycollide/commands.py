"""The commands that speak to a service. `polycollide.remote` does their work when one is called."""

from pathlib import Path
from typing import Annotated

import typer

from polycollide.options import (
    ApiKey,
    Corners,
    Force,
    Image,
    Json,
    Labels,
    Layer,
    Model,
    Preset,
    Priority,
    Settings,
    Url,
)

service = typer.Typer()
Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of jobs.")]
SomeIds = Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="Ids of jobs.")]
Batch = Annotated[str | None, typer.Option(metavar="ID", help="The jobs of this batch.")]
Label = Annotated[
    str | None, typer.Option(help="The jobs with this label, or of a batch that has it.")
]
Timeout = Annotated[
    float | None, typer.Option(min=0, metavar="SECONDS", help="Give up waiting after that.")
]


@service.command()
def submit(
    source: Image,
    target: Image,
    model: Model = None,
    layer: Layer = None,
    corners: Corners = None,
    preset: Preset = None,
    settings: Settings = None,
    labels: Labels = None,
    priority: Priority = 0,
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Fail when an attempt takes longer.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is done.")] = False,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Submit a job to the service, and print its id."""
    from polycollide import remote

    named = {"model": model, "layer": layer, "corners": corners, "preset": preset}
    with remote.connected(url, api_key) as client:
        spec = remote.read_spec(named, settings or [])
        remote.submit(
            *(client, source, target, spec),
            labels=labels or [],
            priority=priority,
            deadline=deadline,
            wait=wait,
            json=json,
        )


@service.command()
def wait(
    ids: Ids, timeout: Timeout = None, json: Json = False, url: Url = None, api_key: ApiKey = None
) -> None:
    """Wait until jobs are done, and print how they ended. Fails if one of them did."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.wait(client, ids, timeout=timeout, json=json)


@service.command()
def watch(
    ids: SomeIds = None,
    batch: Batch = None,
    label: Label = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Watch jobs until they are done: those named, or else all that wait or run."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.watch(client, ids or [], batch=batch, label=label)


@service.command("list")
def list_jobs(
    status: Annotated[
        str | None,
        typer.Option(help="queued, running, canceling, succeeded, failed or canceled."),
    ] = None,
    batch: Batch = None,
    label: Label = None,
    batches: Annotated[bool, typer.Option("--batches", help="Batches instead of jobs.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List jobs, or batches, the newest first."""
    from polycollide import remote

    if batches and (status or batch):
        raise typer.BadParameter("--status and --batch are for jobs; leave them or --batches out.")
    with remote.connected(url, api_key) as client:
        if batches:
            remote.list_batches(client, label=label, limit=limit, json=json)
            return
        remote.list_jobs(client, status=status, batch=batch, label=label, limit=limit, json=json)


@service.command()
def cancel(
    ids: SomeIds = None, batch: Batch = None, url: Url = None, api_key: ApiKey = None
) -> None:
    """Cancel jobs, or every job of a batch."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.cancel(client, ids or [], batch=batch)


@service.command()
def delete(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID...]", help="Ids of jobs, and images as sha256:...."),
    ] = None,
    batch: Batch = None,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Delete jobs that are done with all they found, a whole batch, or images that no job uses."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.delete(client, ids or [], batch=batch)


@service.command()
def fetch(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a job, or of a batch.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR|FILE",
            help="Where a job's corners, samples and pictures go; of a batch a file for all "
            "results, results.jsonl or, as a table, results.csv.",
        ),
    ],
    force: Force = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Fetch all that a job found, the files that `run --out` writes, or the results of a batch."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.fetch(client, id, out, force=force)


@service.command()
def batch(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.jsonl|-",
            help="JSON lines, each with source, target and spec, and custom_id, labels, priority "
            "and deadline_seconds where wanted. Paths of images are taken from its folder. "
            "Pictures and snapshots are kept where a spec sets figures and snapshots.",
        ),
    ],
    labels: Labels = None,
    priority: Priority = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until every job is done.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="results.jsonl|results.csv", help="Wait, and write every result there."
        ),
    ] = None,
    json: Json = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Submit many jobs at once, and print the id of their batch."""
    from polycollide import remote

    with remote.connected(url, api_key) as client:
        remote.batch(
            client, file, labels=labels or [], priority=priority, wait=wait, out=out, json=json
        )
