"""`knl scale`: the scaling study."""

from __future__ import annotations

import typer

from knl import cli_study

app = typer.Typer(
    name="scale",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure what more nodes bring to the training of a recipe.",
)
app.command()(cli_study.run)
app.command()(cli_study.submit)
