"""The `polycollide` command. Each command opens the module that does its work when it is called."""

import io
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from polycollide import commands
from polycollide.options import (
    ApiKey,
    Corners,
    Force,
    Image,
    Json,
    Layer,
    Model,
    Preset,
    Settings,
    Url,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What is missing tells which extra has it; there is no package but the checkout as yet.
INSTALL = "in the checkout, pip install '.[{}]'"
COMPUTING = (
    "faiss",
    "matplotlib",
    "PIL",
    "safetensors",
    "scipy",
    "skimage",
    "torch",
    "torchvision",
)

Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; the GPU is taken where there is one.")
]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"polycollide {metadata.version('polycollide')}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Finds, measures and proves approximate feature collisions in image classifiers."""


@app.command()
def run(
    source: Image,
    target: Image,
    model: Model = None,
    layer: Layer = None,
    corners: Corners = None,
    preset: Preset = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where corners, samples and pictures go.")
    ] = None,
    force: Force = False,
    json: Json = False,
    device: Device = None,
) -> None:
    """Find colliding images here and now, with no server."""
    from polycollide import asked

    named = {"model": model, "layer": layer, "corners": corners, "preset": preset}
    job = asked.read(source, target, named, settings or [])
    from polycollide import local

    local.run(job, out=out, force=force, json=json, device=device)


@app.command()
def layers(
    model: Annotated[str, typer.Option(help="A name from `polycollide models`.")],
    target: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Counts the units active for this image.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Which of the model's weights.")] = None,
    device: Device = None,
) -> None:
    """List the layers of a model that can be tapped."""
    from polycollide import local

    local.layers(model, weights, target, device=device)


@app.command()
def models() -> None:
    """List the models, and whether their weights are on this machine."""
    from polycollide import local

    local.models()


@app.command()
def reproduce(
    experiment: Annotated[str, typer.Argument(help="table1 to table5, fig3, or fig7 to fig12.")],
    pairs: Annotated[
        int | None,
        typer.Option(
            min=1, max=360, help="How many to draw: 20 pairs of digits or 4 of photographs."
        ),
    ] = None,
    beyond: Annotated[
        bool,
        typer.Option("--beyond", help="table1 past the paper: hulls, exact corners, proofs."),
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGE", help="With --target one pair; both again for each other one."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="IMAGE")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="DIR", help="Draws pairs of these, not of the sample photographs."
        ),
    ] = None,
    model: Model = None,
    weights: Annotated[str | None, typer.Option(help="Which of the model's weights.")] = None,
    layer: Layer = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where pictures go, and each pair's result; those there are not run again.",
        ),
    ] = None,
    json: Json = False,
    device: Device = None,
) -> None:
    """Run an experiment of the paper and print its rows beside ours.

    table1 is of digits, all else of photographs, on vgg16 at classifier.0
    (FC-6) or a model and layer of yours. Corners by patches (table3, table5,
    fig7, fig8 and fig10) need --set patches.set=NAME. Numbers follow our
    reading of the paper: each title tells what was run.
    """
    from polycollide import photographs, reproduce

    named = {"model": model, "weights": weights, "layer": layer}
    asked = photographs.Asked(
        sources=tuple(source or ()),
        targets=tuple(target or ()),
        folder=folder,
        count=pairs,
        named={name: value for name, value in named.items() if value is not None},
        settings=tuple(settings or ()),
        out=out,
        json=json,
    )
    reproduce.run(experiment, asked=asked, beyond=beyond, device=device)


app.add_typer(commands.service)

patch_sets = typer.Typer(
    no_args_is_help=True,
    help="Build, list and delete patch sets, of which corners are composed. They are kept where "
    "POLYCOLLIDE_PATCHES says.",
)
app.add_typer(patch_sets, name="patches")
SetName = Annotated[str, typer.Argument(metavar="NAME", help="From `polycollide patches list`.")]


@patch_sets.command("build")
def build_patches(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of images.")],
    name: Annotated[str, typer.Option(help="What the set is to be called.")],
    size: Annotated[int, typer.Option(help="Pixels of a patch's side.")] = 32,
    stride: Annotated[int, typer.Option(help="Pixels from one patch to the next.")] = 12,
    resize: Annotated[int, typer.Option(help="Pixels of an image's side.")] = 224,
    backend: Annotated[
        str, typer.Option(help="What searches sets of over 100 000 patches: faiss or dci.")
    ] = "faiss",
    seed: Annotated[
        int, typer.Option(min=0, help="Of the samples or lines that the index is made of.")
    ] = 0,
) -> None:
    """Make a patch set of all images in a folder; if stopped, the same command goes on."""
    from polycollide import patches

    patches.build(
        directory, name, size=size, stride=stride, resize=resize, backend=backend, seed=seed
    )


@patch_sets.command("list")
def list_patches(
    service: Annotated[
        bool,
        typer.Option(
            "--service", help="Those of the service's workers instead: at --url, by --api-key."
        ),
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """List the patch sets on this machine, or those that jobs can name at a service."""
    if service:
        from polycollide import remote

        with remote.connected(url, api_key) as client:
            remote.list_patch_sets(client)
        return
    from polycollide import patches

    patches.show_all()


@patch_sets.command("info")
def patches_info(name: SetName, json: Json = False) -> None:
    """Show what a patch set is made of, and the files that were skipped."""
    from polycollide import patches

    patches.show(name, json=json)


@patch_sets.command("delete")
def delete_patches(name: SetName) -> None:
    """Delete a patch set, whole or unfinished."""
    from polycollide import patches

    patches.delete(name)


OPERATING = "Run the service"
keys = typer.Typer(
    no_args_is_help=True,
    help="Create, list and revoke API keys of a service whose database POLYCOLLIDE_DATABASE_URL "
    "names. What `polycollide up` runs without --keys needs none: it is open to every user of its "
    "machine.",
)
app.add_typer(keys, name="keys", rich_help_panel=OPERATING)


@app.command(rich_help_panel=OPERATING)
def up(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where everything is kept.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the API.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Where the API listens; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    keys: Annotated[
        bool, typer.Option("--keys", help="Answer requests with an API key only.")
    ] = False,
) -> None:
    """Run everything on this machine, servers included, until Ctrl-C."""
    from polycollide import server

    server.up(data, port, host, keyed=keys)


@app.command(rich_help_panel=OPERATING)
def worker() -> None:
    """Run jobs: one worker for each visible GPU, or one on the CPU."""
    from polycollide import server

    server.worker()


@app.command(rich_help_panel=OPERATING)
def api() -> None:
    """Run the HTTP API."""
    from polycollide import server

    server.api()


@app.command(rich_help_panel=OPERATING)
def reconciler() -> None:
    """Run the reconciler: expired leases and unheard bells."""
    from polycollide import server

    server.reconciler()


@app.command(rich_help_panel=OPERATING)
def sweeper() -> None:
    """Run the sweeper: what retention lets go is deleted."""
    from polycollide import server

    server.sweeper()


@app.command(rich_help_panel=OPERATING)
def migrate() -> None:
    """Bring the database's schema up to date."""
    from polycollide import server

    server.migrate_database()


@keys.command("create")
def create_key(name: Annotated[str, typer.Argument(help="Whose it is, for your lists.")]) -> None:
    """Make an API key and show it, this once."""
    from polycollide import server

    server.create_key(name)


@keys.command("list")
def list_keys() -> None:
    """List API keys by their prefixes."""
    from polycollide import server

    server.list_keys()


@keys.command("revoke")
def revoke_key(
    prefix: Annotated[str, typer.Argument(help="From `polycollide keys list`.")],
) -> None:
    """Close an API key for good."""
    from polycollide import server

    server.revoke_key(prefix)


def main() -> None:
    """The entry point of the command."""
    try:
        _main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("core", "polycollide"):
            raise
        extra = "core" if error.name in COMPUTING else "local"
        needs = f"This command needs {error.name}: {INSTALL.format(extra)}."
        typer.echo(f"Error: {needs}", err=True)
        raise SystemExit(1) from None
    except BrokenPipeError:  # one that has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # such as a full disk below standard output
        from polycollide.listing import unusable

        typer.echo(f"Error: {unusable(error)}", err=True)
        raise SystemExit(1) from None


def _main() -> None:
    # Where cores are shared, threads that spin while they wait make small networks 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Pictures go into files: no window is opened, whatever is set for others.
    os.environ["MPLBACKEND"] = "agg"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a locale has no letters for
    app()
