"""`knl submit`: the queue it takes, what it refuses, the script it writes, and what Slurm says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knl.errors import InputError
from knl.site import JOBS, load_site
from knl.site import SITES as FOLDER
from knl.slurm.queues import choose_queue
from knl.slurm.render import Order, render, slurm_time
from knl.slurm.submit import Wish, prepare, seconds_of

from ..mpi.launch import knl
from .jobs import RANK, SlurmJob

GOLDEN = Path(__file__).parent / "golden"
LADDER = [2**power for power in range(10)]
SITES = {"generic": LADDER, "stampede2": LADDER, "stampede3": [1, 16, 32, 256]}


def script(site: str, nodes: int, *arguments: str, **wishes: object) -> str:
    wish = Wish("resnet50-32k", arguments, nodes, 2 * 3600)
    return prepare(load_site(site), dataclasses.replace(wish, **wishes)).script


def portable(text: str) -> str:
    """Without the folders of this machine."""
    return text.replace(str(JOBS.resolve()), "/knl/slurm").replace(sys.prefix, "/knl/env")


@pytest.mark.parametrize(("site", "nodes"), [(s, n) for s in SITES for n in SITES[s]])
def test_scripts_are_as_they_were(site, nodes):
    """A change is meant: KNL_GOLDEN=write pytest tests/slurm/test_submit.py, and read the diff."""
    path = GOLDEN / f"{site}-{nodes}.sbatch"
    text = portable(script(site, nodes))
    if os.environ.get("KNL_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
    subprocess.run(["bash", "-n", path], check=True)


def test_every_site_has_its_scripts():
    assert set(SITES) == {path.stem for path in FOLDER.glob("*.toml")}


def test_512_nodes_of_stampede2_are_large_and_whole():
    lines = script("stampede2", 512).splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert "#SBATCH --partition=large" in directives
    assert "#SBATCH --ntasks=512" in directives
    for refused in ("--mem", "--array", "--export", "--exclusive"):
        assert not [line for line in directives if refused in line]
    assert not [line for line in directives if "$" in line]
    assert "export KNL_LAUNCHER=ibrun" in lines


@pytest.mark.parametrize(
    ("site", "nodes", "hours", "name", "expected"),
    [
        ("stampede2", 1, 2, "", "normal"),
        ("stampede2", 256, 48, "", "normal"),
        ("stampede2", 257, 48, "", "large"),
        ("stampede2", 8, 100, "", "long"),
        ("stampede2", 16, 2, "development", "development"),
        ("stampede3", 256, 2, "", "skx"),
        ("stampede3", 32, 2, "spr", "spr"),
    ],
)
def test_the_queue_is_chosen_by_nodes_and_time(site, nodes, hours, name, expected):
    queue = choose_queue(load_site(site), nodes, hours, name)
    assert queue is not None and queue.name == expected


@pytest.mark.parametrize(
    ("nodes", "hours", "name", "said"),
    [
        (512, 2, "normal", "stampede2 normal takes 256 nodes, not 512; large takes 2048 and needs "
         "a ticket"),
        (1, 3, "development", "stampede2 development takes 2 h, not 3; normal takes 48 h"),
        (4096, 2, "", "stampede2: no queue takes 4096 nodes for 2 h: normal takes 256 nodes"),
        (1, 2, "nrmal", "--queue nrmal: stampede2 has normal, large"),
    ],
)  # fmt: skip
def test_refusals_name_the_limit_and_the_cure(nodes, hours, name, said):
    with pytest.raises(InputError) as refused:
        choose_queue(load_site("stampede2"), nodes, hours, name)
    assert str(refused.value).startswith(said)


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0.1, 200.0))
def test_a_chosen_queue_takes_the_job(nodes, hours):
    for name in SITES:
        site = load_site(name)
        try:
            queue = choose_queue(site, nodes, hours)
        except InputError:
            assert all(nodes > q.nodes or hours > q.hours for q in site.queues)
        else:
            assert queue is None or (nodes <= queue.nodes and hours <= queue.hours)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("2h", 7200), ("1-02:03:04", 93784), ("02:00:00", 7200), ("2d", 172800)],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "2:00", "30s", "-1h", "1e9x"])
def test_times_that_are_none(text):
    with pytest.raises(InputError, match="--time"):
        seconds_of(text)


@settings(deadline=None)
@given(st.integers(60, 10**7))
def test_a_time_survives(seconds):
    assert seconds_of(slurm_time(seconds)) == seconds


@pytest.mark.one_stack
@settings(deadline=None, max_examples=40)  # each starts a bash and a Python
@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))))
def test_arguments_and_settings_survive_the_shell(words):
    """Whatever a user has typed is one word in the script, and nothing in it is run."""
    order = Order("train.sbatch", "n", words, 1, 60, settings={"KNL_RUN_DIR": "".join(words)})
    text = render(load_site("generic"), None, order)
    head, _, _ = text.partition("# --- end of settings")
    show = 'python3 -c \'import os, sys, json; print(json.dumps([os.environ["KNL_RUN_DIR"], sys.argv[1:]]))\' "$@"'  # noqa: E501
    done = subprocess.run(["bash", "-c", f"{head}\n{show}"], capture_output=True, text=True)
    assert json.loads(done.stdout) == ["".join(words), words], done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("launche = 'srun'", "launche: unknown key, did you mean launcher?"),
        ("[[queues]]\nname = 'a'\nnodes = 4\nhour = 1", "queues.0.hour: unknown key, did you mean "
         "hours?"),
        ("[[queues]]\nname = 'a'\nnodes = 0\nhours = 1", "queues.0.nodes = 0: must be int >= 1"),
        ("[network]\nlatency = 2", "network.latency: unknown key, did you mean latency_us?"),
        ("directives = ['exclusive']", "must be an option such as --exclusive"),
        ("[[queues]]\nname = 'a'\nnodes = 1\nhours = 1\n" * 2, "a is there twice"),
    ],
)  # fmt: skip
def test_a_site_is_refused_by_the_name_of_its_key(tmp_path, line, said):
    path = tmp_path / "s.toml"
    path.write_text(f"title = 'x'\n{line}\n")
    with pytest.raises(InputError) as refused:
        prepare(load_site(str(path)), Wish("digits", [], 1, 3600))
    assert said in str(refused.value)


@pytest.mark.parametrize("change", [{"title": "a\nrm -rf x"}, {"directives": ("--x=1\n#",)}])
def test_lines_of_a_site_take_no_second_line(change):
    site = msgspec.structs.replace(load_site("generic"), **change)
    with pytest.raises(InputError, match="must be in one line"):
        render(site, None, Order("train.sbatch", "n", [], 1, 60))


def test_a_site_adds_and_leaves_out_directives_and_ends_without_its_modules():
    site = msgspec.structs.replace(
        load_site("generic"),
        directives=("-C knl&quad", "--signal=B:USR1@600"),
        leave_out=("exclusive", "signal"),
        modules=("impi/2021 8",),
        prologue=("ulimit -c 0",),
        account="site",
    )
    lines = render(site, None, Order("train.sbatch", "n", [], 1, 60, account="mine")).splitlines()
    assert "#SBATCH -C knl&quad" in lines and "#SBATCH --account=mine" in lines
    assert not [line for line in lines if "--exclusive" in line or "B:USR1@120" in line]
    place = lines.index("module load 'impi/2021 8' || exit 2")
    assert lines[place + 1] == "ulimit -c 0"


def test_no_charge_is_made_up():
    site = load_site("generic")
    job = prepare(site, Wish("digits", [], 1, 3600, queue="q"))
    assert "#SBATCH --partition=q" in job.script.splitlines()
    assert job.to_json("")["su"] is None and "SU" not in job.script.split("#SBATCH")[0]


def test_the_last_override_wins_however_it_is_written():
    with pytest.raises(InputError, match="lanes=2: fewer"):
        prepare(
            load_site("generic"),
            Wish("digits", ["--set", "train.lanes=8", "--set=train.lanes=2"], 4, 3600),
        )
    prepare(
        load_site("generic"),
        Wish("digits", ["--set=train.lanes=2", "--set", "train.lanes=8"], 4, 3600),
    )


def test_lines_of_sbatch_take_no_second_line():
    with pytest.raises(InputError, match="must be in one line"):
        script("generic", 1, account="a\n#SBATCH --nodes=9")


def cli(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        knl("submit", *arguments), cwd=cwd, env=env, capture_output=True, text=True
    )


def test_a_dry_run_prints_the_script_and_what_it_costs(tmp_path):
    done = cli("resnet50-32k", "-N", "512", "--site", "stampede2", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert portable(done.stdout) == (GOLDEN / "stampede2-512.sbatch").read_text()
    assert "at most 1,024.0 node-hours, 819.2 SU" in done.stderr
    assert "stampede2 large needs a ticket" in done.stderr
    assert "knl bundle packs" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("resnet50-32k", "-N", "4", "--site", "stampde2"), "did you mean stampede2?"),
        (("resnet50-32k", "-N", "1024"), "train.lanes=512: fewer than the 1024 ranks"),
        (("resnet-32k", "-N", "4"), "recipe 'resnet-32k' not found"),
        (("digits", "-N", "1", "--set", "train.epoch=1"), "did you mean epochs?"),
        (("digits", "-N", "1", "--after", "x"), "--after x: must be the number of a job"),
        (("digits", "-N", "1", "--bundle", "gone.tar"), "knl bundle makes one"),
        (("digits", "-N", "1", "--time", "9999d"), "must be from a minute to a year"),
        (("digits", "-N", "1", "--", "--nonsense"), "knl train refuses that: No such option"),
        (("digits", "-N", "1", "--", "--set"), "knl train refuses that: "),
        (("digits", "-N", "1", "--", "-n", "2"), "-n 2: a job's ranks are --nodes x"),
        (("digits", "-N", "1", "--", "--print"), "a job trains"),
        (("digits", "-N", "1", "--run-dir", "a", "--", "--run-dir", "b"), "give one of the two"),
    ],
)
def test_what_would_fail_later_is_refused(tmp_path, arguments, said):
    done = cli("--dry-run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_without_slurm_it_says_so(tmp_path):
    done = cli("digits", "-N", "1", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2 and "no sbatch on PATH" in done.stderr


def site_of_test(folder: Path) -> Path:
    path = folder / "here.toml"
    path.write_text(
        'title = "the tests\' cluster"\nprologue = ["export OMP_NUM_THREADS=1 FI_PROVIDER=tcp"]\n'
        '[[queues]]\nname = "normal"\nnodes = 8\nhours = 48.0\njobs = 1\nsu = 2.0\n'
    )
    return path


def test_slurm_takes_the_jobs_one_after_the_other_and_trains(cluster, tmp_path):
    site = ("--site", str(site_of_test(tmp_path)))
    environment = {**cluster.environment, **RANK}
    short = ("digits", "-N", "2", *site, "--set", "train.steps=3", "--json")
    done = cli(*short, "--run-dir", "first run", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["queue"], told["nodes"], told["su"]) == ("normal", 2, 8.0)
    again = cli(*short, cwd=tmp_path, **environment)
    assert again.returncode == 2
    assert f"normal takes 1 job(s) of a user, and {told['job_id']} are there" in again.stderr
    job = SlurmJob(cluster, told["job_id"], tmp_path / f"knl-digits-{told['job_id']}.out")
    assert job.end() == "COMPLETED", job.text()
    after = cli(*short, "--after", told["job_id"], cwd=tmp_path, **environment)
    second = json.loads(after.stdout)["job_id"]
    job = SlurmJob(cluster, second, tmp_path / f"knl-digits-{second}.out")
    assert job.end() == "COMPLETED", job.text()
    command = knl("status", "first run")
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.stdout.startswith(f"first run: digits, job {told['job_id']} done, step 3 of 3, ")


@pytest.mark.one_stack
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.stem)
def test_slurm_would_take_every_script(cluster, path):
    """As many nodes as there are. Those of more are seen as they stand in test_512."""
    nodes = min(8, int(path.stem.rpartition("-")[2]))
    size = (f"--nodes={nodes}", f"--ntasks={nodes}")
    done = cluster.run("sbatch", "--test-only", *size, str(path))
    assert done.returncode == 0, done.stderr
