"""The report of a study."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knl.report.page import Card, Page, Table, plots_html, shown, table_html, words_html
from knl.report.prediction import (
    predicted_rows,
    prediction_finding,
    prediction_numbers,
    prediction_plot,
    prediction_table,
)
from knl.report.study_findings import study_findings
from knl.report.study_plots import study_plots
from knl.report.train_time import Training, charge, hours_of, training_of
from knl.scaling.breakdown import MEANING, PARTS
from knl.scaling.describe import where
from knl.scaling.study import WORDS, Row, Study, rows_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECTIONS = (
    ("Scaling", ("speed-up", "efficiency", "breakdown", "prediction")),
    ("Time and cost", ("time-to-train", "cost")),
    ("Inside a step", ("steps", "ranks", "buckets")),
)


def study_page(study: Study, folder: Path) -> Page:
    """All that was measured; a page that says so where nothing was."""
    rows = rows_of(study)
    recipe: dict[str, Any] = {}
    with contextlib.suppress(tomllib.TOMLDecodeError):
        recipe = tomllib.loads(study.recipe_toml)
    training = training_of(study, recipe)
    plots = study_plots(study, rows, training) if rows else []
    predicted, why_not = predicted_rows(study, folder, rows)
    model = str(recipe.get("model", {}).get("name", ""))
    if rows and (plot := prediction_plot(study, rows, predicted, model)):
        plots.append(plot)
    by_name = {plot.name: plot for plot in plots}
    tables = _tables(study, rows, training)
    if predicted:
        tables.append(prediction_table(predicted))
    findings = study_findings(study, rows, training) if rows else []
    if finding := prediction_finding(predicted, rows[-1].nodes if rows else 0):
        findings.append(finding)
    sections = []
    for heading, names in _SECTIONS:
        if found := [by_name[name] for name in names if name in by_name]:
            sections.append((heading, plots_html(found)))
    numbers = [table_html(table) for table in tables if table.name in ("scaling", "breakdown")]
    numbers += [prediction_numbers(predicted, training)] if predicted else []
    sections.append(("Numbers", "".join(numbers) or "<p>There are none.</p>"))
    sections.append(("Words", words_html(_words(study))))
    return Page(
        kind="Scaling study",
        title=study.recipe or folder.absolute().name,
        lead=_lead(study),
        notices=[*_notices(study, rows), *([why_not] if why_not else [])],
        cards=_cards(rows, training),
        sections=sections,
        findings=findings,
        plots=plots,
        tables=tables,
    )


def _words(study: Study) -> dict[str, str]:
    scaling = f"{study.scaling} scaling"
    words = {w: m for w, m in WORDS.items() if "scaling" not in w}
    return {
        scaling: WORDS[scaling],
        **words,
        **{w.replace("_", " "): m for w, m in MEANING.items()},
    }


def _lead(study: Study) -> str:
    parts = [f"{study.scaling.capitalize()} scaling: {WORDS[f'{study.scaling} scaling']}"]
    if study.site:
        parts.append(f"site {study.site}")
    if model := study.hardware.get("cpu_model"):
        parts.append(f"{model}, {study.hardware.get('cores', '?')} cores")
    if "torch" in study.stack:
        parts.append(f"torch {study.stack['torch']}")
    if study.parameters:
        parts.append(f"{study.parameters / 1e6:.3g} M parameters")
    return "; ".join(parts) + "."


def _notices(study: Study, rows: Sequence[Row]) -> list[str]:
    found = [where(study)] if where(study) else []
    failed = sum(point.failed is not None for point in study.points)
    if not rows:
        found.append("No point has been measured, so there is nothing to draw.")
    if failed:
        found.append(f"{failed} point(s) failed and are left out of plots and tables.")
    if len(rows) == 1:
        found.append("One number of nodes alone: speed-up and efficiency are 1 by definition.")
    return found


def _cards(rows: Sequence[Row], training: Training) -> list[Card]:
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    hours = hours_of(last, training)
    amount, unit = (f"{hours:,.3g}", "h") if hours < 1000 else (f"{hours:,.0f}", "h")
    if hours < 1:
        amount, unit = f"{60 * hours:.3g}", "min"
    most = f"at {last.nodes} node(s)"
    return [
        Card("efficiency", f"{100 * last.efficiency:.0f}", "%", most),
        Card("speed-up", f"{last.speed_up:.3g}", "x", f"ideal {last.ideal:g}, over {first.nodes} "
             "node(s)"),
        Card("throughput", shown(last.images_per_s), "images/s", most),
        Card("time to train", amount, unit, training.what),
    ]  # fmt: skip


def _tables(study: Study, rows: Sequence[Row], training: Training) -> list[Table]:
    titles = ["nodes", "ranks", "batch", "s a step", "images/s", "least", "greatest", "speed-up",
              "ideal", "efficiency %", "hours", "node-hours", "SU", "USD of nodes"]  # fmt: skip
    found = []
    if rows:
        scaling = [
            [r.nodes, r.ranks, r.global_batch, r.step_s, r.images_per_s, r.images_per_s_low,
             r.images_per_s_high, r.speed_up, r.ideal, 100 * r.efficiency,
             hours_of(r, training), r.nodes * hours_of(r, training), *charge(study, r, training)]
            for r in rows
        ]  # fmt: skip
        found.append(Table("scaling", titles, scaling))
        parts = [[r.nodes, *(1e3 * r.breakdown[part] for part in PARTS)] for r in rows]
        names = [f"{part.replace('_', ' ')} ms" for part in PARTS]
        found.append(Table("breakdown", ["nodes", *names], parts))
    points = [
        [p.nodes, p.repetition + 1, p.images_per_s, *_times(p.step_s), p.failed or "measured"]
        for p in study.points
    ]
    titles = ["nodes", "repetition", "images/s", "median s", "5 % s", "95 % s", "state"]
    found.append(Table("points", titles, points))
    keys = ("compute", "exposed_sync", "straggler", "lars", "data")
    ranks = [
        [p.nodes, p.repetition + 1, r.rank, r.host, *(getattr(r, key) for key in keys)]
        for p in study.points
        for r in p.per_rank
    ]
    found.append(Table("ranks", ["nodes", "repetition", "rank", "host", *keys], ranks))
    buckets = [[b.index, b.bytes, b.ready_s] for b in study.buckets]
    found.append(Table("buckets", ["bucket", "bytes", "ready_s"], buckets))
    return found


def _times(times: Any) -> tuple[Any, Any, Any]:
    return (times.median, times.p05, times.p95) if times else (None, None, None)
