"""A study: steps of one recipe on several numbers of nodes, in a folder that grows point by point.

`points/NODES.json` holds what was measured on so many nodes, and has one writer: the job for that
number. `study.json` is all of them in one, written anew after each point.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import msgspec
from msgspec import Meta

from knl.errors import FailedError, InputError
from knl.files import replace_file
from knl.scaling.breakdown import PARTS

STUDY = "study.json"
_ONE_OF_A_STUDY = ("recipe", "recipe_toml", "scaling", "cores_per_rank")
WORDS = {
    "baseline": "the fewest nodes that were measured; all else is compared with it",
    "speed-up": "images/s over the baseline's images/s",
    "ideal": "a speed-up of as many times as there are nodes of the baseline",
    "efficiency": "speed-up over ideal: 100 % where a node does as much as one of the baseline",
    "weak scaling": "each node has the same number of images, so the global batch grows",
    "strong scaling": "the global batch stays, so each node has fewer images",
}

_Positive = Annotated[int, Meta(ge=1)]
_Seconds = Annotated[float, Meta(ge=0)]


class Tensor(msgspec.Struct, frozen=True):
    """The gradient of one parameter."""

    name: str
    bytes: _Positive


class ReadyBucket(msgspec.Struct, frozen=True):
    """Gradients that are summed together. `ready_s`: after the begin of backward, when the last of
    them was there."""

    index: int
    bytes: _Positive
    ready_s: _Seconds


class StepTimes(msgspec.Struct, frozen=True):
    """Seconds of the measured steps, each until its slowest rank was done."""

    median: _Seconds
    p05: _Seconds
    p95: _Seconds
    all: tuple[_Seconds, ...]


class RankTimes(msgspec.Struct, frozen=True):
    """Median seconds of one rank in each part of a step."""

    rank: int
    host: str
    compute: _Seconds
    exposed_sync: _Seconds
    straggler: _Seconds
    lars: _Seconds
    data: _Seconds


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. `failed`: why there are no numbers; `breakdown`: seconds of each of
    knl.scaling.breakdown.PARTS."""

    nodes: _Positive
    ranks_per_node: _Positive
    ranks: _Positive
    lanes: _Positive
    lane_batch: _Positive
    global_batch: _Positive
    repetition: Annotated[int, Meta(ge=0)]
    steps: _Positive
    warmup: Annotated[int, Meta(ge=0)]
    step_s: Optional[StepTimes] = None
    images_per_s: Optional[Annotated[float, Meta(gt=0)]] = None
    breakdown: Optional[dict[str, _Seconds]] = None
    per_rank: tuple[RankTimes, ...] = ()
    failed: Optional[str] = None


class Study(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one recipe. `cores_per_rank`: where ranks of one machine stand for
    nodes, the cores that each has to itself (0: they take turns on all of them); None on nodes of
    a cluster. `forward_s`, `backward_s`: of one lane, by rank 0 of the baseline, from which
    `tensors` and `buckets` are, too, in the order of backward; `parameters`: how many weights;
    `samples`: of the training set."""

    schema: Literal[1] = 1
    recipe: str
    recipe_toml: str
    site: Optional[str]
    scaling: Literal["weak", "strong"]
    hardware: dict[str, Any]
    stack: dict[str, str]
    cores_per_rank: Optional[int] = None
    parameters: int = 0
    samples: int = 0
    tensors: tuple[Tensor, ...] = ()
    buckets: tuple[ReadyBucket, ...] = ()
    forward_s: _Seconds = 0.0
    backward_s: _Seconds = 0.0
    points: tuple[Point, ...] = ()


class Row(msgspec.Struct, frozen=True):
    """One number of nodes: its middle repetition (of an even number, the faster of the two in the
    middle), and the least and the greatest images/s of all. `speed_up`, `ideal`, `efficiency`: see
    WORDS."""

    nodes: int
    ranks: int
    global_batch: int
    repetitions: int
    step_s: float
    images_per_s: float
    images_per_s_low: float
    images_per_s_high: float
    speed_up: float
    ideal: float
    efficiency: float
    breakdown: dict[str, float]


def point_file(folder: Path, nodes: int) -> Path:
    """Where the job for so many nodes writes."""
    return folder / "points" / f"{nodes}.json"


def save_study(path: Path, study: Study) -> None:
    """Write it whole or not at all. Raises FailedError when the place cannot be written."""
    content = json.dumps(msgspec.to_builtins(study), indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise FailedError(f"{path} cannot be written: {error.strerror}") from None


def load_study(path: Path) -> Study:
    """One file of a study. Raises InputError, in one line, where it is missing, damaged or
    contradicts itself."""
    try:
        study = msgspec.json.decode(path.read_bytes(), type=Study)
    except OSError as error:
        raise InputError(f"study {path}: {error.strerror}; knl scale run makes one") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"study {path}: {error}; measure it anew with knl scale run") from None
    seen: set[tuple[int, int]] = set()
    for point in study.points:
        where = f"study {path}: the point of {point.nodes} node(s), repetition {point.repetition}"
        if problem := _contradiction(point):
            raise InputError(f"{where}: {problem}; measure it anew with knl scale run")
        if (point.nodes, point.repetition) in seen:
            raise InputError(f"{where}: is there twice; remove one of them")
        seen.add((point.nodes, point.repetition))
    return study


def _contradiction(point: Point) -> str:
    if point.ranks != point.nodes * point.ranks_per_node:
        return f"ranks = {point.ranks}: must be nodes x ranks_per_node"
    if point.global_batch != point.lanes * point.lane_batch:
        return f"global_batch = {point.global_batch}: must be lanes x lane_batch"
    if point.failed is not None:
        return ""
    if point.step_s is None or point.images_per_s is None or point.breakdown is None:
        return "step_s, images_per_s and breakdown must be there, or failed must say why not"
    if missing := [part for part in PARTS if part not in point.breakdown]:
        return f"breakdown has no {', '.join(missing)}"
    if not math.isclose(point.images_per_s * point.step_s.median, point.global_batch, rel_tol=0.01):
        return f"images_per_s = {point.images_per_s:g}: must be global_batch over step_s.median"
    return ""


def read_folder(folder: Path) -> Study:
    """All that was measured in a folder, in one. Raises InputError where there is nothing, or where
    its parts are of different studies."""
    files = sorted((folder / "points").glob("*.json"), key=lambda path: path.name)
    if not files:
        return load_study(folder / STUDY)
    parts = [load_study(path) for path in files]
    for path, part in zip(files, parts):
        require_same(parts[0], part, path)
    parts.sort(key=lambda part: min((p.nodes for p in part.points), default=math.inf))
    first = next((part for part in parts if part.tensors), parts[0])
    points = sorted(
        (point for part in parts for point in part.points), key=lambda p: (p.nodes, p.repetition)
    )
    return msgspec.structs.replace(first, points=tuple(points))


def require_same(study: Study, other: Study, path: Path) -> None:
    """Raise InputError where another study is in the folder already."""
    for key in _ONE_OF_A_STUDY:
        old, new = getattr(other, key), getattr(study, key)
        if old != new:
            shown = f"{key} differs" if key == "recipe_toml" else f"{key} = {old!r}, not {new!r}"
            same = "the same --ranks, or " if key == "cores_per_rank" else ""
            raise InputError(f"{path} is of another study ({shown}): give {same}another --out")


def rows_of(study: Study) -> list[Row]:
    """One row a number of nodes, fewest first: points that failed are left out."""
    by_nodes: dict[int, list[Point]] = {}
    for point in study.points:
        if point.failed is None:
            by_nodes.setdefault(point.nodes, []).append(point)
    rows: list[Row] = []
    for nodes, points in sorted(by_nodes.items()):
        points.sort(key=lambda point: -(point.images_per_s or 0.0))
        middle = points[(len(points) - 1) // 2]
        speed = middle.images_per_s or 0.0
        first_speed = rows[0].images_per_s if rows else speed
        ideal = nodes / rows[0].nodes if rows else 1.0
        rows.append(
            Row(
                nodes=nodes,
                ranks=middle.ranks,
                global_batch=middle.global_batch,
                repetitions=len(points),
                step_s=middle.global_batch / speed,
                images_per_s=speed,
                images_per_s_low=points[-1].images_per_s or 0.0,
                images_per_s_high=points[0].images_per_s or 0.0,
                speed_up=speed / first_speed,
                ideal=ideal,
                efficiency=speed / first_speed / ideal,
                breakdown=middle.breakdown or {},
            )
        )
    return rows


def point_of(study: Study, row: Row) -> Point:
    """The repetition that a row is."""
    points = (p for p in study.points if p.nodes == row.nodes and not p.failed)
    return next(p for p in points if p.images_per_s == row.images_per_s)
