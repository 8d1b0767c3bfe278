"""Recipes: what is accepted, and how what is not is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from knl.config import load_recipe, recipe_names, require_ranks_fit, to_toml
from knl.errors import InputError

# override: words that the one line must hold (key, value, what it may be, the cure)
REFUSED = {
    "train.lans=4": ["train.lans", "unknown key", "did you mean lanes?"],
    "trian.lanes=4": ["trian", "did you mean train?"],
    "train.lanes=0": ["train.lanes = 0", ">= 1"],
    "train.lanes=many": ["train.lanes = 'many'", "int"],
    "train.lanes=1.5": ["train.lanes = 1.5", "int"],
    "train.lanes=true": ["train.lanes = True", "int"],
    "train.lane_batch=-64": ["train.lane_batch = -64", ">= 1"],
    "train.epochs=0": ["train.epochs = 0", "> 0"],
    "train.epochs=nan": ["train.epochs = nan"],
    "train.epochs=inf": ["train.epochs = inf"],
    "train.seed=-1": ["train.seed = -1", ">= 0"],
    "train.seed=99999999999999999999": ["train.seed = 9999"],
    "train.dtype=fp16": ["train.dtype = 'fp16'", "fp32, bf16"],
    "train.layout=nchw": ["train.layout = 'nchw'", "contiguous, channels_last"],
    "schedule.lr=-0.1": ["schedule.lr = -0.1", ">= 0"],
    "schedule.lr=nan": ["schedule.lr = nan"],
    "schedule.decay=cosine": ["schedule.decay = 'cosine'", "poly, multi-step, constant"],
    "schedule.milestones=[30, -1]": ["schedule.milestones.1 = -1", ">= 0"],
    "optim.form=lamb": ["optim.form = 'lamb'", "paper, torch, nus, larc, sgd"],
    "optim.momentum=1": ["optim.momentum = 1", "< 1"],
    "optim.eta=0": ["optim.eta = 0", "> 0"],
    "optim.skip=bias": ["optim.skip = 'bias'", "array"],
    "model.name=resnet51": ["model.name = 'resnet51'", "resnet50"],
    "model=resnet50": ["model = 'resnet50'", "object"],
    "data.classes=1": ["data.classes = 1", ">= 2"],
    "comm.timeout_s=0": ["comm.timeout_s = 0", "> 0"],
    "nonsense": ["--set nonsense", "key=value"],
    "=3": ["--set =3", "key=value"],
    "name.first=x": ["name is a value, not a table"],
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_values_are_refused_in_one_line_with_key_value_and_range(override):
    with pytest.raises(InputError) as refusal:
        load_recipe("digits", [override])
    message = str(refusal.value)
    assert all(word in message for word in REFUSED[override]), message
    assert "\n" not in message


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match=r"image_size = 200: smaller than data.crop = 224"):
        load_recipe("resnet50-bench", ["data.image_size=200", "data.crop=224"])
    with pytest.raises(InputError, match=r"milestones = \[60.0, 30.0\]: must ascend"):
        load_recipe("resnet50-8k", ["schedule.milestones=[60, 30]"])


def test_more_ranks_than_lanes_are_refused_with_the_set_that_keeps_the_batch():
    recipe = load_recipe("resnet50-32k")
    require_ranks_fit(recipe, 512)
    with pytest.raises(InputError) as refusal:
        require_ranks_fit(recipe, 1000)
    cure = ["train.lanes=1024", "train.lane_batch=32"]
    assert all(f"--set {override}" in str(refusal.value) for override in cure)
    mended = load_recipe("resnet50-32k", cure)
    require_ranks_fit(mended, 1000)
    assert mended.global_batch == recipe.global_batch == 32768


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_a_round_trip_through_its_resolved_form(name, tmp_path):
    recipe = load_recipe(name)
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert recipe.name == name


def test_the_published_recipes_have_the_published_numbers():
    nus = load_recipe("resnet50-32k")
    assert (nus.global_batch, nus.train.epochs, nus.schedule.lr) == (32768, 90, 32)
    goyal = load_recipe("resnet50-8k")
    assert (goyal.global_batch, goyal.schedule.lr, goyal.optim.form) == (8192, 3.2, "sgd")
    alexnet = load_recipe("alexnet-bn-32k")
    assert (alexnet.global_batch, alexnet.train.epochs, alexnet.schedule.lr) == (32768, 100, 22)
    assert load_recipe("alexnet-4k").global_batch == 4096


def test_overrides_take_toml_values_and_bare_words():
    recipe = load_recipe(
        "digits", ["train.epochs=3", "optim.form=nus", "data.path=/a b", "optim.skip=[]"]
    )
    assert (recipe.train.epochs, recipe.optim.form) == (3, "nus")
    assert (recipe.data.path, recipe.optim.skip) == ("/a b", ())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[train", "is not TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "model is missing"),
        (b"[model]\n[data]\nname = 'digits'\n[train]\n[schedule]\n", "model.name is missing"),
    ],
)
def test_a_damaged_recipe_file_is_named(content, words, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        load_recipe(str(path))
    assert words in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match=r"'digit' not found, did you mean digits\?"):
        load_recipe("digit")
    with pytest.raises(InputError, match=r"missing\.toml"):
        load_recipe(str(Path("no") / "missing.toml"))
