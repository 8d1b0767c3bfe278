"""The jobs of `knl scale submit`: what is in them, what is refused before Slurm is asked."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from knl.cli import app
from knl.errors import InputError
from knl.scaling.submit import Asked, jobs_of
from knl.site import load_site


def jobs(site: str, counts=(1, 512), name="r", seconds=1800, folder="/f", **more):
    asked = Asked(name, ["r", "--set", "a=$(touch x)'\n"], counts, Path(folder), seconds, **more)
    return jobs_of(load_site(site), asked)


def test_a_job_has_its_site_s_queue():
    small, large = jobs("stampede2")
    assert [job.queue.name for job in (small, large)] == ["normal", "large"]
    assert large.to_json("")["su"] == pytest.approx(512 * 0.4)
    assert "#SBATCH --nodes=512\n" in large.script and "#SBATCH --time=00:30:00\n" in large.script
    assert "exclusive" not in large.script and "--mem" not in large.script


def test_a_script_is_bash_and_its_words_are_those_that_were_given():
    for site in ("generic", "stampede2", "stampede3"):
        (job,) = jobs(site, counts=(1,), folder="/a b/$(c)'d")
        assert subprocess.run(["bash", "-n"], input=job.script, text=True).returncode == 0
        begin = job.script.index("\nset -- ") + 8
        words = shlex.split(job.script[begin : job.script.index("# --- end of settings")])
        assert words[-2:] == ["--out", "/a b/$(c)'d"] and "a=$(touch x)'\n" in words
        assert f"export KNL_SITE={site}\n" in job.script


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"counts": (4096,)}, "stampede2: no queue takes 4096 nodes"),
        ({"seconds": 900_000}, "no queue takes 1 nodes for 250 h"),
        ({"queue": "none"}, "--queue none: stampede2 has normal"),
        ({"counts": (64,), "queue": "development"}, "development takes 16 nodes, not 64"),
    ],
)
def test_what_no_queue_takes_is_refused(more, words):
    with pytest.raises(InputError, match=words):
        jobs("stampede2", **{"counts": (1,), **more})


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["scale", "submit", "digits", "--nodes", "1,2,4", "--dry-run", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert [job["nodes"] for job in told["jobs"]] == [1, 2, 4]
    assert {job["job_id"] for job in told["jobs"]} == {None}
    assert list(tmp_path.iterdir()) == []


def test_what_the_job_would_refuse_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["scale", "submit", "digits", "--nodes", "1,64", "--strong", "--dry-run"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert "fewer than the 64 ranks" in str(done.exception)
