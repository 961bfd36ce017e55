"""Options that several commands have."""

from typing import Annotated

import typer

# Those of core.spec, which is not opened for a line of help; a test compares them.
PRESETS = (
    "hull",
    "paper-mnist",
    "paper-vgg16-patches-code",
    "paper-vgg16-patches-text",
    "paper-vgg16-pixels",
    "patches",
)

Image = Annotated[
    str, typer.Option(metavar="IMAGE", help="A file, or a sample such as sample:mnist/3-0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Model = Annotated[str | None, typer.Option(help="A name from `polycollide models`.")]
Layer = Annotated[str | None, typer.Option(help="A name from `polycollide layers`.")]
Corners = Annotated[int | None, typer.Option(help="Corners of the polytope, 1 to 256.")]
Preset = Annotated[str | None, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other setting, such as alpha=10, interpolation.samples=500 or units=[5,17].",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace files of your own in DIR that have the names of a result's."
    ),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="LABEL", help="A label to find it by.")
]
Priority = Annotated[int, typer.Option(help="-100 to 100; higher goes first.")]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="POLYCOLLIDE_URL",
        help="The service's address, if not http://127.0.0.1:8000.",
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="POLYCOLLIDE_API_KEY", help="A key to the service.")
]
