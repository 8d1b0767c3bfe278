"""`knl train` with real ranks: the same training whatever their number and their provider."""

from __future__ import annotations

import json
import math
import re
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from .launch import knl, run
from .runs import EPOCHS, STEPS, Run, train_digits

TEAMS = [(2, "auto"), (3, "oneccl"), (4, "oneccl"), (3, "mpi"), (2, "gloo")]


@pytest.fixture(scope="module", params=TEAMS, ids="{0[0]}-{0[1]}".format)
def team(request, tmp_path_factory) -> tuple[Run, int, str]:
    """Digits, trained by several ranks, with their number and the provider they should take."""
    ranks, provider = request.param
    folder = tmp_path_factory.mktemp("team")
    done = train_digits(folder, ranks, "--provider", provider, "--run-dir", str(folder / "run"))
    return done, ranks, provider.replace("auto", "oneccl")


def test_losses_do_not_depend_on_the_number_of_ranks(single, team):
    trained, _, _ = team
    assert len(single.losses) == STEPS
    assert single.losses[-1] < single.losses[0] - 0.04
    assert trained.losses == pytest.approx(single.losses, abs=1e-4)
    assert trained.result["loss"] == pytest.approx(single.result["loss"], abs=1e-3)


def test_stdout_is_one_json_object_that_says_what_was_run(team):
    trained, ranks, provider = team
    assert trained.done.stdout.count("\n") == 1
    result = trained.result
    assert list(result) == [
        "run_dir", "recipe", "top1", "top5", "loss", "steps", "epochs", "damaged_records",
        "images_per_s", "ranks", "lanes", "global_batch", "provider", "layout", "plan", "stage",
        "start_s", "wall_s",
    ]  # fmt: skip
    wanted = {
        "run_dir": str(trained.folder),
        "recipe": "digits",
        "steps": STEPS,
        "epochs": EPOCHS,
        "ranks": ranks,
        "lanes": 4,
        "global_batch": 256,
        "provider": provider,
    }
    assert {key: result[key] for key in wanted} == wanted
    assert 0.1 < result["top1"] < result["top5"] <= 1.0
    assert set(result["start_s"]) == {"Python", "MPI", "collectives", "data and network"}
    assert sum(result["start_s"].values()) < result["wall_s"]
    assert result["images_per_s"] > 0 and result["wall_s"] > 0


def test_stderr_names_the_provider_and_nobody_complains(team):
    trained, ranks, provider = team
    lines = trained.done.stderr.splitlines()
    assert f"{STEPS} steps; {ranks} rank(s) over {provider} " in lines[0]
    (weights,) = {row["weights_crc32"] for row in trained.rows if "weights_crc32" in row}
    assert lines[-1].startswith(f"weights {weights} on all {ranks} rank(s)")
    assert not [line for line in lines if "warn" in line.lower() or "error" in line.lower()]


def test_every_step_has_a_row_of_metrics(team):
    trained, _, _ = team
    assert [row["step"] for row in trained.steps] == list(range(1, STEPS + 1))
    for row in trained.steps:
        assert list(row) == [
            "step", "epoch", "loss", "lr", "images_per_s", "t_data", "t_compute",
            "t_forward", "t_comm_exposed", "t_optim", "trust_min", "trust_max",
        ]  # fmt: skip
        assert all(math.isfinite(value) and value >= 0 for value in row.values())
        assert row["trust_min"] <= row["trust_max"]
    assert trained.steps[-1]["epoch"] == EPOCHS


def test_the_environment_is_written_down(team):
    trained, ranks, provider = team
    environment = json.loads((trained.folder / "environment.json").read_text())
    assert (environment["ranks"], environment["launcher"]) == (ranks, "mpi")
    assert environment["provider"].startswith(f"{provider} ")
    assert len(environment["hosts"]) == 1


def test_tensorboard_can_read_the_curves(team):
    trained, _, _ = team
    (events,) = trained.folder.glob("events.out.tfevents.*")
    data, curves = events.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            curves.setdefault(value.tag, {})[event.step] = value.simple_value
        data = data[16 + length :]
    for key in ("loss", "lr", "images_per_s", "trust_min", "trust_max"):
        wanted = {row["step"]: row[key] for row in trained.steps}
        assert curves[f"train/{key}"] == pytest.approx(wanted, rel=1e-6)
    for key in ("top1", "top5", "loss"):
        assert curves[f"test/{key}"] == {STEPS: pytest.approx(trained.result[key], rel=1e-6)}


def test_one_rank_is_alone_and_makes_its_own_run_directory(single):
    assert (single.result["ranks"], single.result["provider"]) == (1, "single")
    assert re.fullmatch(r"runs/digits-[0-9-]+", single.result["run_dir"])
    assert (single.folder / "recipe.toml").exists()


def test_a_run_that_blows_up_ends_in_one_line_with_step_and_layer(tmp_path):
    settings = ("schedule.lr=1e6", "schedule.warmup_epochs=0", "optim.form=sgd")
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = run(knl("train", "digits", "-n", "2", "--json", *overrides), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    *before, line = done.stderr.splitlines()
    assert not [other for other in before if other.startswith("knl: ")]
    assert re.match(r"knl: step \d+: gradient of [\w.]+ is not finite, .*; lr was \d+: ", line)


def test_a_run_notes_trust_ratios_by_layer_and_where_its_ranks_are(single):
    lines = (single.folder / "trust.jsonl").read_text().splitlines()
    trust = [json.loads(line) for line in lines]
    assert [row["step"] for row in trust] == list(range(1, STEPS + 1))
    for noted, step in zip(trust, single.steps):
        ratios = noted["trust"].values()
        assert min(ratios) == pytest.approx(step["trust_min"], rel=1e-3)
        assert max(ratios) == pytest.approx(step["trust_max"], rel=1e-3)
    placement = json.loads((single.folder / "environment.json").read_text())["placement"]
    (row,) = placement["rows"]
    assert "C" in row and len(row) == len(placement["first_cpus"])
