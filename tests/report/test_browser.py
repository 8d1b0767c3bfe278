"""Reports in a real browser: on a phone, on a screen, on paper."""

from __future__ import annotations

import pytest

from knl.report.command import report
from knl.scaling.study import STUDY, save_study

from ..unit.test_study import point, study
from .browser import browser
from .test_report import evaluation, step, write

PHONE, SCREEN, PAPER = 390, 1200, 680


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    rows = [step(n) for n in range(1, 60)] + [evaluation(n, n / 100) for n in (20, 40)]
    trust = [{"step": n, "trust": {"layer" * 9: 0.1, "b": 2.0}} for n in range(1, 60)]
    run = write(root / ("run-with-a-name-that-has-no-end-" * 3), rows, trust)
    folder = root / "study"
    nodes = [2**n for n in range(10)]
    found = study(*(point(n, seconds=1 + n / 500) for n in nodes), site="stampede2")
    save_study(folder / STUDY, found)
    for each in (run, folder):
        report(each)
    return [run / "report.html", folder / "report.html"]


@pytest.mark.one_stack
def test_pages_fit_their_window_and_ask_for_nothing(pages, tmp_path):
    with browser() as chromium:
        for page in pages:
            for width in (PHONE, SCREEN, PAPER):
                media = "print" if width == PAPER else "screen"
                chromium.open(page, width, media)
                assert chromium.value("document.documentElement.scrollWidth") <= width
                images = "[...document.images]"
                assert chromium.value(f"{images}.every(i => i.complete && i.naturalWidth > 99)")
                assert chromium.value(f"{images}.every(i => i.alt.length > 9)")
                chromium.screenshot(tmp_path / "shot.png")
                assert _colours(tmp_path / "shot.png") > 50
    assert not chromium.errors
    outside = {url for url in chromium.requests if not url.startswith("data:")}
    assert outside == {page.absolute().as_uri() for page in pages}


def _colours(path) -> int:
    """A page that is not drawn has one or two."""
    from PIL import Image

    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24))
