"""The page: parts of HTML, put into one file that asks the network for nothing."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path

from knl import __version__
from knl.errors import InputError
from knl.files import replace_file
from knl.report.plots import Plot

_NONE = "\N{EN DASH}"
_CSS = Path(__file__).with_name("style.css")
# Nothing is loaded, nothing runs: not even what a file's strings would try.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Card:
    """A headline number."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under titles. `name`: of its CSV; `shown`: rows on the page, all of them in the CSV."""

    name: str
    titles: Sequence[str]
    rows: Sequence[Sequence[object]]
    shown: int = 40


@dataclass(frozen=True)
class Finding:
    """What to do next: a claim with its number, and the cure. `weight`: how much it matters, as a
    share of the time or of the result that is at stake."""

    weight: float
    claim: str
    cure: str


@dataclass(frozen=True)
class Page:
    """A report. `sections`: (heading, HTML made by the functions of this module)."""

    kind: str
    title: str
    lead: str
    notices: Sequence[str]
    cards: Sequence[Card]
    sections: Sequence[tuple[str, str]]
    findings: Sequence[Finding]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()

    @property
    def told(self) -> list[Finding]:
        """The three findings that matter most."""
        return sorted(self.findings, key=lambda finding: -finding.weight)[:3]


def write_page(page: Page, folder: Path) -> list[Path]:
    """Write report.html, plots/*.svg and *.png, tables/*.csv; returns their paths, the page first.
    Raises InputError where the folder cannot be written."""
    files = {folder / "report.html": html_of(page).encode()}
    for plot in page.plots:
        files[folder / "plots" / f"{plot.name}.svg"] = plot.svg
        files[folder / "plots" / f"{plot.name}.png"] = plot.png
    for table in page.tables:
        files[folder / "tables" / f"{table.name}.csv"] = csv_of(table).encode()
    try:
        for path, content in reversed(files.items()):  # the page last: it is there when all is
            path.parent.mkdir(exist_ok=True)
            with replace_file(path) as file:
                file.write(content)
    except OSError as error:
        raise InputError(f"report in {folder} cannot be written: {error.strerror}") from None
    return list(files)


def html_of(page: Page) -> str:
    """The whole file."""
    body = [
        f'<header><p class="kind">{escape(page.kind)}</p><h1>{escape(page.title)}</h1>'
        f'<p class="lead">{escape(page.lead)}</p></header>',
        *(f'<p class="notice">{escape(notice)}</p>' for notice in page.notices),
        _cards(page.cards),
    ]
    body += [f"<section><h2>{escape(name)}</h2>{part}</section>" for name, part in page.sections]
    if page.told:
        body.append(f"<section><h2>What to do next</h2>{_findings(page.told)}</section>")
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    body.append(f"<footer>Written by knl {escape(__version__)} on {now}.</footer>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(page.title)} · {escape(page.kind)}</title>\n"
        f"<style>\n{_CSS.read_text()}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def plots_html(plots: Sequence[Plot], note: str = "") -> str:
    """Figures side by side, where there is room; a sentence under them."""
    return f'<div class="plots">{"".join(map(_figure, plots))}</div>{small(note)}'


def table_html(table: Table, note: str = "") -> str:
    """The first rows, without columns that are empty, and where all of them are."""
    columns = [n for n in range(len(table.titles)) if any(row[n] is not None for row in table.rows)]
    kinds = {n: _kind(table, n) for n in columns}
    titles = "".join(f"<th{kinds[n]}>{escape(table.titles[n])}</th>" for n in columns)
    rows = "".join(
        f"<tr>{''.join(f'<td{kinds[n]}>{escape(shown(row[n]))}</td>' for n in columns)}</tr>"
        for row in table.rows[: table.shown]
    )
    rest = len(table.rows) - table.shown
    more = f"{rest} more rows are in the file. " if rest > 0 else ""
    link = f'<a href="tables/{escape(table.name)}.csv">{escape(table.name)}.csv</a>'
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'
        f'</div><p class="small">{escape(note)} {escape(more)}As a file: {link}</p>'
    )


def words_html(words: Mapping[str, str]) -> str:
    """What words mean."""
    rows = "".join(f"<dt>{escape(w)}</dt><dd>{escape(m)}</dd>" for w, m in words.items())
    return f'<dl class="words">{rows}</dl>'


def small(text: str) -> str:
    """A sentence in small print; "" for none."""
    return f'<p class="small">{escape(text)}</p>' if text else ""


def csv_of(table: Table) -> str:
    """The table as a file, with numbers in full. Text that a spreadsheet would take for a formula
    is quoted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_no_formula(title) for title in table.titles])
    for row in table.rows:
        writer.writerow([_no_formula(value) for value in row])
    return out.getvalue()


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r]", value) else value


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.svg).decode()
    links = "".join(
        f'<a href="plots/{escape(plot.name)}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png")
    )
    return (
        f"<figure{' class=wide' if plot.wide else ''}>"
        f'<img alt="{escape(plot.caption)}" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption>{escape(plot.caption)} {links}</figcaption></figure>"
    )


def _cards(cards: Sequence[Card]) -> str:
    if not cards:
        return ""
    parts = []
    for card in cards:
        unit = f"<small>{escape(card.unit)}</small>" if card.unit else ""
        parts.append(
            f'<div class="card"><dt>{escape(card.label)}</dt>'
            f'<dd class="value">{escape(card.value)}{unit}</dd>'
            f'<dd class="note">{escape(card.note)}</dd></div>'
        )
    return f'<dl class="cards">{"".join(parts)}</dl>'


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(f"<li><b>{escape(f.claim)}</b> {escape(f.cure)}</li>" for f in findings)
    return f'<ol class="findings">{items}</ol>'


def _kind(table: Table, column: int) -> str:
    """Words are set to the left."""
    values = [row[column] for row in table.rows if row[column] not in (None, "")]
    return ' class="text"' if values and all(isinstance(v, str) for v in values) else ""


def shown(value: object) -> str:
    """A value as a reader wants it; a dash for none, and for what is not a number."""
    if value is None:
        return _NONE
    if isinstance(value, float):
        if value != value:
            return _NONE
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
