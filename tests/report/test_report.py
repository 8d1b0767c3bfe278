"""`knl report` on runs and studies of every kind, whole and damaged."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser

import pytest

from knl.config import load_recipe, to_toml
from knl.errors import InputError
from knl.report.command import report
from knl.scaling.study import STUDY, save_study

from ..unit.test_study import point, study

EVIL = "<script>alert(1)</script>\"'&$_{$%"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def step(number: int, **changes) -> dict:
    return {
        "step": number, "epoch": number / 10, "loss": 2.0 / number, "lr": 0.1,
        "images_per_s": 100.0, "t_data": 0.01, "t_compute": 0.5, "t_forward": 0.2,
        "t_comm_exposed": 0.3, "t_optim": 0.05, "trust_min": 0.01, "trust_max": 2.0, **changes,
    }  # fmt: skip


def evaluation(number: int, top1: float = 0.5) -> dict:
    return {"step": number, "epoch": number / 10, "top1": top1, "top5": 0.9, "loss": 1.0}


def write(folder, rows, trust=(), environment=None):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if trust:
        (folder / "trust.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trust))
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def page_of(folder) -> str:
    """Its page, which must be whole, ask for nothing and run nothing."""
    text = (folder / "report.html").read_text()
    tags = Tags(text).found
    assert text.endswith("</html>\n")
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "video"}
    for _, attributes in tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert not attributes.get("href", "").startswith(("http", "//", "javascript"))
        assert not any(name.startswith("on") for name in attributes)
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything."""
    rows = [step(n) for n in range(1, 31)] + [evaluation(10, 0.3), evaluation(30, 0.6)]
    trust = [{"step": n, "trust": {"a.weight": 0.01, EVIL: 3.0}} for n in range(1, 31)]
    place = {"host": EVIL, "cpu_model": EVIL, "first_cpus": [0, 1], "rows": ["C.", ".W"]}
    environment = {"ranks": 2, "hosts": [EVIL], "provider": EVIL, "placement": place}
    folder = write(tmp_path_factory.mktemp("runs") / "run", rows, trust, environment)
    return folder, report(folder)


def test_a_run_has_its_plots_as_files_of_both_kinds(whole):
    folder, result = whole
    wanted = {"loss", "accuracy", "learning-rate", "trust", "time", "throughput", "placement"}
    for suffix, magic in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        files = {path.stem: path for path in (folder / "plots").glob(f"*{suffix}")}
        assert set(files) == wanted
        assert all(path.read_bytes().startswith(magic) for path in files.values())
    assert page_of(folder).count("data:image/svg+xml;base64,") == len(wanted)
    assert (result["kind"], result["report"]) == ("run", str(folder / "report.html"))


def test_its_tables_are_its_rows(whole):
    folder, _ = whole
    with (folder / "tables" / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30 and float(rows[4]["loss"]) == 2.0 / 5
    with (folder / "tables" / "parts.csv").open() as file:
        parts = {row["part of a step"]: float(row["ms"]) for row in csv.DictReader(file)}
    assert parts["backward"] == pytest.approx(300) and parts["LARS"] == pytest.approx(50)


def test_findings_are_few_and_have_numbers(whole):
    _, result = whole
    texts = [finding["finding"] for finding in result["findings"]]
    assert 2 <= len(texts) <= 3 and all(any(c.isdigit() for c in text) for text in texts)
    assert any("35% of a step of 860 ms is exposed sync (300 ms)" in text for text in texts)
    assert any("rose by 30.0 points" in text for text in texts)


def test_what_files_say_is_text_and_no_html(whole):
    folder, _ = whole
    text = page_of(folder)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "No step has been finished yet"),
        ([step(1)], "No evaluation has been made yet"),
        ([step(n, loss=None, images_per_s=None) for n in (1, 2)], "Not one step has a loss"),
        ([step(n, loss=math.nan, t_data=math.inf) for n in (1, 2)], "Not one step has a loss"),
        ([step(n, t_forward="x", trust_min=None) for n in range(1, 9)], "No evaluation"),
        ([evaluation(0, math.nan)], "No step has been finished yet"),
        ([{"step": 1, "lr": 1}, {"step": "x"}, [], 3], "3 line(s) of its files"),
        ([step(1), evaluation(1), evaluation(1, math.nan)], ""),
    ],
)
def test_a_poor_run_has_a_page_that_says_so(tmp_path, rows, words):
    folder = write(tmp_path / "run", rows)
    report(folder)
    assert words in page_of(folder)


def test_a_formula_in_a_table_is_text(tmp_path):
    folder = write(tmp_path / "run", [step(1), step(2)], [{"step": 1, "trust": {"=cmd()": 1.0}}])
    report(folder)
    assert (folder / "tables" / "trust.csv").read_text().startswith("step,'=cmd()")


def test_a_study_has_speed_up_efficiency_breakdown_time_and_cost(tmp_path):
    ranks = [
        {"rank": n, "host": EVIL, "compute": 0.5 + n, "exposed_sync": 0.1, "straggler": 0.0,
         "lars": 0.1, "data": 0.0}
        for n in range(2)
    ]  # fmt: skip
    found = study(
        point(1), point(2, 0, 1.5, per_rank=ranks), point(2, 1, 1.6), point(4, failed=EVIL),
        buckets=[{"index": 0, "bytes": 1000, "ready_s": 0.39}], backward_s=0.4, recipe=EVIL,
        tensors=[{"name": EVIL, "bytes": 1000}],
    )  # fmt: skip
    save_study(tmp_path / STUDY, found)
    result = report(tmp_path)
    text = page_of(tmp_path)
    assert "<script" not in text and "1 point(s) failed" in text and "efficiency" in text
    names = {path.stem for path in (tmp_path / "plots").glob("*.svg")}
    assert names >= {"speed-up", "efficiency", "breakdown", "steps", "time-to-train", "cost"}
    assert names >= {"ranks", "buckets"} and result["kind"] == "study"
    with (tmp_path / "tables" / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["efficiency %"]) == pytest.approx(100 / 1.5)
    assert any("At 2 nodes the efficiency is 67%" in f["finding"] for f in result["findings"])


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([point(3)], "One number of nodes alone"),
        ([], "No point has been measured"),
        ([point(1, failed="a"), point(2, failed="b")], "2 point(s) failed"),
    ],
)
def test_a_poor_study_has_a_page_that_says_so(tmp_path, points, words):
    save_study(tmp_path / STUDY, study(*points))
    assert report(tmp_path)["kind"] == "study"
    assert words in page_of(tmp_path)


def test_what_is_neither_is_refused_in_a_line(tmp_path):
    with pytest.raises(InputError, match="neither a run"):
        report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        report(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_prediction_and_published_points_are_beside_what_was_measured(tmp_path):
    recipe = load_recipe("resnet50-32k", ["data.path=/none"])
    found = study(point(1), point(2, 0, 1.1), recipe_toml=to_toml(recipe), site="stampede2")
    save_study(tmp_path / STUDY, found)
    report(tmp_path)
    text = page_of(tmp_path)
    assert "as published for Xeon Phi 7250" in text
    assert (tmp_path / "plots" / "prediction.svg").exists()
    with (tmp_path / "tables" / "prediction.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["nodes"]) for row in rows] == [2**n for n in range(12)]
    for row in rows:
        low, middle, high = (float(row[f"efficiency{end}"]) for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high
    with (tmp_path / "tables" / "scaling.csv").open() as file:
        last = [*csv.DictReader(file)][-1]
    assert float(last["SU"]) == pytest.approx(0.8 * float(last["node-hours"]))
    assert float(last["USD of nodes"]) == 2 * 2436


def test_a_study_that_cannot_be_predicted_says_why(tmp_path):
    save_study(tmp_path / STUDY, study(point(1), point(2), recipe_toml="x = 1"))
    assert any("No prediction:" in notice for notice in report(tmp_path)["notices"])


def test_published_efficiencies_are_those_of_the_paper():
    from knl.report.prediction import PUBLISHED, efficiency_of

    found = {p.name: round(efficiency_of(p), 2) for p in PUBLISHED if p.node_speed}
    # 1.28 million images, 90 epochs, 512 nodes, an hour: 62.6 images/s a node of 79.
    assert (found["ResNet-50, 512 KNL"], found["ResNet-50, 2048 KNL"]) == (0.79, 0.59)
    assert found["AlexNet, 512 KNL"] == 0.27
