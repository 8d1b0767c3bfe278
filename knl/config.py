"""Recipes: what to train. Read from TOML, checked in full before anything starts."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec
import tomli_w
from msgspec import Meta

from knl.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"

# CPU flags of which one makes bfloat16 faster than float32.
BF16_ISA = ("avx512_bf16", "amx_bf16")
# The one without which oneCCL cuts sums of bfloat16 off, where it should round them.
_ROUNDING_ISA = "avx512_bf16"

_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]
_AboveZero = Annotated[float, Meta(gt=0, le=1e6)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table: unknown keys, wrong types and numbers out of range are refused by name."""


class Model(Section, frozen=True):
    """What network. `zero_init_gamma`: the last BatchNorm of a residual block starts at 0."""

    name: Literal["resnet50", "resnet-small", "alexnet", "alexnet-bn", "alexnet-torch"]
    zero_init_gamma: bool = False
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.5


class Data(Section, frozen=True):
    """What samples. `path`: folder of a set on disk. `image_size`: pixels a side as stored, 0 for
    the set's own; `crop`: as trained, 0 for the whole picture. `samples`, `classes`: of the
    synthetic set. `chunk`: neighbouring records that stay together when an epoch is shuffled.
    Of packed sets alone: `colour_jitter`: brightness, contrast and saturation times 1 +- so much;
    `lighting`: deviations of AlexNet's PCA lighting (0.1 there); `max_damaged`: records that may
    be replaced before the run stops. `prefetch_mb`: MiB of batches made ahead on each rank."""

    name: Literal["digits", "fashion-mnist", "synthetic", "packed"]
    path: str = ""
    image_size: _Count = 0
    crop: _Count = 0
    augment: Literal["none", "crop-flip", "random-resized-crop"] = "none"
    classes: Annotated[int, Meta(ge=2)] = 1000
    samples: _Positive = 65536
    chunk: _Positive = 1
    colour_jitter: _Share = 0.0
    lighting: _Share = 0.0
    max_damaged: _Count = 10
    prefetch_mb: _AboveZero = 256.0


class Train(Section, frozen=True):
    """How long and how wide. The global batch is lanes x lane_batch. `steps`: stop after so many,
    0 for all epochs. `eval_every`: epochs between evaluations, 0 for the last alone. `dtype`:
    "bf16" for activations and what convolutions and matrix products read, in bfloat16; weights,
    momentum, statistics, sums and the loss stay float32. `slow_bf16`: take it where it is slower
    than fp32, too. `layout`: of pictures and weights in memory; "ipex": weights as Intel's
    extension packs them; "auto": what the node's plan says. `compile`: by torch.compile.
    `checkpoint_minutes`: between checkpoints, 0 for the ends of epochs and of the run alone;
    `keep_checkpoints`: how many of the last, beside the best. `on_nonfinite`: what to do when a
    loss or a gradient is no number; "skip" leaves the step's update out, up to `max_skipped`
    times."""

    epochs: _AboveZero
    lanes: _Positive
    lane_batch: _Positive
    steps: _Count = 0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    eval_every: _Count = 1
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    slow_bf16: bool = False
    layout: Literal["auto", "blocked", "contiguous", "channels_last", "ipex"] = "auto"
    compile: bool = False
    checkpoint_minutes: _NotNegative = 10.0
    keep_checkpoints: _Positive = 3
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: _Count = 10


class Optim(Section, frozen=True):
    """LARS or SGD. `form`: see knl.optim.lars; `eta`: the trust coefficient; `skip`: what gets
    neither trust ratio nor weight decay."""

    form: Literal["paper", "torch", "nus", "larc", "sgd"] = "paper"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    weight_decay: _NotNegative = 5e-4
    eta: _AboveZero = 0.001
    skip: tuple[str, ...] = ("bias", "norm")


class Schedule(Section, frozen=True):
    """The learning rate: see knl.optim.schedule."""

    lr: _NotNegative
    warmup_epochs: _NotNegative = 0.0
    warmup_lr: _NotNegative = 0.0
    decay: Literal["poly", "multi-step", "constant"] = "poly"
    power: _AboveZero = 2.0
    milestones: tuple[_NotNegative, ...] = ()
    gamma: _Share = 0.1


class Comm(Section, frozen=True):
    """Gradient sync. `dtype`: of gradients between nodes ("bf16": each addition rounds to
    bfloat16); within a node, in shared memory, they are summed in float32. `bucket_mb`: MiB of
    gradients summed together; "auto": what the node's plan says. `timeout_s`: seconds to wait for
    the other ranks before giving the run up."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    bucket_mb: Union[_AboveZero, Literal["auto"]] = "auto"
    first_bucket_mb: _AboveZero = 1.0
    timeout_s: _AboveZero = 300.0


class Recipe(Section, frozen=True):
    """One training run, in full."""

    name: str
    model: Model
    data: Data
    train: Train
    schedule: Schedule
    optim: Optim = Optim()
    comm: Comm = Comm()

    @property
    def global_batch(self) -> int:
        return self.train.lanes * self.train.lane_batch


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or by the path of its TOML file, with `key=value` overrides.

    Raises InputError in one line that names the key, its value and what it may be.
    """
    path, table = read_table("recipe", name, RECIPES)
    for override in overrides:
        _override(table, override)
    recipe = convert(table, Recipe, path)
    _check_together(recipe)
    return recipe


def read_table(what: str, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The TOML file of a name in `folder`, or of a path, and its table. Raises InputError when
    it is not there or cannot be read."""
    path = Path(name) if name.endswith(".toml") or "/" in name else folder / f"{name}.toml"
    try:
        return path, {"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = sorted(path.stem for path in folder.glob("*.toml"))
        raise InputError(
            f"{what} {name!r} not found{nearest(name, known)}; known: {', '.join(known)}, "
            "or the path of a .toml file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} {path} is not TOML: {error}") from None


def to_toml(recipe: Recipe) -> str:
    """The recipe as resolved: every key, defaults too. `load_recipe` reads it back."""
    return tomli_w.dumps(cast("Mapping[str, Any]", msgspec.to_builtins(recipe)))


def require_ranks_fit(recipe: Recipe, ranks: int) -> None:
    """Raise InputError when there are more ranks than lanes, with the --set that would mend it."""
    lanes, lane_batch = recipe.train.lanes, recipe.train.lane_batch
    if ranks <= lanes:
        return
    parts = next(
        (p for p in range(2, lane_batch + 1) if lane_batch % p == 0 and lanes * p >= ranks), 0
    )
    cure = f"use at most {lanes} ranks"
    if parts:
        cure += (
            f", or keep the global batch of {recipe.global_batch} with smaller lanes: --set "
            f"train.lanes={lanes * parts} --set train.lane_batch={lane_batch // parts} "
            "(changes the BatchNorm groups, and so the trajectory)"
        )
    raise InputError(f"train.lanes={lanes}: fewer than the {ranks} ranks; {cure}")


def require_cpu_fits(recipe: Recipe, isa: Collection[str]) -> None:
    """Raise InputError where bfloat16 is asked for on a CPU (its flags) that is no good at it."""
    if recipe.train.dtype == "bf16" and not recipe.train.slow_bf16 and not set(BF16_ISA) & set(isa):
        raise InputError(
            f"train.dtype = 'bf16': slower than fp32 on this CPU, which has neither "
            f"{' nor '.join(BF16_ISA)}; use train.dtype = 'fp32', or --set train.slow_bf16=true to "
            "train with it all the same"
        )
    if recipe.comm.dtype == "bf16" and _ROUNDING_ISA not in isa:
        raise InputError(
            f"comm.dtype = 'bf16': on this CPU, which has no {_ROUNDING_ISA}, oneCCL cuts each sum "
            "of bfloat16 off instead of rounding it (0.2 % too small); use comm.dtype = 'fp32'"
        )


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: must be key=value, such as --set train.epochs=3")
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: {section} is a value, not a table")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text  # a word without quotes, as a shell leaves it


_Kind = TypeVar("_Kind", bound=Section)


def convert(table: dict[str, Any], kind: type[_Kind], path: Path) -> _Kind:
    """A TOML table as a Section. Raises InputError that names file, key, value and what it may be:
    msgspec's check, with its message turned into one that shows the value and the cure."""
    _refuse_unknown(table, kind, "", path)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        keys = re.findall(r"[^.`\[\]]+", place)
        value: Any = table
        for key in keys:
            if key.isdigit() and isinstance(value, list):
                value = value[int(key)]
            elif isinstance(value, Mapping):
                value = value.get(key)
        name = ".".join(keys) or kind.__name__.lower()
        if message.startswith("Object missing required field"):
            missing = message.split("`")[1]
            where = f"{name}.{missing}" if keys else missing
            raise InputError(f"{path}: {where} is missing") from None
        raise InputError(f"{path}: {name} = {value!r}: {_plain(message, kind, keys)}") from None


def _plain(message: str, kind: type[msgspec.Struct], keys: Sequence[str]) -> str:
    if message.startswith("Invalid enum value"):
        options = _field(kind, keys).__args__
        return f"must be one of {', '.join(map(str, options))}"
    return message.replace("Expected", "must be", 1).replace("`", "")


def _field(kind: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not key.isdigit():
            kind = next(f.type for f in msgspec.structs.fields(kind) if f.name == key)
    return kind


def _refuse_unknown(table: Mapping[str, Any], kind: Any, place: str, path: Path) -> None:
    """msgspec refuses unknown keys too, but does not know the nearest right one."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise InputError(
                f"{path}: {place}{key}: unknown key{nearest(key, list(fields))}; "
                f"known: {', '.join(fields)}"
            )
        inner = _table_kind(fields[key])
        if inner is not None and isinstance(value, dict):
            _refuse_unknown(value, inner, f"{place}{key}.", path)
        elif inner is not None and isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    _refuse_unknown(item, inner, f"{place}{key}.{number}.", path)


def _table_kind(kind: Any) -> Any:
    """The table among a field's types: itself, or what a tuple or an Optional holds."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is None and isinstance(part, type) and issubclass(part, msgspec.Struct):
            return part
    return None


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for a misspelt word: the known one that is like it, else nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _check_together(recipe: Recipe) -> None:
    """What no single field can know."""
    data, schedule = recipe.data, recipe.schedule
    if data.crop and data.image_size and data.image_size < data.crop:
        raise InputError(
            f"data.image_size = {data.image_size}: smaller than data.crop = {data.crop}; "
            "a crop must fit into the picture"
        )
    if schedule.decay == "multi-step" and list(schedule.milestones) != sorted(schedule.milestones):
        raise InputError(f"schedule.milestones = {list(schedule.milestones)}: must ascend")
