"""`knl scale predict`, `backtest`, `cost`: against torch, a study made with known parameters, the
literature's numbers, and input that is wrong."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from knl.cli_scale import app
from knl.config import Model, load_recipe
from knl.errors import InputError
from knl.models import build_model
from knl.profile import save_profile
from knl.scaling import backtest, cost
from knl.scaling.extrap import extrap_of
from knl.scaling.fit import fit_sync
from knl.scaling.known import from_speed, from_study, usable_points
from knl.scaling.layers import forward_flops, layers_of, parameters
from knl.scaling.model import Setting, Sync, batches, step_of
from knl.scaling.predict import describe, prepare, to_json
from knl.scaling.study import STUDY, save_study
from knl.site import load_site
from knl.sysfs import read_topology

from ..topology.trees import TREES
from .test_profile import profile
from .test_study import point, study

RECIPE = load_recipe("resnet50-32k")
NET = load_site("stampede2").network
SITE = ("--site", "stampede2")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("name", "pixels", "planes"),
    [("resnet50", 65, 3), ("resnet-small", 28, 1), ("resnet-small", 9, 1), ("alexnet", 227, 3),
     ("alexnet-bn", 227, 3), ("alexnet-torch", 224, 3)],
)  # fmt: skip
def test_shapes_and_operations_are_those_of_the_networks(name, pixels, planes, monkeypatch):
    for slow in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, slow, lambda tensor, *_, **__: tensor)
    recipe = msgspec.structs.replace(RECIPE, model=Model(name=name))
    layers = layers_of(recipe, pixels, 10, planes)
    model = build_model(recipe.model, planes, 10).eval()
    bytes_of = [parameter.numel() * 4 for parameter in model.parameters()]
    assert [size for layer in layers for size in layer.tensors] == bytes_of
    counted = []

    def count(module, _, output):
        spots = output.shape[2] * output.shape[3] if output.dim() == 4 else 1
        counted.append(2 * module.weight.numel() * spots)

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, planes, pixels, pixels))
    assert forward_flops(layers) == sum(counted)
    assert parameters(layers) == sum(bytes_of) // 4


# A study made by the model itself, with a network that is not the site's.
TRUE = Sync(latency=2.0, bandwidth=0.25, contention=0.05, slowdown=0.1)


def made_study(folder, nodes=(1, 2, 4, 8, 16, 32), truth=TRUE, **changes):
    known = from_speed(RECIPE, 700.0, "made")
    points = []
    for count in nodes:
        step = step_of(known, Setting(NET), truth, count)
        parts = {"compute": step.compute_s, "exposed_sync": step.exposed_s, "straggler": 0.0}
        whole = sum(parts.values())
        parts |= {"lars": 0.0, "data": 0.0, "other": 0.0}
        points.append(point(count, seconds=whole, breakdown=parts))
    # buckets and their times are left out: then they are the recipe's own
    facts = {"recipe": "resnet50-32k", "site": "stampede2", "samples": 1_281_167}
    save_study(folder / STUDY, study(*points, **{**facts, **changes}))
    return folder


def test_a_fit_finds_the_network_that_a_study_was_made_with(tmp_path):
    known, found = from_study(RECIPE, made_study(tmp_path))
    fit = fit_sync(known, Setting(NET), usable_points(found, tmp_path), has_site=True)
    for name in ("latency", "bandwidth", "contention", "slowdown"):
        value, low, high = fit.interval(name)
        assert low <= value <= high
        assert low <= getattr(TRUE, name) <= high, name
    assert fit.interval("bandwidth")[0] == pytest.approx(TRUE.bandwidth, rel=0.3)
    for measured in found.points:
        predicted = step_of(known, Setting(NET), fit.sync, measured.nodes)
        assert predicted.step_s == pytest.approx(measured.step_s.median, rel=0.03)
    # far beyond what was measured, it still holds
    far = step_of(known, Setting(NET), fit.sync, 512).step_s
    assert far == pytest.approx(step_of(known, Setting(NET), TRUE, 512).step_s, rel=0.1)


def test_what_hidden_sums_do_not_say_stays_open(tmp_path):
    truth = Sync(bandwidth=4.0)
    known, found = from_study(RECIPE, made_study(tmp_path, nodes=(1, 2), truth=truth))
    fit = fit_sync(known, Setting(NET), usable_points(found, tmp_path), has_site=True)
    _, low, high = fit.interval("latency")
    assert high / low > 10


def test_a_study_predicts_with_an_interval_around(tmp_path):
    made = prepare(RECIPE, made_study(tmp_path), None, None, None, None)
    result = to_json(made, (1, 8, 512, 2048))
    assert result["site"] == "stampede2"
    for row in result["rows"]:
        assert row["step_s_low"] <= row["step_s"] <= row["step_s_high"]
        assert row["efficiency_low"] <= row["efficiency"] <= row["efficiency_high"]
        assert row["hours_low"] <= row["hours"] <= row["hours_high"]
    assert result["fit"]["points"] == 5
    assert "fitted to 5 points" in describe(result)
    exported = extrap_of(made.study)
    assert exported["parameters"] == ["nodes"]
    assert [m["point"] for m in exported["measurements"]["step"]["time"]] == [
        [1], [2], [4], [8], [16], [32]]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "nodes", "said"),
    [
        ({}, (4,), "a fit needs two or more"),
        ({"parameters": 5}, (1, 2), "5 parameters, resnet50-32k has 25,557,032"),
        ({"points": [point(1), point(2, failed="no")]}, (), "a fit needs two or more"),
        ({"points": [point(1), point(2, breakdown={
            "data": 0, "compute": 9, "straggler": 0, "exposed_sync": 0, "lars": 0, "other": 0})]},
         (), "its parts are 9 s, its step 1 s"),
        ({"points": []}, (), "0 number(s) of nodes"),
    ],
)  # fmt: skip
def test_studies_that_say_too_little_or_contradict_themselves(tmp_path, changes, nodes, said):
    made_study(tmp_path, nodes, **changes) if nodes else save_study(
        tmp_path / STUDY, study(*changes["points"])
    )
    with pytest.raises(InputError) as refused:
        prepare(RECIPE, tmp_path, None, "stampede2", None, None)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1}', "NaN", "[" * 100_000])
def test_studies_that_are_none(tmp_path, text):
    (tmp_path / STUDY).write_text(text)
    with pytest.raises(InputError, match="study"):
        prepare(RECIPE, tmp_path, None, "stampede2", None, None)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1.0", '"1"'])
def test_numbers_that_are_none(tmp_path, number):
    path = made_study(tmp_path, (1, 2)) / STUDY
    path.write_text(path.read_text().replace('"compute": ', f'"compute": {number}, "x": ', 1))
    with pytest.raises(InputError, match="study"):
        prepare(RECIPE, tmp_path, None, "stampede2", None, None)


def test_a_profile_says_how_fast_a_node_is_for_its_own_network_alone(tmp_path):
    node = read_topology(TREES["vm"][0].write(tmp_path / "vm"))
    path = tmp_path / "profile.json"
    save_profile(profile(node), path)
    made = prepare(RECIPE, path, None, "stampede2", None, None)
    assert made.known.image_s == pytest.approx(1 / 8.0)
    with pytest.raises(InputError, match="measured on resnet50, the recipe's"):
        prepare(load_recipe("alexnet-bn-32k"), path, None, "stampede2", None, None)
    empty = msgspec.structs.replace(profile(node), gain=None, trials=())
    save_profile(empty, path)
    with pytest.raises(InputError, match="has no images/s"):
        prepare(RECIPE, path, None, "stampede2", None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--node-images-per-s", "79"), "whose network?"),
        (SITE, "how fast is one node?"),
        ((*SITE, "--node-images-per-s", "79", "--from", "x"), "how fast is one node?"),
        ((*SITE, "--node-images-per-s", "0"), "must be above 0"),
        ((*SITE, "--node-images-per-s", "nan"), "must be above 0"),
        ((*SITE, "--node-images-per-s", "79", "--nodes", "0,1"), "--nodes 0,1"),
        ((*SITE, "--node-images-per-s", "79", "--nodes", "999999999"), "must be 100000 at most"),
        ((*SITE, "--from", "/nowhere/at/all"), "No such file"),
        (("--site", "generic", "--node-images-per-s", "79"), "has no [network]"),
        ((*SITE, "--node-images-per-s", "79", "--extrap", "x"), "needs --from"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(arguments, said):
    refused = run("predict", "resnet50-32k", *arguments).exception
    assert isinstance(refused, InputError)
    assert said in str(refused) and "\n" not in str(refused)


def test_the_contract_of_predict():
    result = run("predict", "resnet50-32k", *SITE, "--node-images-per-s", "79", "--json")
    found = json.loads(result.stdout)
    assert [row["nodes"] for row in found["rows"]] == [2**n for n in range(12)]
    keys = {"nodes", "global_batch", "compute_s", "allreduce_s", "exposed_s", "straggler_s",
            "step_s", "images_per_s", "efficiency", "hours", "node_hours", "cost_usd"}  # fmt: skip
    assert all(keys <= set(row) for row in found["rows"])
    first, half, full = found["rows"][0], found["rows"][9], found["rows"][11]
    assert (first["exposed_s"], first["straggler_s"], first["efficiency"]) == (0, 0, 1)
    assert (half["global_batch"], full["global_batch"]) == (32_768, 32_768)
    assert (half["node_images"], full["node_images"]) == (64, 16)
    assert "keep the global batch of 32,768" in found["assumptions"]["lanes"]
    assert {"nodes", "bytes", "algorithm", "seconds"} <= set(found["allreduce"][0])
    assert 0.5 < half["hours"] < 1.0
    assert half["su"] == pytest.approx(half["node_hours"] * 0.8)
    assert half["hardware_usd"] == 512 * 2436


def test_strong_scaling_keeps_the_batch_and_the_busiest_node_sets_the_pace():
    known = from_speed(RECIPE, 79.0, "given")
    assert batches(known, 1, "strong") == (32_768, 32_768, 64)
    assert batches(known, 60, "strong") == (32_768, 9 * 64, 64)
    assert batches(known, 2048, "strong") == batches(known, 2048, "weak") == (32_768, 16, 16)


def test_published_results_and_how_far_the_model_is_from_them():
    rows = {row["name"]: row for row in backtest.published_rows()}
    assert len(rows) == 8
    hour = rows["ResNet-50, 512 KNL"]
    # by hand: 90 epochs of 39 steps of 64 / 79 s, 102 MB twice over 7 GB/s, scatter, evaluations
    assert hour["predicted_minutes"] == pytest.approx(51.4, abs=1.0)
    assert hour["error"] == pytest.approx(hour["predicted_minutes"] / 60 - 1)
    for row in rows.values():
        if row["error"] is not None:
            assert row["low_minutes"] <= row["predicted_minutes"] <= row["high_minutes"]
            assert row["error"] < 0 and row["why"]  # faster than what was published, all of them
    for point_ in backtest.PUBLISHED:
        if point_.cpu:
            speed = rows[point_.name]["needed_images_per_s"]
            minutes = backtest.minutes(point_, speed, Setting(NET), Sync(overlap=False))
            assert minutes == pytest.approx(point_.minutes, rel=1e-3)
    text = run("backtest").stdout
    assert "Nurion" in text and "SURFsara" in text


def test_cost_has_the_prices_and_the_operations_of_the_literature():
    result = run("cost", "--node-images-per-s", "79", *SITE, "--price", "SKX=5000", "--json")
    found = json.loads(result.stdout)
    systems = {row["name"]: row for row in found["systems"]}
    assert systems["ResNet-50, 512 KNL"]["hardware_usd"] == pytest.approx(1.2e6, rel=0.05)
    assert systems["ResNet-50, 256 P100"]["hardware_usd"] == pytest.approx(4.1e6, rel=0.05)
    assert systems["ResNet-50, 1600 SKX"]["hardware_usd"] == 800 * 5000
    assert systems["resnet50-32k, 512 nodes, predicted"]["top1"] is None
    budget = found["budget"]
    assert budget["forward_flops"] == pytest.approx(1e18, rel=0.1)
    assert budget["training_flops"] == 3 * budget["forward_flops"]
    assert budget["floor_s_forward"] == pytest.approx(5, rel=0.1)
    assert "operations/s" in run("cost").stdout


@pytest.mark.parametrize("price", ["KNL=3", "KNL 7250", "KNL 7250=no", "SKX=-1", "SKX=nan"])
def test_prices_that_are_none(price):
    with pytest.raises(InputError, match="--price"):
        cost.prices_with([price])
