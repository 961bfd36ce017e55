"""The `polycollide` command. Each command opens the module that does its work when it is called."""

import os
from pathlib import Path
from typing import Annotated

import typer

from polycollide import commands
from polycollide.options import Corners, Image, Json, Layer, Model, Preset, Settings

app = typer.Typer(
    help="Finds, measures and proves approximate feature collisions in image classifiers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; the GPU is taken where there is one.")
]


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
    json: Json = False,
    device: Device = None,
) -> None:
    """Find colliding images here and now, with no server."""
    from polycollide import local

    named = {"model": model, "layer": layer, "corners": corners, "preset": preset}
    local.run(source, target, named, settings or [], out=out, json=json, device=device)


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
    experiment: Annotated[str, typer.Argument(help="table1.")],
    pairs: Annotated[int, typer.Option(min=1, max=360, help="Digit pairs to average over.")] = 20,
    json: Json = False,
    device: Device = None,
) -> None:
    """Run an experiment of the paper and print its rows beside ours."""
    from polycollide import reproduce

    reproduce.run(experiment, pairs=pairs, json=json, device=device)


app.add_typer(commands.service)


def main() -> None:
    """The entry point of the command."""
    try:
        _main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("core", "polycollide"):
            raise
        needs = f"This command computes here, which needs {error.name}"
        typer.echo(f"Error: {needs}: pip install 'polycollide[core]'.", err=True)
        raise SystemExit(1) from None


def _main() -> None:
    # Where cores are shared, threads that spin while they wait make small networks 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
