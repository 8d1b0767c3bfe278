"""The report of a run."""

from __future__ import annotations

import math
from statistics import median

from knl.config import to_toml
from knl.report.page import Card, Page, Table, plots_html, shown, small, table_html
from knl.report.placement import placement_plot
from knl.report.run_data import RunData, number
from knl.report.run_findings import run_findings, step_parts
from knl.report.run_plots import run_plots

_MEANING = {
    "images": "waiting for images",
    "forward": "all lanes of rank 0",
    "backward": "with the sums that go on behind it",
    "exposed sync": "waiting for sums, or for late ranks, after backward",
    "LARS": "the update of the weights",
}


def run_page(run: RunData) -> Page:
    """All that is known of the run, however far it came."""
    plots = run_plots(run) if run.steps else []
    placement = placement_plot(run.environment.get("placement"))
    by_name = {plot.name: plot for plot in plots}
    tables = _tables(run)
    sections = []
    for heading, names in (
        ("Learning", ("loss", "accuracy", "learning-rate", "trust")),
        ("Speed", ("time", "throughput")),
    ):
        found = [by_name[name] for name in names if name in by_name]
        if heading == "Speed" and placement:
            found.append(placement)
        if found:
            sections.append((heading, plots_html(found)))
    numbers = [table_html(table) for table in tables if table.name in ("parts", "evaluations")]
    if numbers:
        sections.append(("Numbers", "".join(numbers) + _links(tables)))
    if run.recipe:
        sections.append(("Recipe", _recipe(run)))
    return Page(
        kind="Training run",
        title=run.recipe.name if run.recipe else run.folder.absolute().name,
        lead=_lead(run),
        notices=_notices(run),
        cards=_cards(run),
        sections=sections,
        findings=run_findings(run) if run.steps else [],
        plots=[*plots, *([placement] if placement else [])],
        tables=tables,
    )


def _lead(run: RunData) -> str:
    parts = []
    if run.recipe:
        train = run.recipe.train
        parts.append(f"{run.recipe.model.name} on {run.recipe.data.name}")
        parts.append(
            f"{train.lanes} lanes x {train.lane_batch} = batch {run.recipe.global_batch:,}"
        )
    if ranks := run.environment.get("ranks"):
        hosts = run.environment.get("hosts") or []
        parts.append(f"{ranks} rank(s) on {len(hosts)} host(s) over {run.environment['provider']}"
                     if "provider" in run.environment else f"{ranks} rank(s)")  # fmt: skip
    versions = run.environment.get("versions")
    if isinstance(versions, dict) and "torch" in versions:
        parts.append(f"torch {versions['torch']}")
    return "; ".join(parts) or "No recipe and no environment could be read."


def _notices(run: RunData) -> list[str]:
    found = []
    if not run.steps:
        found.append("No step has been finished yet, so there is nothing to draw.")
    elif not run.evaluations:
        found.append("No evaluation has been made yet: there is no accuracy to tell.")
    if run.steps and not any(math.isfinite(loss) for loss in run.column("loss")):
        found.append("Not one step has a loss that is a number.")
    if run.broken:
        found.append(f"{run.broken} line(s) of its files could not be read and are left out.")
    return found


def _cards(run: RunData) -> list[Card]:
    cards = []
    if run.evaluations:
        last = run.evaluations[-1]
        best = max(run.evaluations, key=lambda row: number(row, "top1"))
        cards.append(Card("top-1", _percent(number(last, "top1")), "%",
                          f"best {_percent(number(best, 'top1'))} % at epoch "
                          f"{number(best, 'epoch'):.4g}"))  # fmt: skip
        cards.append(Card("test loss", shown(number(last, "loss")), "", "at the last evaluation"))
    if run.steps:
        speeds = [speed for speed in run.column("images_per_s")[1:] if speed > 0]
        if speeds:
            speed = shown(median(speeds))
            cards.append(Card("throughput", speed, "images/s", "median over steps"))
        cards.append(Card("trained", f"{number(run.steps[-1], 'epoch'):.4g}", "epochs",
                          f"{len(run.steps):,} steps"))  # fmt: skip
        cards.append(Card("in steps", *_duration(_seconds(run)), "without evaluations and start"))
    return cards


def _seconds(run: RunData) -> float:
    keys = ("t_data", "t_compute", "t_comm_exposed", "t_optim")
    times = [value for key in keys for value in run.column(key)]
    return sum(value for value in times if math.isfinite(value))


def _duration(seconds: float) -> tuple[str, str]:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g}", unit
    return f"{seconds:.3g}", "s"


def _tables(run: RunData) -> list[Table]:
    tables = []
    if run.steps:
        parts = step_parts(run)
        total = sum(parts.values())
        rows = [
            [part, 1e3 * seconds, 100 * seconds / total if total else None, _MEANING[part]]
            for part, seconds in parts.items()
        ]
        tables.append(Table("parts", ["part of a step", "ms", "%", "what it is"], rows))
        titles = [*run.steps[0]]
        tables.append(Table("steps", titles, [[row.get(t) for t in titles] for row in run.steps]))
    if run.evaluations:
        titles = ["step", "epoch", "top1", "top5", "loss"]
        rows = [[row.get(title) for title in titles] for row in run.evaluations]
        tables.append(Table("evaluations", titles, rows))
    if run.trust:
        titles = [*dict.fromkeys(name for row in run.trust for name in row["trust"])]
        rows = [[row["step"], *(row["trust"].get(t) for t in titles)] for row in run.trust]
        tables.append(Table("trust", ["step", *titles], rows))
    return tables


def _links(tables: list[Table]) -> str:
    names = [table.name for table in tables if table.name in ("steps", "trust")]
    links = ", ".join(f'<a href="tables/{name}.csv">{name}.csv</a>' for name in names)
    return f'<p class="small">Every step is in {links}.</p>' if links else ""


def _recipe(run: RunData) -> str:
    from html import escape

    assert run.recipe  # or there is no such section
    return f"<pre>{escape(to_toml(run.recipe))}</pre>" + small("The recipe as resolved.")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}" if math.isfinite(share) else "\N{EN DASH}"
