"""`knl bench`: commands that measure a part beside its peers in the same run."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure a part beside its peers: ratios of medians, taken in turn in one run.",
)

_JSON = typer.Option(False, "--json", help="Print one JSON object on stdout.")
_ROUNDS = typer.Option(0, "--rounds", min=0, help="Measurements of each rival; 0 for the usual.")
