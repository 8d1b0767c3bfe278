"""A study's files: what is read back, what is refused, what its rows say."""

from __future__ import annotations

import json

import msgspec
import pytest

from knl.errors import InputError
from knl.scaling.breakdown import PARTS
from knl.scaling.describe import describe, to_json
from knl.scaling.study import Point, Study, load_study, point_file, read_folder, rows_of, save_study


def point(nodes: int, repetition: int = 0, seconds: float = 1.0, **changes) -> dict:
    facts = {
        "nodes": nodes, "ranks_per_node": 1, "ranks": nodes, "lanes": nodes, "lane_batch": 64,
        "global_batch": 64 * nodes, "repetition": repetition, "steps": 2, "warmup": 2,
        "step_s": {"median": seconds, "p05": seconds, "p95": seconds, "all": [seconds] * 2},
        "images_per_s": 64 * nodes / seconds,
        "breakdown": {part: seconds / len(PARTS) for part in PARTS},
    }  # fmt: skip
    return {**facts, **changes}


def study(*points: dict, **changes) -> Study:
    facts = {"recipe": "r", "recipe_toml": "", "site": None, "scaling": "weak", "hardware": {},
             "stack": {}}  # fmt: skip
    return msgspec.convert({"schema": 1, **facts, "points": points, **changes}, Study)


def test_jobs_write_files_of_their_own_which_are_one_study(tmp_path):
    save_study(point_file(tmp_path, 4), study(point(4)))
    save_study(point_file(tmp_path, 1), study(point(1), parameters=7, tensors=[
        {"name": "w", "bytes": 28}]))  # fmt: skip
    save_study(point_file(tmp_path, 16), study(point(16, failed="no", step_s=None)))
    found = read_folder(tmp_path)
    assert [p.nodes for p in found.points] == [1, 4, 16]
    assert (found.parameters, found.tensors[0].name) == (7, "w")
    assert load_study(point_file(tmp_path, 4)) == study(point(4))


def test_efficiency_is_speed_up_over_ideal():
    one, two, four = rows_of(
        study(point(2, seconds=1.0), point(4, seconds=1.25), point(8, seconds=2.0))
    )
    assert (one.speed_up, one.efficiency) == (1, 1)
    assert (two.ideal, two.efficiency) == (2, pytest.approx(0.8))
    assert (four.speed_up, four.efficiency) == (pytest.approx(2.0), pytest.approx(0.5))


def test_a_row_is_the_middle_repetition_and_consistent_in_itself():
    (row,) = rows_of(study(*(point(1, n, s) for n, s in enumerate((5.0, 1.0, 2.0)))))
    assert (row.step_s, row.images_per_s, row.repetitions) == (2.0, 32.0, 3)
    assert sum(row.breakdown.values()) == pytest.approx(2.0)
    assert (row.images_per_s_low, row.images_per_s_high) == (64 / 5, 64.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 0}, "must be|>= 1"),
        ({"ranks": 3}, "ranks = 3: must be nodes x ranks_per_node"),
        ({"global_batch": 5}, "must be lanes x lane_batch"),
        ({"images_per_s": 5.0}, "images_per_s = 5: must be global_batch over step_s.median"),
        ({"step_s": None}, "or failed must say why not"),
        ({"breakdown": {}}, "breakdown has no data"),
        ({"repetition": "x"}, "repetition"),
    ],
)
def test_a_wrong_point_is_one_line(tmp_path, changes, words):
    path = tmp_path / "study.json"
    good = msgspec.to_builtins(study(point(1)))
    path.write_text(json.dumps({**good, "points": [{**point(1), **changes}]}))
    with pytest.raises(InputError, match=words) as refused:
        load_study(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 2}', '{"schema": 1}', "NaN", "\0"])
def test_a_file_that_is_no_study_is_one_line(tmp_path, content):
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match="measure it anew") as refused:
        read_folder(tmp_path)
    assert "\n" not in str(refused.value)


def test_numbers_that_are_none_are_refused(tmp_path):
    save_study(tmp_path / "study.json", study(point(1)))
    text = (
        (tmp_path / "study.json").read_text().replace('"images_per_s": 64.0', '"images_per_s": NaN')
    )
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=r"study\.json"):
        read_folder(tmp_path)


def test_a_missing_one_and_two_in_one_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="knl scale run makes one"):
        read_folder(tmp_path)
    save_study(point_file(tmp_path, 1), study(point(1)))
    save_study(point_file(tmp_path, 2), study(point(2), scaling="strong"))
    with pytest.raises(InputError, match="is of another study"):
        read_folder(tmp_path)
    save_study(point_file(tmp_path, 2), study(point(2), point(2)))
    with pytest.raises(InputError, match="is there twice"):
        read_folder(tmp_path)


def test_the_words_are_defined_in_the_output(tmp_path):
    found = study(point(1), point(2, failed="it broke", step_s=None), cores_per_rank=1)
    text = describe(found, tmp_path)
    for word in ("baseline:", "ideal:", "efficiency:", "straggler:", "stand for nodes", "it broke"):
        assert word in text
    told = json.loads(json.dumps(to_json(found, tmp_path)))
    assert told["rows"][0]["efficiency"] == 1 and "ideal" in told["words"]
    assert told["note"].startswith("Ranks of one machine")


def test_no_points_is_no_rows():
    assert rows_of(study()) == []
    assert Point(**point(1)).failed is None
