"""`knl report`: finds out what a folder holds, and writes its page, plots and tables there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knl.errors import InputError
from knl.report.page import Page, write_page
from knl.report.run_data import is_run, read_run
from knl.report.run_page import run_page
from knl.scaling.study import STUDY, read_folder


def report(folder: Path) -> dict[str, Any]:
    """Write the report; the object that `knl report --json` prints, its keys are a contract.

    Raises InputError where the folder is neither a run nor a study, or a study is damaged.
    """
    page, kind = _page(folder)
    files = write_page(page, folder)
    return {
        "kind": kind,
        "report": str(files[0]),
        "files": [str(path) for path in files],
        "notices": list(page.notices),
        "findings": [{"finding": f.claim, "cure": f.cure} for f in page.told],
    }


def _page(folder: Path) -> tuple[Page, str]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a run directory or a study's folder")
    if (folder / STUDY).exists() or (folder / "points").is_dir():
        from knl.report.study_page import study_page

        return study_page(read_folder(folder), folder), "study"
    if is_run(folder):
        return run_page(read_run(folder)), "run"
    raise InputError(
        f"{folder}: neither a run (no metrics.jsonl, no recipe.toml) nor a study (no {STUDY}); "
        "knl train writes the one, knl scale run the other"
    )
